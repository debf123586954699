"""What a checkpoint is: every format in and out, as one canonical set of lazy tensors.

A reader maps a format to canonical names (`parameters.py` is the table), a writer maps them back.

    open.py          `open_checkpoint`: which format a path holds, and its reader
    convert.py       one checkpoint into another format or other parallel sizes
    config.py        `ModelConfig`: everything that decides the function
    parameters.py    THE TABLE: each parameter, its shape, how tensor parallelism cuts it
    lazy.py          tensors that are read late; dtypes.py, errors.py beside them
    checkpoint.py    `Checkpoint` and `Provenance`, which readers return
    tokenizer.py     what a tokenizer folder says, for scoring and for conversion
    catalog.py       the public checkpoints that we know (catalog/)
    files/           kinds of files      megatron/, huggingface/    layouts of checkpoints
    samples/         the small checkpoints and texts that ship

A new format is a reader in its own room that returns a `Checkpoint`, called from `open.py`, and
a writer, called from `convert.py`. Any room may import from here; nothing here imports the model or
a process group, so that opening, converting and resharding run on a laptop. Import names from the
modules: this file imports nothing, so that one reader does not bring all of them.
"""
