"""Layers that differ in what they consist of, between Megatron's args and tensors and a config.

    branches.py    which layers have attention, Mamba-2, an MLP or a matrix in its place, how wide

`args.py` and the readers and writers of the room above may import from here. This room imports the
modules of `checkpoints` only.
"""
