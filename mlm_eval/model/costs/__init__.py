"""What a model costs, from its sizes alone.

    flops.py    floating-point operations of the passes that are really run
    memory.py   bytes on the rank that needs most, in evaluation and in training

Whoever may import from `mlm_eval.model` may import from here. This room imports from
`mlm_eval.checkpoints`, and from `mlm_eval.model` only constants of how its layers compute.
"""
