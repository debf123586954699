"""bench: what is counted and compared, by hand; real measurements of tiny models; the refusals.

No figure that a clock has made is judged here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from support import random_models
from support.command_line import CONFIG, as_user, assert_one_sentence, read
from support.ranks import TORCHRUN, run_ranks

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.parameters import allowed_tp, num_parameters, parameters
from mlm_eval.cli import bench as command
from mlm_eval.model.costs.memory import evaluation_memory
from mlm_eval.model.initial import initial_tensor
from mlm_eval.model.sizes import named_config
from mlm_eval.planning import bench_run, bench_study
from mlm_eval.planning.bench_options import BenchOptions, parse_scale, parse_sizes
from mlm_eval.planning.bench_plot import plot_bench
from mlm_eval.planning.bench_report import bench_record, bench_text
from mlm_eval.planning.bench_run import Drawn, Measured, measure_point
from mlm_eval.planning.bench_study import (
    PROCESS,
    BenchPoint,
    BenchSeries,
    check_point,
    fit,
    free_bytes,
    model_series,
    paper_series,
    rank_bytes,
    scaled,
    step_flops,
    usual_sizes,
)
from mlm_eval.ranks.collectives import AllReduceCounter
from mlm_eval.ranks.launch import LaunchResult
from mlm_eval.ranks.world import World
from mlm_eval.reporting.results import write_json
from mlm_eval.tasks.paper import load_paper

pytest_plugins = ["support.command_line_fixtures"]

GPT = dataclasses.replace(random_models.GPT, params_dtype="float32")
POINT = BenchPoint(1, "tiny", GPT)
OPTIONS = BenchOptions(device="cpu", dtype="float32")
AUTO = dataclasses.replace(OPTIONS, scale=None)
FEW = BenchOptions(device="cpu", dtype="float32", batch=3, seq_length=8, steps=2, warmup_steps=1)
QUICK = ["--batch", 2, "--steps", 2, "--warmup-steps", 1, "--device", "cpu"]


def quickly(point: BenchPoint, options: BenchOptions) -> Measured:
    """Measure, with small matrices for the peak."""
    bench_run.SIDES, bench_run.PRODUCT_SECONDS = {"cpu": (16, 32)}, 0.001
    return measure_point(point, options)


def measured(seconds: list[float], **figures: Any) -> Measured:
    """Return figures as if they were measured."""
    values: dict[str, Any] = {
        "peak_tflops": 0.1,
        "busy_over_alone": 1.0,
        "all_reduces": 4,
        "all_reduce_bytes": 2_000_000,
        "all_reduce_seconds": 0.25,
        "threads": 1,
        "device_name": "a processor",
        "load_seconds": 0.1,
    }
    return Measured(step_seconds=seconds, **(values | figures))


def shaped(mode: str, *, batch: int, length: int, recompute: bool = False) -> BenchOptions:
    return dataclasses.replace(
        OPTIONS, mode=mode, batch=batch, seq_length=length, recompute=recompute
    )


# --- operations ---


def test_the_operations_of_a_step_by_hand():
    """Two layers of hidden 32 (4 heads of 8, MLP 64), 50 rows of vocabulary, rows of 4 tokens."""
    layer = (
        4 * 2 * 96 * 32  # queries, keys, values
        + 4 * 2 * 32 * 32  # projection
        + 2 * 4 * 2 * 64 * 32  # MLP
        + 2 * 2 * 4 * 4 * 32  # scores and weighted values
    )
    head = 4 * 2 * 50 * 32
    forward = 2 * layer + head
    assert step_flops(GPT, shaped("infer", batch=3, length=4)) == 3 * forward
    assert step_flops(GPT, shaped("train", batch=3, length=4)) == 3 * 3 * forward
    again = step_flops(GPT, shaped("train", batch=3, length=4, recompute=True))
    assert again == 3 * (3 * forward + 2 * layer)


def test_a_bert_in_training_computes_the_logits_of_hidden_tokens_only():
    scored, train = (shaped(mode, batch=1, length=16) for mode in ("infer", "train"))
    layers = step_flops(dataclasses.replace(random_models.BERT, lm_head=False), scored)
    head = 2 * 50 * 32
    assert step_flops(random_models.BERT, scored) == layers + 16 * head
    # Positions 1, 8 and 15.
    trained = step_flops(random_models.BERT, train)
    assert trained == 3 * (layers + 3 * head)


# --- weights without a file ---


def test_a_rank_draws_its_shard_only():
    config = dataclasses.replace(GPT, hidden_size=64, kv_channels=16)
    table = parameters(config)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    drawn = Drawn(config, table[name], seed=3)
    half = drawn.read(0, slice(32, 64))
    assert half.shape == (32, 64) and drawn.shape == (64, 64)
    assert not torch.equal(half, drawn.read(0, slice(0, 32)))
    assert torch.equal(half, drawn.read(0, slice(32, 64)))
    assert float(half.std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(drawn.read(0, torch.arange(32, 64)), half)
    assert drawn.read(0, slice(64, 64)).shape == (0, 64)  # a rank without rows
    # Whole, as the ranks read what they share, it is what a new model has.
    assert torch.equal(drawn.read(), initial_tensor(config, table[name], seed=3).read())
    norm = Drawn(config, table["decoder.final_layernorm.weight"], seed=3)
    assert torch.equal(norm.read(), torch.ones(64))


# --- measurements ---


@pytest.mark.parametrize(
    ("base", "mode", "collectives", "large"),
    [
        # Embedding and two of each layer carry `[batch, seq, hidden]`; three small ones of the
        # log-probabilities.
        (random_models.GPT, "infer", 1 + 4 + 3, 5),
        # For each of two micro-batches those, and backward two of each layer and one of the output
        # layer; then the gradient's norm, and the sums of the step.
        (random_models.GPT, "train", 2 * (5 + 5 + 3) + 2, 10),
        (random_models.BERT, "infer", 1 + 4 + 3, 5),
        # The output layer has the hidden tokens only: one of eight in each row.
        (random_models.BERT, "train", 2 * (5 + 5 + 3) + 2, 9),
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_real_steps_are_measured_on_the_ranks(
    base: ModelConfig, mode: str, collectives: int, large: int, tp: int
):
    micro_batch = 2 if mode == "train" else None
    options = dataclasses.replace(FEW, mode=mode, micro_batch=micro_batch)
    per_rank = run_ranks(tp, quickly, BenchPoint(tp, "tiny", base), options)
    first = per_rank[0]
    assert len(first.step_seconds) == 2 and min(first.step_seconds) > 0
    assert first.peak_tflops > 0 and first.busy_over_alone > 0
    assert first.threads == 1 and first.device_name
    for other in per_rank[1:]:  # times differ by rank, what is reported does not
        assert other.step_seconds == first.step_seconds
        assert other.peak_tflops == first.peak_tflops
        assert other.all_reduce_seconds == first.all_reduce_seconds
    if tp == 1:
        assert (first.all_reduces, first.all_reduce_bytes, first.all_reduce_seconds) == (0, 0, 0)
        assert first.busy_over_alone == 1.0
        return
    assert first.all_reduces == collectives
    carried = large * 3 * 8 * 32 * 4
    assert carried < first.all_reduce_bytes < 1.1 * carried
    assert first.all_reduce_seconds > 0


@pytest.mark.parametrize("changes", [{"recompute": True}, {"dtype": "bfloat16"}])
def test_training_takes_its_options(changes: dict[str, Any]):
    options = dataclasses.replace(FEW, mode="train", attention_dropout=0.0, **changes)
    (result,) = run_ranks(1, quickly, POINT, options)
    assert len(result.step_seconds) == 2


def test_a_loss_that_is_not_finite_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_run, "LEARNING_RATE", 1e30)
    with pytest.raises(InputError, match="step 2 in float32 is not finite"):
        measure_point(POINT, dataclasses.replace(FEW, mode="train"))


def counted_around(size: int) -> dict[tuple[int, torch.dtype], int]:
    """Return the all-reduces that are counted where one runs before, three inside, one after."""
    sums = [torch.ones(n) for n in (5, 5, 7)]
    torch.distributed.all_reduce(torch.ones(9))
    counter = AllReduceCounter()
    with pytest.raises(KeyError), counter:
        for values in sums:
            torch.distributed.all_reduce(values)
        raise KeyError
    torch.distributed.all_reduce(torch.ones(9))
    assert [values[0] for values in sums] == [size] * 3
    return dict(counter.counts)


def test_all_reduces_are_counted_for_a_step_only():
    """What runs before and after does not count, also after an exception."""
    for counts in run_ranks(2, counted_around, 2):
        assert counts == {(5, torch.float32): 2, (7, torch.float32): 1}


def test_products_go_on_for_their_time_and_at_least_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_run, "PRODUCT_SECONDS", 0.0)
    cpu = torch.device("cpu")
    assert len(bench_run.product_seconds(cpu, torch.bfloat16, 8)) == 2
    monkeypatch.setattr(bench_run, "PRODUCT_SECONDS", 0.05)
    seconds = bench_run.product_seconds(cpu, torch.float32, 64)
    assert len(seconds) > 2 and min(seconds) > 0


def test_no_larger_product_is_tried_after_a_slow_one(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def product_seconds(device: torch.device, dtype: torch.dtype, side: int) -> list[float]:
        tried.append(side)
        return {10: [2.0, 1.0], 20: [4.0, 3.0]}[side]

    monkeypatch.setattr(bench_run, "SIDES", {"cpu": (10, 20, 30)})
    monkeypatch.setattr(bench_run, "product_seconds", product_seconds)
    # 2 * 20**3 / 3 beats 2 * 10**3 / 1.
    assert bench_run.products(torch.device("cpu"), torch.float32) == (16_000 / 3, 1.0)
    assert tried == [10, 20]


# --- series ---


def test_weak_scaling_is_the_papers_table_1_with_figure_5():
    series = paper_series("weak", load_paper(), [1, 2, 4, 8])
    shapes = [
        (c.num_layers, c.hidden_size, c.num_attention_heads, c.kv_channels, c.ffn_hidden_size)
        for c in (point.config for point in series.points)
    ]
    assert shapes == [
        (40, 1536, 16, 96, 6144),
        (54, 1920, 20, 96, 7680),
        (64, 2304, 24, 96, 9216),
        (72, 3072, 32, 96, 12288),
    ]
    assert {point.config.vocab_size for point in series.points} == {51_200}
    for point, billions in zip(series.points, (1.2, 2.5, 4.2, 8.3), strict=True):
        assert num_parameters(point.config) == pytest.approx(billions * 1e9, rel=0.02)
        assert point.model == f"gpt2-{billions}b"
    assert [point.published for point in series.points] == [1.0, 0.95, 0.82, 0.77]
    assert series.paper and series.paper_batch == 8


def test_strong_scaling_is_the_papers_table_8():
    series = paper_series("strong", load_paper(), [1, 2, 4, 8])
    assert [point.published for point in series.points] == [1.0, 1.64, 2.34, 2.98]
    layers = 40 * (12 * 1536**2 + 13 * 1536) + 2 * 1536
    whole = layers + (51_200 + 1024) * 1536
    assert {num_parameters(point.config) for point in series.points} == {whole}


def test_the_published_figures_are_those_of_the_file():
    paper = json.loads(json.dumps(load_paper()))
    paper["figure5"]["model_parallel"][1]["efficiency_percent"] = 50
    paper["table8"]["rows"][1]["speedup"] = 1.25
    assert paper_series("weak", paper, [2]).points[0].published == 0.5
    assert paper_series("strong", paper, [2]).points[0].published == 1.25


def test_a_scaled_series_by_hand():
    """A tenth of heads of 96 channels is 9.6, of which 8 is the nearest multiple of 8."""
    series = paper_series("weak", load_paper(), [1, 2, 4, 8], scale=0.1)
    shapes = [
        (c.num_layers, c.hidden_size, c.num_attention_heads, c.ffn_hidden_size, c.vocab_size)
        for c in (point.config for point in series.points)
    ]
    assert shapes == [
        (4, 128, 16, 512, 512),
        (5, 160, 20, 640, 512),
        (6, 192, 24, 768, 512),
        (7, 256, 32, 1024, 512),
    ]
    assert series.scale == 0.1


@pytest.mark.parametrize("factor", [0.03, 0.1, 0.25, 0.3, 0.5, 0.77, 0.95])
def test_a_scaled_model_divides_as_the_whole_one_does(factor: float):
    for point in paper_series("weak", load_paper(), [1, 2, 4, 8]).points:
        small = scaled(point.config, factor)
        heads = point.config.num_attention_heads
        assert small.num_attention_heads == small.num_query_groups == heads
        assert small.hidden_size == heads * small.kv_channels and small.kv_channels % 8 == 0
        assert point.tp in allowed_tp(small)
        assert small.ffn_hidden_size == 4 * small.hidden_size
        assert small.vocab_size % 128 == 0
        assert small.hidden_size / point.config.hidden_size == pytest.approx(factor, abs=0.06)
        assert small.num_layers / point.config.num_layers == pytest.approx(factor, abs=0.02)


def test_scaling_never_enlarges():
    assert scaled(GPT, 1.0) is GPT
    narrow = dataclasses.replace(GPT, kv_channels=4, hidden_size=16, num_layers=1)
    small = scaled(narrow, 0.9)
    assert (small.kv_channels, small.hidden_size, small.num_layers) == (4, 16, 1)
    assert small.vocab_size == narrow.vocab_size == 50


def test_the_output_layer_keeps_its_share_of_a_scaled_model():
    whole = paper_series("weak", load_paper(), [1]).points[0].config
    half = scaled(whole, 0.5)

    def share(config: ModelConfig) -> float:
        head = config.vocab_size * config.hidden_size
        return head / (12 * config.num_layers * config.hidden_size**2)

    assert share(half) == pytest.approx(share(whole), rel=0.01)


@pytest.mark.parametrize(
    ("text", "sizes"), [("auto", None), ("4,1,2,2", [1, 2, 4]), (" 8 ", [8]), ("1, 2", [1, 2])]
)
def test_sizes_are_read_in_order(text: str, sizes: list[int] | None):
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "two", "1;2", "1.5"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="must be comma-separated sizes"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["0", "1.1", "-0.5", "half", "nan", ""])
def test_what_is_no_scale_is_refused(text: str):
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        parse_scale(text)
    assert tuple(parse_scale(text) for text in ("auto", "0.25", "1")) == (
        None,
        0.25,
        1.0,
    )


def test_the_usual_sizes_are_those_with_a_core(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_study, "cores", lambda: 6)
    assert usual_sizes("cpu") == [1, 2, 4]
    three_heads = random_models.config(num_attention_heads=3, hidden_size=24, ffn_hidden_size=96)
    assert usual_sizes("cpu", three_heads) == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert usual_sizes("cuda") == [1, 2, 4, 8]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert usual_sizes("cuda") == [1]


def test_what_the_paper_has_no_figure_for_is_refused():
    with pytest.raises(InputError, match="no figure for tp 3, only for 1, 2, 4, 8"):
        paper_series("weak", load_paper(), [1, 3])
    with pytest.raises(InputError, match="--study 'middling' is unknown"):
        paper_series("middling", load_paper(), [1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mode": "guess"}, "--mode 'guess' is unknown; use infer or train"),
        ({"micro_batch": 2}, "belong to --mode train"),
        ({"recompute": True}, "belong to --mode train"),
        ({"attention_dropout": 1.0}, "--attention-dropout is 1.0; it must lie in"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(OPTIONS, **changes)


def test_rows_are_filled_from_model_and_options():
    large = BenchPoint(2, "gpt2-355m", named_config("gpt2-355m"))
    assert (OPTIONS.batch, OPTIONS.forward_rows, OPTIONS.row_length(large.config)) == (8, 8, 1024)
    assert dataclasses.replace(OPTIONS, mode="train", micro_batch=3, batch=2).forward_rows == 2
    assert OPTIONS.row_length(GPT) == 16  # its positions
    check_point(large, OPTIONS)
    with pytest.raises(InputError, match="more than the 16 positions of tiny"):
        check_point(POINT, dataclasses.replace(OPTIONS, seq_length=17))
    headless = BenchPoint(1, "tuned", dataclasses.replace(random_models.BERT, lm_head=False))
    check_point(headless, OPTIONS)
    with pytest.raises(InputError, match="tuned has no language-model head"):
        check_point(headless, dataclasses.replace(OPTIONS, mode="train"))


# --- memory ---


def test_the_need_of_a_rank_is_the_memory_models():
    point = BenchPoint(2, "tiny", GPT)
    need = evaluation_memory(GPT, tp=2, itemsize=4, batch_tokens=8 * 16, scored_rows=8 * 16)
    assert rank_bytes(point, OPTIONS) == need.on_cpu().total + PROCESS
    train = dataclasses.replace(OPTIONS, mode="train", attention_dropout=0.0)
    whole = rank_bytes(point, train)
    assert whole > rank_bytes(point, OPTIONS)
    for smaller in ({"micro_batch": 1}, {"recompute": True}):
        assert rank_bytes(point, dataclasses.replace(train, **smaller)) < whole


def test_ranks_share_the_memory_of_the_machine():
    assert free_bytes("cpu", 4) == pytest.approx(free_bytes("cpu", 1) / 4, rel=0.2)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bench_study, "free_on_gpus", lambda: (70, 50))
    assert (free_bytes("cuda", 1), free_bytes("cuda", 2)) == (70, 50)
    with pytest.raises(InputError, match="tp 4 needs 4 GPUs, one for each rank, but 2 can be seen"):
        free_bytes("cuda", 4)


def weak(scale: float) -> BenchSeries:
    return paper_series("weak", load_paper(), [1, 2], scale=scale)


def test_what_does_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_study, "free_bytes", lambda device, ranks: 10**10 // ranks)
    told = r"tp 2 \(gpt2-2.5b\) needs [0-9.]+ GB on each of 2 ranks, 5.0 GB are free for each"
    with pytest.raises(InputError, match=rf"{told}; shrink the models with --scale") as caught:
        fit(weak, OPTIONS)
    assert "--recompute" not in str(caught.value)
    # Under a launcher the ranks of this machine count: a node for each has more.
    monkeypatch.setattr(bench_study, "free_bytes", lambda device, ranks: 10**11 // ranks**5)
    with pytest.raises(InputError, match="tp 2"):
        fit(weak, OPTIONS)
    assert fit(weak, OPTIONS, local_ranks=1).scale == 1.0
    train = dataclasses.replace(OPTIONS, mode="train")
    with pytest.raises(InputError, match="a --micro-batch, or --recompute"):
        fit(weak, train)


def test_auto_takes_the_largest_scale_that_fits(monkeypatch: pytest.MonkeyPatch):
    wanted = weak(0.45)
    needs = [rank_bytes(point, OPTIONS) for point in wanted.points]
    monkeypatch.setattr(bench_study, "free_bytes", lambda device, ranks: max(needs))
    assert fit(weak, AUTO) == wanted
    monkeypatch.setattr(bench_study, "free_bytes", lambda device, ranks: PROCESS)
    with pytest.raises(InputError, match=r"tp 1 \(gpt2-1.2b\) needs [^;]+; leave it out"):
        fit(weak, AUTO)


# --- efficiencies, limits, the record ---


def record_of(
    kind: str, sizes: list[int], seconds: list[list[float]], *, cores: int = 16, **figures: Any
) -> dict[str, Any]:
    """Return the record of the paper's series, scaled by 0.1, with made-up times."""
    series = paper_series(kind, load_paper(), sizes, scale=0.1)
    times = [measured(times, **figures) for times in seconds]
    return bench_record(series, OPTIONS, times, cores=cores)


