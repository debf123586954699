"""Models beyond dense ones in Megatron's formats: written at any sizes, read back bit by bit.

What megatron-core itself makes of the files is at the end.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import SHARED
from support import random_models
from support.folders.family_models import FAMILY_MODELS
from support.fuzz.core_process import run_core

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, YarnScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.megatron.write_dist import write_torch_dist
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import allowed_tp

DEEPSEEK = FAMILY_MODELS["deepseek"]
FAMILIES = SHARED / "oracles" / "families"


def assert_same(actual: Checkpoint, expected: Checkpoint) -> None:
    """The same model: settings, and every tensor bit by bit, heads of prediction too."""
    assert actual.config == expected.config
    for ours, theirs in (
        (actual.tensors, expected.tensors),
        (actual.prediction_heads, expected.prediction_heads),
    ):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name].read(), tensor.read()), name
    assert actual.provenance.warnings == [] and actual.provenance.pickle_classes == []


def layouts(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield sizes to write at: ranks, stages, experts dealt and cut in every way there is."""
    for tp in (1, 2, 4):
        yield {"tp": tp, "pp": 2}
        if config.num_experts:
            yield {"tp": tp, "ep": 2}
            yield {"tp": tp, "ep": 4, "etp": 1}
            yield {"tp": tp, "pp": 2, "ep": 2, "etp": 1}
            if tp == 4 and not config.add_bias_linear:
                yield {"tp": tp, "etp": 2}


