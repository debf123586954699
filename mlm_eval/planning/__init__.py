"""What a run will need, and how fast a machine is.

    plan.py            memory, FLOPs and time, computed from a model's settings: a record
    plan_text.py       that record as tables
    bench_options.py   how a speed is measured; imports no torch
    bench_study.py     what is measured: models at tensor-parallel sizes, and whether they fit
    bench_run.py       one of them measured on its ranks
    bench_report.py    efficiencies, what limits them, the record, the table
    bench_plot.py      the plot

This room imports `reporting`, `training`, `engine`, `ranks`, `model` and `mlm_eval.checkpoints`.
The paper's figures and the work of each benchmark come from the tasks, handed in by the command
line.
"""