def test_weak_efficiency_is_the_rate_of_a_rank_by_hand():
    """Rows of 1,024 tokens, 8 of them; the second model has more work, on two ranks."""
    first = 4 * (1024 * 24 * 128**2 + 4 * 1024**2 * 128) + 1024 * 2 * 512 * 128
    second = 5 * (1024 * 24 * 160**2 + 4 * 1024**2 * 160) + 1024 * 2 * 512 * 160
    record = record_of("weak", [1, 2], [[2.0, 3.0, 1.0], [5.0]])
    one, two = record["points"]
    assert one["seconds_per_step"] == 2.0  # the median
    assert one["tflops_per_rank"] == pytest.approx(8 * first / 2.0 / 1e12)
    assert two["tflops_per_rank"] == pytest.approx(8 * second / 5.0 / 2 / 1e12)
    assert (one["efficiency"], one["published_relative"]) == (1.0, 1.0)
    assert two["efficiency"] == pytest.approx((second / 5.0 / 2) / (first / 2.0))
    assert two["published"] == two["published_relative"] == 0.95
    assert "speedup" not in two
    assert one["tokens_per_second"] == 8 * 1024 / 2.0
    assert one["share_of_peak"] == pytest.approx(8 * first / 2.0 / 1e11)


def test_strong_speed_up_is_the_ratio_of_times_by_hand():
    record = record_of("strong", [1, 2, 4], [[10.0], [6.25], [5.0]])
    assert [p["speedup"] for p in record["points"]] == [1.0, 1.6, 2.0]
    assert [p["efficiency"] for p in record["points"]] == [1.0, 0.8, 0.5]
    assert [p["published_relative"] for p in record["points"]] == [1.0, 1.64, 2.34]


