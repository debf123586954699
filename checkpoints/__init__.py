"""What a checkpoint is: every format in and out, as one canonical set of lazy tensors.

A reader maps a format to canonical names, a writer maps them back. Everything here runs on a
laptop: no model, no process group.

    open.py         `open_checkpoint`: detects the format and calls its reader
    convert.py      `convert`: writes a checkpoint in another format or for other parallel sizes
    comparison.py   `Comparison`: what two models differ in, and the verdict
    parameters.py   THE TABLE: each parameter, its shape, and how tensor parallelism cuts it
    config.py       `ModelConfig`: every setting that decides what the model computes
    checkpoint.py   `Checkpoint` and `Provenance`, which readers return
    lazy.py         tensors that know their shape and read a slice when asked
    vocabulary.py   a checkpoint with more or fewer rows of vocabulary
    tokenizer.py    text to ids, by the rules of a tokenizer folder
    dtypes.py       dtypes without torch, what `auto` means, a cast that refuses to overflow
    catalog.py      public checkpoints, one TOML file each in catalog/
    errors.py       `InputError`: what is wrong with the user's input
    files/          kinds of files, whatever they hold: pickles, safetensors, .distcp, zarr
    archives/       checkpoints that come as one file: zip, tar
    hub/            hf:// addresses: repositories of the Hugging Face hub, fetched and pushed to
    folders/        folders that are written to: whose they are, and what may be removed
    memory/         bytes: sizes as people write them, the memory of this machine
    soundness/      whether weights are what was saved
    tokenizers/     added tokens, BERT's word pieces, what stands beside a vocabulary
    projects/       settings that other projects write beside Megatron's weights
    megatron/       the layouts of Megatron-LM                samples/   what ships
    deepspeed/      gpt-neox's and Megatron-DeepSpeed's folders
    huggingface/    the layouts of Hugging Face

To add a format: a room beside `megatron/` with a reader that returns a `Checkpoint`, called from
`open.py`, and a writer, called from `convert.py`. Everyone may import from here; nothing here
imports from the rest of `mlm_eval`. Import from the modules: this file imports nothing, so that
one reader does not load all of them.
"""
