"""The loader: every checkpoint format in and out, as one canonical set of lazy tensors.

A reader maps a format to canonical names (`parameters.py` is the table), a writer maps them
back. Nothing here imports the model or starts a process group, so that opening, converting and
resharding run on a laptop. Import names from the modules; this file stays empty so that the
import of one reader does not bring all of them.
"""
