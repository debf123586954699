"""The model is mathematics: GPT and BERT over tensor-parallel layers, nothing about files or tasks.

    tensor_parallel.py   THE PAPER'S SECTION 3: column-, row- and vocabulary-parallel layers, and
                         all collectives of the model; a new parallel layer goes here
    transformer.py       the layer, top to bottom      gpt.py, bert.py   the models around it
    dropout.py           masks that do not depend on the layout      kv_cache.py   generation
    sizes.py             sizes by name, new models and heads
    flops.py, memory.py  what a pass costs

Imports `mlm_eval.checkpoints` (the config and the table) only.
"""
