"""Conversion to Hugging Face: time and memory against the way that loads everything, and `cp`.

A synthetic 345M fp16 checkpoint, tensor-parallel 2, is converted by `mlm-eval convert` and by the
usual script (torch.load of all ranks, build GPT2LMHeadModel, save_pretrained), in turns. Then the
rate at which values are copied, without all that comes before, is compared with that of `cp` of the
same files on a warm cache. Then a 1.3B checkpoint is converted, for the memory. Exits with 1 where
a target is missed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common.memory import Usage, measure
from common.results import Row, publish
from common.synthetic import write_gpt2

VOCAB = 50432
LARGE_BYTES = 600e6
FASTER, LEANER, OF_CP = 6.0, 3.0, 0.6
"""Targets: against the script, in time and memory; against the rate of `cp`."""
WHAT = "345M, fp16, tp 2 -> Hugging Face"


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


def compare(source: Path, target: Path, pairs: int) -> list[Row]:
    """Measure both ways in turns."""
    script = [sys.executable, __file__, "--load-everything", str(source), str(target)]
    commands = (convert_command(source, target), script)
    runs = [[run(command, target) for command in commands] for _ in range(pairs)]
    ours, theirs = ([pair[side] for pair in runs] for side in (0, 1))
    return [
        Row(
            f"convert {WHAT}",
            "load everything",
            "s",
            [usage.seconds for usage in ours],
            [usage.seconds for usage in theirs],
            FASTER,
        ),
        Row(
            f"convert {WHAT}, memory",
            "load everything",
            "MB",
            [usage.peak_bytes / 1e6 for usage in ours],
            [usage.peak_bytes / 1e6 for usage in theirs],
            LEANER,
        ),
    ]


def copying(source: Path, target: Path, pairs: int) -> list[Row]:
    """Measure the rate at which values are copied against `cp`, and the time of all the rest."""
    copied: tuple[list[float], list[float]] = [], []
    rest: tuple[list[float], list[float]] = [], []
    for _ in range(pairs):
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, __file__, "--only-copy", str(source), str(target)]
        started = time.perf_counter()
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        whole = time.perf_counter() - started
        seconds, gigabytes = map(float, told.split()[-2:])
        copied[0].append(seconds / gigabytes)
        rest[0].append(whole - seconds)
        shutil.rmtree(target)
        copied[1].append(seconds_of("cp", "-r", str(source), str(target)) / size(target))
        rest[1].append(seconds_of(sys.executable, "-c", "import torch"))
    return [
        Row(f"convert {WHAT}, copying", "cp, warm cache", "s for a GB", *copied, target=OF_CP),
        Row(f"convert {WHAT}, all but copying", "import torch", "s", *rest),
    ]


def only_copy(source: Path, target: Path) -> None:
    """Convert as the command does; print the seconds from the first piece to the last, and the GB.

    What comes before is start-up: imports, opening, planning.
    """
    import mlm_eval
    from mlm_eval.checkpoints.convert import convert

    written: list[tuple[float, int]] = []
    convert(
        mlm_eval.open_checkpoint(source),
        "hf",
        target,
        on_progress=lambda done, _: written.append((time.perf_counter(), done)),
    )
    (first, before), (last, done) = written[0], written[-1]
    print(last - first, (done - before) / 1e9)


def size(folder: Path) -> float:
    """Return the size of all files below a folder, in GB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def seconds_of(*command: str) -> float:
    """Return how long a command takes."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def large(scratch: Path) -> Row:
    """Measure the memory of converting a 1.3B checkpoint."""
    source, target = scratch / "gpt2-1.3b", scratch / "out"
    write_gpt2("1.3b", source, tp=2, vocab_size=VOCAB)
    usage = run(convert_command(source, target), target)
    shutil.rmtree(source)
    return Row(
        "convert 1.3B, fp16, tp 2, memory",
        "its limit",
        "MB",
        [usage.peak_bytes / 1e6],
        [LARGE_BYTES / 1e6],
        1.0,
    )


def main() -> int:
    """Run the measurements; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--dir", help="where to put the checkpoints (6 GB); default: a temporary folder"
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--load-everything", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only-copy", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for work, paths in (
        (load_everything, options.load_everything),
        (only_copy, options.only_copy),
    ):
        if paths:
            work(*paths)
            return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        scratch = Path(name)
        source = write_gpt2("345m", scratch / "gpt2-345m", tp=2, vocab_size=VOCAB)
        rows = compare(source, scratch / "out", options.pairs)
        rows += copying(source, scratch / "out", options.pairs)
        shutil.rmtree(source)
        rows.append(large(scratch))
    return int(not publish("convert", rows, {"time": "wall"}))


if __name__ == "__main__":
    sys.exit(main())
