"""The model is mathematics: GPT, BERT and T5 over tensor-parallel layers.

    tensor_parallel.py   THE PAPER'S SECTION 3: column-, row- and vocabulary-parallel layers, and
                         every collective of the model
    transformer.py       the transformer layer, top to bottom
    attention.py         self-attention, latent attention, rotary positions, the cache of generation
    mamba.py             Mamba-2 in the place of attention: convolution, scan, gated norm
    experts.py           a mixture of experts in the place of an MLP
    layers.py            norms, activations, the MLP; copies from the host without a wait
    gpt.py, bert.py      the two models around it, with their heads
    t5.py                the third: an encoder, and a decoder that looks at it
    dropout.py           masks that do not depend on the layout
    sizes.py             models known by name
    initial.py           new heads and new models
    costs/               floating-point operations of a pass, memory of a run on each rank

A new parallel layer goes into `tensor_parallel.py`. Everyone above may import from here; this room
imports from `mlm_eval.checkpoints` only, and knows nothing of files, tasks or how ranks start.
"""
