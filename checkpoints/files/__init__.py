"""Kinds of files, whatever they hold: read without running anything, written whole or not at all.

    safe_pickle.py        the unpickler that runs nothing
    torch_file.py         reads what `torch.save` wrote, lazily
    torch_save.py         writes what `torch.save` writes, one tensor at a time
    safetensors_file.py   reads and writes safetensors
    zarr_arrays.py        reads folders of zarr arrays
    distcp.py             reads the folders of torch.distributed.checkpoint
    state_dict.py         wrappers' prefixes; tensors of kinds that are not read, by name
    window.py             a byte range of a file as a file
    text_file.py          text and JSON: byte order marks, line ends, encodings
    stand_in.py           names what lies in the place of a file: Git LFS pointers, pages
    output.py             files and folders that appear whole; the cache folder

`megatron/` and `huggingface/` import from here. This room imports `errors`, `lazy` and `dtypes` of
`checkpoints`, and `folders/`.
"""
