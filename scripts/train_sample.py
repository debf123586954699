"""Train the sample that ships with mlm-eval: a small GPT and its tokenizer, in Megatron's layout.

The text is what `sample_corpus.py` builds from this Python; the model is the package's own, written
as two tensor-parallel ranks in half precision. With the same seed, Python, library versions and
number of threads a run repeats itself. A quarter of an hour on one core:

    OMP_NUM_THREADS=1 python scripts/train_sample.py --output build/sample-gpt
    mlm-eval wikitext103 --ckpt build/sample-gpt --data checkpoints/samples/text/wiki.sample.tokens
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from sample_corpus import natural_text, sha256, training_articles
from torch import Tensor, nn
from torch.nn import functional as F

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.gpt import GPT
from mlm_eval.tokenizer import load_tokenizer

TENSOR_PARALLEL = 2
VOCAB_ENTRIES = 2000  # <|endoftext|>, the last one, included
END_OF_TEXT = "<|endoftext|>"
DIVISIBLE_BY = 128  # Megatron pads the vocabulary to a multiple of this, times the ranks

CONFIG = ModelConfig(
    family="gpt",
    num_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    ffn_hidden_size=512,
    vocab_size=math.ceil(VOCAB_ENTRIES / (DIVISIBLE_BY * TENSOR_PARALLEL)) * DIVISIBLE_BY * TENSOR_PARALLEL,
    max_position_embeddings=256,
    activation="gelu_tanh",  # what Megatron's fused bias-GELU computes
    params_dtype="float16",
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Write vocab.json and merges.txt of a byte-level BPE, `<|endoftext|>` last as in GPT-2."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCAB_ENTRIES - 1, show_progress=False)
    folder.mkdir(parents=True)
    bpe.save_model(str(folder))
    path = folder / "vocab.json"
    vocab: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(VOCAB_ENTRIES - 1)), len(vocab)
    vocab[END_OF_TEXT] = len(vocab)
    path.write_text(json.dumps(vocab), encoding="utf-8")
    merges = folder / "merges.txt"  # the library signs the first line; GPT-2's has the version alone
    lines = merges.read_text(encoding="utf-8").splitlines()
    merges.write_text("\n".join(["#version: 0.2", *lines[1:]]) + "\n", encoding="utf-8")


def initialise(model: GPT) -> None:
    """Megatron's initial weights: N(0, 0.02), less for what is added to the residual; see facts E.9."""
    std = CONFIG.init_method_std
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            nn.init.normal_(parameter, std=std / math.sqrt(2 * CONFIG.num_layers))
        else:
            nn.init.normal_(parameter, std=std)
