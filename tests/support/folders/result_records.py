"""Result records as the commands write them, made up: for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSIONS = {"mlm_eval": "0.1.0", "torch": "2.13.0"}

# layers, hidden size, heads, parameters with the vocabulary padded for one rank
SIZES = {
    "gpt2-355m": ("gpt", 24, 1024, 16, 354_871_296),
    "gpt2-2.5b": ("gpt", 54, 1920, 20, 2_488_688_640),
    "bert-336m": ("bert", 24, 1024, 16, 336_297_858),
    "bert-3.9b": ("bert", 48, 2560, 40, 3_869_260_674),
}

ZERO_SHOT_SETTINGS = {
    "wikitext103": {"seq_length": 1024, "stride": 32},
    "lambada": {"target": "word"},
}

# Table 6 of the paper for its 336M model, and the sets' sizes.
RECIPES = {
    "mnli": {"global_batch": 128, "lr": 1e-5, "epochs": 10},
    "qqp": {"global_batch": 128, "lr": 5e-5, "epochs": 12},
    "squad-1.1": {"global_batch": 64, "lr": 3e-5, "epochs": 2},
    "squad-2.0": {"global_batch": 48, "lr": 3e-5, "epochs": 2},
    "race": {"global_batch": 32, "lr": 2e-5, "epochs": 3},
}
TOTALS = {
    "dev-matched": 9815,
    "dev-mismatched": 9832,
    "dev-middle": 1436,
    "dev-high": 3451,
    "test-middle": 1436,
    "test-high": 3498,
    "test": 4934,
}


def checkpoint(size: str, name: str) -> dict[str, Any]:
    """Return the checkpoint's part of a record."""
    family, layers, hidden, heads, parameters = SIZES[size]
    return {
        "path": f"models/{name}/release",
        "digest": f"quick-sha256:{name:0<64}",
        "format": "megatron-torch",
        "num_parameters": parameters,
        "config": {
            "family": family,
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
        },
    }


def zero_shot(
    task: str, value: float, *, size: str = "gpt2-355m", name: str = "mine", **settings: Any
) -> dict[str, Any]:
    """Return a record of the paper's protocol, but for `settings`; LAMBADA is in percent."""
    metrics = {"adjusted_ppl": value} if task == "wikitext103" else {"accuracy": value / 100}
    return {
        "task": task,
        "protocol": "megatron-paper",
        "metrics": metrics,
        "counts": {},
        "settings": {
            "vocab": "padded",
            "dtype": "float16",
            "tp": 1,
            "dp": 1,
            "limit": None,
            "data": {
                "path": f"{task}.file",
                "sha256": "0" * 64,
                "paper_file": True,
                "warnings": [],
            },
            **ZERO_SHOT_SETTINGS[task],
            **settings,
        },
        "checkpoint": checkpoint(size, name),
        "timing": {},
        "versions": VERSIONS,
    }


def fine_tuned(
    task: str,
    figures: dict[str, float],
    *,
    size: str = "bert-336m",
    name: str = "mine",
    total: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return a record of the paper's fine-tuning, but for `settings`.

    Args:
        task: `mnli`, `qqp`, `squad-1.1`, `squad-2.0` or `race`.
        figures: By set, in percent; for SQuAD `exact` and `f1`.
        size: Of the model.
        name: Of the checkpoint.
        total: Examples of each set; None: as many as were published.
        settings: More, or others.
    """
    kind, _, version = task.partition("-")
    if kind == "squad":
        count = {"1.1": 10570, "2.0": 11873}[version] if total is None else total
        metrics: dict[str, Any] = {**figures, "dev": {**figures, "total": count}}
    else:
        counts = {**TOTALS, "dev": {"mnli": 19647, "qqp": 40430, "race": 4887}[kind]}
        metrics = {
            set_: {"accuracy": value / 100, "total": counts[set_] if total is None else total}
            for set_, value in figures.items()
        }
    # The run that was chosen, beside the medians: another number, which no table may show.
    chosen = {
        set_: {
            **entry,
            **({"accuracy": 0.5} if "accuracy" in entry else {"exact": 50.0, "f1": 50.0}),
        }
        for set_, entry in metrics.items()
        if isinstance(entry, dict)
    }
    return {
        "task": kind,
        "protocol": "megatron-paper",
        "metrics": {**chosen, "exact": 50.0, "f1": 50.0, "median": metrics, "seeds": {}},
        "counts": {"train_examples": 87866} if kind == "race" else {},
        "settings": {
            "dtype": "bfloat16",
            "tp": 1,
            "dp": 8,
            "vocab": "padded",
            "version": version,
            "seeds": [1, 2, 3, 4, 5],
            "eval_only": False,
            "train_limit": None,
            "dev_limit": None,
            "test_limit": None,
            "data": {"sets": {}, "warnings": []},
            **RECIPES[task],
            **settings,
        },
        "checkpoint": checkpoint(size, name),
        "timing": {},
        "versions": VERSIONS,
    }


def write(folder: Path, name: str, values: Any) -> Path:
    """Write a record and return its path."""
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path
