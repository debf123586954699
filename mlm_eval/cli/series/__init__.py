"""A series of checkpoints in one command: the ranks start once, and the text is tokenized once.

    evaluation.py   what a command does with each checkpoint of a series
    loop.py         the loop: choose, open, skip what is done, score, list; watch

The commands import from here; what a series is stands in `mlm_eval.series`.
"""
