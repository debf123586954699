"""Commands that read sequences and write JSON lines, a line for each.

    score.py            score
    generate.py         generate
    standard_input.py   `--input -`: what rank 0 reads there, for all ranks

No other room imports these files; `app.py` names them.
"""
