"""Who the ranks are: how they start, what their layout is, and what they say outside the model.

    world.py         this process's place: torchrun, Slurm, or ranks of our own
    launch.py        starts ranks, ends with them, and tells the first cause of a failure
    mesh.py          the layout dp x tp: chosen, checked once, and kept as a DeviceMesh
    collectives.py   gather, broadcast, sum, barrier: every collective that is not the model's

Imports `mlm_eval.model` and `mlm_eval.checkpoints`.
"""
