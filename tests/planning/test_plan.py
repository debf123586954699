"""Plan: parameters, memory against a tracker of live tensors, operations, what fits."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import configs, random_models
from support.paths import PROJECT
from support.ranks import run_ranks
from support.runs.as_on_a_gpu import as_on_a_gpu
from support.runs.live_tensors import LiveTensors
from torch.utils.flop_counter import FlopCounterMode

from mlm_eval import cli
from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import resolve_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.parameters import (
    active_parameters,
    allowed_tp,
    num_parameters,
    parameters,
)
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.score import PairRequest, Request
from mlm_eval.model import attention
from mlm_eval.model.costs.flops import forward_flops
from mlm_eval.model.costs.memory import (
    OUTSIDE,
    EvaluationNeed,
    TrainingBatch,
    evaluation_memory,
    local_parameters,
    training_memory,
)
from mlm_eval.model.dropout import Dropout, sample_keys
from mlm_eval.model.initial import new_checkpoint, with_head
from mlm_eval.model.sizes import named_config
from mlm_eval.planning.plan import parse_throughput, plan_record
from mlm_eval.planning.plan_text import plan_text
from mlm_eval.tasks.language.settings import why_untrained
from mlm_eval.tasks.workloads import workloads
from mlm_eval.training.data import NO_LABEL, Sample, collate
from mlm_eval.training.objectives import CausalLM, MultipleChoice, Objective
from mlm_eval.training.replicas import Replicas

SAMPLE = PROJECT / "checkpoints" / "samples" / "gpt"

WIDE = random_models.config(
    random_models.GPT, hidden_size=64, kv_channels=16, ffn_hidden_size=256, vocab_size=128,
    max_position_embeddings=512, activation="gelu_tanh",
)  # fmt: skip
LLAMA = random_models.config(
    random_models.LLAMA, hidden_size=64, kv_channels=16, ffn_hidden_size=160, vocab_size=128,
    max_position_embeddings=512,
)  # fmt: skip
HYBRID = dataclasses.replace(
    LLAMA, position_embedding_type="none", mamba_layers=(0,), no_mixer_layers=(1,),
    no_mlp_layers=(0,), mamba_num_heads=8, mamba_head_dim=16, mamba_num_groups=2,
    mamba_state_dim=16, mamba_conv_width=4,
)  # fmt: skip
BERT = random_models.config(
    random_models.BERT, num_layers=3, hidden_size=64, kv_channels=16, ffn_hidden_size=256,
    vocab_size=128, max_position_embeddings=256,
)  # fmt: skip


# --- parameters ---


@pytest.mark.parametrize(("tp", "rows"), [(1, 50_304), (2, 50_432), (4, 50_688), (8, 51_200)])
def test_the_vocabulary_of_a_named_model_is_padded_as_megatron_does(tp: int, rows: int):
    assert named_config("gpt2-8.3b", tp=tp).vocab_size == rows


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"no model is called 'gpt3'.*gpt2-8\.3b"):
        named_config("gpt3")


@pytest.mark.parametrize("config", [WIDE, LLAMA, BERT], ids=["gpt", "llama", "bert"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_fullest_rank_has_as_many_weights_as_it_loads(config: ModelConfig, tp: int):
    config = dataclasses.replace(config, vocab_size=129)  # not divisible: rank 0 has most rows
    count = 0
    for parameter in parameters(config).values():
        index = parameter.index(0, tp)
        part = torch.empty(parameter.shape, device="meta")
        if isinstance(index, slice):
            part = part.narrow(parameter.rule.dim or 0, index.start, index.stop - index.start)
        elif index is not None:
            part = part.index_select(parameter.rule.dim or 0, index.to("meta"))
        count += part.numel()
    assert local_parameters(config, tp) == count


# --- memory of an evaluation ---


def scoring_peak(checkpoint: Checkpoint, dtype: str, batch_tokens: int, length: int) -> int:
    """Return the most bytes that live while windows are scored, the weights not counted."""
    engine = Engine.load(checkpoint, dtype=dtype, batch_tokens=batch_tokens)
    count = batch_tokens // length
    vocab_size = checkpoint.config.vocab_size
    tokens = torch.arange(32 * count + length + 1) % vocab_size
    windows = [tokens[32 * i : 32 * i + length + 1] for i in range(count)]
    requests = [Request(window, 32 if i else length) for i, window in enumerate(windows)]
    with as_on_a_gpu(), LiveTensors([*engine.model.parameters(), tokens]) as live:
        engine.score(requests)
    return live.peak


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        WIDE,
        dataclasses.replace(WIDE, activation="squared_relu"),
        dataclasses.replace(WIDE, activation="swiglu"),
        dataclasses.replace(WIDE, ffn_hidden_size=32),  # attention is what needs most
        LLAMA,
        dataclasses.replace(LLAMA, ffn_hidden_size=32),
        dataclasses.replace(
            WIDE,
            position_embedding_type="alibi",
            embedding_layernorm=True,
            max_position_embeddings=256,
        ),
        dataclasses.replace(WIDE, parallel_residual=True),
        dataclasses.replace(WIDE, vocab_size=20_000, hidden_size=16, kv_channels=4),  # logits
        HYBRID,
        dataclasses.replace(HYBRID, mamba_state_dim=64, mamba_head_dim=64),
    ],
    ids=[
        *("gelu", "squared_relu", "swiglu", "attention", "rotary", "rotary-attention"),
        *("alibi", "parallel", "logits", "hybrid", "wide states"),
    ],
)
def test_evaluation_memory_is_what_lives(config: ModelConfig, dtype: str):
    found = scoring_peak(new_checkpoint(config, seed=1), dtype, 4096, 256)
    need = evaluation_memory(
        config, tp=1, itemsize=resolve_dtype(dtype).itemsize, batch_tokens=4096, scored_rows=736
    )
    assert need.activations == pytest.approx(found, rel=0.15)


RELATIVE = random_models.config(
    configs.T5, num_layers=3, decoder_num_layers=3, hidden_size=64, kv_channels=16,
    ffn_hidden_size=256, vocab_size=128, max_position_embeddings=256,
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        RELATIVE,
        dataclasses.replace(RELATIVE, ffn_hidden_size=32),
        dataclasses.replace(RELATIVE, position_embedding_type="learned_absolute"),
        dataclasses.replace(RELATIVE, position_embedding_type="rope"),
        dataclasses.replace(RELATIVE, vocab_size=20_000, hidden_size=16, kv_channels=4),
    ],
    ids=["relative", "attention", "learned", "rotary", "logits"],
)
def test_evaluation_memory_of_a_t5_is_what_lives(config: ModelConfig, dtype: str):
    engine = Engine.load(new_checkpoint(config, seed=1), dtype=dtype, batch_tokens=4096)
    text, mask = torch.arange(256) % 128, torch.ones(256, dtype=torch.int64)
    tokens = torch.arange(257) % 128
    requests = [PairRequest(tokens, 256, text, mask) for _ in range(16)]
    with as_on_a_gpu(), LiveTensors([*engine.model.parameters(), text, mask, tokens]) as live:
        engine.score(requests)
    need = EvaluationNeed(config, resolve_dtype(dtype).itemsize, 4096)(1, 1)
    assert need.activations == pytest.approx(live.peak, rel=0.2)


# --- memory of a training ---


def training_peak(
    engine: Engine, objective: Objective, samples: list[Sample], batch: TrainingBatch
) -> int:
    """Return the most bytes that live in a second micro-batch beside weights and gradients."""
    replicas = Replicas(engine.model, objective, engine.mesh, mode="ddp", recompute=batch.recompute)
    data = collate(samples)
    dropout = None
    if batch.hidden_dropout or batch.attention_dropout:
        keys = sample_keys(1, 0, data.row_numbers)
        dropout = Dropout(keys, batch.hidden_dropout, batch.attention_dropout)
    peak = 0
    for _ in range(2):
        known = [*engine.model.parameters()]
        known += [p.grad for p in known if p.grad is not None]
        # The attention of a GPU: the CPU's own keeps a little less.
        as_on_a_gpu = mock.patch.object(attention, "_plain_on_the_cpu", lambda x: False)
        with LiveTensors(known) as live, as_on_a_gpu:
            with torch.autocast("cpu", torch.bfloat16, enabled=batch.half):
                loss, _ = replicas.module(data, dropout, 1.0)
            loss.backward()
        peak = live.peak
    return peak


def choice_samples(batch: TrainingBatch) -> list[Sample]:
    """Return samples of four rows each."""
    samples = []
    for index in range(batch.rows // 4):
        rows = [torch.arange(batch.length) % 128 for _ in range(4)]
        samples.append(Sample(rows, [torch.zeros_like(row) for row in rows], 1, index))
    return samples


CHOICE = dataclasses.replace(BERT, lm_head=False, binary_head=False, multichoice_head=True)


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("hidden", "attention"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.1)], ids=["none", "hidden", "both"]
)
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "squared_relu"])
def test_training_memory_is_what_lives(
    activation: str, hidden: float, attention: float, half: bool, recompute: bool
):
    config = dataclasses.replace(CHOICE, activation=activation)
    batch = TrainingBatch(
        rows=8,
        length=128,
        hidden_dropout=hidden,
        attention_dropout=attention,
        half=half,
        recompute=recompute,
    )
    bert = dataclasses.replace(BERT, activation=activation)
    engine = Engine.load(with_head(new_checkpoint(bert, seed=1), "multichoice_head"))
    found = training_peak(engine, MultipleChoice(), choice_samples(batch), batch)
    need = training_memory(config, batch, tp=1)
    assert need.activations == pytest.approx(found, rel=0.2 if recompute else 0.1)


ALIBI = dataclasses.replace(WIDE, position_embedding_type="alibi", parallel_residual=True)


@pytest.mark.parametrize("config", [WIDE, LLAMA, ALIBI], ids=["gpt", "llama", "alibi"])
def test_training_memory_of_a_language_model(config: ModelConfig):
    config = dataclasses.replace(config, vocab_size=4000)
    batch = TrainingBatch(rows=4, length=128, predicted=4 * 128, attention_dropout=0.0)
    rows = [torch.arange(128) + i for i in range(4)]
    samples = [
        Sample([row], [torch.zeros_like(row)], torch.cat([row[1:], row.new_tensor([NO_LABEL])]), i)
        for i, row in enumerate(rows)
    ]
    engine = Engine.load(new_checkpoint(config, seed=1))
    found = training_peak(engine, CausalLM(), samples, batch)
    assert training_memory(config, batch, tp=1).activations == pytest.approx(found, rel=0.2)


def peaks_on_ranks(tp: int) -> tuple[int, int]:
    """Return what lives on a rank while it scores, and while it trains."""
    batch = TrainingBatch(rows=8, length=128)
    scored = scoring_peak(new_checkpoint(WIDE, seed=1), "float32", 4096, 256)
    engine = Engine.load(with_head(new_checkpoint(BERT, seed=1), "multichoice_head"), tp=tp)
    return scored, training_peak(engine, MultipleChoice(), choice_samples(batch), batch)


@pytest.mark.parametrize("tp", [2, 4])
def test_memory_of_tensor_parallel_ranks_is_what_lives(tp: int):
    for scored, trained in run_ranks(tp, peaks_on_ranks, tp):
        need = evaluation_memory(WIDE, tp=tp, itemsize=4, batch_tokens=4096, scored_rows=256)
        assert need.activations == pytest.approx(scored, rel=0.15)
        batch = TrainingBatch(rows=8, length=128)
        assert training_memory(CHOICE, batch, tp=tp).activations == pytest.approx(trained, rel=0.15)


def test_training_keeps_sixteen_bytes_for_each_weight_beside_the_activations():
    batch = TrainingBatch(rows=8, length=128)
    need = training_memory(CHOICE, batch, tp=1)
    assert need.total - need.activations == 16 * local_parameters(CHOICE, 1)
    alone = training_memory(CHOICE, dataclasses.replace(batch, accumulates=False), tp=1)
    # Gradients come as activations go: together they need less.
    assert alone.activations == need.activations - need.gradients


# --- floating-point operations ---


def planned(config: ModelConfig, **options: Any) -> dict[str, Any]:
    """Return the plan of a model for all of its tasks."""
    return plan_record(
        "it",
        lambda tp: config,
        workloads(config, **options),
        itemsize=2,
        batch_tokens=4096,
        throughput=1e12,
    )


def test_layers_that_differ_cost_what_their_products_cost():
    """Mamba-2, a matrix in a branch's place and MLPs of other widths, as torch counts products."""
    config = dataclasses.replace(
        LLAMA, num_layers=4, position_embedding_type="none", mamba_layers=(0, 3),
        linear_mixer_layers=(1,), no_mixer_layers=(2,), no_mlp_layers=(0,),
        linear_mlp_layers=(3,), ffn_hidden_size=160, layer_ffn_hidden_sizes=(0, 96, 160, 0),
        mamba_num_heads=8, mamba_head_dim=16, mamba_num_groups=2, mamba_state_dim=16,
        mamba_conv_width=4,
    )  # fmt: skip
    engine = Engine.load(new_checkpoint(config, seed=1))
    tokens = torch.arange(256)[None] % 128
    for last in (256, 10):
        counter = FlopCounterMode(display=False)
        with as_on_a_gpu(), counter, torch.inference_mode():
            engine.model(tokens, 256 - last)
        found = forward_flops(config, 256, last_rows=last, head_rows=0)
        # The convolution is no matrix product, and torch does not count it.
        convolved = 2 * 2 * 256 * 4 * (8 * 16 + 2 * 2 * 16)
        assert found - convolved == counter.get_total_flops()


