"""Megatron-LM's own layouts: names, arguments and files of every era since 2019, both ways.

    names.py         parameter names of every era -> canonical names; what is refused by name
    args.py          saved arguments <-> `ModelConfig`, both directions of one table
    files.py         which rank files there are, and what must agree in all of them
    read_torch.py, write_torch.py    the `torch` format: tensor x pipeline ranks
    read_dist.py, write_dist.py      `torch_dist` and its relatives

What the formats are: docs/megatron.md. Imports `files/` and the modules of `checkpoints`; only
`open.py` and `convert.py` import from here.
"""
