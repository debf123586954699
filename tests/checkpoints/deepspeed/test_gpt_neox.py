"""gpt-neox's folders: every kind of layer, cut over ranks, comes back bit by bit.

The folders are made by tests/support/folders/deepspeed_folders.py, which knows gpt-neox's names and
orders apart from the reader.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.folders import synthetic
from support.folders.deepspeed_folders import (
    ENGINE_NAMES,
    NEWER_NAMES,
    ROW_BIASES,
    neox_settings,
    write_neox,
)

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, parse_overrides
from mlm_eval.checkpoints.deepspeed.harmless import NEOX_HARMLESS
from mlm_eval.checkpoints.deepspeed.settings import NEOX_READ, NEOX_REFUSED
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint

NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
SEQUENTIAL = dataclasses.replace(
    synthetic.GPT,
    position_embedding_type="rope",
    rotary_percent=0.5,
    untie_embeddings_and_output_weights=True,
    **NO_DROPOUT,
)
PARALLEL = dataclasses.replace(SEQUENTIAL, parallel_residual=True)
LLAMA = dataclasses.replace(synthetic.LLAMA, layernorm_epsilon=1e-8, **NO_DROPOUT)

Layout = tuple[ModelConfig, dict[str, Any]]
LAYOUTS: dict[str, Layout] = {
    "parallel": (PARALLEL, {}),
    "sequential": (SEQUENTIAL, {}),
    "newer names": (PARALLEL, {"names": NEWER_NAMES}),
    "without a pipeline": (PARALLEL, {"pipeline": False}),
    "Llama": (LLAMA, {"names": NEWER_NAMES}),
    "Llama of 2023": (LLAMA, {"llama": True, "mlp_type": "llama", "activation": "silu"}),
    "Llama without a pipeline": (LLAMA, {"names": NEWER_NAMES, "pipeline": False}),
    "a gate with biases": (dataclasses.replace(PARALLEL, activation="geglu"), {}),
    "the fused kernel": (dataclasses.replace(PARALLEL, activation="gelu_tanh"), {}),
    "grouped with biases": (
        dataclasses.replace(PARALLEL, num_query_groups=2),
        {"attention_config": [[["flash"], 4]]},
    ),
    "ALiBi": (
        dataclasses.replace(PARALLEL, position_embedding_type="alibi", rotary_percent=1.0),
        {},
    ),
    "learned, tied": (
        dataclasses.replace(
            SEQUENTIAL,
            position_embedding_type="learned_absolute",
            rotary_percent=1.0,
            untie_embeddings_and_output_weights=False,
        ),
        {},
    ),
}


def random_model(config: ModelConfig) -> synthetic.Model:
    """Return a model whose biases of row-parallel layers are eighths: their sums are exact."""
    model = synthetic.random_model(config)
    eighths = {n: (t * 8).round() / 8 for n, t in model.items() if n.endswith(ROW_BIASES)}
    return model | eighths


def written(folder: Path, name: str, tp: int) -> tuple[Path, synthetic.Model, ModelConfig]:
    config, options = LAYOUTS[name]
    model = random_model(config)
    return write_neox(folder, model, config, tp=tp, **options), model, config


def assert_same(found: Checkpoint, model: synthetic.Model) -> None:
    assert found.tensors.keys() == model.keys()
    for name, tensor in model.items():
        assert torch.equal(found.tensors[name].read(), tensor), name


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_as_it_was_trained(name: str, tp: int, tmp_path: Path):
    root, model, config = written(tmp_path, name, tp)
    found = open_checkpoint(root)
    assert found.config == config
    assert found.provenance.format == "deepspeed"
    assert (found.provenance.tensor_parallel, found.provenance.iteration) == (tp, 7)
    assert found.provenance.training_state == ["optimizer state"]
    assert_same(found, model)
    assert len(found.provenance.warnings) == ("fused" in name)


def test_row_biases_are_summed_beside_one_another_and_taken_once_in_a_row(tmp_path: Path):
    """With the parallel residual each rank adds a bias of its own; else they are copies."""
    names = [f"decoder.layers.{i}.{part}" for i in range(4) for part in ROW_BIASES]
    for name, config in (("parallel", PARALLEL), ("sequential", SEQUENTIAL)):
        root, model, _ = written(tmp_path / name, name, 2)
        files = [
            root / f"global_step7/layer_03-model_{rank:02d}-model_states.pt" for rank in (0, 1)
        ]
        first, second = (torch.load(f)["attention.dense.bias"] for f in files)
        assert torch.equal(first, second) == (not config.parallel_residual)
        found = open_checkpoint(root)
        for bias in names:
            assert torch.equal(found.tensors[bias].read(), model[bias])
    # Told that the parallel one were sequential, its biases are not the copies they should be.
    with pytest.raises(InputError, match="linear_proj.bias differs by .* tensor-parallel ranks 0"):
        open_checkpoint(tmp_path / "parallel", parse_overrides(["parallel_residual=false"]))


def test_one_norm_for_both(tmp_path: Path):
    model = random_model(PARALLEL)
    for name in list(model):
        if ".pre_mlp_layernorm." in name:
            model[name] = model[name.replace("pre_mlp", "input")]
    other = {n: t + 1 if ".pre_mlp_layernorm." in n else t for n, t in model.items()}
    found = open_checkpoint(write_neox(tmp_path, other, PARALLEL, gpt_j_tied=True))
    assert_same(found, model)


@pytest.mark.parametrize(
    ("lacking", "setting"),
    [
        ("attention.query_key_value", "use_bias_in_attn_linear"),
        ("attention.dense", "use_bias_in_attn_linear"),
        ("mlp", "use_bias_in_mlp"),
        ("norm", "use_bias_in_norms"),
    ],
)
def test_biases_that_a_run_does_not_have_are_zeros(lacking: str, setting: str, tmp_path: Path):
    model = random_model(PARALLEL)
    root = write_neox(tmp_path, model, PARALLEL, tp=2, **{setting: False})
    for file in root.glob("global_step7/layer_*"):
        layer = torch.load(file)
        kept = {k: v for k, v in layer.items() if lacking not in k or not k.endswith("bias")}
        torch.save(kept, file)
    found = open_checkpoint(root)
    qkv = lacking == "attention.query_key_value"
    assert found.config == dataclasses.replace(PARALLEL, add_qkv_bias=not qkv)
    zeros = {n for n, t in found.tensors.items() if not t.read().any()}
    part = {"attention.dense": "linear_proj", "mlp": "linear_fc", "norm": "norm"}.get(lacking)
    assert zeros == {n for n in model if part and part in n and n.endswith("bias")}
    configs = root / "global_step7/configs/run.yml"
    configs.write_text(configs.read_text().replace(setting.replace("_", "-"), "something"))
    if not qkv:  # where the run had them, they are lost
        with pytest.raises(
            InputError, match="lacks the parameter .*bias|do not call for, such as .*bias"
        ):
            open_checkpoint(root)


def test_an_output_table_that_was_cut_by_columns(tmp_path: Path):
    model = random_model(PARALLEL)
    root = write_neox(tmp_path, model, PARALLEL, tp=2, output_layer_parallelism="row")
    for rank, columns in enumerate(model["output_layer.weight"].chunk(2, dim=1)):
        file = root / f"global_step7/layer_08-model_{rank:02d}-model_states.pt"
        torch.save({"final_linear.weight": columns.clone()}, file)
    found = open_checkpoint(root)
    assert torch.equal(found.tensors["output_layer.weight"].read(), model["output_layer.weight"])


def test_settings_may_have_underscores_and_stand_in_several_files(tmp_path: Path):
    root, model, config = written(tmp_path, "parallel", 1)
    configs = root / "global_step7/configs"
    settings = yaml.safe_load((configs / "run.yml").read_text())
    (configs / "run.yml").unlink()
    items = [(name.replace("-", "_"), value) for name, value in settings.items()]
    (configs / "a.yml").write_text(yaml.safe_dump(dict(items[9:])))
    # YAML 1.1 takes a number without a point for a word.
    text = yaml.safe_dump(dict(items[:9])).replace("epsilon: 1.0e-05", "epsilon: 1e-5")
    assert isinstance(yaml.safe_load(text)["layernorm_epsilon"], str)
    (configs / "b.yaml").write_text(text)
    assert open_checkpoint(root).config == config
    configs.rename(root / "configs")  # beside the steps, as some were published
    assert open_checkpoint(root).config == config
    (root / "configs/c.yml").write_text("pos-emb: learned")
    with pytest.raises(InputError, match="c.yml has another pos_emb than the other files"):
        open_checkpoint(root)


@pytest.mark.parametrize("name", sorted(NEOX_REFUSED))
def test_settings_of_another_function_are_refused_by_name(name: str, tmp_path: Path):
    other: Any = {"attention_config": [[["global", "sparse_fixed"], 2]]}.get(name, 2)
    if name == "soft_prompt_tuning":
        other = {"enabled": True}
    root, _, _ = written(tmp_path, "parallel", 1)
    configs = root / "global_step7/configs/run.yml"
    configs.write_text(yaml.safe_dump(neox_settings(PARALLEL, 1) | {name.replace("_", "-"): other}))
    with pytest.raises(
        InputError, match=rf"\({name} in configs/run.yml\), which mlm-eval does not"
    ):
        open_checkpoint(root)
    harmless = [*NEOX_REFUSED[name][1], None]
    more = {"attention_config": [[["global"], "all"]], "soft_prompt_tuning": {"enabled": False}}
    for value in [*harmless, *([more[name]] if name in more else [])]:
        configs.write_text(yaml.safe_dump(neox_settings(PARALLEL, 1) | {name: value}))
        assert open_checkpoint(root).config == PARALLEL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pos-emb": "rpe"}, "pos_emb 'rpe' .* is not supported; known are learned, rotary"),
        ({"pos-emb": "sinusoidal"}, "pos_emb 'sinusoidal' .configs/run.yml. is not supported"),
        ({"norm": "scalenorm"}, "norm 'scalenorm' .* is not supported"),
        ({"activation": "mish"}, "the activation mish .* is not computed here; known are gelu"),
        ({"num-layers": 5}, "num_layers 4 by its weights, where configs/run.yml says 5; copy all"),
        (
            {"hidden-size": "wide"},
            "hidden_size is 'wide' in configs/run.yml, expected a value of type int",
        ),
        (
            {"num-attention-heads": 3},
            "do not fit 3 heads in 3 groups; correct it with --set num_at",
        ),
        ({"num-attention-heads": None}, "does not say how many attention heads"),
        (
            {"num-kv-heads": 3},
            "3 key and value heads of 4 query heads are not shared evenly by 1 t",
        ),
        (
            {"no-weight-tying": False},
            "holds an output table of its own where .* no_weight_tying Fa",
        ),
        (
            {"layernorm-epsilon": "none"},
            "layernorm_epsilon is 'none' in .*, expected a value of type flo",
        ),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path):
    root = write_neox(
        tmp_path,
        random_model(PARALLEL),
        PARALLEL,
        settings=neox_settings(PARALLEL, 1) | settings,
    )
    with pytest.raises(InputError, match=message):
        open_checkpoint(root)


def test_yaml_that_is_more_than_data_is_not_run(tmp_path: Path):
    root, _, _ = written(tmp_path, "parallel", 1)
    (root / "global_step7/configs/run.yml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(InputError, match="is not plain YAML .*; nothing in it was run"):
        open_checkpoint(root)


def test_without_its_settings_a_folder_says_what_to_give(tmp_path: Path):
    root, model, config = written(tmp_path, "parallel", 2)
    shutil.rmtree(root / "global_step7/configs")
    with pytest.raises(InputError, match="has no configs/ folder with the run's .yml") as caught:
        open_checkpoint(root)
    wanted = str(caught.value).split("--set ")[1:]
    assert [word.partition("=")[0] for word in wanted] == [
        *("parallel_residual", "position_embedding_type", "rotary_percent", "activation"),
        "num_attention_heads",
    ]
    given = ["num_attention_heads=4", "max_position_embeddings=8", "rotary_percent=0.5"]
    given += ["parallel_residual=true", "position_embedding_type=rope", "activation=gelu"]
    found = open_checkpoint(root, parse_overrides(given))
    assert found.config == config
    assert_same(found, model)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("activation", ["gelu_tanh", "geglu_tanh", "swiglu"])
def test_transformer_engines_mlps_are_read_as_it_is_stated(
    activation: str, tp: int, tmp_path: Path
) -> None:
    """Its kernels activate the first half, gpt-neox's own code the second."""
    config = dataclasses.replace(PARALLEL, activation=activation)
    model = random_model(config)
    settings = neox_settings(dataclasses.replace(PARALLEL, activation="gelu"), tp)
    settings |= {"te-layernorm-mlp": True, "activation": activation.removesuffix("_tanh")}
    root = write_neox(tmp_path, model, config, tp=tp, names=ENGINE_NAMES, settings=settings)
    with pytest.raises(InputError, match="TransformerEngine's MLPs .te_layernorm_mlp.*--set act"):
        open_checkpoint(root)
    found = open_checkpoint(root, {"activation": activation})
    assert found.config == config
    assert_same(found, model)


