"""Who the ranks are: how they start, how they are laid out, what they say outside the model.

    world.py         this process's place: torchrun, Slurm, or ranks that we started
    launch.py        starts ranks, waits for them, reports the first cause of a failure
    causes.py        the first cause of a failure, for ranks without a parent of ours
    signals.py       what signals do: a process ends and leaves nothing unfinished
    streams.py       stdout and stderr that every text can be written to
    faults.py        lack of memory, full disks, lost ranks, named as such
    mesh.py          the layout dp x tp of the running ranks, kept as a DeviceMesh
    groups.py        makes that mesh: process groups, memory
    layout.py        which layout fits the free memory, and which GPU each rank gets
    shared_memory.py sums through memory that the ranks of a machine share
    collectives.py   gather, broadcast, sum, barrier: every collective that is not the model's

This room imports `model` and `mlm_eval.checkpoints`; everyone above may import from here.
"""