def test_wikitext_costs_what_its_windows_cost():
    config = dataclasses.replace(WIDE, max_position_embeddings=1024)
    first = planned(config, task="wikitext103")["tasks"][0]
    engine = Engine.load(new_checkpoint(config, seed=1))
    tokens = torch.zeros(270_330, dtype=torch.int64)
    from mlm_eval.tasks.zero_shot.wikitext103 import strided_windows

    found = strided_windows(270_330, 1024, 32)
    assert len(found) == 8_417 and "8,417 windows" in first["title"]
    requests = [Request(tokens[start:stop], scored) for start, stop, scored in found]
    assert first["evaluation_flops"] == pytest.approx(engine.flops(requests), rel=1e-12)
    assert first["evaluation_seconds"] == pytest.approx(first["evaluation_flops"] / 1e12)


def test_the_345m_models_windows_cost_the_known_operations():
    """0.70 TFLOP for a window whose last layer and head see the scored rows only.

    By hand: 24 layers of h = 1,024 on s = 1,024 tokens are 24 L h^2 s + 4 L s^2 h, and the head is
    2 h V s, together 0.83 TFLOP with nothing cut.
    """
    (workload,) = workloads(named_config("gpt2-355m"), task="wikitext103")
    plan = planned(named_config("gpt2-355m"), task="wikitext103")
    assert sum(p.count for p in workload.passes) == 8_417
    assert plan["tasks"][0]["evaluation_flops"] / 8_417 == pytest.approx(0.70e12, rel=0.01)