def test_transformer_engines_mlps_have_an_epsilon_of_their_own(tmp_path: Path) -> None:
    config = dataclasses.replace(PARALLEL, activation="gelu_tanh", layernorm_epsilon=1e-6)
    settings = neox_settings(config, 1)
    root = write_neox(tmp_path, random_model(config), config, names=ENGINE_NAMES, settings=settings)
    with pytest.raises(InputError, match="epsilon 1e-05 whatever .* --set layernorm_epsilon=1e-05"):
        open_checkpoint(root, {"activation": "gelu_tanh"})
    given = {"activation": "gelu_tanh", "layernorm_epsilon": 1e-5}
    assert open_checkpoint(root, given).config.layernorm_epsilon == 1e-5


@pytest.mark.parametrize(
    "name", ["new-attention", "use_parallel_norm", "rope-theta-2", "logits_softcap", "mlp-gate-2"]
)
def test_an_unknown_setting_of_the_model_is_refused(name: str, tmp_path: Path) -> None:
    settings = neox_settings(PARALLEL, 1) | {name: True}
    root = write_neox(tmp_path, random_model(PARALLEL), PARALLEL, settings=settings)
    said = f"configs/run.yml says {name.replace('-', '_')}: True, a setting that mlm-eval does not"
    with pytest.raises(InputError, match=said):
        open_checkpoint(root)
    off = settings | {name: False}
    (root / "global_step7/configs/run.yml").write_text(yaml.safe_dump(off))
    assert open_checkpoint(root).provenance.warnings == []


