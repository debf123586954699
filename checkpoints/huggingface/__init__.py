"""Hugging Face folders, both ways. A family is a table that is read in either direction.

    families/      THE TABLES: parameter names and config.json keys of each family
    quantized/     weights of few bits, dequantised while they are read
    layers/        layers that differ: the kinds of a hybrid's, heads of multi-token prediction
    fields.py      what a key of config.json does; the keys that families share
    layout.py      how a family's tensors pack a canonical parameter
    t5.py          what T5 says otherwise than the others, both ways
    folds.py       gains and rotary pairs from one form to the other
    config.py      config.json <-> `ModelConfig`
    windows.py     layers that attend within a window, and their rotary base
    experts.py     experts and latents of config.json, and which class has a mixture
    reader.py      the builder that collects the settings of a config.json
    read.py        a folder -> `Checkpoint`
    plan.py        which class a model becomes, what changes form, what is refused
    write.py       `Checkpoint` -> a folder that plain `from_pretrained` loads
    tokenizer.py   the tokenizer files of such a folder

`open.py` and `convert.py` import from here. This room imports `files/` and the modules of
`checkpoints`, never `megatron/`. transformers is not needed.
"""