def test_a_series_that_starts_at_two_ranks_is_its_own_measure():
    record = record_of("strong", [2, 8], [[10.0], [5.0]])
    last = record["points"][1]
    assert (last["speedup"], last["efficiency"]) == (2.0, 0.5)
    assert last["published"] == 2.98
    assert last["published_relative"] == pytest.approx(2.98 / 1.64)
    assert any("relative to tp 2" in note for note in record["not_as_in_the_paper"])


def test_a_point_alone_is_related_to_nothing():
    (point,) = record_of("weak", [4], [[1.0]])["points"]
    assert point["efficiency"] is None and point["published_relative"] is None
    assert point["published"] == 0.82


def test_the_record_says_what_limits_cpu_ranks():
    record = record_of(
        "weak", [1, 4], [[1.0], [1.0]], cores=2, busy_over_alone=0.48, all_reduces=13
    )
    one, four = record["points"]
    assert (one["cores_per_thread"], four["cores_per_thread"]) == (1.0, 0.5)
    assert four["all_reduce_share"] == 0.25
    told = "\n".join(record["limits"])
    assert "they share its 2 core(s)" in told
    assert "4 ranks share 2 core(s): at most 0.50 of a core for each thread" in told
    assert "tp 4: with all ranks busy, a rank's matrix products run at 48%" in told
    assert "the 13 all-reduces of a step (2.0 MB) would take about 25% of it" in told
    assert "something else ran" not in told and "1 ranks share" not in told
    # One rank with two threads on two cores lacks nothing.
    assert record_of("weak", [1], [[1.0]], cores=2, threads=2)["limits"] == []


