"""Benchmarks that a BERT is fine-tuned for: RACE, MNLI, QQP, SQuAD; a new one is a `Task`.

    task.py       what a task is, and the list of them    race.py, glue.py, squad.py   the tasks
    features.py   rows of BERT                            spans.py     SQuAD's windows and answers
    run.py        a fine-tuning from data to record       metrics.py   figures, as `evaluate` module
    predictions.py   saved predictions and ensembles      recipes/     the paper's hyper-parameters

Imports `tasks.data` and `mlm_eval` below the command line.
"""
