"""Whole runs of the trainer: the same losses on every layout, what it writes, what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.ranks import run_ranks
from support.runs import training_runs
from torch import Tensor

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.engine.engine import Engine
from mlm_eval.model.bert import BERT
from mlm_eval.model.dropout import Dropout
from mlm_eval.training.data import Batch
from mlm_eval.training.log import smoothed
from mlm_eval.training.loop import train
from mlm_eval.training.objectives import Classification
from mlm_eval.training.settings import Listener, TrainingProgress, TrainSettings

LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tp 2, recomputed": (2, 1, {"micro_batch": 1, "recompute": True}),
    "dp 2": (1, 2, {"micro_batch": 4}),
    "fsdp2": (1, 2, {"dp_mode": "fsdp2", "micro_batch": 3}),
}
DROPPED = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
CASES = {"without dropout": ("multichoice_head", {}), "with dropout": ("mlm", DROPPED)}
SCORES = [0.1, 0.2]  # after 10 steps and after 20


@pytest.fixture(scope="module", params=CASES)
def one_process(request, tmp_path_factory) -> tuple[str, dict[str, Any], Path]:
    """Twenty steps of 6 of 26 samples, over several epochs, in one process."""
    kind, changes = CASES[request.param]
    changes = changes | {"evaluate_every": 10}
    folder = tmp_path_factory.mktemp("one")
    training_runs.run(1, 1, kind, folder, changes, scores=SCORES)
    return kind, changes, folder


def on_a_layout(tp: int, dp: int, kind: str, folder: Path, changes: dict[str, Any]) -> None:
    training_runs.run(tp, dp, kind, folder, changes, scores=SCORES)


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_steps_are_the_same_on_every_layout(name, one_process, tmp_path):
    """Losses, accuracies, rates, gradient norms before clipping, and sums of evaluated weights.

    With dropout on as well: a mask belongs to its sample, its head and its place.
    """
    kind, changes, folder = one_process
    tp, dp, how = LAYOUTS[name]
    run_ranks(tp * dp, on_a_layout, tp, dp, kind, tmp_path / "run", changes | how)
    expected, actual = training_runs.metrics(folder), training_runs.metrics(tmp_path / "run")
    assert len(expected) == 22 and max(line.get("grad_norm", 0) for line in expected) > 1
    for line, wanted in zip(actual, expected, strict=True):
        if "evaluation" in line:
            found, sums = line["evaluation"]["weights"], wanted["evaluation"]["weights"]
            assert found == pytest.approx(sums, rel=1e-6)
        else:
            assert line.pop("grad_norm") == pytest.approx(wanted["grad_norm"], rel=2e-5)
            assert line == {k: pytest.approx(wanted[k], rel=1e-5) for k in line}


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_matrix_products_train_float32_weights(dtype, one_process, tmp_path):
    kind, changes, folder = one_process
    report, weights = training_runs.run(1, 1, kind, tmp_path, {**changes, "dtype": dtype})
    expected = [line["loss"] for line in training_runs.metrics(folder) if "loss" in line]
    assert report.losses[:4] == pytest.approx(expected[:4], rel=0.01)
    assert report.losses == pytest.approx(expected, rel=0.15)
    assert report.losses != pytest.approx(expected, rel=1e-6)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_passes_of_a_step_take_the_faster_products(dtype, tmp_path, monkeypatch):
    asked: list[str] = []

    @contextlib.contextmanager
    def products():
        asked.append("in")
        yield
        asked.append("out")

    def backward(loss, *_, plain=torch.Tensor.backward):
        asked.append("backward")
        plain(loss)

    monkeypatch.setattr("mlm_eval.training.step.float32_products", products)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    training_runs.run(1, 1, "classification_head", tmp_path, {"max_steps": 1, "dtype": dtype})
    assert asked and asked == ["in", "backward", "out"] * (len(asked) // 3)


# --- What a run leaves ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Any]:
    """A finished run of three epochs, on two ranks, best after the second."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_ranks(2, three_epochs, folder)


CHANGES = {"max_steps": None, "epochs": 3, "global_batch": 8}


def three_epochs(folder: Path, scores: Any = (0.2, 0.9, 0.5), **how: bool) -> Any:
    return training_runs.run(2, 1, "classification_head", folder, CHANGES, scores=scores, **how)


def test_the_report_tells_every_step_and_the_best_evaluation(finished):
    folder, per_rank = finished
    lines = training_runs.metrics(folder)
    for report, _ in per_rank:  # on every rank the same
        assert report.steps == 9 and report.epochs == 3 and report.samples == 72
        assert report.losses == [line["loss"] for line in lines if "loss" in line]
        assert [(e["step"], e["epoch"], e["score"]) for e in report.evaluations] == [
            (3, 1, 0.2),
            (6, 2, 0.9),
            (9, 3, 0.5),
        ]
        assert report.best == report.evaluations[1]
        assert report.evaluations[0]["nested"] == {"correct": 3}
        assert report.samples_per_second == pytest.approx(72 / report.seconds)