def test_lambada_reads_and_scores_as_many_tokens_as_its_file():
    (workload,) = workloads(WIDE, task="lambada")
    assert sum(p.count for p in workload.passes) == 5_153
    assert sum(p.count * p.length for p in workload.passes) == 425_064
    assert sum(p.count * p.head_rows for p in workload.passes) == 6_542


@pytest.mark.realdata
def test_the_counts_are_those_of_the_papers_files(shared_data: Path):
    from mlm_eval.checkpoints.tokenizer import load_tokenizer
    from mlm_eval.tasks.zero_shot import lambada, wikitext103

    words = load_tokenizer(directory=shared_data / "gpt2")
    file = wikitext103.WikiTextOptions(data=str(shared_data / "wikitext-103" / "wiki.test.tokens"))
    text = wikitext103.WIKITEXT103.prepare(file, tokenizer=words, positions=1024)
    assert text.counts["tokenized_tokens"] == wikitext103.PAPER_TOKENS
    lines = lambada.ClozeOptions(data=str(shared_data / "lambada" / "lambada_test.jsonl"))
    passages = lambada.LAMBADA.prepare(lines, tokenizer=words, positions=1024)
    assert len(passages.requests) == lambada.PAPER_PASSAGES
    assert sum(request.length for request in passages.requests) == lambada.PAPER_READ_TOKENS
    assert passages.counts["target_tokens"] == lambada.PAPER_TARGET_TOKENS


