"""Training through experts, latent attention and the newer layers: gradients, saves, resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import random_models
from support.folders.family_models import FAMILY_MODELS
from support.ranks import run_ranks
from support.runs import training_runs
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, parse_overrides
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.megatron.args import check_args
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.model.sizes import initial_config
from mlm_eval.tasks.language.pretraining import check_start
from mlm_eval.tasks.language.settings import TextSettings
from mlm_eval.training import state as training_state
from mlm_eval.training.data import Batch, collate
from mlm_eval.training.optimization import Trained, make_optimizer

COUNT = 7  # of samples: no layout divides it
MIXTRAL = FAMILY_MODELS["mixtral"]
DEEPSEEK = FAMILY_MODELS["deepseek"]
BIASED = FAMILY_MODELS["windows and sinks"]  # rotary, so that biases of keys have gradients
FIXED = ".router.expert_bias"
"""What no gradient reaches."""


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare each tensor within 1e-4 of its largest gradient, which rounding does not reach."""
    assert set(actual) == set(expected)
    for name, gradient in actual.items():
        allowed = 1e-4 * float(expected[name].abs().max()) + 3e-7
        worst = float((gradient - expected[name]).abs().max())
        assert worst <= allowed, f"{name}: {worst:.2e} off, largest {allowed / 1e-4:.2e}"


# ---- against transformers ----------------------------------------------------------------------

Part = tuple[str, slice]
"""A parameter of transformers, and rows of it."""
ALL = slice(None)


def parts_of(config: ModelConfig) -> dict[str, list[Part]]:
    """Return, by canonical name, of which parts of transformers' parameters a tensor is made."""
    found: dict[str, list[Part]] = {
        "embedding.word_embeddings.weight": [("model.embed_tokens.weight", ALL)],
        "decoder.final_layernorm.weight": [("model.norm.weight", ALL)],
        "output_layer.weight": [("lm_head.weight", ALL)],
    }
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."

        def add(name: str, *parts: str, ours: str = ours, theirs: str = theirs) -> None:
            found[ours + name] = [(theirs + part, ALL) for part in parts]

        add("input_layernorm.weight", "input_layernorm.weight")
        add("pre_mlp_layernorm.weight", "post_attention_layernorm.weight")
        add("self_attention.linear_proj.weight", "self_attn.o_proj.weight")
        if config.multi_latent_attention:
            for name, part in (
                ("linear_q_down_proj", "q_a_proj"),
                ("q_layernorm", "q_a_layernorm"),
                ("linear_q_up_proj", "q_b_proj"),
                ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
                ("kv_layernorm", "kv_a_layernorm"),
                ("linear_kv_up_proj", "kv_b_proj"),
            ):
                add(f"self_attention.{name}.weight", f"self_attn.{part}.weight")
        else:
            found[f"{ours}self_attention.linear_qkv.weight"] = packed(config, theirs)
        mlp = ("gate_proj.weight", "up_proj.weight")
        if layer not in config.moe_layers:
            add("mlp.linear_fc1.weight", *(f"mlp.{part}" for part in mlp))
            add("mlp.linear_fc2.weight", "mlp.down_proj.weight")
            continue
        add("mlp.router.weight", "mlp.gate.weight")
        add("mlp.experts.linear_fc1.weight", "mlp.experts.gate_up_proj")
        add("mlp.experts.linear_fc2.weight", "mlp.experts.down_proj")
        if config.moe_router_enable_expert_bias:
            add("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias")
        if config.moe_shared_expert_intermediate_size:
            shared = "mlp.shared_experts."
            add(f"{shared}linear_fc1.weight", *(f"{shared}{part}" for part in mlp))
            add(f"{shared}linear_fc2.weight", f"{shared}down_proj.weight")
    return found


def packed(config: ModelConfig, theirs: str) -> list[Part]:
    """Return the packed rows of queries, keys and values: group after group."""
    channels = config.kv_channels
    queries = config.num_attention_heads // config.num_query_groups * channels
    parts = []
    for group in range(config.num_query_groups):
        for name, size in (("q", queries), ("k", channels), ("v", channels)):
            rows = slice(group * size, (group + 1) * size)
            parts.append((f"{theirs}self_attn.{name}_proj.weight", rows))
    return parts


