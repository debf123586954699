"""Layers that differ from one another, between a folder and a `Checkpoint`.

    hybrids.py       which layers have Mamba-2, attention, an MLP or experts
    prediction.py    heads of multi-token prediction, layers behind a model's own

Only the files of `huggingface/` import from here. This room imports its reader and its families.
"""
