"""A loaded model at work: scoring, encoding, generating, comparing. No training, no benchmarks.

    engine.py     `Engine`: this rank's shard in memory       batching.py   THE ONE LOOP: pack, deal,
    encode.py     BERT's states and heads for whole inputs                  run, join
    generate.py   text, token by token                        resume.py     scores of a stopped run
    verify.py     two checkpoints by their logits

Imports `ranks`, `model` and `mlm_eval.checkpoints`.
"""
