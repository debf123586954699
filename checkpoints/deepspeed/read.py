"""The reader of DeepSpeed's steps: gpt-neox, and Megatron-DeepSpeed with BLOOM.

Each tensor-parallel rank's tensors are brought under Megatron's names and into its order; then they
are ranks of the `torch` format and merged as those are. In a pipeline a file holds one layer, by
its place in the pipeline's list: where blocks begin differs between projects, so that what a file
holds tells what it is. Source: docs/megatron.md, "DeepSpeed".
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.checkpoint import (
    Checkpoint,
    cheap_digest,
    ends_of,
    training_state,
)
from mlm_eval.checkpoints.config import ConfigBuilder
from mlm_eval.checkpoints.deepspeed.blocks import Tensors, megatron_blocks, megatron_norm
from mlm_eval.checkpoints.deepspeed.folder import Step
from mlm_eval.checkpoints.deepspeed.harmless import unknown_args
from mlm_eval.checkpoints.deepspeed.settings import NeoxSettings, neox_config, read_settings
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safe_pickle import printable
from mlm_eval.checkpoints.files.state_dict import unwrapped
from mlm_eval.checkpoints.files.torch_file import TorchFile, read_torch_file
from mlm_eval.checkpoints.lazy import Concat, LazyTensor, Selected, rows_between
from mlm_eval.checkpoints.megatron.args import saved_args
from mlm_eval.checkpoints.megatron.files import Rank, RankFile, flat_tensors
from mlm_eval.checkpoints.megatron.layout import ExpertLayout
from mlm_eval.checkpoints.megatron.read_torch import merge_ranks
from mlm_eval.checkpoints.projects.settings import PASSED_ON
from mlm_eval.checkpoints.soundness.copies import (
    copied_layers,
    copied_on_purpose,
    deeper_or_copied,
)

_NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}

Builder = Callable[[Mapping[str, tuple[int, ...]], str], ConfigBuilder]


@dataclasses.dataclass
class _Rank:
    """What one tensor-parallel rank's files hold."""

    states: dict[str, Any]
    """The entries of the rank's own file; empty where it has none."""
    layers: dict[int, Tensors]
    """By the place in the pipeline's list."""
    module: Tensors
    """The whole module of runs without a pipeline, under its own names."""
    files: list[TorchFile]


