"""Commands that read sequences and write JSON lines, a line for each.

    score.py            score
    generate.py         generate
    standard_input.py   `--input -`: what rank 0 reads there, for all ranks

Rooms of the command line import from this one's files as from any other: not at all, but `app.py`
names them.
"""