def test_training_costs_three_forward_passes_and_recomputation_a_fourth():
    plain = planned(BERT, task="race")["tasks"][0]
    batch = TrainingBatch(rows=8, length=1, recompute=True)
    again = planned(BERT, task="race", batch=batch)["tasks"][0]
    (workload,) = workloads(BERT, task="race")
    assert workload.training is not None and workload.training.epochs == 3
    rows = sum(p.count for p in workload.training.passes)
    assert rows == 4 * 87_866
    epochs = 3 * plain["evaluation_flops"]
    forward = (plain["training_flops"] - epochs) / 9
    assert again["training_flops"] - epochs == pytest.approx(12 * forward)


@pytest.mark.parametrize(
    ("size", "epochs", "accumulates"), [("bert-336m", 12, True), (None, 12, True)]
)
def test_the_recipe_is_that_of_the_papers_size(size: str | None, epochs: int, accumulates: bool):
    (workload,) = workloads(BERT, task="qqp", size=size)
    assert workload.training is not None
    assert workload.training.epochs == epochs
    assert (workload.training.micro_batch < workload.training.global_batch) is accumulates
    (whole,) = workloads(BERT, task="qqp", size=size, batch=TrainingBatch(rows=128, length=1))
    assert whole.training is not None
    assert whole.training.micro_batch == whole.training.global_batch


