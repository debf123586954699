"""One small model in the layouts of every project that writes Megatron's weights.

Each maker writes a checkpoint below a root and returns its doors: the paths, from the root, that a
user may give. All of them lead to the same model.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.megatron.write_dist import write_torch_dist
from support import random_models
from support.folders import dcp_folders
from support.folders.synthetic import LLAMA, args_of, era_name, rank_tensors, stage_tensors
from support.folders.zarr_folders import write_array

MODEL = dataclasses.replace(LLAMA, layernorm_epsilon=1e-6, rotary_base=500000.0)
SEED = 3


def weights_of(model: ModelConfig = MODEL) -> dict[str, Tensor]:
    """Return the model's weights under canonical names."""
    return random_models.state_dict(model, seed=SEED)


def fields(config: ModelConfig, **more: Any) -> dict[str, Any]:
    """Return the fields of megatron-core's config for a model, as a provider dumps them."""
    return {
        "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "attention_backend": {"_args_": [1], "_target_": "megatron.core.enums.AttnBackend"},
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "kv_channels": config.kv_channels,
        "layernorm_epsilon": config.layernorm_epsilon,
        "normalization": "RMSNorm",
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "num_moe_experts": None,
        "num_query_groups": config.num_query_groups,
        "position_embedding_type": "rope",
        "rotary_base": int(config.rotary_base),
        "rope_scaling": False,
        "rope_scaling_factor": 1.0,
        "seq_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": False,
        "vocab_size": config.vocab_size,
        **more,
    }


def weights_in(folder: Path) -> Path:
    """Write the model's weights into a folder, in torch_dist and without args."""
    source = random_models.checkpoint(MODEL, seed=SEED)
    step = write_torch_dist(source, folder.parent / "made", iteration=7) / "iter_0000007"
    folder.parent.mkdir(parents=True, exist_ok=True)
    step.rename(folder)
    torch.save({"iteration": 7, "checkpoint_version": 3.0}, folder / "common.pt")
    return folder


