"""Folders that are written to: whose they are, and what may be removed.

    file_names.py         names of files that come from a file
    checkpoint_files.py   the files of a checkpoint, which `--overwrite` may remove
    locks.py              one writer at a time
    unfinished.py         what this process is writing, removed when it ends early
    kept_scores.py        what a run keeps beside its output, and when that is over

Every room may import from here. This room imports `errors` of `checkpoints`.
"""
