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
import shutil
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

from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.lazy import InMemory
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.tokenizer import load_tokenizer
from mlm_eval.model.gpt import GPT

TENSOR_PARALLEL = 2
VOCAB_ENTRIES = 2000  # <|endoftext|>, the last one, included
END_OF_TEXT = "<|endoftext|>"
DIVISIBLE_BY = 128  # Megatron pads the vocabulary to a multiple of this, times the ranks
MULTIPLE = DIVISIBLE_BY * TENSOR_PARALLEL

STEPS = 3000
BATCH = 8  # windows of 256 tokens
LEARNING_RATE = 3e-3
MIN_LEARNING_RATE = 6e-5
WARM_UP = 0.05  # of the steps
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0

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
    """Megatron's initial weights: N(0, 0.02), less for what is added to the residual."""
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


def windows(tokens: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
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
        while len(waiting) >= BATCH:
            yield torch.stack(waiting[:BATCH])
            del waiting[:BATCH]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    swing = 0.5 * (1 + math.cos(math.pi * progress))
    return MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * swing


def train(model: GPT, tokens: Tensor, *, steps: int, seed: int) -> list[float]:
    """Train the model in place; return the loss of each step, in nats per token.

    The softmax runs over the padded vocabulary, as in Megatron.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # biases and norms: no decay
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=ADAM_BETAS,
    )
    batches = windows(tokens, torch.Generator().manual_seed(seed))
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        window = next(batches)  # [B, T + 1]
        logits = F.linear(model(window[:, :-1]), model.output_layer.table)  # [B, T, V]
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            seconds = time.perf_counter() - started
            print(f"step {step + 1}/{steps}: loss {recent:.4f}, {seconds:.0f} s", flush=True)
    return losses


def megatron_args(steps: int, seed: int) -> dict[str, Any]:
    """How the model was trained, under the names that Megatron keeps it by in a file's `args`."""
    return {
        "tokenizer_type": "GPT2BPETokenizer",
        "make_vocab_size_divisible_by": DIVISIBLE_BY,
        "seq_length": CONFIG.max_position_embeddings,
        "micro_batch_size": BATCH,
        "global_batch_size": BATCH,
        "train_iters": steps,
        "consumed_train_samples": steps * BATCH,
        "optimizer": "adam",
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "adam_eps": 1e-08,
        "lr": LEARNING_RATE,
        "min_lr": MIN_LEARNING_RATE,
        "lr_decay_style": "cosine",
        "lr_warmup_fraction": WARM_UP,
        "weight_decay": WEIGHT_DECAY,
        "clip_grad": CLIP,
        "seed": seed,
    }


def as_checkpoint(model: GPT, args: dict[str, Any], folder: Path) -> Checkpoint:
    """The trained model as the writer takes it; `args` are those of the training run."""
    tensors = {name: InMemory(tensor.detach()) for name, tensor in model.named_parameters()}
    provenance = Provenance(folder, "megatron-torch", iteration=args["train_iters"], args=args)
    return Checkpoint(CONFIG, tensors, provenance).check()


def main() -> None:
    """Train, and write the checkpoint, the tokenizer and a record of how they were made."""
    parser = argparse.ArgumentParser(description="Train the sample checkpoint.")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} is there already; remove it or choose another folder")
    started = time.process_time()
    torch.manual_seed(arguments.seed)

    texts = [natural_text(article) for article in training_articles()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tokenizer"
        train_tokenizer(texts, folder)
        tokenizer = load_tokenizer(directory=folder)
        assert tokenizer.eot_id == VOCAB_ENTRIES - 1
        pieces = [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts]
        tokens = torch.tensor([token for piece in pieces for token in piece])
        print(f"{len(texts)} articles, {len(tokens)} tokens", flush=True)

        model = GPT(CONFIG)
        initialise(model)
        losses = train(model, tokens, steps=arguments.steps, seed=arguments.seed)
        args = megatron_args(arguments.steps, arguments.seed)
        write_megatron_torch(
            as_checkpoint(model, args, arguments.output),
            arguments.output,
            tp=TENSOR_PARALLEL,
            dtype=torch.float16,
            names="legacy",
            true_vocab_size=VOCAB_ENTRIES,
        )
        shutil.copytree(folder, arguments.output / "tokenizer")
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "training_text_sha256": sha256("".join(texts)),
        "training_tokens": len(tokens),
        "steps": arguments.steps,
        "tokens_seen": arguments.steps * BATCH * CONFIG.max_position_embeddings,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "cpu_seconds": round(time.process_time() - started),
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
