"""Where texts and data sets come from, whatever the task.

    text.py      text and JSON, with faults named       sources.py   what --data names: files, sets
    tokens.py    texts tokenized once and kept

Imports `mlm_eval.checkpoints` only; the benchmarks' rooms import from here.
"""
