"""Benchmarks that a BERT is fine-tuned for, by the paper's recipes.

    task.py          `Task`: what the benchmarks have in common, and the list of them
    race.py          RACE            glue.py   MNLI and QQP            squad.py   SQuAD 1.1 and 2.0
    features.py      pairs of texts as rows of BERT
    spans.py         windows of long passages as rows, scores of their tokens -> best answers
    metrics.py       figures: plain functions, and one module for `evaluate`
    settings.py      recipes: hyperparameters, a TOML file a task and size in recipes/; options
    data.py          features made on rank 0, for all ranks
    run.py           a fine-tuning, from data to record
    figures.py       figures of runs, and their medians over seeds
    predictions.py   saved predictions, and ensembles of them

To add one: a subclass of `Task` in a file of its own, its line in the list of `task.py`, recipes.
This room imports `tasks.data` and `mlm_eval` without the command line.
"""