def test_the_last_and_the_best_weights_are_megatron_checkpoints(finished):
    """Two tensor-parallel files with the head, the numbers of training in their args."""
    folder, per_rank = finished
    report, _ = per_rank[0]
    last, best = open_checkpoint(folder / "checkpoint"), open_checkpoint(report.best_checkpoint)
    for checkpoint, step in ((last, 9), (best, 6)):
        assert checkpoint.provenance.tensor_parallel == 2
        assert checkpoint.provenance.iteration == step
        assert checkpoint.config.num_classes == 3 and not checkpoint.config.lm_head
        assert checkpoint.provenance.args["lr"] == training_runs.settings().lr
    bias = "classification_head.bias"
    assert not torch.equal(last.tensors[bias].read(), best.tensors[bias].read())
    for rank, (_, weights) in enumerate(per_rank):
        for name, shard in weights.items():
            whole = last.tensors[name].read()
            dim = next((d for d in range(whole.dim()) if whole.shape[d] != shard.shape[d]), None)
            cut = whole if dim is None else whole.chunk(2, dim)[rank]
            assert torch.equal(shard, cut), name


ORIGINAL_ORDER = {"apply_residual_connection_post_layernorm": True}


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, ORIGINAL_ORDER], ids=["", "original order"])
@pytest.mark.parametrize("kind", training_runs.OBJECTIVES)
def test_what_was_trained_is_what_was_written(kind, changes, tmp_path):
    base = dataclasses.replace(random_models.GPT if kind == "lm" else random_models.BERT, **changes)
    steps = {"max_steps": 2, "warmup": 0.0, "hidden_dropout": 0.3}
    report, weights = training_runs.run(1, 1, kind, tmp_path / "run", steps, base=base)
    checkpoint = open_checkpoint(report.checkpoint)
    before = training_runs.model_for(kind, base)
    for name, value in weights.items():
        assert torch.equal(checkpoint.tensors[name].read(), value)
        assert not torch.equal(before.tensors[name].read(), value), f"{name} was not trained"
    expected = dataclasses.replace(before.config, hidden_dropout=0.3, attention_dropout=0.0)
    assert checkpoint.config == expected
    assert report.best is None and report.best_checkpoint is None and report.evaluations == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "source", "written"),
    [
        ("mlm", "legacy", "legacy"),
        ("mlm", "core", "core"),
        ("mlm", None, "core"),
        ("lm", "legacy", "legacy"),
        ("classification_head", "core", "legacy"),  # megatron-core has no task heads
        ("qa_head", "legacy", "legacy"),
    ],
)
def test_the_sources_parameter_names_stay(kind, source, written, tmp_path):
    """So do the rows of its vocabulary, whatever Megatron would pad them to."""
    model = training_runs.model_for(kind)
    provenance = dataclasses.replace(model.provenance, names=source)
    engine = Engine.load(dataclasses.replace(model, provenance=provenance), dtype="float32")
    report = train(
        engine,
        training_runs.samples(kind, 8, vocab=model.config.vocab_size),
        training_runs.OBJECTIVES[kind](),
        training_runs.settings(max_steps=1),
        output_dir=tmp_path / "run",
    )
    checkpoint = open_checkpoint(report.checkpoint)
    assert checkpoint.provenance.names == written
    assert checkpoint.config.vocab_size == model.config.vocab_size


def test_the_logs_are_there(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    lines = [line for line in training_runs.metrics(folder) if "loss" in line]
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    events = board.Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 10))
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in lines])
    assert [event.value for event in board.Scalars("dev/score")] == pytest.approx([0.2, 0.9, 0.5])
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (folder / "state").iterdir()} == {"finished.json"}


def test_a_finished_run_is_not_run_again(finished):
    folder, per_rank = finished
    before = (folder / "metrics.jsonl").read_bytes()
    for (report, weights), (wanted, expected) in zip(
        run_ranks(2, three_epochs, folder, []), per_rank, strict=True
    ):
        assert report == wanted
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.5}, "holds another run: lr 0.002, now 0.5; .* --restart"),
        ({"seed": 2}, "seed 1234, now 2"),
        ({"count": 27}, r"samples 26, now 27"),
        ({"kind": "mlm"}, "model.*lm_head False, now True"),
    ],
)
def test_another_run_is_not_gone_on_with(change, message, finished):
    folder, _ = finished
    count, kind = change.pop("count", 26), change.pop("kind", "classification_head")
    with pytest.raises(InputError, match=message):
        training_runs.run(1, 1, kind, folder, CHANGES | change, count=count)