def test_unsteady_steps_and_failures_are_told():
    record = record_of("weak", [1], [[1.0, 1.0, 1.3]])
    assert any("its steps took 1 s to 1.3 s" in sentence for sentence in record["limits"])
    assert record_of("weak", [1], [[1.0, 1.0, 1.1]])["limits"] == []
    series = paper_series("weak", load_paper(), [1, 2])
    record = bench_record(series, OPTIONS, [measured([1.0])], cores=2, failed="tp 2 failed")
    assert len(record["points"]) == 1 and record["limits"][-1] == "tp 2 failed"


def test_what_is_not_as_in_the_paper_is_told():
    told = record_of("weak", [1], [[1.0]])["not_as_in_the_paper"]
    assert told == [
        # 4 * 1,024 * 128 of that, 24 * 128**2 of the matrices, for each layer; the output layer.
        "models scaled by 0.1: not the paper's sizes; attention, which grows with --seq-length, "
        f"is {4 * 524_288 / (4 * (524_288 + 393_216) + 131_072):.0%} of the first one's operations",
        "forward passes; the paper's figures are of training",
        "a processor; the paper's devices are V100 GPUs",
    ]
    series = paper_series("weak", load_paper(), [1])
    options = BenchOptions(device="cuda", dtype="float16", mode="train", batch=4, seq_length=512)
    figures = measured([1.0], device_name="Tesla V100-SXM3-32GB")
    record = bench_record(series, options, [figures], cores=2)
    assert record["not_as_in_the_paper"] == [
        "4 rows a step, in the paper 8",
        "rows of 512 tokens, in the paper 1,024",
    ]
    assert record["limits"] == [] and record["points"][0]["cores_per_thread"] is None
    other = model_series("tiny", GPT, [1])
    record = bench_record(other, OPTIONS, [measured([1.0])], cores=2)
    assert record["not_as_in_the_paper"] == [] and record["points"][0]["published"] is None


