"""Weights that are stored in few bits, dequantised while they are read.

    fp8.py     DeepSeek V3 as published: 8 bits a value, one scale for a block of a matrix
    mxfp4.py   gpt-oss' experts as published: 4 bits a value, one scale for 32 of them

`read.py` imports from here. This room imports `lazy` and `errors` of `checkpoints`.
"""