def test_squad_means_both_versions_and_wrong_tasks_are_refused():
    assert [w.task for w in workloads(BERT, task="squad")] == ["squad1", "squad2"]
    with pytest.raises(InputError, match="--task race is not a task of a GPT model.*wikitext103"):
        workloads(WIDE, task="race")


@pytest.mark.parametrize(
    ("config", "task", "why"),
    [
        (HYBRID, "lm", "Mamba layers, which mlm-eval evaluates and does not train"),
        (dataclasses.replace(WIDE, parallel_residual=True), "lm", "does not write, so it cannot"),
        (dataclasses.replace(BERT, lm_head=False), "mlm", "no language-model head"),
    ],
    ids=["hybrid", "gpt-neox", "fine-tuned"],
)
def test_what_cannot_be_trained_has_no_training(config: ModelConfig, task: str, why: str):
    """`plan` shows no memory for a training that its command refuses."""
    assert why_untrained(config)
    planned = [work.task for work in workloads(config)]
    assert planned and task not in planned
    with pytest.raises(InputError, match=f"--task {task}: this model has .*{why}"):
        workloads(config, task=task)


# --- what fits ---


def test_what_fits_is_told_with_the_smallest_size():
    config = named_config("gpt2-2.5b")
    needs = workloads(config)
    limit = 6e9

    def plan(**options: Any) -> dict[str, Any]:
        return plan_record(
            "it", lambda tp: named_config("gpt2-2.5b", tp=tp), needs, itemsize=2,
            batch_tokens=32768, device_memory=limit, throughput=1e12, **options,
        )  # fmt: skip

    made = plan()
    totals = {entry["tp"]: entry["evaluation"]["total"] for entry in made["layouts"]}
    assert list(totals) == [1, 2, 4, 5, 10, 20]
    fitting = [tp for tp, total in totals.items() if total + OUTSIDE <= limit]
    assert made["smallest_tp"]["evaluation"] == min(fitting) == 2
    fits = {entry["tp"]: entry["evaluation"]["fits"] for entry in made["layouts"]}
    assert fits == {tp: tp in fitting for tp in totals}
    # Times are those of the size that fits.
    assert [w["tp"] for w in made["tasks"] if w["task"] == "wikitext103"] == [2]
    one = made["tasks"][0]
    assert one["evaluation_seconds"] == pytest.approx(one["evaluation_flops"] / 2e12)
    assert [entry["tp"] for entry in plan(tp=4)["layouts"]] == [4]
    with pytest.raises(InputError, match="cannot split this model over tp=3.*1, 2, 4, 5, 10, 20"):
        plan(tp=3)


