"""Layers that differ from one another, between config.json and `ModelConfig`.

    hybrids.py    which layers have Mamba-2, attention, an MLP or experts

Only the files of `huggingface/` import from here. This room imports its reader and its families.
"""
