"""The trainer that fine-tuning and language modelling share; it knows no benchmark.

    settings.py       hyper-parameters and run settings, once each    loop.py    the run
    objectives.py     losses                                           step.py    one step
    optimization.py   AdamW, schedule, clipping, loss scale            state.py   resuming
    data.py           which samples a step takes                       log.py     what a run leaves
    replicas.py       DDP and FSDP2

Imports `engine`, `ranks`, `model` and `mlm_eval.checkpoints`.
"""
