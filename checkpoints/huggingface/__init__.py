"""Hugging Face folders, both ways: a family is a table, read in either direction.

    families.py   names and config fields of each family      layout.py   how tensors are packed
    config.py     config.json <-> `ModelConfig`               plan.py     what a folder will hold
    read.py       a folder -> `Checkpoint`                    write.py    `Checkpoint` -> a folder

Imports `files/` and the modules of `checkpoints`; only `open.py` and `convert.py` import from here.
transformers itself is not needed.
"""
