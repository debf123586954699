"""A series: checkpoints of one or more training runs, evaluated one after the other.

    iterations.py   the iterations below a root, those that are finished, and the choice among them
    names.py        the names of the records, unique and safe
    members.py      the checkpoints of a series, in order; how each is opened
    listing.py      the list of the records, kept up to date
    done.py         whether a record that is there is the one that this run would write
    prefetch.py     the next checkpoint's bytes, brought into the page cache

The loop itself is in `mlm_eval.cli.series`. This room imports `mlm_eval` below planning, and knows
neither tasks nor ranks.
"""
