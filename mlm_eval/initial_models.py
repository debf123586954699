"""Models before their training: a new head on a trained encoder, and whole new models of a named size."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig, apply_overrides
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Computed, LazyTensor
from mlm_eval.checkpoints.parameters import parameters

TASK_HEADS = ("multichoice_head", "classification_head", "qa_head")

DIVISIBLE_BY = 128
"""A new model's vocabulary is padded to a multiple of this, whatever the layout of its training."""

# Name: layers, hidden size, heads. The paper's (Tables 1, 2 and 4), then smaller ones.
_GPT_SIZES = {
    "gpt2-355m": (24, 1024, 16),
    "gpt2-2.5b": (54, 1920, 24 - 4),
    "gpt2-8.3b": (72, 3072, 24),
    "gpt2-1.2b-scaling": (40, 1536, 16),
    "gpt2-2.5b-scaling": (54, 1920, 20),
    "gpt2-4.2b-scaling": (64, 2304, 24),
    "gpt2-8.3b-scaling": (72, 3072, 32),
    "gpt2-124m": (12, 768, 12),
    "gpt2-tiny": (4, 128, 4),
}
_BERT_SIZES = {
    "bert-336m": (24, 1024, 16),
    "bert-1.3b": (24, 2048, 32),
    "bert-3.9b": (48, 2560, 40),
    "bert-base": (12, 768, 12),
    "bert-mini": (4, 256, 4),
    "bert-tiny": (2, 128, 2),
}
