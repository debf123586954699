"""Checkpoints that come as one file.

    zip_archive.py   published zip archives (NVIDIA's NGC), unpacked once
    tar_archive.py   tar archives (NeMo's .nemo): files are read where they stand in the archive
    unpacking.py     where archives are unpacked that cannot be read where they are

`open.py` and `tokenizers` import from here; so does RACE, whose passages come in tar archives.
This room imports `errors`, `files` and `folders` of `checkpoints`.
"""
