"""DeepSpeed's folders: gpt-neox and Megatron-DeepSpeed (BLOOM), a file a layer or a file a rank.

    folder.py     which files a step holds, and what is missing where ZeRO's parts are all there is
    read.py       `read_step`: the files as ranks of Megatron's `torch` format, merged as those are
    settings.py   gpt-neox's configs/*.yml: what each setting does, and the model's config
    harmless.py   settings of both projects that change nothing of the model, and unknown ones
    blocks.py     gpt-neox's layers: names, gates, query groups and biases as Megatron has them

`open.py` imports from here. This room imports `megatron/`, whose reader merges the ranks.
"""