def test_the_record_survives_its_file(tmp_path: Path):
    record = record_of("weak", [1, 2], [[1.0], [math.pi]])
    assert read(write_json(tmp_path / "bench.json", record)) == record
    assert (record["task"], record["protocol"]) == ("bench", "weak-scaling")
    settings = record["settings"]
    assert (settings["scale"], settings["device"], settings["threads_per_rank"]) == (0.1, "cpu", 1)
    assert "vocabulary x 0.01" in settings["scaling"]
    assert record["versions"]["torch"]


def test_the_table_shows_both_figures_and_the_scale():
    text = bench_text(record_of("strong", [1, 2], [[10.0], [6.25]]))
    assert text.startswith("strong scaling of the 1.2B model of the paper's Table 8, SCALED BY 0.1")
    (line,) = (line for line in text.splitlines() if line.startswith("   2 "))
    assert "gpt2-1.2b x 0.1" in line and line.split()[-3:] == ["1.60", "80%", "1.64"]
    assert max(len(line) for line in text.splitlines()) < 140
    whole = model_series("tiny", GPT, [1])
    text = bench_text(bench_record(whole, OPTIONS, [measured([0.5])], cores=2))
    assert text.startswith("throughput of tiny: inference, float32, cpu")
    assert "SCALED" not in text and "efficiency" not in text and "paper" not in text
    assert "500 ms" in text


