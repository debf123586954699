"""Where texts and data sets come from, for every task.

    sources.py   what `--data` names: a file, a folder, a set of the `datasets` library
    text.py      fields of JSON objects; errors name file and line
    tokens.py    texts tokenized once and kept

The other rooms of `tasks` import from here; this room imports from `mlm_eval.checkpoints` only.
"""
