"""A loaded model at work: scoring, encoding, generating, comparing. No training, no benchmarks.

    engine.py     `Engine`: this rank's shard in memory
    batching.py   THE ONE LOOP: requests packed by length, dealt to the ranks, run, joined
    encode.py     BERT's states and heads for whole inputs
    generate.py   text, token by token
    resume.py     scores of an interrupted run
    verify.py     two checkpoints compared by their logits

Imports `ranks`, `model` and `mlm_eval.checkpoints`.
"""
