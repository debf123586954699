"""The trainer that fine-tuning and language modelling share. It knows no benchmark.

    settings.py       hyperparameters and settings of a run, once each
    loop.py           the run: steps, evaluations, saving, stopping
    step.py           one step: micro-batches, gradient norm, update
    data.py           which samples a step takes, and their batches
    objectives.py     losses
    optimization.py   AdamW, the learning rate, clipping, the loss scale
    replicas.py       DDP and FSDP2 over data-parallel ranks
    state.py          what resuming needs, for any layout
    series.py         checkpoints that a run keeps on its way
    log.py            metrics.jsonl, TensorBoard, the plot
    trackers.py       TensorBoard, wandb, Trackio and MLflow behind one interface

This room imports `engine`, `ranks`, `model` and `mlm_eval.checkpoints`.
"""
