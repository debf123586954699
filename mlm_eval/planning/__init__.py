"""Before and around a run: what it will need (`plan`), and how fast this machine is (`bench`).

Imports `reporting`, `training`, `engine`, `ranks`, `model` and `mlm_eval.checkpoints`.
"""
