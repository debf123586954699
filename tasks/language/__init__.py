"""Masked and causal language modelling on text: `mlm` and `lm`.

    data.py   from texts to samples: sentences packed, tokens hidden, windows cut
    pretraining.py   a run from text to record

Imports `tasks.data` and `mlm_eval` below the command line.
"""
