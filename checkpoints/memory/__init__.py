"""Bytes: sizes as people write them, and the memory of this machine.

    byte_size.py   sizes such as 5GB
    host.py        what is free, and what this process keeps of what it has freed

Anyone may import from here; nothing here imports from other rooms.
"""
