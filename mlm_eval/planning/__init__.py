"""What a run will need, and how fast the machine is.

`plan` computes memory, operations and time from a model's settings, `plan_text` prints them.
`bench_options` says how a speed is measured and imports no torch; `bench_study` says what is
measured, which is a series of models at tensor-parallel sizes, and whether it fits; `bench_run`
measures one of them on its ranks; `bench_report` and `bench_plot` compare and show the results.

Imports `reporting`, `training`, `engine`, `ranks`, `model` and `mlm_eval.checkpoints`. The figures
of the paper and the work of each benchmark come from the tasks, handed in by the command line.
"""
