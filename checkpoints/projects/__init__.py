"""Checkpoints that other projects write in Megatron's formats: where their settings stand.

    settings.py   Megatron-Bridge, NeMo 2 and verl: files beside the weights -> Megatron's args
    gemma.py      what their Gemma classes compute beyond the fields of their settings

`megatron/` and `open.py` import from here. This room imports `errors` and `files` of `checkpoints`.
"""
