"""Tokenizers of one id a byte that have a begin-of-text token, number 256."""

from __future__ import annotations

import json
from pathlib import Path

from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer


def tokenizer_json(folder: Path, *, begins: bool, **settings: object) -> Tokenizer:
    """Write a tokenizer.json whose rules put `<bos>` before a text, or do not."""
    from tokenizers import AddedToken, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken("<bos>", special=True)])
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            single=["<bos>", "$A"], special_tokens=[("<bos>", 256)]
        )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory=folder)
