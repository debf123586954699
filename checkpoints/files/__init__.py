"""Kinds of files, whatever they hold: read without running anything, written whole or not at all.

    safe_pickle.py        the unpickler that runs nothing
    torch_file.py         what `torch.save` writes, read lazily and written as a stream
    safetensors_file.py   safetensors       distcp.py       torch.distributed.checkpoint's folders
    zip_archive.py        published zips    output.py       atomic files and folders, the cache root

Imports `errors`, `lazy` and `dtypes` of this folder's parent; the layouts (`megatron/`,
`huggingface/`) import from here.
"""