def folders(target: Path) -> set[str]:
    return {path.parent.name for path in target.rglob("mp_rank_*/*.pt")}


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_what_is_written_reads_back_bit_equal(name: str, tmp_path: Path) -> None:
    source = random_models.checkpoint(FAMILY_MODELS[name])
    for sizes in layouts(source.config):
        written = write_megatron_torch(source, tmp_path / "torch", overwrite=True, **sizes)
        assert_same(open_checkpoint(written), source)
        # From one arrangement to the next, not from the source alone.
        source = open_checkpoint(
            shutil.copytree(written, tmp_path / "_".join(map(str, sizes.items())))
        )
    dist = open_checkpoint(write_torch_dist(source, tmp_path / "dist"))
    assert_same(dist, random_models.checkpoint(FAMILY_MODELS[name]))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"tp": 2, "ep": 2}, {"00_000", "00_001", "01_000", "01_001"}),
        ({"tp": 2, "ep": 2, "etp": 1}, {"00_000", "01_001"}),
        ({"tp": 4, "ep": 2, "etp": 2}, {"00_000", "01_000", "02_001", "03_001"}),
        ({"tp": 2, "etp": 1}, {"00", "01"}),
        ({"tp": 4, "ep": 2, "etp": 1}, {"00_000", "01_001", "02_000", "03_001"}),
        ({"ep": 2, "pp": 2}, {"00_000_000", "00_000_001", "00_001_000", "00_001_001"}),
    ],
)
def test_folders_are_those_that_the_ranks_of_a_run_load(
    sizes: dict[str, Any], expected: set[str], tmp_path: Path
) -> None:
    source = random_models.checkpoint(FAMILY_MODELS["mixtral"])
    written = write_megatron_torch(source, tmp_path / "out", **sizes)
    assert folders(written) == {f"mp_rank_{name}" for name in expected}
    ranks = []
    for path in written.rglob("model_optim_rng.pt"):
        args = torch.load(path, weights_only=False)["args"]
        assert args.world_size == len(expected)
        rank = args.rank % (args.world_size // sizes.get("pp", 1))
        numbers = [int(part) for part in path.parent.name.split("_")[2:]]
        assert rank % sizes.get("tp", 1) == numbers[0]
        etp = args.expert_tensor_parallel_size
        assert "ep" not in sizes or rank // etp % sizes["ep"] == numbers[-1]
        ranks.append(args.rank)
    assert sorted(ranks) == list(range(len(expected)))


def test_whole_experts_on_every_rank_are_read_and_a_lost_rank_is_told(tmp_path: Path) -> None:
    """Folders that Megatron loads at expert-tensor size 1, and itself writes a part of only."""
    source = random_models.checkpoint(FAMILY_MODELS["every second layer, with biases"])
    written = write_megatron_torch(source, tmp_path / "out", tp=2)
    args = torch.load(next(written.rglob("mp_rank_01/*.pt")), weights_only=False)["args"]
    assert args.expert_tensor_parallel_size == 1  # megatron-core takes biases no other way
    assert_same(open_checkpoint(written), source)
    shutil.rmtree(written / "release" / "mp_rank_01")
    with pytest.raises(InputError, match="only a part of its model.*ranks from 1 on"):
        open_checkpoint(written)


def test_a_cut_down_projection_is_told_by_its_args(tmp_path: Path) -> None:
    """A half of it may be wider than the latent alone, as whole ones are."""
    changes = {"kv_lora_rank": 6, "qk_pos_emb_head_dim": 8, "q_lora_rank": 8}
    source = random_models.checkpoint(dataclasses.replace(DEEPSEEK, **changes))
    assert_same(open_checkpoint(write_megatron_torch(source, tmp_path / "out", tp=2)), source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_that_chooses_experts_stays_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    source = random_models.checkpoint(DEEPSEEK)
    for write in (write_megatron_torch, write_torch_dist):
        written = open_checkpoint(write(source, tmp_path / write.__name__, tp=2, dtype=dtype))
        for name, tensor in written.tensors.items():
            kept = name.endswith("router.expert_bias")
            assert tensor.dtype == (torch.float32 if kept else dtype), name
            assert torch.equal(tensor.read(), source.tensors[name].read().to(tensor.dtype)), name


# ---- heads of multi-token prediction -----------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek", "mixtral", "every second layer, with biases"])
def test_heads_of_prediction_are_carried_along(name: str, tmp_path: Path) -> None:
    source = random_models.with_prediction_heads(random_models.checkpoint(FAMILY_MODELS[name]), 2)
    there = open_checkpoint(write_megatron_torch(source, tmp_path / "torch", tp=2, pp=2, ep=2))
    back = open_checkpoint(write_torch_dist(there, tmp_path / "dist"))
    assert_same(there, source)
    assert_same(back, source)
    assert back.provenance.args["mtp_num_layers"] == 2
    assert any("multi-token prediction" in note for note in back.provenance.notes)
    alone = dataclasses.replace(back, prediction_heads={})
    written = open_checkpoint(write_megatron_torch(alone, tmp_path / "alone"))
    assert not written.provenance.args.get("mtp_num_layers")  # Megatron would look for them


@pytest.mark.parametrize("part", ["enorm", "transformer_layer.mlp.router"])
def test_heads_that_differ_between_ranks_are_found(part: str, tmp_path: Path) -> None:
    source = random_models.with_prediction_heads(random_models.checkpoint(DEEPSEEK), 1)
    folder = write_megatron_torch(source, tmp_path / "out", tp=2)
    file = folder / "release" / "mp_rank_01" / "model_optim_rng.pt"
    saved = torch.load(file, weights_only=False)
    saved["model"][f"mtp.layers.0.{part}.weight"] += 0.001
    torch.save(saved, file)
    assert "1 replicated tensor(s) differ" in " ".join(open_checkpoint(folder).provenance.warnings)
    saved["model"][f"mtp.layers.0.{part}.weight"] += 9.0
    torch.save(saved, file)
    with pytest.raises(InputError, match=rf"mixes two checkpoints: mtp\.layers\.0\.{part}"):
        open_checkpoint(folder)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("mixtral", {"ep": 3}, "cannot deal 4 experts to ep=3.*ep in 1, 2, 4"),
        ("mixtral", {"tp": 2, "etp": 4}, "etp=4 ranks at tp=2.*etp in 1, 2"),
        ("windows and sinks", {"tp": 2, "etp": 2}, "experts with biases on one rank only"),
        ("geglu", {"ep": 2}, "--ep and --etp are for mixtures of experts"),
        ("geglu", {"names": "legacy"}, "Megatron v2.5 has no .*write core names"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    name: str, sizes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_megatron_torch(random_models.checkpoint(FAMILY_MODELS[name]), tmp_path / "x", **sizes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral", {"activation": "geglu_tanh"}, "tanh GELU in experts"),
        ("tanh geglu", {"glu_linear_offset": 1.0}, "clamped or shifted tanh GEGLU"),
        ("mixtral", {"moe_router_bias": True}, "bias in a router"),
        ("mixtral", {"moe_router_topk": 1}, "softmax over one chosen expert"),
        ("deepseek", {"softmax_scale": 0.4}, "factor of scores of its own"),
        ("deepseek", {"attention_output_gate": True}, "latent attention with gates"),
        ("deepseek", {"qk_l2_norm": True}, "latent attention with L2-normed"),
        ("deepseek", {"kv_lora_rank": 10, "q_lora_rank": 15}, "cut the latent of .* over the"),
        (
            "latents, YaRN",
            {"yarn": YarnScaling(4.0, 8, mscale=0.7, mscale_all_dim=0.5, round_range=False)},
            "has yarn = .*Megatron's args cannot say",
        ),
    ],
)
def test_what_megatron_core_does_not_have_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = random_models.checkpoint(dataclasses.replace(FAMILY_MODELS[name], **changes))
    for write in (write_megatron_torch, write_torch_dist):
        with pytest.raises(InputError, match=message):
            write(source, tmp_path / "out", tp=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [("geglu", "args.gated_linear_unit"), ("l2 norm", "qk_l2_norm"), ("windows and sinks", "YaRN")],
)
def test_what_megatron_lm_has_no_option_for_is_told(name: str, words: str, tmp_path: Path) -> None:
    source = random_models.checkpoint(FAMILY_MODELS[name])
    done = convert(source, "torch_dist", tmp_path / "out")
    assert any(words in warning for warning in done.warnings)


def test_a_conversion_keeps_the_experts_layout_unless_told_otherwise(tmp_path: Path) -> None:
    source = random_models.checkpoint(FAMILY_MODELS["mixtral"])
    convert(source, "megatron", tmp_path / "2", tp=2, ep=2)
    convert(open_checkpoint(tmp_path / "2"), "megatron", tmp_path / "kept")
    convert(open_checkpoint(tmp_path / "2"), "megatron", tmp_path / "one", tp=1, ep=1)
    assert folders(tmp_path / "kept") == folders(tmp_path / "2")
    assert folders(tmp_path / "one") == {"mp_rank_00"}
    with pytest.raises(InputError, match="--ep and --etp are for Megatron targets"):
        convert(source, "hf", tmp_path / "hf", ep=2)


# ---- genuine checkpoints -----------------------------------------------------------------------

GENUINE = (
    "dsv3_bf16_tp2",
    "dsv3_mtp_dist",
    "dsv2lite",
    "gate",
    "gptoss_yarn",
    "grouped_legacy_tp2",
    "llama4",
    "mixtral_ep2",
    "mixtral_tp2_ep2",
    "mixtral_tp2_ep2_etp1",
    "moe_bias_gelu",
    "qwen2moe_dist",
    "qwen3moe_pp2_ep2_dist",
    "sink_alt_tp2",
    "v12_dsv2_yarn",
)


@pytest.fixture(scope="session")
def families() -> Path:
    """Return the folder of the genuine checkpoints; skip where it is not."""
    if not FAMILIES.is_dir():
        pytest.skip(f"{FAMILIES} is not here")
    return FAMILIES


@pytest.mark.long
@pytest.mark.parametrize("name", GENUINE)
def test_genuine_checkpoints_are_rewritten_bit_by_bit(
    name: str, families: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(families / name)
    experts = source.config.num_experts
    tp = allowed_tp(source.config)[-1]
    chain = [{"tp": tp, "pp": 2, "ep": 2 if experts else 1}, {"tp": 2}]
    chain += [{"tp": 2, "ep": 4, "etp": 1}] if experts else []
    current = source
    for number, sizes in enumerate(chain):
        current = open_checkpoint(
            write_megatron_torch(current, tmp_path / str(number), **sizes)  # type: ignore[arg-type]
        )
        assert_same(current, source)
    assert_same(open_checkpoint(write_torch_dist(current, tmp_path / "dist")), source)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "dsv2lite",
        "dsv3_bf16_tp2",
        "gate",
        "gptoss_yarn",
        "llama4",
        "mixtral_ep2",
        "mixtral_tp2_ep2",
        "mixtral_tp2_ep2_etp1",
        "moe_bias_gelu",
        "qwen2moe_tp2",
        "sink_alt_tp2",
    ],
)
def test_files_hold_what_genuine_ones_hold(name: str, families: Path, tmp_path: Path) -> None:
    """Rank by rank and key by key, the empty extra states included."""
    source = open_checkpoint(families / name)
    saved = source.provenance.args
    written = write_megatron_torch(
        source,
        tmp_path / "out",
        tp=saved["tensor_model_parallel_size"],
        pp=saved["pipeline_model_parallel_size"],
        ep=saved["expert_model_parallel_size"],
        etp=saved["expert_tensor_parallel_size"] if source.config.num_experts else None,
    )
    assert folders(written) == folders(families / name)
    for path in (families / name).rglob("model_optim_rng.pt"):
        theirs = torch.load(path, weights_only=False)["model"]
        [other] = written.rglob(f"{path.parent.name}/*.pt")
        ours = torch.load(other, weights_only=False)["model"]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert (value is None) == (ours[key] is None), key
            assert value is None or torch.equal(value, ours[key]), key


@pytest.mark.long
@pytest.mark.parametrize("name", ["dsv3_mtp_dist", "mixtral_dist", "qwen3moe_pp2_ep2_dist"])
def test_torch_dist_has_the_keys_and_shapes_of_genuine_files(
    name: str, families: Path, tmp_path: Path
) -> None:
    written = write_torch_dist(open_checkpoint(families / name), tmp_path / "out")
    ours, theirs = shapes(written), shapes(families / name)
    assert {key: ours.get(key, ...) for key in theirs} == theirs
    assert all(value is None for key, value in ours.items() if key not in theirs)


def shapes(root: Path) -> dict[str, tuple[int, ...] | None]:
    """Return the shapes of the model's tensors by key; None for other entries."""
    folder = next(root.rglob(".metadata")).parent
    entries = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {
        key: tuple(entry.size) if hasattr(entry, "size") else None
        for key, entry in entries.items()
        if not key.startswith(("optimizer.", "rng_state", "rerun"))
    }


# ---- megatron-core reads them ------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.long
@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
@pytest.mark.parametrize("format", ["torch", "torch_dist"])
def test_megatron_core_loads_them_and_computes_the_same_logits(format: str, tmp_path: Path) -> None:
    """Its model is built from nothing but the args that we wrote."""
    dist = format == "torch_dist"
    script = "megatron_core_model.py" if dist else "megatron_core_torch.py"
    write = write_torch_dist if dist else write_megatron_torch
    noise = torch.Generator().manual_seed(5)
    tokens = torch.randint(52, (2, 12), generator=noise)
    torch.save({"tokens": tokens}, tmp_path / "inputs")
    triples: list[Path] = []
    # The L2 norm of a dense model's local layers is what Megatron-LM leaves out.
    names = [name for name in FAMILY_MODELS if name != "l2 norm"]
    for name in names:
        written = write(random_models.checkpoint(FAMILY_MODELS[name]), tmp_path / name)
        place = written / "release"
        place = place if dist else place / "mp_rank_00" / "model_optim_rng.pt"
        triples += [place, tmp_path / "inputs", tmp_path / f"{name}.output"]
    run_core(script, tmp_path, triples)
    for name in names:
        theirs = torch.load(tmp_path / f"{name}.output")["logits"]
        model = random_models.on_one_rank(FAMILY_MODELS[name])
        ours = model.output_layer.logits(model(tokens).flatten(0, 1)).view(theirs.shape)
        assert ours.std() > 0.5  # no comparison of noughts
        assert math.isfinite(theirs.std())
        # Float32 in another order of sums: 1e-4 of the logits' spread is a hundred times that.
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * ours.std().item(), msg=name)


@pytest.mark.process
@pytest.mark.long
@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_core_loads_heads_of_prediction(tmp_path: Path) -> None:
    source = random_models.with_prediction_heads(random_models.checkpoint(DEEPSEEK), 1)
    written = write_megatron_torch(source, tmp_path / "out")
    file = written / "release" / "mp_rank_00" / "model_optim_rng.pt"
    run_core("megatron_core_torch.py", tmp_path, [file, Path("-"), tmp_path / "output"])
