"""The memory that `mlm-eval plan` foretells against what runs really take, on the CPU.

A model of 355M parameters scores windows of WikiText's shape, in float32 and bfloat16, and another
of 336M takes two training steps of RACE's shape. Each is a process of its own that reports its
anonymous memory before there is a model; the difference to its peak is what the plan is about.
Exits with 1 when a plan is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common.memory import POLL_SECONDS, anonymous_bytes

BOUND = 0.15


@dataclass(frozen=True)
class Case:
    """One run: a model, what it does, and how."""

    title: str
    model: str
    dtype: str
    batch_tokens: int = 4096
    rows: int = 0
    length: int = 0
    attention_dropout: float = 0.0
    recompute: bool = False

    @property
    def trains(self) -> bool:
        """Whether it is a training."""
        return self.rows > 0


CASES = {
    "score-fp32": Case("scoring, 4,096 tokens a batch", "gpt2-355m", "float32"),
    "score-bf16": Case("scoring, 4,096 tokens a batch", "gpt2-355m", "bfloat16"),
    "score-large": Case("scoring, 8,192 tokens a batch", "gpt2-355m", "bfloat16", 8192),
    "train": Case("training, 4 rows of 128", "bert-336m", "float32", rows=4, length=128),
    "train-dropout": Case(
        "training, 4 rows of 128, attention dropout",
        "bert-336m",
        "float32",
        rows=4,
        length=128,
        attention_dropout=0.1,
    ),
    "train-recompute": Case(
        "training, 8 rows of 128, recomputed",
        "bert-336m",
        "bfloat16",
        rows=8,
        length=128,
        recompute=True,
    ),
}


def planned(case: Case) -> int:
    """Return the bytes that the plan says."""
    import dataclasses

    from mlm_eval.model.costs.memory import TrainingBatch, evaluation_memory, training_memory
    from mlm_eval.model.sizes import named_config

    config = named_config(case.model)
    if not case.trains:
        itemsize = 4 if case.dtype == "float32" else 2
        need = evaluation_memory(
            config, tp=1, itemsize=itemsize, batch_tokens=case.batch_tokens, scored_rows=2048
        )
        return need.on_cpu().total
    batch = TrainingBatch(
        rows=case.rows,
        length=case.length,
        attention_dropout=case.attention_dropout,
        half=case.dtype != "float32",
        recompute=case.recompute,
    )
    config = dataclasses.replace(config, lm_head=False, binary_head=False, multichoice_head=True)
    return training_memory(config, batch, tp=1).on_cpu().total


def measured(name: str, folder: Path) -> int:
    """Return the anonymous bytes of a run at its peak, above those before it had a model."""
    command = [sys.executable, __file__, "--run", name, "--dir", str(folder)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        assert process.stdout is not None
        told = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{name} failed")
    return peak - int(told)


def run(case: Case, folder: Path) -> None:
    """Do what a case says, in this process."""
    import torch

    from mlm_eval.checkpoints.open import open_checkpoint
    from mlm_eval.engine.engine import Engine
    from mlm_eval.model.initial import new_checkpoint, with_head
    from mlm_eval.model.sizes import named_config

    torch.manual_seed(0)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # threads and their buffers
    source = folder / case.model
    if not source.exists():
        from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch

        write_megatron_torch(new_checkpoint(named_config(case.model), seed=1), source, tp=1)
        return
    if case.trains:
        import mlm_eval.training.loop  # noqa: F401
    import mlm_eval.checkpoints.megatron.read_torch  # noqa: F401

    print(anonymous_bytes(os.getpid()), flush=True)  # all is imported, and there is no model
    checkpoint = open_checkpoint(source)
    if not case.trains:
        score(
            Engine.load(checkpoint, dtype=case.dtype, batch_tokens=case.batch_tokens, device="cpu")
        )
        return
    engine = Engine.load(with_head(checkpoint, "multichoice_head"), dtype="float32", device="cpu")
    train(engine, case)


def score(engine: object) -> None:
    """Score two batches of windows: the first one whole, the others their last 32 tokens."""
    import torch

    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.score import Request

    assert isinstance(engine, Engine)
    count = 2 * engine.batch_tokens // 1024
    tokens = torch.randint(0, 50_257, (1024 + 32 * count + 1,))
    windows = [tokens[32 * i : 32 * i + 1025] for i in range(count)]
    engine.score([Request(w, 32 if i else 1024) for i, w in enumerate(windows)])


def train(engine: object, case: Case) -> None:
    """Take steps of two micro-batches each, so that gradients are there beside activations."""
    import torch

    from mlm_eval.checkpoints.dtypes import resolve_dtype
    from mlm_eval.engine.engine import Engine
    from mlm_eval.model.bert import BERT
    from mlm_eval.model.dropout import Dropout, sample_keys
    from mlm_eval.training.data import Sample, collate
    from mlm_eval.training.objectives import MultipleChoice
    from mlm_eval.training.optimization import make_optimizer
    from mlm_eval.training.replicas import Replicas
    from mlm_eval.training.settings import Hyperparameters

    assert isinstance(engine, Engine) and isinstance(engine.model, BERT)
    replicas = Replicas(
        engine.model, MultipleChoice(), engine.mesh, mode="ddp", recompute=case.recompute
    )
    optimizer = make_optimizer(replicas.trained, Hyperparameters(lr=1e-5, weight_decay=0.1))
    samples = []
    for index in range(case.rows // 4):
        rows = [torch.randint(0, 30_522, (case.length,)) for _ in range(4)]
        samples.append(Sample(rows, [torch.zeros_like(row) for row in rows], 1, index))
    batch = collate(samples)
    for step in range(2):
        for _ in range(2):
            keys = sample_keys(1, step, batch.row_numbers)
            dropout = Dropout(keys, 0.1, case.attention_dropout)
            with torch.autocast("cpu", resolve_dtype(case.dtype), enabled=case.dtype != "float32"):
                loss, _ = replicas.module(batch, dropout, 1.0)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def compare(names: list[str], folder: Path) -> bool:
    """Measure the cases one after the other; return whether all plans hold."""
    good = True
    for name in names:
        case = CASES[name]
        if not (folder / case.model).exists():
            subprocess.run([sys.executable, __file__, "--run", name, "--dir", folder], check=True)
        plan, found = planned(case), measured(name, folder)
        error = plan / found - 1
        good = good and abs(error) <= BOUND
        print(
            f"{case.model}, {case.dtype}, {case.title}: planned {plan / 1e9:.3f} GB, "
            f"measured {found / 1e9:.3f} GB, {100 * error:+.1f} % (bound {100 * BOUND:.0f} %)",
            flush=True,
        )
    return good


def main() -> int:
    """Run the measurements; 1 when a bound is broken."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", help="where to put checkpoints (3 GB); default: a temporary folder"
    )
    parser.add_argument("--case", action="append", choices=CASES, help="only these (repeatable)")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(CASES[options.run], Path(options.dir))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        return 0 if compare(options.case or list(CASES), Path(scratch)) else 1


if __name__ == "__main__":
    sys.exit(main())