@pytest.mark.parametrize(
    ("text", "value"),
    [("400TFLOPS", 4e14), ("1.5 PFLOP/s", 1.5e15), ("39tflops", 3.9e13), ("4e14", 4e14)],
)
def test_throughput_is_parsed(text: str, value: float):
    assert parse_throughput(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "80 apples", "nan"])
def test_what_is_no_rate_is_refused(text: str):
    with pytest.raises(InputError, match="--throughput .* is not a rate"):
        parse_throughput(text)


# --- the command ---


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int, str, str]:
    """Run `mlm-eval plan` in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["mlm-eval", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_the_command_plans_a_named_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = ("--model", "gpt2-8.3b", "--device-memory", "80GB", "--throughput", "400TFLOPS")
    code, out, err = run_cli(monkeypatch, capsys, *options)
    assert (code, err) == (0, "")
    assert "8,314,143,744 as the paper counts them" in out
    assert "smallest tp that fits: evaluation: 1, lm: 6" in out
    code, out, _ = run_cli(monkeypatch, capsys, *options, "--json", "--tp", "8")
    record = json.loads(out)
    (layout,) = record["layouts"]
    assert (layout["tp"], layout["vocab_size"]) == (8, 51_200)
    need = layout["evaluation"]
    assert need["total"] == need["weights"] + need["activations"] and need["fits"]
    assert need["weights"] == 2 * layout["parameters_per_rank"]


def test_small_models_are_planned_in_megabytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = ("--ckpt", "sample:gpt", "--task", "wikitext103", "--tp", "1")
    code, out, _ = run_cli(monkeypatch, capsys, *options)
    assert code == 0 and "0.00 GB" not in out
    assert re.search(r"1 +1,088,256 +2\.18 MB +\d+ MB", out)  # float16


def test_the_command_plans_sharded_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    line = ("--model", "bert-3.9b", "--task", "race", "--device-memory", "50GB", "--dp", "8")
    line += ("--micro-batch", "1", "--recompute", "--throughput", "100TFLOPS")
    code, out, _ = run_cli(monkeypatch, capsys, *line)
    assert code == 0 and "smallest tp that fits: evaluation: 1, race: 2" in out
    assert "micro-batch 1, ddp over dp 8)" in out and "on each of tp x 8 ranks" in out
    code, out, _ = run_cli(monkeypatch, capsys, *line, "--dp-mode", "fsdp2")
    assert "smallest tp that fits: evaluation: 1, race: 1" in out
    assert "micro-batch 1, fsdp2 over dp 8)" in out


def test_the_command_plans_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code, out, _ = run_cli(monkeypatch, capsys, "--ckpt", SAMPLE, "--json", "--device", "cpu")
    record = json.loads(out)
    assert code == 0
    assert record["num_parameters"] == 1_088_256 and record["allowed_tp"] == [1, 2, 4]
    assert {task["task"] for task in record["tasks"]} == {"wikitext103", "lambada", "lm"}
    # The sample has 256 positions: its windows are shorter, hence more.
    count = math.ceil((270_330 - 1 - 256) / 32) + 1
    assert record["tasks"][0]["title"] == f"WikiText-103, {count:,} windows of 256 tokens"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --ckpt C, or --model NAME"),
        (("--model", "gpt2-355m", "--ckpt", "x"), "give --ckpt C, or --model NAME"),
        (("--model", "gpt5"), "no model is called 'gpt5'"),
        (("--model", "bert-336m", "--tp", "3"), "cannot split"),
        (("--model", "bert-336m", "--device", "tpu"), "--device 'tpu' is unknown; use cuda or cpu"),
        (("--model", "bert-336m", "--dtype", "int8"), "--dtype 'int8' is unknown"),
        (("--model", "bert-336m", "--dp-mode", "zero"), "--dp-mode 'zero' is unknown; use ddp"),
        (("--model", "bert-336m", "--device-memory", "much"), "is not a size"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    code, out, err = run_cli(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err and len(err.splitlines()) == 1


# --- experts, and what does not fit a node --------------------------------------------------------

MIXTURE = dataclasses.replace(
    LLAMA, num_layers=3, num_experts=8, moe_layers=(1, 2), moe_ffn_hidden_size=96,
    moe_router_topk=2, moe_shared_expert_intermediate_size=64,
)  # fmt: skip
LATENT = dataclasses.replace(
    MIXTURE, multi_latent_attention=True, q_lora_rank=24, kv_lora_rank=16, qk_head_dim=16,
    qk_pos_emb_head_dim=8, v_head_dim=16, num_query_groups=LLAMA.num_attention_heads,
)  # fmt: skip


def test_active_parameters_are_those_of_a_model_with_as_many_experts_as_a_token_meets():
    """But for the routers, which know all experts."""
    for base in (MIXTURE, LATENT, dataclasses.replace(MIXTURE, activation="gelu")):
        fewer = dataclasses.replace(base, num_experts=base.moe_router_topk)
        routers = (base.num_experts - fewer.num_experts) * base.hidden_size * len(base.moe_layers)
        assert active_parameters(base) == num_parameters(fewer) + routers
    assert active_parameters(LLAMA) == num_parameters(LLAMA)


def test_experts_are_cut_by_columns_over_the_ranks():
    """Each rank has its share of every expert, whatever their number."""
    odd = dataclasses.replace(MIXTURE, num_experts=5)
    whole = parameters(odd)["decoder.layers.1.mlp.experts.linear_fc1.weight"]
    assert whole.numel(2) * 2 == whole.numel(1) and whole.shape[0] == 5
    halves = local_parameters(odd, 2)
    assert num_parameters(odd) / 2 < halves < 0.55 * num_parameters(odd)


def plan_of(config: ModelConfig, memory: float | None) -> dict[str, Any]:
    return plan_record(
        "a model", lambda _: config, [], itemsize=2, batch_tokens=64, device_memory=memory
    )


def test_what_needs_more_than_a_node_is_said_in_a_sentence():
    wide = dataclasses.replace(
        LLAMA, num_layers=1, hidden_size=4096, num_attention_heads=32, num_query_groups=32,
        kv_channels=128, ffn_hidden_size=1 << 17, vocab_size=1024,
    )  # fmt: skip
    assert plan_of(wide, None)["notes"] == []
    assert plan_of(wide, 80e9)["notes"] == []
    weights = 2 * local_parameters(wide, 16)
    [note] = plan_of(wide, OUTSIDE + 1.2 * weights)["notes"]
    assert "needs tp 16, more than one node of 8 devices" in note and "no pipeline" in note
    [note] = plan_of(wide, OUTSIDE + 1e6)["notes"]
    assert "no tp that divides the model" in note and "no pipeline evaluation" in note


@pytest.mark.parametrize("config", [MIXTURE, LATENT], ids=["experts", "latent"])
def test_the_text_names_active_parameters_and_operations(config: ModelConfig):
    record = plan_of(config, None)
    length = config.max_position_embeddings
    whole = forward_flops(config, length, last_rows=length, head_rows=length)
    assert record["flops_per_token"] == whole / length
    text = plan_text({**record, "settings": {**record["settings"], "dtype": "bfloat16"}})
    assert f"{record['active_parameters']:,} parameters for each token" in text
    assert "8 experts of 96 in 2 layers, 2 for each token" in text
    assert "GFLOP a token of a full text" in text


def test_a_model_without_attention_is_counted_at_every_size_it_allows():
    layers = tuple(range(HYBRID.num_layers))
    model = dataclasses.replace(
        HYBRID,
        mamba_layers=layers,
        no_mixer_layers=(),
        no_mlp_layers=layers,
        mamba_num_heads=16,
        mamba_num_groups=4,
    )
    sizes = allowed_tp(model)
    assert max(sizes) > model.num_attention_heads
    found = [
        evaluation_memory(model, tp=tp, itemsize=4, batch_tokens=64, scored_rows=4).weights
        for tp in sizes
    ]
    assert found == sorted(found, reverse=True)
