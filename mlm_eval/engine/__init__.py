"""A loaded model at work: scoring, encoding, generating, comparing. No training, no benchmarks.

    engine.py               `Engine`: this rank's shard of a model in memory
    batching.py             THE ONE LOOP: items packed by length, dealt to the ranks, run, joined
    score.py                GPT's and T5's log-probabilities of requests
    encode.py               BERT's states, masked-LM scores and head outputs of whole inputs
    generate.py             text, token by token
    prompts.py              what is continued, how tokens are chosen, what became of it
    products.py             float32 on the CPU by the faster library, where it is as exact
    resume.py               scores of an interrupted run
    verify.py               two checkpoints compared: settings, weights and outputs
    weights.py              every element of two checkpoints' weights, in one form
    plain_transformers.py   a converted folder run by transformers alone, in its own process

This room imports `ranks`, `model` and `mlm_eval.checkpoints`.
"""
