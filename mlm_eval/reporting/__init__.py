"""What a run found, for machines and for people.

    results.py   the record that every task returns, and its JSON; imports no torch
    record.schema.json  the record's fields, as a JSON schema (draft 2020-12)
    environment.py  when, where and by what command a record was made
    series_list.py  the list of a series: each checkpoint with its iteration and its record
    existing.py  whether a file that is in the way is a result, and of how many data
    text.py      the tables and sentences that commands print
    tables.py    the types of the paper's tables, with measured rows among the published ones
    curves.py    figures over training, as a picture or in the page
    render.py    such tables as Markdown, LaTeX, CSV or HTML, through templates/
    plots.py     their plots

What is compared with what is decided in `mlm_eval.tasks.paper`. Planning, harness, tasks and the
command line import from here; this room imports `mlm_eval` below it and never the tasks.
"""
