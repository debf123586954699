"""Masked and causal language modelling on text files: `mlm` and `lm`.

    data.py          texts -> samples: sentences packed, tokens masked, rows cut
    settings.py      which text, and how it becomes samples
    pretraining.py   a run, from text to record

This room imports `tasks.data` and `mlm_eval` without the command line.
"""