def read_step(step: Step, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint in the folder of one step; no weight is read.

    Raises:
        InputError: A file is missing or damaged, the model is of an unsupported kind, or the folder
            holds ZeRO's parts of the weights only.
    """
    ranks = _read_ranks(step)
    where = str(step.path)
    states = ranks[0].states
    args = saved_args(states.get("args"), where)
    _check_ranks(step, ranks, args)
    _check_same_layers(ranks, where)
    if any(key.startswith("attention.") for layer in ranks[0].layers.values() for key in layer):
        settings = read_settings(step.path, args, overrides)
        settings.check(where)
        # A rank's own args go first: a step may have been cut anew since its .yml was written.
        stated = {"model_parallel_size": settings.get("model_parallel_size")[0]}
        _check_ranks(step, ranks, stated | args)
        chunks = _neox_chunks(ranks, settings, where)
        args = _neox_args(settings, len(ranks))

        def build(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> ConfigBuilder:
            return neox_config(settings, shapes, dtype, where)

        checkpoint = _merged(step, ranks, chunks, args, overrides, build)
    else:
        if ranks[0].layers and not states:
            raise InputError(
                f"{where} lacks mp_rank_00_model_states.pt, which holds the run's settings; copy "
                "that file too"
            )
        chunks = [_plain_chunk(rank, where) for rank in ranks]
        checkpoint = _merged(step, ranks, chunks, _fork_args(args), overrides, None)
        checkpoint.provenance.warnings.extend(unknown_args(args))
    return _with_provenance(checkpoint, step, ranks)


# ---- files -------------------------------------------------------------------------------------


def _read_ranks(step: Step) -> list[_Rank]:
    """Return what the files hold, by tensor-parallel rank."""
    if step.experts:
        raise InputError(
            f"{step.path} holds DeepSpeed's mixture of experts ({step.experts[0]}), which mlm-eval "
            "does not compute; it reads dense GPT models of DeepSpeed"
        )
    files = {number: read_torch_file(path) for number, path in _needed_modules(step).items()}
    states = {number: _dict_of(file) for number, file in files.items()}
    modules = {number: state.get("module") for number, state in states.items()}
    if any(isinstance(module, dict) and module for module in modules.values()):
        missing = next((n for n in range(max(modules) + 1) if n not in modules), None)
        if missing is not None:
            raise InputError(
                f"{step.path} lacks mp_rank_{missing:02d}_model_states.pt; copy all ranks of one "
                "save"
            )
        return [_module_rank(step, files[number], states[number]) for number in sorted(files)]
    if not step.layers:
        step.refuse_without_weights()
    first = min(files, default=None)
    ranks: list[_Rank] = []
    for number in range(1 + max(rank for _, rank in step.layers)):
        rank = _Rank({} if first is None else states[first], {}, {}, [])
        if first is not None:
            rank.files.append(files[first])
        for place in sorted({place for place, _ in step.layers}):
            path = step.layers.get((place, number))
            if path is None:
                raise InputError(
                    f"{step.path} lacks layer_{place:02d}-model_{number:02d}-model_states.pt; copy "
                    "all files of one save"
                )
            file = read_torch_file(path)
            rank.layers[place] = flat_tensors(_dict_of(file), path)
            rank.files.append(file)
        ranks.append(rank)
    return ranks


def _needed_modules(step: Step) -> dict[int, Path]:
    """Return the files of ranks to read: in a pipeline they hold no weights, and one is enough."""
    if step.layers and step.modules:
        first = min(step.modules)
        state = _dict_of(read_torch_file(step.modules[first]))
        if not state.get("module"):
            return {first: step.modules[first]}
    return dict(sorted(step.modules.items()))


def _dict_of(file: TorchFile) -> dict[str, Any]:
    if not isinstance(file.value, dict):
        raise InputError(
            f"{file.path} holds a {type(file.value).__name__}, not the dictionary that DeepSpeed "
            "saves; copy it again"
        )
    return file.value


_SEQUENTIAL = re.compile(r"(?:.+?\.)?sequential\.(?P<place>[0-9]{1,6})\.(?P<name>.+)")
"""A parameter of gpt-neox without a pipeline: its layer's place in the list, and its name there."""


def _module_rank(step: Step, file: TorchFile, state: dict[str, Any]) -> _Rank:
    module = state.get("module")
    if not isinstance(module, dict):
        raise InputError(f"{file.path} has no module in it; copy all ranks of one save")
    shells = (value for value in module.values() if isinstance(value, LazyTensor))
    if any(not tensor.numel for tensor in shells):
        step.refuse_without_weights()
    flat = {unwrapped(key): tensor for key, tensor in flat_tensors(module, file.path).items()}
    layers: dict[int, Tensors] = {}
    placed = {key: match for key in flat if (match := _SEQUENTIAL.fullmatch(key))}
    for key, match in placed.items():
        layers.setdefault(int(match["place"]), {})[match["name"]] = flat[key]
    strange = next((key for key in flat if key not in placed), None)
    if layers and strange is not None:
        raise InputError(
            f"{file.path} has a parameter that no model of gpt-neox without a pipeline has: "
            f"{printable(strange)}; mlm-eval would compute something else than the model did, so "
            "it stops here"
        )
    if not layers and not any(".query_key_value." in k or ".linear_qkv." in k for k in flat):
        raise InputError(
            f"{file.path} is a DeepSpeed checkpoint of another model than Megatron's (it holds "
            f"{printable(next(iter(flat), 'nothing'))}); save it in the form of its own library "
            "(transformers: save_pretrained, or the zero_to_fp32.py beside), and give --ckpt that"
        )
    return _Rank(state, layers, {} if layers else flat, [file])


def _check_ranks(step: Step, ranks: Sequence[_Rank], args: Mapping[str, Any]) -> None:
    """Refuse steps of fewer ranks than the run had."""
    for name in ("tensor_model_parallel_size", "model_parallel_size"):
        stated = args.get(name)
        if isinstance(stated, int) and stated != len(ranks):
            raise InputError(
                f"{step.path} holds the files of {len(ranks)} tensor-parallel rank(s) where the "
                f"run had {stated}; copy all files of one save"
            )


def _check_same_layers(ranks: Sequence[_Rank], where: str) -> None:
    """Refuse ranks whose layers are not alike, and what is neither a vector nor a matrix."""
    for rank, place in itertools.product(ranks, ranks[0].layers):
        ours, theirs = ranks[0].layers[place], rank.layers.get(place, {})
        odd = sorted(ours.keys() ^ theirs.keys())
        if odd:
            raise InputError(
                f"{where} mixes two checkpoints: {printable(odd[0])} (place {place}) is on some of "
                "the tensor-parallel ranks only; copy all files of one save"
            )
        for name, tensor in theirs.items():
            alike = (tensor.shape, tensor.kind) == (ours[name].shape, ours[name].kind)
            if not alike or len(tensor.shape) not in (1, 2):
                raise InputError(
                    f"{where}: {printable(name)} (place {place}) is {list(tensor.shape)} "
                    f"{tensor.kind} on a tensor-parallel rank and {list(ours[name].shape)} "
                    f"{ours[name].kind} on the first, where vectors and matrices alike are "
                    "expected; copy all files of one save"
                )


# ---- layers ------------------------------------------------------------------------------------


def _kind(layer: Mapping[str, LazyTensor]) -> str:
    """Return what a place of the pipeline's list holds, by its parameters."""
    if not layer:
        return "nothing"
    if "word_embeddings.weight" in layer:
        return "embedding"
    if any(name.startswith("input_layernorm.") for name in layer):
        return "block"
    if any(name.startswith(("final_linear.", "lm_head.")) for name in layer):
        return "head"
    leaves = {name.removeprefix("norm.") for name in layer}
    if not leaves <= {"weight", "bias", "scale"}:
        return "unknown"
    return "norm" if all(len(tensor.shape) == 1 for tensor in layer.values()) else "head"


def _places(ranks: Sequence[_Rank], where: str) -> dict[str, list[int]]:
    """Return the places of each kind of layer, checked."""
    found: dict[str, list[int]] = {"embedding": [], "block": [], "norm": [], "head": []}
    for place, layer in sorted(ranks[0].layers.items()):
        kind = _kind(layer)
        if kind == "nothing":
            continue
        if kind not in found:
            raise InputError(
                f"{where} has a layer that no GPT model of gpt-neox or Megatron-DeepSpeed has "
                f"(place {place}: {printable(next(iter(layer)))}); mlm-eval would compute "
                "something else than the model did, so it stops here"
            )
        found[kind].append(place)
    blocks = found["block"]
    for kind, count in (("embedding", 1), ("norm", 1)):
        if len(found[kind]) != count:
            raise InputError(
                f"{where} holds {len(found[kind])} files of its {kind}, expected one for each "
                "rank; copy all files of one save"
            )
    tables = [name for place in found["head"] for name in ranks[0].layers[place]]
    if len(tables) > 1:
        raise InputError(
            f"{where} holds more than an output table after its layers "
            f"({printable(', '.join(tables[:3]))}); mlm-eval would compute something else than "
            "the model did, so it stops here"
        )
    lost = sorted(set(range(blocks[0], blocks[-1])) - set(blocks)) if blocks else [2]
    if lost:
        raise InputError(
            f"{where} lacks layer_{lost[0]:02d}-model_00-model_states.pt; copy all files of one "
            "save"
        )
    return found


def _plain_chunk(rank: _Rank, where: str) -> Tensors:
    """Return a rank of Megatron-DeepSpeed by the flat names of Megatron's legacy code."""
    if not rank.layers:
        return rank.module
    places = _places([rank], where)
    chunk: Tensors = {}
    for place, layer in rank.layers.items():
        for name, tensor in layer.items():
            if place in places["embedding"]:
                chunk[f"embedding.{name}"] = tensor
            elif place in places["block"]:
                chunk[f"transformer.layers.{places['block'].index(place)}.{name}"] = tensor
            elif place in places["norm"]:
                chunk[f"transformer.final_layernorm.{name.rpartition('.')[2]}"] = tensor
            else:
                chunk["output_layer.weight"] = tensor
    return chunk


def _neox_chunks(ranks: Sequence[_Rank], settings: NeoxSettings, where: str) -> list[Tensors]:
    """Return the ranks of gpt-neox by megatron-core's names."""
    places = _places(ranks, where)
    zero_bias = settings.layer_norm and settings.may_lack_bias("norms")
    chunks: list[Tensors] = [{} for _ in ranks]
    for number, place in enumerate(places["block"]):
        blocks = [rank.layers.get(place, {}) for rank in ranks]
        for chunk, block in zip(chunks, megatron_blocks(blocks, settings, where), strict=True):
            for name, tensor in block.items():
                chunk[f"transformer.layers.{number}.{name}"] = tensor
    heads = [rank.layers[place] for place in places["head"][:1] for rank in ranks]
    tables = _cut_by_rows([next(iter(head.values())) for head in heads], ranks, places)
    for index, (rank, chunk) in enumerate(zip(ranks, chunks, strict=True)):
        for name, tensor in rank.layers[places["embedding"][0]].items():
            chunk[f"embedding.{name}"] = tensor
        norm = {n.rpartition(".")[2]: t for n, t in rank.layers[places["norm"][0]].items()}
        for leaf, tensor in megatron_norm(norm, zero_bias=zero_bias).items():
            chunk[f"transformer.final_layernorm.{leaf}"] = tensor
        if tables:
            chunk["output_layer.weight"] = tables[index]
    return chunks


def _cut_by_rows(
    parts: list[LazyTensor], ranks: Sequence[_Rank], places: Mapping[str, list[int]]
) -> list[LazyTensor]:
    """Return each rank's rows of the output table, which some runs cut by columns.

    They did with gpt-neox's `output_layer_parallelism: row`.
    """
    words = ranks[0].layers[places["embedding"][0]]["word_embeddings.weight"].shape
    by_columns = (words[0] * len(parts), words[-1] // max(len(parts), 1))
    if len(parts) < 2 or parts[0].shape != by_columns:
        return parts
    whole = Concat(parts, 1)
    starts = [number * words[0] for number in range(len(parts))]
    return [Selected(whole, rows_between(start, start + words[0])) for start in starts]


# ---- args --------------------------------------------------------------------------------------


def _fork_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return Megatron-DeepSpeed's args in Megatron's own words."""
    found = {name: value for name, value in args.items() if name not in ("rank", "rope_theta")}
    groups = args.get("num_key_value_heads")
    if isinstance(groups, int) and "num_query_groups" not in args:
        found["num_query_groups"] = groups
        found["group_query_attention"] = groups != args.get("num_attention_heads")
    norm = args.get("normalization")
    if isinstance(norm, str) and norm in _NORMS:
        found["normalization"] = _NORMS[norm]
    if args.get("rope_theta") is not None:
        found |= {"rotary_base": args["rope_theta"], PASSED_ON: ["rotary_base"]}
    return found


def _neox_args(settings: NeoxSettings, tp: int) -> dict[str, Any]:
    """Return what the writers of Megatron's formats take from a run's args."""
    divisor = settings.get("make_vocab_size_divisible_by")[0]
    found = {"make_vocab_size_divisible_by": divisor, "tensor_model_parallel_size": tp}
    return {name: value for name, value in found.items() if value is not None}


def _merged(
    step: Step,
    ranks: Sequence[_Rank],
    chunks: Sequence[Tensors],
    args: dict[str, Any],
    overrides: dict[str, Any],
    build: Builder | None,
) -> Checkpoint:
    version = ranks[0].states.get("checkpoint_version", 3.0 if ranks[0].layers else None)
    step_number = ranks[0].states.get("iteration", ranks[0].states.get("global_steps"))
    files: dict[Rank, RankFile] = {}
    for number, (rank, chunk) in enumerate(zip(ranks, chunks, strict=True)):
        file = rank.files[-1]
        files[number, 0, 0] = RankFile(
            file.path,
            file,
            args,
            [chunk],
            version=version if type(version) in (int, float) else None,
            iteration=step_number if type(step_number) is int else None,
            label=f"the files of rank {number}",
        )
    tp = len(ranks)
    same = []
    if ranks[0].layers:  # a file each
        same = copied_on_purpose([copied_layers(chunk) for chunk in chunks], step.path)
    layout = ExpertLayout(tp, 1, tp)
    checkpoint = merge_ranks(step.path, files, layout, 1, overrides, build=build)
    checkpoint.provenance.same_parts.extend(same)
    checkpoint.provenance.warnings.extend(deeper_or_copied(same))
    return checkpoint


def _with_provenance(checkpoint: Checkpoint, step: Step, ranks: Sequence[_Rank]) -> Checkpoint:
    files = {file.path: file for rank in ranks for file in rank.files}
    marks: dict[str, tuple[int, list[int] | bytes]] = {}
    for path, file in files.items():
        crcs: list[int] | bytes = file.crcs or ends_of(path, 1 << 16)
        marks[path.name] = (path.stat().st_size, crcs)
    names = {key for key, value in ranks[0].states.items() if value is not None}
    names |= {"optim.pt" for name in step.zero if name.endswith("optim_states.pt")}
    extra = list(files.values())
    provenance = dataclasses.replace(
        checkpoint.provenance,
        format="deepspeed",
        names=None,
        pickle_classes=sorted({c for file in extra for c in file.classes}),
        hostile=sorted({c for file in extra for c in file.hostile}),
        training_state=training_state(names),
        files=list(files),
        digest=cheap_digest(marks),
    )
    return dataclasses.replace(checkpoint, provenance=provenance)
