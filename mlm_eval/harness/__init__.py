"""lm-evaluation-harness on our engine: the model class, and its command line with that class in it.

    model.py   `MegatronLM`      command.py   `mlm-eval harness`      hub_encoding.py   its tokens

Imports `reporting`, `engine`, `ranks` and `mlm_eval.checkpoints`; lm_eval is an optional extra.
"""
