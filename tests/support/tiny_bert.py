"""A BERT of a few thousand weights with its own vocabulary, for tests of fine-tuning."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, load_tokenizer
from mlm_eval.engine.engine import Engine
from support import random_models

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("the", "cat", "dog", "sat", "on", "mat", "who", "where", "is", "was", "in", "red")
LETTERS = string.ascii_lowercase + string.digits
PIECES = (*SPECIAL, *WORDS, *string.punctuation, *LETTERS, *(f"##{letter}" for letter in LETTERS))

PAD, UNK, CLS, SEP, MASK = range(5)


def ids(text: str) -> list[int]:
    """Return the ids of vocabulary entries written with spaces between them."""
    return [PIECES.index(piece) for piece in text.split()]


def write_vocabulary(folder: Path) -> Path:
    """Write the vocabulary: words, single letters, digits and punctuation; lower case."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


def tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of that vocabulary."""
    return load_tokenizer(vocab_file=write_vocabulary(folder))


def checkpoint(folder: Path, *, tp: int = 1, positions: int = 128, **changes: Any) -> Checkpoint:
    """Return a random BERT with both heads of pre-training, written in Megatron's format."""
    config = random_models.config(
        random_models.BERT,
        vocab_size=-(-len(PIECES) // 8) * 8,
        max_position_embeddings=positions,
        **changes,
    )
    write_megatron_torch(random_models.checkpoint(config), folder, tp=tp)
    return open_checkpoint(folder)


def load(source: Checkpoint, dtype: str) -> Engine:
    """Return an engine in one process: what `finetune` is given."""
    return Engine.load(source, dtype=dtype)
