"""What Megatron's own tokenizers make of a vocabulary: the name of their type, and their entries.

Megatron saves `tokenizer_type` and refuses a checkpoint that was saved with another one; the size
of its vocabulary follows from the entries of its tokenizer, which are not always those of the
files.
Source: docs/megatron.md, "Arguments", "Vocabulary padding".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.checkpoints.tokenizers.wordpiece import lower_cases

LEGACY_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer")
"""The types that Megatron v2.5 knows."""

_BERT_TYPES = LEGACY_TYPES[:2]
_ADDED_TO_BERT = ("[BOS]", "[EOS]")
_MOST_EXTRA_IDS = 10_000  # T5 has 100; more is damage


def tokenizer_type(tokenizer: Tokenizer) -> str:
    """Return Megatron's name for a kind of tokenizer.

    A tokenizer.json has the type of the vocabulary that it was made from where its rules are those
    of BERT or GPT-2; others are for Megatron's wrapper of Hugging Face's tokenizers. A
    sentencepiece model gets the type that Megatron's own converter from Llama writes.
    """
    if tokenizer.kind == "sentencepiece":
        return "Llama2Tokenizer"
    if tokenizer.kind == "gpt2-bpe":
        return "GPT2BPETokenizer"
    if tokenizer.kind == "bert-wordpiece":
        return _BERT_TYPES[not tokenizer.lower_case]
    rules = json.loads(tokenizer.backend.to_str())
    splitter = rules.get("pre_tokenizer") or {}
    lower_case = lower_cases(rules)
    if lower_case is not None:
        return _BERT_TYPES[not lower_case]
    if rules["model"]["type"] == "BPE" and splitter.get("type") == "ByteLevel":
        # Its default regex is GPT-2's; other models come with one of their own.
        return "GPT2BPETokenizer" if splitter.get("use_regex", True) else "HuggingFaceTokenizer"
    return "HuggingFaceTokenizer"


def added_entries(tokenizer: Tokenizer, args: Mapping[str, Any]) -> int:
    """Return how many entries Megatron's tokenizer has beyond those of the vocabulary.

    Since April 2021 (48a5e0daeb, in v2.5) those of BERT have `[BOS]` and `[EOS]` at their end, and
    as many `<extra_id_0>` as the args' `vocab_extra_ids` says.
    """
    if tokenizer_type(tokenizer) not in _BERT_TYPES:
        return 0
    extra = args.get("vocab_extra_ids")
    if not isinstance(extra, int) or not 0 <= extra <= _MOST_EXTRA_IDS:
        extra = 0
    pieces = [*_ADDED_TO_BERT, *(f"<extra_id_{i}>" for i in range(extra))]
    return sum(tokenizer.piece_id(piece) is None for piece in pieces)


def with_tokenizer_type(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Checkpoint:
    """Return a checkpoint whose args say the type of its tokenizer; what they say already stays."""
    source = checkpoint.provenance
    if source.args.get("tokenizer_type") is not None:
        return checkpoint
    args = {**source.args, "tokenizer_type": tokenizer_type(tokenizer)}
    return dataclasses.replace(checkpoint, provenance=dataclasses.replace(source, args=args))