def tracked(root: Path) -> Path:
    """Return the folder of an iteration that the root's tracker file names."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return root / "iter_0000007"


def bridge(root: Path, **more: Any) -> list[str]:
    """Megatron-Bridge: run_config.yaml beside the weights."""
    step = weights_in(tracked(root))
    settings = {"model": fields(MODEL, **more), "tokenizer": {"tokenizer_model": "x"}}
    (step / "run_config.yaml").write_text(yaml.safe_dump(settings))
    state = {"step": torch.tensor(7, dtype=torch.int32), "consumed_train_samples": torch.tensor(9)}
    torch.save(state, step / "train_state.pt")
    torch.save(state, root / "latest_train_state.pt")
    inside = (".metadata", "common.pt", "metadata.json", "__0_0.distcp", "run_config.yaml")
    beside = ["latest_checkpointed_iteration.txt", "latest_train_state.pt"]
    return ["", *beside, *_below("iter_0000007", *inside, "train_state.pt")]


def nemo_2(root: Path, **more: Any) -> list[str]:
    """NeMo 2: weights/ beside context/."""
    weights_in(root / "weights")
    (root / "context").mkdir()
    settings = {"config": fields(MODEL, **more)}
    (root / "context/model.yaml").write_text(yaml.safe_dump(settings))
    doors = _below("weights", ".metadata", "common.pt", "__0_0.distcp")
    return ["", *doors, *_below("context", "model.yaml")]


def nemo_2_zarr(root: Path) -> list[str]:
    """NeMo 2 with zarr arrays, as it wrote them for a time."""
    arrays_in(root / "weights", prefix="module.")
    (root / "context").mkdir()
    (root / "context/model.yaml").write_text(yaml.safe_dump({"config": fields(MODEL)}))
    array = "weights/module.embedding.word_embeddings.weight"
    return ["", "weights", array, f"{array}/.zarray", f"{array}/0.0", "context/model.yaml"]


def verl(root: Path, **more: Any) -> list[str]:
    """verl: global_step_N/actor with dist_ckpt/, transformer_config.json and huggingface/."""
    actor = root / "global_step_20/actor"
    weights_in(actor / "dist_ckpt")
    (root / "global_step_10").mkdir()
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    lost = ("activation_func", "position_embedding_type", "rotary_base", "seq_length", "_target_")
    kept = {k: v for k, v in fields(MODEL, **more).items() if k not in lost}
    del kept["share_embeddings_and_output_weights"]
    (actor / "transformer_config.json").write_text(json.dumps(kept))
    (actor / "huggingface").mkdir()
    hub = {
        "rope_theta": MODEL.rotary_base,
        "max_position_embeddings": MODEL.max_position_embeddings,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (actor / "huggingface/config.json").write_text(json.dumps(hub))
    inside = _below("global_step_20/actor/dist_ckpt", ".metadata", "common.pt", "__0_0.distcp")
    beside = ["latest_checkpointed_iteration.txt", "global_step_20/actor/transformer_config.json"]
    return ["", "global_step_20", "global_step_20/actor", *inside, *beside]


def arrays_in(folder: Path, *, prefix: str = "", args: Any = None) -> Path:
    """Write the model's weights as zarr arrays, a chunk for each of two ranks."""
    for name, tensor in weights_of().items():
        chunk = (-(-tensor.shape[0] // 2), *tensor.shape[1:])
        write_array(folder / f"{prefix}{name}", tensor, chunk)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    common = {"checkpoint_version": 3.0, "iteration": 7}
    torch.save(common if args is None else {**common, "args": args}, folder / "common.pt")
    return folder


def megatron_args(**more: Any) -> Any:
    """Return the model's args as Megatron-LM saves them."""
    base = int(MODEL.rotary_base)
    epsilon = MODEL.layernorm_epsilon
    return args_of(MODEL, rotary_base=base, norm_epsilon=epsilon, **more)


def zarr(root: Path) -> list[str]:
    """Megatron-LM's zarr."""
    arrays_in(tracked(root), args=megatron_args())
    inside = ("common.pt", "metadata.json", "decoder.final_layernorm.weight/.zarray")
    array = "decoder.final_layernorm.weight"
    return ["", *_below("iter_0000007", *inside, array, f"{array}/1")]


def torch_dcp(root: Path) -> list[str]:
    """FSDP2's torch_dcp: names below `model.`, settings in entries of their own."""
    return _plain_dcp(root, weights_of())


def fsdp_dtensor(root: Path) -> list[str]:
    """Megatron-FSDP's fsdp_dtensor: one more wrapper, gate and up apart."""
    halves = {}
    for name, tensor in weights_of().items():
        if ".linear_fc1." in name:
            halves |= dict(zip((f"module.{name}_w", f"module.{name}_v"), tensor.chunk(2)))  # noqa: B905
        else:
            halves[f"module.{name}"] = tensor
    return _plain_dcp(root, halves)


def _plain_dcp(root: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    state = {
        "model": {name: tensor.contiguous() for name, tensor in tensors.items()},
        "args": megatron_args(),
        "checkpoint_version": 3.0,
        "iteration": 7,
    }
    dcp.save(state, checkpoint_id=tracked(root), no_dist=True)
    return ["", *_below("iter_0000007", ".metadata", "__0_0.distcp")]


def _below(folder: str, *names: str) -> list[str]:
    return [folder, *(f"{folder}/{name}" for name in names)]


# ---- NeMo 1 --------------------------------------------------------------------------------------


def nemo_config(model: ModelConfig = MODEL, **more: Any) -> dict[str, Any]:
    """Return what model_config.yaml says of a model, in NeMo's words."""
    values = {
        "mcore_gpt": True,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": None,
        "encoder_seq_length": model.max_position_embeddings,
        "max_position_embeddings": "${.encoder_seq_length}",
        "layernorm_epsilon": model.layernorm_epsilon,
        "normalization": {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}[model.normalization],
        "position_embedding_type": model.position_embedding_type,
        "rotary_percentage": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "activation": f"fast-{model.activation}" if model.gated else "gelu",
        "bias": model.add_bias_linear,
        "bias_activation_fusion": model.activation == "gelu_tanh",
        "share_embeddings_and_output_weights": not model.untie_embeddings_and_output_weights,
        "make_vocab_size_divisible_by": 128,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "megatron_amp_O2": True,
        "precision": "bf16",
        "optim": {"name": "distributed_fused_adam", "lr": 1e-4},
        "tokenizer": {"library": "megatron", "type": "GPT2BPETokenizer"},
        "nemo_version": "1.23.0",
    }
    return values | more


def nemo_folder(root: Path, **config: Any) -> Path:
    """Make the folder of a NeMo checkpoint, with its settings and no weights."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "model_config.yaml").write_text(yaml.safe_dump(config))
    return root


def nemo_dist(root: Path, **config: Any) -> list[str]:
    """NeMo 1 with torch_dist inside."""
    nemo_folder(root, **nemo_config(**config))
    keys = {f"model.{name}": tensor for name, tensor in weights_of().items()}
    dcp_folders.save(root / "model_weights", keys, common={"checkpoint_version": 3.0})
    return ["", "model_config.yaml", *_below("model_weights", ".metadata", "common.pt")]


def nemo_zarr(root: Path, **config: Any) -> list[str]:
    """NeMo 1 with zarr inside."""
    nemo_folder(root, **nemo_config(**config))
    arrays_in(root / "model_weights", prefix="model.")
    array = "model_weights/model.embedding.word_embeddings.weight"
    return ["", "model_weights", array, f"{array}/0.0", f"{array}/.zarray"]


def nemo_name(name: str, *, mcore: bool) -> str:
    """Return the name that NeMo gives a parameter in a rank's file."""
    if mcore:
        return f"model.module.{name}"
    return f"model.{_in_language_model(era_name(name, 'v2.5'))}"


def _in_language_model(name: str) -> str:
    return name if name.startswith("language_model.") else f"language_model.{name}"


def nemo_ranks(
    root: Path,
    model: ModelConfig = MODEL,
    *,
    tp: int = 1,
    pp: int = 1,
    two_matrices: bool = False,
    version: float = 3.0,
    **config: Any,
) -> list[str]:
    """NeMo 1 with a file for each rank, by the names of megatron-core or, without it, of NeMo.

    Args:
        root: The folder to make.
        model: Its settings; the weights follow from them.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        two_matrices: The branches of a gated MLP are two matrices (NeMo's words without `fast-`).
        version: Whose order the QKV rows have.
        config: Of model_config.yaml, beside what follows from `model`.
    """
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    values = nemo_config(model, **sizes, **config)
    nemo_folder(root, **values)
    each = model.num_layers // pp
    doors = ["", "model_config.yaml"]
    for rank in range(tp):
        tensors = rank_tensors(weights_of(model), model, rank, tp, version=version)
        for stage in range(pp):
            layers = list(range(stage * each, (stage + 1) * each))
            held = stage_tensors(tensors, layers, first=stage == 0, last=stage == pp - 1)
            flat = {nemo_name(k, mcore=values["mcore_gpt"]): v for k, v in held.items()}
            if two_matrices:
                flat = _apart(flat)
            name = f"mp_rank_{rank:02d}" if pp == 1 else f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
            folder = "" if tp == pp == 1 else f"{name}/"
            (root / folder).mkdir(exist_ok=True)
            torch.save(flat, root / folder / "model_weights.ckpt")
            doors += [folder, f"{folder}model_weights.ckpt"]
    return doors


def _apart(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in flat.items():
        if match := re.fullmatch(r"(.+\.dense_h_to_4h)\.(weight|bias)", name):
            gate, up = tensor.chunk(2)
            found |= {name: gate.clone(), f"{match[1]}_2.{match[2]}": up.clone()}
        else:
            found[name] = tensor
    return found


def packed(folder: Path, archive: Path, mode: str = "w", prefix: str = "./") -> Path:
    """Pack what is in a folder as NeMo does, and return the archive."""
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        for entry in sorted(folder.iterdir()):
            tar.add(entry, f"{prefix}{entry.name}")
    return archive


def nemo_archive(root: Path) -> list[str]:
    """NeMo 1 as one file."""
    nemo_dist(root / "made")
    packed(root / "made", root / "model.nemo")
    return ["model.nemo"]


def nemo_tp2_pp2(root: Path) -> list[str]:
    """NeMo 1 with a file for each of four ranks."""
    return nemo_ranks(root, tp=2, pp=2)


LAYOUTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "Megatron-Bridge": (bridge, "megatron-bridge"),
    "NeMo 2": (nemo_2, "nemo"),
    "NeMo 2, zarr": (nemo_2_zarr, "nemo"),
    "NeMo 1": (nemo_dist, "nemo"),
    "NeMo 1, zarr": (nemo_zarr, "nemo"),
    "NeMo 1, ranks": (nemo_tp2_pp2, "nemo"),
    "NeMo 1, archive": (nemo_archive, "nemo"),
    "verl": (verl, "verl"),
    "zarr": (zarr, "megatron-zarr"),
    "torch_dcp": (torch_dcp, "megatron-torch-dcp"),
    "fsdp_dtensor": (fsdp_dtensor, "megatron-fsdp-dtensor"),
}
"""Layout -> its maker, and the format that `inspect` shows."""
