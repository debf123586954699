"""Weights that are stored in few bits, dequantised while they are read.

    mxfp4.py   gpt-oss' experts as published: 4 bits a value, one scale for 32 of them

`read.py` imports from here. This room imports `lazy` and `errors` of `checkpoints`.
"""