def test_other_unknown_settings_are_listed(tmp_path: Path) -> None:
    unknown = {f"colour-{number}": number for number in range(1, 11)}
    settings = neox_settings(PARALLEL, 1) | unknown
    root = write_neox(tmp_path, random_model(PARALLEL), PARALLEL, settings=settings)
    [warning] = open_checkpoint(root).provenance.warnings
    assert "configs/run.yml has settings that mlm-eval does not know" in warning
    assert "colour_1, colour_10, colour_2" in warning and warning.endswith("and 2 more")


def test_an_rmsnorm_with_a_large_epsilon_is_told_of(tmp_path: Path):
    config = dataclasses.replace(LLAMA, layernorm_epsilon=1e-5)
    model = synthetic.random_model(config)
    root = write_neox(tmp_path, model, config, names=NEWER_NAMES)
    [warning] = open_checkpoint(root).provenance.warnings
    assert "adds its epsilon (1e-05) to the root" in warning
    fused = write_neox(tmp_path / "fused", model, config, names=NEWER_NAMES, rmsnorm_fusion=True)
    assert open_checkpoint(fused).provenance.warnings == []


def test_a_setting_has_one_meaning():
    assert not NEOX_READ & set(NEOX_REFUSED)
    assert not NEOX_HARMLESS & {*NEOX_READ, *NEOX_REFUSED}


