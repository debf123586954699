"""A small sentencepiece model, trained on texts that come with Python."""

from __future__ import annotations

from pathlib import Path

import pytest


def train_pieces(folder: Path, vocab_size: int, model_type: str = "bpe") -> Path:
    """Write `tokenizer.model` of so many pieces into a folder, and return its path.

    The test is skipped where sentencepiece is not installed.
    """
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    from pydoc_data.topics import topics

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(topics.values()).split("\n")),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type=model_type,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"
