"""Checkpoints that other projects write in Megatron's formats: where their settings stand.

    settings.py   Megatron-Bridge, NeMo and verl: files beside the weights -> Megatron's args
    gemma.py      what their Gemma classes compute beyond the fields of their settings
    nemo_1.py     the folders and words of NeMo 1
    tokenizer_places.py   where they keep the tokenizer

`megatron/` and `open.py` import from here. This room imports `errors` and `files` of `checkpoints`.
"""