# ---- what is lost or too much ------------------------------------------------------------------


def test_half_of_the_ranks_is_refused_by_what_the_settings_say(tmp_path: Path):
    """Without rank files every size of the half still fits every other."""
    root, _, _ = written(tmp_path, "parallel", 2)
    for path in [*root.rglob("mp_rank_*"), *root.rglob("layer_*-model_01-*")]:
        path.unlink()
    with pytest.raises(InputError, match=r"1 tensor-parallel rank\(s\) where the run had 2"):
        open_checkpoint(root)


@pytest.mark.parametrize("name", ["bias", "other.weight"])
def test_a_second_tensor_behind_the_layers_is_refused(name: str, tmp_path: Path):
    root, _, config = written(tmp_path, "parallel", 1)
    last = max(root.rglob("layer_*"))
    tables = torch.load(last)
    first = next(iter(tables))
    torch.save(tables | {f"{first.rpartition('.')[0]}.{name}": torch.ones(config.vocab_size)}, last)
    with pytest.raises(InputError, match="more than an output table after its layers"):
        open_checkpoint(root)


def test_a_bias_of_another_size_than_its_matrix_is_refused(tmp_path: Path):
    root, _, _ = written(tmp_path, "parallel", 1)
    layer = root / "global_step7" / "layer_03-model_00-model_states.pt"
    state = torch.load(layer)
    name = "mlp.dense_h_to_4h.bias"
    torch.save(state | {name: torch.cat([state[name], state[name]])}, layer)
    with pytest.raises(InputError, match=r"linear_fc1 .*beside a matrix of|shape"):
        open_checkpoint(root)


@pytest.mark.parametrize("key", ["sequential.word.weight", "sequential.\u00b2.weight"])
def test_a_parameter_without_a_place_in_the_list_is_refused(key: str, tmp_path: Path):
    model = random_model(PARALLEL)
    root = write_neox(tmp_path, model, PARALLEL, pipeline=False)
    path = root / "global_step7" / "mp_rank_00_model_states.pt"
    state = torch.load(path)
    state["module"][key] = torch.ones(2)
    torch.save(state, path)
    with pytest.raises(InputError, match="no model of gpt-neox without a pipeline has"):
        open_checkpoint(root)
