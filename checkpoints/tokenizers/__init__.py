"""The rules of tokenizers, file by file: what `checkpoints/tokenizer.py` puts together.

    side_files.py   what stands beside a vocabulary: settings, added and special tokens
    fast_file.py    what a tokenizer.json may hold, before the library reads it
    wordpiece.py    BERT's word pieces, by every switch that a tokenizer_config.json may set
    added.py        tokens that were added to a vocabulary, read out of a text
    tokenizer_type.py   Megatron's name of a tokenizer's type, and what it adds to its entries
    begin_of_text.py    the token that begins a text, and whether a tokenizer puts it there
    copying.py      copies of these files beside a model

`checkpoints/tokenizer.py` and those who copy a tokenizer import from here; this room imports
`errors`, `files` and, for copies and types, `tokenizer` and `checkpoint`.
"""
