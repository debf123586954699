"""lm-evaluation-harness on our engine. The package lm_eval is an optional extra.

    model.py          `MegatronLM`, the model class that the harness calls
    command.py        the harness' own command line with that class in it
    hub_encoding.py   text to ids and back, as transformers does it

This room imports `reporting`, `engine`, `ranks`, `model` and `mlm_eval.checkpoints`.
"""
