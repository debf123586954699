"""What a run found, for machines and for people.

`results` is the record that every task returns; it imports no torch, so that a command which only
reads or writes records starts fast. `text` makes the tables that the commands print. `tables` holds
the types of the paper's tables with measured rows among the published ones, `plots` draws them and
`render` writes them as Markdown, LaTeX, CSV or HTML through `templates/`.

What is compared with what is decided in `mlm_eval.tasks.paper`. Nothing here imports the tasks;
planning, harness and tasks may import this room.
"""
