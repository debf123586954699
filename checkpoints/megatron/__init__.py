"""Megatron-LM's own formats, of every version since 2019, both ways. They are in docs/megatron.md.

    names.py        parameter names of every version -> canonical names; what is refused by name
    fields.py       every saved argument: read, refused, or without effect on the function, and why
    args.py         saved arguments <-> `ModelConfig`
    family_args.py  the same of newer layers: experts, latent attention, windows, YaRN
    layers/         layers that differ in what they consist of: hybrids, heterogeneous layers
    iteration.py    the folders below a root, and the file that names the latest
    relatives.py    layouts of other projects, refused by name
    files.py        the files of the `torch` format, what must agree in all of them, and where
                    their experts stand
    read_torch.py   the `torch` format, one file for each tensor and pipeline rank
    write_torch.py
    read_dist.py    `torch_dist` and its relatives, whole tensors in .distcp files
    write_dist.py
    layout.py       names, parallel sizes and rows for both writers

`open.py`, `convert.py` and what stands above `checkpoints` may import from here. This room imports
`files/` and the modules of `checkpoints`, never `huggingface/`.
"""
