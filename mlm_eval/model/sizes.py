"""Models known by name: the paper's sizes (its Tables 1, 2 and 4) and a few small ones.

A name stands for layers, hidden size and heads (`initial_models.SIZES`); what the families have in
common and how a vocabulary is padded is added here.
"""

from __future__ import annotations

import dataclasses

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import num_parameters
from mlm_eval.model.initial import DIVISIBLE_BY, SIZES, initial_config

VOCABULARY = {"gpt": 50_257, "bert": 30_522}
"""Entries of GPT-2's byte-level BPE, and of BERT's uncased WordPiece vocabulary."""


def family_of(name: str) -> str:
    """Return `gpt` or `bert`.

    Raises:
        InputError: No model has this name.
    """
    if name not in SIZES:
        raise InputError(f"no model is called {name!r}; known are {', '.join(SIZES)}")
    return "gpt" if name.startswith("gpt") else "bert"


def named_config(name: str, *, tp: int = 1) -> ModelConfig:
    """Return the settings of a named model, its vocabulary padded as Megatron pads it for `tp`.

    That is to a multiple of 128 x tp: 50,304 rows of GPT-2 on one rank, 51,200 on eight.
    Source: docs/megatron.md, "Vocabulary padding".
    """
    family = family_of(name)
    config = initial_config(name, family=family, vocab_entries=VOCABULARY[family])
    multiple = DIVISIBLE_BY * tp
    rows = -(-VOCABULARY[family] // multiple) * multiple
    return dataclasses.replace(config, vocab_size=rows)


def paper_parameters(name: str) -> int:
    """Return a model's parameters as the paper counts them: tied embeddings once, no padding.

    A BERT is counted with its pooler and both of its heads.
    """
    config = dataclasses.replace(named_config(name), vocab_size=VOCABULARY[family_of(name)])
    return num_parameters(config)
