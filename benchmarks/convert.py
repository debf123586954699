"""Conversion to Hugging Face: time and memory against the way that loads everything.

A synthetic 345M fp16 checkpoint, tensor-parallel 2, is converted by `mlm-eval convert` and by the
usual script (torch.load of all ranks, build GPT2LMHeadModel, save_pretrained), in turns. Then a
1.3B one by `mlm-eval convert` alone. Exits with 1 when a bound is broken: a quarter of the time, a
third of the memory, and 600 MB for the 1.3B model.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common.memory import Usage, measure
from common.synthetic import write_gpt2

VOCAB = 50432
TIME_BOUND, MEMORY_BOUND, LARGE_BYTES = 0.25, 1 / 3, 600e6


def convert_command(source: Path, target: Path) -> list[str]:
    """Return the command of this project."""
    options = ["--ckpt", str(source), "--to", "hf", "--output", str(target)]
    return [sys.executable, "-m", "mlm_eval", "convert", *options]


def load_everything(source: Path, target: Path) -> None:
    """Convert as scripts do: every rank in memory, then a model, then its state dict."""
    import argparse as argparse_module

    from transformers import GPT2Config, GPT2LMHeadModel

    paths = sorted(source.glob("*/mp_rank_*/model_optim_rng.pt"))
    with torch.serialization.safe_globals([argparse_module.Namespace]):
        ranks = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
    args, models = ranks[0]["args"], [rank["model"] for rank in ranks]
    heads, hidden = args.num_attention_heads, args.hidden_size
    channels = hidden // heads

    def merged(key: str, dim: int) -> torch.Tensor:
        return torch.cat([model[key] for model in models], dim=dim)

    state = {
        "transformer.wte.weight": merged("embedding.word_embeddings.weight", 0),
        "transformer.wpe.weight": models[0]["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": models[0]["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": models[0]["decoder.final_layernorm.bias"],
    }
    for i in range(args.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"transformer.h.{i}."
        for old, new in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
            for leaf in ("weight", "bias"):
                state[f"{theirs}{new}.{leaf}"] = models[0][f"{ours}{old}.{leaf}"]
        for leaf in ("weight", "bias"):
            qkv = merged(f"{ours}self_attention.linear_qkv.{leaf}", 0)
            qkv = qkv.view(heads, 3, channels, -1).transpose(0, 1).reshape(3 * hidden, -1)
            is_weight = leaf == "weight"
            state[f"{theirs}attn.c_attn.{leaf}"] = qkv.t().contiguous() if is_weight else qkv[:, 0]
            fc1 = merged(f"{ours}mlp.linear_fc1.{leaf}", 0)
            state[f"{theirs}mlp.c_fc.{leaf}"] = fc1.t().contiguous() if is_weight else fc1
        for old, new in (
            ("self_attention.linear_proj", "attn.c_proj"),
            ("mlp.linear_fc2", "mlp.c_proj"),
        ):
            state[f"{theirs}{new}.weight"] = merged(f"{ours}{old}.weight", 1).t().contiguous()
            state[f"{theirs}{new}.bias"] = models[0][f"{ours}{old}.bias"]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    config = GPT2Config(
        vocab_size=state["lm_head.weight"].shape[0],
        n_positions=args.max_position_embeddings,
        n_embd=hidden,
        n_layer=args.num_layers,
        n_head=heads,
    )
    model = GPT2LMHeadModel(config).half()
    model.load_state_dict(state)
    model.save_pretrained(target)


def run(command: list[str], target: Path) -> Usage:
    """Measure one conversion into a folder that is removed again."""
    shutil.rmtree(target, ignore_errors=True)
    usage = measure(command)
    shutil.rmtree(target)
    return usage


def median(usages: list[Usage], field: str) -> float:
    """Return the median of one figure."""
    return statistics.median(getattr(usage, field) for usage in usages)


def compare(scratch: Path, rounds: int) -> bool:
    """Measure both ways on the 345M checkpoint in turns; return whether the bounds hold."""
    source, target = scratch / "gpt2-345m", scratch / "out"
    write_gpt2("345m", source, tp=2, vocab_size=VOCAB)
    script = [sys.executable, __file__, "--load-everything", str(source), str(target)]
    ours: list[Usage] = []
    theirs: list[Usage] = []
    for _ in range(rounds):
        theirs.append(run(script, target))
        ours.append(run(convert_command(source, target), target))
    print(f"345M, fp16, tensor-parallel 2 -> Hugging Face, medians of {rounds} runs in turns")
    for name, usages in (("mlm-eval convert", ours), ("load everything", theirs)):
        seconds, peak = median(usages, "seconds"), median(usages, "peak_bytes")
        print(f"  {name:<18}{seconds:8.2f} s {peak / 1e6:9.0f} MB anonymous")
    times = [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]
    memory = [a.peak_bytes / b.peak_bytes for a, b in zip(ours, theirs, strict=True)]
    time_ratio, memory_ratio = statistics.median(times), statistics.median(memory)
    print(f"  ratio of times  {time_ratio:.3f} (bound {TIME_BOUND})")
    print(f"  ratio of memory {memory_ratio:.3f} (bound {MEMORY_BOUND:.3f})")
    shutil.rmtree(source)
    return time_ratio <= TIME_BOUND and memory_ratio <= MEMORY_BOUND


def large(scratch: Path) -> bool:
    """Measure the conversion of a 1.3B checkpoint; return whether its memory stays in the bound."""
    source, target = scratch / "gpt2-1.3b", scratch / "out"
    write_gpt2("1.3b", source, tp=2, vocab_size=VOCAB)
    usage = run(convert_command(source, target), target)
    print(
        f"1.3B, fp16, tensor-parallel 2 -> Hugging Face: {usage.seconds:.2f} s, "
        f"{usage.peak_bytes / 1e6:.0f} MB anonymous (bound {LARGE_BYTES / 1e6:.0f})"
    )
    shutil.rmtree(source)
    return usage.peak_bytes <= LARGE_BYTES


def main() -> int:
    """Run the measurements; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", help="where to put the checkpoints (6 GB); default: a temporary folder"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--load-everything", nargs=2, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.load_everything:
        load_everything(*map(Path, options.load_everything))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        good = compare(Path(scratch), options.rounds)
        return 0 if large(Path(scratch)) and good else 1


if __name__ == "__main__":
    sys.exit(main())