def test_progress_counts_up_to_the_end(tmp_path):
    told: list[TrainingProgress] = []
    listener = Listener()
    listener.on_step = told.append  # type: ignore[method-assign]
    engine = Engine.load(training_runs.model_for("lm"))
    train(
        engine,
        training_runs.samples("lm", 10),
        training_runs.OBJECTIVES["lm"](),
        training_runs.settings(max_steps=None, epochs=2, global_batch=4, keep_last=True),
        output_dir=tmp_path,
        listener=listener,
    )
    lines = training_runs.metrics(tmp_path)
    assert [p.step for p in told] == [1, 2, 3, 4, 5, 6] and {p.total_steps for p in told} == {6}
    assert [p.epoch for p in told] == [1, 1, 1, 2, 2, 2]
    # The mean of the epoch so far, of 4, 4 and 2 samples.
    losses = [line["loss"] for line in lines]
    assert told[2].loss == pytest.approx((4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10)
    assert told[3].loss == pytest.approx(losses[3])
    assert told[5].seconds_left == 0 and told[0].seconds_left > 0


# --- Faults of the input --------------------------------------------------------------------------


class Exploding(Classification):
    """The loss of the third step overflows."""

    def __init__(self) -> None:
        self.calls = 0

    def loss_and_hits(
        self, model: BERT, batch: Batch, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor, int]:
        losses, hits, count = super().loss_and_hits(model, batch, dropout)
        self.calls += 1
        return losses * (float("inf") if self.calls == 3 else 1.0), hits, count


def exploding(tp: int, folder: Path, dtype: str) -> list[dict[str, Any]]:
    engine = Engine.load(training_runs.model_for("classification_head"), tp=tp)
    train(
        engine,
        training_runs.samples("classification_head", 12),
        Exploding(),
        training_runs.settings(max_steps=6, micro_batch=6, dtype=dtype),
        output_dir=folder,
    )
    return training_runs.metrics(folder)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_loss_that_is_no_number_ends_the_run_on_every_rank(tp, tmp_path):
    with pytest.raises(InputError, match="not finite in step 3; lower --lr"):
        run_ranks(tp, exploding, tp, tmp_path, "float32")


@pytest.mark.parametrize("tp", [1, 2])
def test_float16_skips_a_step_that_overflows(tp, tmp_path):
    """As in Megatron the learning rate waits too, and the loss scale is halved."""
    lines = run_ranks(tp, exploding, tp, tmp_path, "float16")[0]
    assert [line["loss_scale"] for line in lines] == [65536.0] * 2 + [32768.0] * 4
    assert lines[3]["lr"] == lines[2]["lr"]
    assert all(torch.tensor(line["loss"]).isfinite() for line in lines if line["step"] != 3)


class Steep(Classification):
    """A loss so steep that float16 overflows until its scale is small."""

    def loss_and_hits(
        self, model: BERT, batch: Batch, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor, int]:
        losses, hits, count = super().loss_and_hits(model, batch, dropout)
        return losses * 2.0**10, hits, count


def steep(dp: int, folder: Path, mode: str) -> list[float]:
    engine = Engine.load(training_runs.model_for("classification_head"), tp=1, dp=dp)
    train(
        engine,
        training_runs.samples("classification_head", 12),
        Steep(),
        training_runs.settings(
            max_steps=14, micro_batch=1, dtype="float16", dp_mode=mode, global_batch=4, lr=0.0
        ),
        output_dir=folder,
    )
    return [line["loss_scale"] for line in training_runs.metrics(folder)]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_float16_skips_the_same_steps_on_every_layout(mode, tmp_path):
    """With dp in the loss's factor, two ranks would have to halve the scale once more than one."""
    alone = steep(1, tmp_path / "alone", "ddp")
    assert 2 <= sum(a > b for a, b in zip([65536.0, *alone], alone, strict=False)) < 12
    assert alone[-1] == alone[-2]  # it has come to where nothing overflows
    assert run_ranks(2, steep, 2, tmp_path / "ranks", mode) == [alone] * 2


def test_too_few_samples_for_a_step_are_refused(tmp_path):
    with pytest.raises(InputError, match="5 training samples do not fill one global batch of 6"):
        training_runs.run(1, 1, "lm", tmp_path, {}, count=5)
    report, _ = training_runs.run(
        1, 1, "lm", tmp_path, {"keep_last": True, "max_steps": 2}, count=5
    )
    assert report.samples == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs is 0; it must be at least 1"),
        ({"hidden_dropout": 1.0}, r"--hidden-dropout is 1.0; it must lie in \[0, 1\)"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"dtype": "int8"}, "--dtype 'int8' is unknown; use auto, float32, bfloat16"),
        ({"dp_mode": "zero"}, "--dp-mode 'zero' is unknown; use ddp, fsdp2"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainSettings(**{"lr": 1e-4, **changes})


def test_a_model_that_no_file_can_hold_is_refused_before_training(tmp_path):
    """Megatron's legacy names, which task heads need, know no norm of queries and keys."""
    base = dataclasses.replace(random_models.BERT, qk_layernorm=True, qk_layernorm_bias=True)
    with pytest.raises(InputError, match="no norm of queries and keys"):
        training_runs.run(1, 1, "classification_head", tmp_path / "run", {}, base=base)
    assert not (tmp_path / "run").exists()


def test_a_smoothed_curve_starts_with_the_first_value():
    values = [float(i) for i in range(30)]
    assert smoothed(values)[:3] == [0.0, 0.5, 1.0]
    assert smoothed(values)[29] == pytest.approx(sum(range(20, 30)) / 10)


def test_settings_round_through_json():
    settings = training_runs.settings(max_steps=3).deciding()
    assert json.loads(json.dumps(settings)) == settings