def transformers_model(config: ModelConfig) -> Any:
    import transformers

    common = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "num_hidden_layers": config.num_layers,
        "num_experts_per_tok": config.moe_router_topk,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_theta": config.rotary_base,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if config.multi_latent_attention:
        return transformers.DeepseekV3ForCausalLM(
            transformers.DeepseekV3Config(
                **common,
                intermediate_size=config.ffn_hidden_size,
                moe_intermediate_size=config.moe_ffn_hidden_size,
                n_routed_experts=config.num_experts,
                # The width of the shared expert is a multiple of the routed ones'.
                n_shared_experts=1,
                first_k_dense_replace=1,
                n_group=config.moe_router_num_groups,
                topk_group=config.moe_router_group_topk,
                routed_scaling_factor=config.moe_router_topk_scaling_factor,
                norm_topk_prob=True,
                q_lora_rank=config.q_lora_rank,
                kv_lora_rank=config.kv_lora_rank,
                qk_nope_head_dim=config.qk_head_dim,
                qk_rope_head_dim=config.qk_pos_emb_head_dim,
                v_head_dim=config.v_head_dim,
            )
        )
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **common,
            head_dim=config.kv_channels,
            intermediate_size=config.moe_ffn_hidden_size,
            num_local_experts=config.num_experts,
            sliding_window=None,
        )
    )


