"""Train the sample that ships with mlm-eval: a small GPT and its tokenizer, in Megatron's layout.

The text is what `sample_corpus.py` builds from this Python; the model is the package's own, written
as two tensor-parallel ranks in half precision. With the same seed, Python, library versions and
number of threads a run repeats itself. A quarter of an hour on one core:

    OMP_NUM_THREADS=1 python scripts/train_sample.py --output build/sample-gpt
    mlm-eval wikitext103 --ckpt build/sample-gpt --data checkpoints/samples/text/wiki.sample.tokens
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.gpt import GPT

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
    vocab_size=math.ceil(VOCAB_ENTRIES / (DIVISIBLE_BY * TENSOR_PARALLEL))
    * DIVISIBLE_BY
    * TENSOR_PARALLEL,
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
    merges = (
        folder / "merges.txt"
    )  # the library signs the first line; GPT-2's has the version alone
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


def windows(tokens: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches `[batch, positions + 1]` for ever.

    Each pass over the text cuts it into windows from another offset and takes them in random order;
    a window's last token is the next one's first, so that every token is predicted once a pass.
    """
    length = CONFIG.max_position_embeddings
    waiting: list[Tensor] = []
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        cut = tokens[offset:].unfold(0, length + 1, length)  # [windows, positions + 1]
        waiting += cut[torch.randperm(len(cut), generator=generator)].unbind()
        while len(waiting) >= batch:
            yield torch.stack(waiting[:batch])
            del waiting[:batch]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine to a fiftieth of the peak."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: GPT, tokens: Tensor, *, steps: int, batch: int, peak: float, seed: int
) -> list[float]:
    """Train the model in place; return the loss of each step, in nats per token.

    The softmax runs over the padded vocabulary, as in Megatron.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # biases and norms: no decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
    )
    batches = windows(tokens, batch, torch.Generator().manual_seed(seed))
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        window = next(batches)
        states = model(window[:, :-1])  # [B, T, h]
        logits = F.linear(states, model.output_table)  # [B, T, V]
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            seconds = time.perf_counter() - started
            print(f"step {step + 1}/{steps}: loss {recent:.4f}, {seconds:.0f} s", flush=True)
    return losses


def megatron_args(steps: int, batch: int, peak: float, seed: int) -> dict[str, Any]:
    """What Megatron (v2.5 to 23.06) would have stored of this run in its `args`."""
    return {
        "num_layers": CONFIG.num_layers,
        "hidden_size": CONFIG.hidden_size,
        "ffn_hidden_size": CONFIG.ffn_hidden_size,
        "num_attention_heads": CONFIG.num_attention_heads,
        "kv_channels": CONFIG.kv_channels,
        "max_position_embeddings": CONFIG.max_position_embeddings,
        "seq_length": CONFIG.max_position_embeddings,
        "encoder_seq_length": CONFIG.max_position_embeddings,
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "padded_vocab_size": CONFIG.vocab_size,
        "tokenizer_type": "GPT2BPETokenizer",
        "vocab_file": "tokenizer/vocab.json",
        "merge_file": "tokenizer/merges.txt",
        "layernorm_epsilon": CONFIG.layernorm_epsilon,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": False,
        "attention_softmax_in_fp32": False,
        "openai_gelu": False,
        "onnx_safe": None,
        "bias_gelu_fusion": True,
        "hidden_dropout": CONFIG.hidden_dropout,
        "attention_dropout": CONFIG.attention_dropout,
        "init_method_std": CONFIG.init_method_std,
        "fp16": True,
        "bf16": False,
        "params_dtype": torch.float16,
        "tensor_model_parallel_size": TENSOR_PARALLEL,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "data_parallel_size": 1,
        "world_size": TENSOR_PARALLEL,
        "micro_batch_size": batch,
        "global_batch_size": batch,
        "train_iters": steps,
        "iteration": steps,
        "lr": peak,
        "min_lr": 0.02 * peak,
        "lr_decay_style": "cosine",
        "lr_warmup_fraction": 0.05,
        "optimizer": "adam",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-08,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "seed": seed,
    }
