"""Where texts and data sets come from, for every task.

    sources.py   what `--data` names: a file, a folder, a set of the `datasets` library
    known.py     the files that the tasks want (files.toml), and whether a file is one of them
    tables.py    parquet and JSON-lines files, a file or a folder of them
    text.py      fields of JSON objects; errors name file and line
    tokens.py    texts tokenized once and kept

The other rooms of `tasks` import from here; this room imports from `mlm_eval.checkpoints` only.
"""