def transformers_gradients(config: ModelConfig) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the same weights and samples, by canonical names."""
    model = transformers_model(config).eval()
    table, parts = model.state_dict(keep_vars=True), parts_of(config)
    weights = random_models.state_dict(config)
    assert parts.keys() == weights.keys()
    with torch.no_grad():
        for name, pieces in parts.items():
            places = [table[part][rows] for part, rows in pieces]
            values = weights[name].split([len(place) for place in places])
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
    batch: Batch = collate(training_runs.samples("lm", COUNT, vocab=config.vocab_size))
    logits = model(batch.tokens, attention_mask=batch.padding_mask).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss.backward()
    gradients = {
        name: torch.cat([gradient_of(table[part])[rows] for part, rows in pieces])
        for name, pieces in parts.items()
    }
    return loss.item(), gradients


def gradient_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def on_a_rank(tp: int, dp: int, config: ModelConfig, changes: dict[str, Any]) -> Any:
    return training_runs.gradients(tp, dp, "lm", changes, base=config)


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(MIXTRAL, num_layers=2, moe_layers=(0, 1)),
        dataclasses.replace(
            DEEPSEEK, num_layers=2, moe_layers=(1,), moe_shared_expert_intermediate_size=12
        ),
    ],
    ids=["Mixtral", "DeepseekV3"],
)
def test_gradients_are_those_of_transformers(config: ModelConfig) -> None:
    loss, expected = transformers_gradients(config)
    for tp, dp in [(1, 1), (2, 1), (1, 2)]:
        for actual, found in run_ranks(tp * dp, on_a_rank, tp, dp, config, {"micro_batch": 2}):
            assert actual == pytest.approx(loss, rel=1e-5)
            assert_same_gradients(found, expected)


# ---- layouts against each other ----------------------------------------------------------------

DROPPED = {"hidden_dropout": 0.3, "attention_dropout": 0.2}
WAYS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tp 2, recomputed": (2, 1, {"recompute": True}),
    "fsdp2": (1, 2, {"dp_mode": "fsdp2"}),
    "tp 2 x fsdp2": (2, 2, {"dp_mode": "fsdp2"}),
}
TRAINED = ("deepseek", "every second layer, with biases", "windows and sinks", "output gates")


def all_families(tp: int, dp: int, changes: dict[str, Any]) -> Any:
    return {name: on_a_rank(tp, dp, FAMILY_MODELS[name], changes) for name in TRAINED}


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_with_dropout_no_layout_changes_a_gradient(way: str) -> None:
    tp, dp, changes = WAYS[way]
    expected = all_families(1, 1, DROPPED)
    for found in run_ranks(tp * dp, all_families, tp, dp, DROPPED | changes):
        for name in TRAINED:
            assert found[name][0] == pytest.approx(expected[name][0], rel=1e-5)
            assert_same_gradients(found[name][1], expected[name][1])


def test_biases_of_experts_do_not_decay() -> None:
    """They have two dims, one for the experts."""
    names = {"experts.linear_fc1.bias": 2, "experts.linear_fc1.weight": 3, "linear_fc1.bias": 1}
    trained = [
        Trained(name, torch.nn.Parameter(torch.ones((2,) * dims)), over_tp=False)
        for name, dims in names.items()
    ]
    groups = make_optimizer(trained, training_runs.settings(weight_decay=0.1)).param_groups
    decaying = [p for group in groups if group["weight_decay"] for p in group["params"]]
    assert [p.dim() for p in decaying] == [3]


# ---- runs --------------------------------------------------------------------------------------

STEPS = {"max_steps": 2, "warmup": 0.0, "global_batch": 4, "save_minutes": 1e6}


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_what_was_trained_is_what_was_written(name: str, tmp_path: Path) -> None:
    base = FAMILY_MODELS[name]
    report, weights = training_runs.run(1, 1, "lm", tmp_path / "run", STEPS, base=base, count=8)
    checkpoint = open_checkpoint(report.checkpoint)
    before = random_models.checkpoint(base)
    for key, value in weights.items():
        assert torch.equal(checkpoint.tensors[key].read(), value)
        moved = not torch.equal(before.tensors[key].read(), value)
        assert moved != key.endswith(FIXED), key
    assert checkpoint.config == dataclasses.replace(base, hidden_dropout=0.0, attention_dropout=0.0)


def a_run(
    tp: int, dp: int, folder: Path, base: ModelConfig, changes: dict[str, Any]
) -> list[float]:
    report, _ = training_runs.run(tp, dp, "lm", folder, STEPS | changes, base=base, count=20)
    return report.losses


def state_of(folder: Path, base: ModelConfig) -> dict[str, Tensor]:
    latest = training_state.StateFolder(folder / "state").latest()
    assert latest is not None
    return {
        f"{kind} {name}": lazy.read().clone()
        for kind in ("weights", *training_state.MOMENTS)
        for name, lazy in training_state.read_state(latest, base, kind).items()
    }


class Stop(Exception):
    """Ends a run in the middle."""


def stopped(tp: int, dp: int, folder: Path, base: ModelConfig, changes: dict[str, Any]) -> None:
    """Run three of five steps, save, and end."""
    from mlm_eval.training.step import Stepper

    take = Stepper.take

    def taken(self: Stepper, step: int, numbers: list[int], **options: Any) -> Any:
        if step == 3:
            raise Stop
        return take(self, step, numbers, **{**options, "save_due": step == 2})

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stop):
        patched.setattr(Stepper, "take", taken)
        a_run(tp, dp, folder, base, changes)


def with_every_expert(config: ModelConfig) -> ModelConfig:
    """Return the model with all experts chosen for each token.

    A choice that is all but a tie falls to the other side with the rounding of other kernels, and
    the losses after it differ by more than rounding.
    """
    no_groups = {"moe_router_num_groups": 0, "moe_router_group_topk": 0}
    return dataclasses.replace(config, moe_router_topk=config.num_experts, **no_groups)


MOVES: list[tuple[ModelConfig, tuple[int, int], str, tuple[int, int], str]] = [
    (with_every_expert(BIASED), (2, 1), "ddp", (1, 2), "fsdp2"),
    (with_every_expert(DEEPSEEK), (1, 2), "fsdp2", (2, 1), "ddp"),
    (with_every_expert(MIXTRAL), (2, 2), "fsdp2", (1, 1), "ddp"),
]


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize(("base", "first", "mode", "then", "other_mode"), MOVES)
def test_a_run_goes_on_at_another_layout(
    base: ModelConfig,
    first: tuple[int, int],
    mode: str,
    then: tuple[int, int],
    other_mode: str,
    tmp_path: Path,
) -> None:
    """Weights and both moments are saved as those of the whole model, experts and all."""
    five = {"max_steps": 5, "dp_mode": mode}
    [whole] = run_ranks(1, a_run, 1, 1, tmp_path / "whole", base, five)
    run_ranks(1, stopped, 1, 1, tmp_path / "one", base, five)
    run_ranks(first[0] * first[1], stopped, *first, tmp_path / "cut", base, five)
    expected, actual = state_of(tmp_path / "one", base), state_of(tmp_path / "cut", base)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        # Adam moves a weight whose gradient is rounding alone by up to a step; another layout's
        # weights would be off by their spread, a hundred steps.
        step = training_runs.settings().lr if name.startswith("weights ") else 0.0
        allowed = max(2e-5 * float(value.abs().max()), step)
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=allowed, msg=name)
    five["dp_mode"] = other_mode
    for losses in run_ranks(then[0] * then[1], a_run, *then, tmp_path / "cut", base, five):
        assert losses == pytest.approx(whole, rel=2e-5)


# ---- what is refused, and told -----------------------------------------------------------------


def written(folder: Path, config: ModelConfig, args: dict[str, Any]) -> Path:
    source = random_models.checkpoint(config)
    provenance = dataclasses.replace(source.provenance, args=args)
    return write_megatron_torch(dataclasses.replace(source, provenance=provenance), folder)


def start(checkpoint: Checkpoint, folder: Path) -> list[str]:
    from mlm_eval.checkpoints.tokenizer import load_tokenizer

    words = load_tokenizer(directory=random_models.byte_vocabulary(folder))
    return check_start(TextSettings(data=[Path("a")]), checkpoint, words)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (
            {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "seq_aux_loss"},
            "a loss that balances its experts .args.moe_aux_loss_coeff = 0.01",
        ),
        ({"moe_z_loss_coeff": 1e-3}, "router's logits small .args.moe_z_loss_coeff = 0.001"),
    ],
)
def test_losses_of_experts_are_refused_unless_they_are_switched_off(
    args: dict[str, Any], what: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(MIXTRAL, vocab_size=256)
    folder = written(tmp_path / "moe", config, args)
    name = next(iter(args))
    with pytest.raises(InputError, match=f"{what}.*--set {name}=0"):
        start(open_checkpoint(folder), tmp_path / "words")
    without = open_checkpoint(folder, parse_overrides([f"{name}=0"]))
    assert start(without, tmp_path / "same words") == []


def test_a_coefficient_that_no_balancing_uses_is_no_loss(tmp_path: Path) -> None:
    config = dataclasses.replace(MIXTRAL, vocab_size=256)
    args = {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "none"}
    folder = written(tmp_path / "moe", config, args)
    assert start(open_checkpoint(folder), tmp_path / "words") == []


def test_what_training_leaves_as_it_is_is_told(tmp_path: Path) -> None:
    source = random_models.checkpoint(dataclasses.replace(DEEPSEEK, vocab_size=256))
    warnings = start(random_models.with_prediction_heads(source, 1), tmp_path / "words")
    assert any("biases that choose experts stay" in warning for warning in warnings)
    assert any("multi-token prediction are not trained" in warning for warning in warnings)


def test_a_model_that_megatron_lacks_is_refused_before_training(tmp_path: Path) -> None:
    base = dataclasses.replace(MIXTRAL, activation="geglu_tanh")
    with pytest.raises(InputError, match="no tanh GELU in experts"):
        training_runs.run(1, 1, "lm", tmp_path / "run", {}, base=base)
    assert not (tmp_path / "run").exists()


def assert_megatron_says_it(config: ModelConfig) -> None:
    """Its args and shapes give the settings again, so that a trained model can be saved."""
    check_args(config)


def test_a_file_describes_latent_attention(tmp_path: Path) -> None:
    path = tmp_path / "mla.toml"
    path.write_text(
        "num_layers = 2\nhidden_size = 32\nnum_attention_heads = 4\nmulti_latent_attention = true\n"
        "kv_lora_rank = 12\nqk_head_dim = 8\nqk_pos_emb_head_dim = 4\nv_head_dim = 6\n"
    )
    config = initial_config(path, family="gpt", vocab_entries=52)
    assert (config.kv_channels, config.rotary, config.qk_layernorm) == (6, True, True)
    assert_megatron_says_it(config)
    path.write_text(path.read_text() + "kv_channels = 8\n")
    with pytest.raises(InputError, match="has kv_channels = 8, which Megatron's args cannot say"):
        assert_megatron_says_it(initial_config(path, family="gpt", vocab_entries=52))


def test_a_file_describes_a_mixture_of_experts(tmp_path: Path) -> None:
    path = tmp_path / "moe.toml"
    path.write_text("num_layers = 2\nhidden_size = 32\nnum_attention_heads = 4\nnum_experts = 4\n")
    config = initial_config(path, family="gpt", vocab_entries=52)
    assert config.moe_layers == (0, 1) and config.moe_router_topk == 2
    assert config.moe_ffn_hidden_size == config.ffn_hidden_size == 128
    path.write_text(path.read_text() + "moe_layers = [1]\nmoe_ffn_hidden_size = 8\n")
    config = initial_config(path, family="gpt", vocab_entries=52)
    assert (config.moe_layers, config.moe_ffn_hidden_size) == ((1,), 8)
    assert_megatron_says_it(config)
    path.write_text(path.read_text() + "moe_aux_loss_coeff = 0.01\n")
    with pytest.raises(InputError, match="trains experts on the task's loss alone"):
        initial_config(path, family="gpt", vocab_entries=52)