def test_rates_are_shown_in_a_unit_that_suits_them():
    assert "GFLOP/s a rank" in bench_text(record_of("weak", [1], [[1.0]]))
    assert "TFLOP/s a rank" in bench_text(record_of("weak", [1], [[1.0]], peak_tflops=400.0))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["weak", "strong"])
@pytest.mark.parametrize("sizes", [[1], [2], [1, 2, 4, 8]])
def test_the_plot_is_a_png(kind: str, sizes: list[int], tmp_path: Path):
    record = record_of(kind, sizes, [[1.0]] * len(sizes))
    path = tmp_path / "new" / "bench.png"
    plot_bench(read(write_json(tmp_path / "bench.json", record)), path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = imread(path).shape
    assert width == 1000 and height > 400
    assert [file.name for file in path.parent.iterdir()] == ["bench.png"]


def test_a_plot_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name another file with --plot"):
        plot_bench(record_of("weak", [1], [[1.0]]), tmp_path / "file" / "bench.png")


# --- the command ---


def test_a_checkpoint_on_one_and_two_ranks(folder: Path, tmp_path: Path):
    output, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    ended = as_user(
        "bench", "--ckpt", folder / "gpt", "--tp", "2,1", *QUICK, "--output", output, "--plot", plot
    )
    assert ended.code == 0, ended.err
    assert "measuring tp 1 ...\nmeasuring tp 2 ...\n" in ended.err
    assert ended.out.startswith("strong scaling of gpt: inference, float32, cpu\n")
    record = read(output)
    assert [point["tp"] for point in record["points"]] == [1, 2]
    for point in record["points"]:
        assert point["parameters"] == num_parameters(CONFIG)
        assert point["tokens_per_second"] * point["seconds_per_step"] == pytest.approx(2 * 32)
        expected = step_flops(CONFIG, shaped("infer", batch=2, length=32)) / 1e12
        assert point["tflop_per_step"] == pytest.approx(expected)
        total = point["tflops_per_rank"] * point["tp"] * point["seconds_per_step"]
        assert total == pytest.approx(expected)
        share = point["tflops_per_rank"] / point["peak_tflops"]
        assert point["share_of_peak"] == pytest.approx(share)
    assert record["points"][0]["all_reduces"] == 0 < record["points"][1]["all_reduces"]
    assert record["settings"]["threads_per_rank"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_scaled_study_in_training_on_two_ranks(tmp_path: Path):
    output = tmp_path / "bench.json"
    ended = as_user(
        "bench", "--study", "weak", "--scale", "0.03", "--tp", 2, "--mode", "train", *QUICK,
        "--seq-length", 16, "--micro-batch", 1, "--output", output,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "scaled by 0.03" in ended.err and "SCALED BY 0.03: training" in ended.out
    record = read(output)
    (point,) = record["points"]
    assert (point["num_layers"], point["hidden_size"], point["published"]) == (2, 160, 0.95)
    assert record["settings"]["micro_batch"] == 1


def test_under_a_launcher_its_ranks_are_measured(folder: Path, tmp_path: Path):
    output = tmp_path / "bench.json"
    torchrun = ("-P", "-m", "torch.distributed.run", *TORCHRUN, "-m", "mlm_eval")
    ended = as_user("bench", "--ckpt", folder / "gpt", *QUICK, "--output", output, command=torchrun)
    assert ended.code == 0, ended.err
    assert ended.out.count("throughput of gpt") == 1  # rank 0 alone prints
    assert [point["tp"] for point in read(output)["points"]] == [2]


def test_running_ranks_fit_one_size_only():
    world = World(rank=0, size=2, local_rank=0, local_size=2, source="torchrun")
    assert command._of_world(None, world) == [2] == command._of_world([2], world)
    assert command._of_world([1, 2], None) == [1, 2] and command._of_world(None, None) is None
    with pytest.raises(InputError, match=r"2 rank\(s\) are running, so only tp 2 can be measured"):
        command._of_world([1, 2], world)


def test_wrong_input_that_only_the_ranks_find_ends_the_run(tmp_path: Path):
    """Training cannot copy key and value heads; all ranks find it when they begin."""
    config = random_models.config(random_models.LLAMA, num_query_groups=1)
    write_megatron_torch(random_models.checkpoint(config), tmp_path / "llama", tp=1)
    output = tmp_path / "bench.json"
    ended = as_user(
        "bench", "--ckpt", tmp_path / "llama", "--tp", 2, "--mode", "train", *QUICK, "--output",
        output,
    )  # fmt: skip
    assert ended.code == 2 and ended.out == "", ended
    assert ended.err.splitlines()[-1].startswith("mlm-eval: cannot train this model over tp=2")
    assert "Traceback" not in ended.err and not output.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give one of --ckpt C, --model NAME"),
        (["--ckpt", "x", "--model", "gpt2-tiny"], "give one of --ckpt C, --model NAME"),
        (["--study", "weak", "--model", "gpt2-tiny"], "give one of --ckpt C, --model NAME"),
        (["--model", "gpt5"], "no model is called 'gpt5'"),
        (["--ckpt", "/nowhere"], "/nowhere does not exist"),
        (["--model", "gpt2-tiny", "--tp", "1,3"], "cannot split this model over tp=3"),
        (["--study", "weak", "--tp", "1,6"], "has no figure for tp 6"),
        (["--study", "odd"], "--study 'odd' is unknown"),
        (["--study", "weak", "--set", "num_layers=1"], "--study takes the paper's"),
        (["--model", "gpt2-tiny", "--scale", "2"], "--scale '2'"),
        (["--ckpt", "x", "--scale", "0.5"], "a checkpoint has its size"),
        (["--model", "gpt2-tiny", "--output", "/"], "it is a folder"),
        (["--model", "gpt2-tiny", "--seq-length", 2000], "the 1024 positions of gpt2-tiny"),
        (["--model", "gpt2-tiny", "--mode", "dream"], "--mode 'dream' is unknown"),
        (["--model", "gpt2-tiny", "--dtype", "int4"], "--dtype 'int4' is unknown"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(run, options: list[object], told: str):
    assert_one_sentence(run("bench", *options, "--device", "cpu"), told)


def test_what_does_not_fit_is_one_sentence(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_study, "free_bytes", lambda device, ranks: 10**9)
    ended = run("bench", "--study", "weak", "--tp", "1,8", "--mode", "train", "--device", "cpu")
    assert_one_sentence(ended, "tp 1 (gpt2-1.2b) needs", "1.0 GB are free", "--scale")


def failing_at_two(result: LaunchResult, seen: list[int | None]) -> Any:
    """Return a `launch` that leaves figures where rank 0 would for one rank, and fails for two."""

    def launch(argv: list[str], *, ranks: int, device: str, threads: int | None) -> LaunchResult:
        assert argv[:2] == ["bench", "--job"] and device == "cpu"
        seen.append(threads)
        if ranks > 1:
            return result
        path = Path(argv[2])
        job = json.loads(path.read_text())
        assert BenchOptions(**job["options"]).device == "cpu"
        assert ModelConfig(**job["config"]).family == "gpt"
        write_json(path.with_suffix(".measured.json"), dataclasses.asdict(measured([1.0])))
        return LaunchResult(0)

    return launch


def test_what_was_measured_before_a_failure_is_kept(run, tmp_path, monkeypatch):
    """Also: a rank has as many threads at every size, else more ranks would be slower ranks."""
    output, threads = tmp_path / "bench.json", []
    monkeypatch.setattr(command, "cores", lambda: 8)
    died = LaunchResult(1, "rank 1 has died")
    monkeypatch.setattr(command, "launch", failing_at_two(died, threads))
    ended = run("bench", "--model", "gpt2-tiny", "--tp", "1,2", *QUICK, "--output", output)
    assert ended.code == 1 and ended.err.endswith("mlm-eval: rank 1 has died\n")
    assert "tp 2 and what follows it was not measured" in " ".join(ended.out.split())
    assert [point["tp"] for point in read(output)["points"]] == [1]
    assert threads == [4, 4]


def test_ctrl_c_at_a_size_ends_all(run, tmp_path, monkeypatch):
    output = tmp_path / "bench.json"
    monkeypatch.setattr(command, "launch", failing_at_two(LaunchResult(130), []))
    ended = run("bench", "--model", "gpt2-tiny", "--tp", "1,2", *QUICK, "--output", output)
    assert ended.code == 130 and ended.out == "" and not output.exists()
