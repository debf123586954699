"""Result: valid JSON whatever the figures, whole files or none, and no slow imports."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import random_models

import mlm_eval
from mlm_eval.checkpoints.checkpoint import Checkpoint, Provenance
from mlm_eval.checkpoints.config import NEWER_SETTINGS, ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.engine.score import Request
from mlm_eval.reporting.results import (
    Result,
    checkpoint_record,
    exponential,
    timing_record,
    versions,
)
from mlm_eval.reporting.text import inspect_record, inspect_text


def result(**metrics: Any) -> Result:
    return Result(
        task="lambada",
        protocol="megatron-paper",
        metrics=metrics,
        counts={"examples": 3},
        settings={"warnings": ["run"], "data": {"path": "caf\u00e9.jsonl", "warnings": ["data"]}},
        checkpoint={"path": "model"},
        timing={"eval_seconds": 0.5},
        versions={"torch": "2"},
    )


def strict_loads(text: str) -> Any:
    """Parse JSON, refusing the NaN and Infinity that Python would accept."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_record_has_the_names_of_the_contract_in_their_order():
    record = strict_loads(result(accuracy=0.5).to_json())
    assert list(record) == [
        "task", "protocol", "metrics", "counts", "settings", "checkpoint", "timing", "versions",
        "run",
    ]  # fmt: skip
    assert record["metrics"] == {"accuracy": 0.5}
    assert record["settings"]["data"]["path"] == "caf\u00e9.jsonl"
    assert result().to_json().endswith("}\n")


def test_floats_come_back_exactly():
    values = {"a": 1.1008449901248143, "b": 1e-300, "c": 0.1 + 0.2, "d": 7, "e": True}
    assert strict_loads(result(**values).to_json())["metrics"] == values


def test_figures_that_json_cannot_hold_become_null_with_a_note():
    inner = {"x": -math.inf, "list": [1.0, math.nan]}
    record = strict_loads(result(ppl=math.inf, stderr=math.nan, inner=inner, ok=1.5).to_json())
    metrics = record["metrics"]
    assert (metrics["ppl"], metrics["stderr"], metrics["ok"]) == (None, None, 1.5)
    assert metrics["ppl_note"] == "infinity: beyond the range of a float64"
    assert metrics["stderr_note"].startswith("not a number")
    assert "ok_note" not in metrics
    assert metrics["inner"]["x"] is None
    assert metrics["inner"]["x_note"].startswith("minus infinity")
    assert metrics["inner"]["list"] == [1.0, None]


def test_a_result_is_frozen_and_keeps_its_infinities_in_python():
    made = result(ppl=math.inf)
    made.to_json()
    assert made.metrics == {"ppl": math.inf}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.task = "other"


def test_warnings_of_data_and_run_are_one_list():
    assert result().warnings == ["data", "run"]
    assert dataclasses.replace(result(), settings={}).warnings == []


def test_write_makes_the_folders_and_leaves_one_file(tmp_path):
    target = tmp_path / "a" / "b" / "r.json"
    assert result(accuracy=0.5).write(target) == target
    assert result(accuracy=0.25).write(str(target)) == target
    assert strict_loads(target.read_text(encoding="utf-8"))["metrics"] == {"accuracy": 0.25}
    assert os.listdir(target.parent) == ["r.json"]
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode  # readable for whom the umask allows


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "r.json"
    target.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="r.json cannot be written .No space left on device"):
        result().write(target)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="name another file with --output"):
        result().write(tmp_path / "file" / "r.json")
    with pytest.raises(InputError, match="cannot be written"):
        result().write(tmp_path)  # a folder
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("exponent", "value"),
    [
        (0.0, 1.0),
        (709.0, math.exp(709.0)),
        (710.0, math.inf),
        (math.inf, math.inf),
        (-math.inf, 0.0),
    ],
)
def test_exponential_overflows_to_infinity(exponent, value):
    assert exponential(exponent) == value


def test_exponential_of_nan_is_nan():
    assert math.isnan(exponential(math.nan))


def test_versions_name_what_computed_the_result():
    found = versions()
    assert found["mlm_eval"] == mlm_eval.__version__
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert "tokenizers" in found


def test_versions_cost_no_imports():
    code = (
        "import sys; from mlm_eval.reporting.results import versions; versions(); "
        "print({'torch', 'transformers', 'datasets', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def small_checkpoint() -> Checkpoint:
    config = ModelConfig(
        family="gpt",
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=4,
        ffn_hidden_size=32,
        vocab_size=128,
        max_position_embeddings=16,
    )
    provenance = Provenance(
        Path("root/iter_0000001"),
        "megatron-torch",
        checkpoint_version=3.0,
        tensor_parallel=2,
        iteration=1,
        config_sources={"activation": "args.bias_gelu_fusion"},
        warnings=["ranks differ"],
        digest="quick-sha256:abc",
    )
    return Checkpoint(config, {}, provenance)


def test_checkpoint_record():
    record = checkpoint_record(small_checkpoint())
    assert record["path"] == "root/iter_0000001"
    assert record["digest"] == "quick-sha256:abc"
    assert (record["format"], record["checkpoint_version"]) == ("megatron-torch", 3.0)
    assert (record["tensor_parallel"], record["pipeline_parallel"], record["iteration"]) == (
        2,
        1,
        1,
    )
    # 128 x 8 + 16 x 8 embeddings; norms 3 x 16; qkv 24 x 9; projection 8 x 9; mlp 32 x 9 + 8 x 33
    assert record["num_parameters"] == 1024 + 128 + 48 + 216 + 72 + 288 + 264
    assert record["config"]["vocab_size"] == 128
    assert record["config_sources"] == {"activation": "args.bias_gelu_fusion"}
    assert record["warnings"] == ["ranks differ"]
    strict_loads(json.dumps(record))


def test_timing_counts_the_tokens_that_went_through_the_model():
    engine: Any = SimpleNamespace(load_seconds=1.5, flops=lambda requests: 6e12 * len(requests))
    requests = [Request(torch.arange(9), 4), Request(torch.arange(5), 1)]
    assert timing_record(engine, requests, 2.0) == {
        "load_seconds": 1.5,
        "eval_seconds": 2.0,
        "tokens_per_second": (8 + 4) / 2.0,
        "model_tflops": 6.0,
    }
    partial: Any = SimpleNamespace(finished=lambda: {0: "taken over from an earlier run"})
    resumed = timing_record(engine, requests, 2.0, partial)
    assert (resumed["tokens_per_second"], resumed["model_tflops"]) == (4 / 2.0, 3.0)
    none_measured = timing_record(engine, requests, 0.0)
    assert (none_measured["tokens_per_second"], none_measured["model_tflops"]) == (None, None)


def test_inspect_shows_no_setting_of_layers_that_a_model_lacks() -> None:
    def shown(config: ModelConfig) -> set[str]:
        text = inspect_text(inspect_record(random_models.checkpoint(config), "digest"))
        return {line.split()[0] for line in text.splitlines() if line.startswith("  ")}

    for config in (random_models.LLAMA, random_models.GPT, random_models.BERT):
        assert not shown(config) & NEWER_SETTINGS
    scaled = dataclasses.replace(
        random_models.LLAMA, embedding_multiplier=3.0, window_size=5, window_layers=(1,)
    )
    assert shown(scaled) & NEWER_SETTINGS == {
        "embedding_multiplier",
        "window_size",
        "window_layers",
    }
