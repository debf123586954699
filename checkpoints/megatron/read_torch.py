"""Megatron's `torch` format: mp_rank_XX[_YYY]/model_optim_rng.pt, every era since 2019-07.

Each tensor-parallel rank and pipeline stage wrote one file. This reader merges them lazily: the QKV
order of versions 0 and 1.0 becomes group order, gated fc1 becomes `[gate; up]`, pipeline stages get
global layer numbers.
Source: docs/megatron.md, "Folders and files", "Pipeline stages", "Top-level keys",
"megatron-core names", "Tensor parallelism", "QKV row order", "Gated MLP".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlm_eval.checkpoints.checkpoint import (
    Checkpoint,
    Provenance,
    cheap_digest,
    check_weight_dtype,
    training_state,
)
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import dtype_name
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import LazyTensor, Selected, StoredTensor, runs
from mlm_eval.checkpoints.megatron import names
from mlm_eval.checkpoints.megatron.args import build_config, check_dims, layer_indices
from mlm_eval.checkpoints.megatron.fields import RunCode
from mlm_eval.checkpoints.megatron.files import (
    MODEL_FILES,
    RankFile,
    check_same_run,
    parallel_sizes,
    read_rank,
    scan_ranks,
)
from mlm_eval.checkpoints.megatron.iteration import folder_of_ranks, saved_iteration
from mlm_eval.checkpoints.megatron.layout import WORD_EMBEDDINGS
from mlm_eval.checkpoints.parameters import Parameter, cut_dim, parameters

DRIFT = 0.1
"""Largest difference between copies on different ranks, relative to their largest value."""

UNVERSIONED = (
    "the files hold no checkpoint_version, so version 0 (QKV rows [3, heads, head]) is assumed, as "
    "Megatron does; if the model's numbers look random it was saved between 2020-09-11 and "
    "2020-09-29: use --set checkpoint_version=2.0"
)


def read_model_file(path: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a single `.pt` file, or of all ranks where the file is one of them.

    Raises:
        InputError: The file is damaged, or is one rank of a checkpoint whose other files are not
            beside it.
    """
    if path.name in MODEL_FILES and (folder := folder_of_ranks(path.parent)):
        return read_ranks(folder, overrides)
    rank_file = read_rank(path)
    tp, pp = parallel_sizes(rank_file)
    if (tp, pp) not in ((1, 1), (None, None)):
        raise InputError(
            f"{path} is one of the {tp} tensor-parallel x {pp} pipeline files of a checkpoint; "
            "give --ckpt the folder that holds its mp_rank_XX folders"
        )
    return _merge(path, {(0, 0): rank_file}, 1, 1, overrides)


def read_ranks(folder: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint in an `iter_*` or `release` folder with mp_rank_XX folders.

    Raises:
        InputError: A rank is missing, files of two checkpoints are mixed, or the model is
            unsupported.
    """
    paths = scan_ranks(folder)
    first_key = min(paths)
    first = read_rank(paths[first_key])
    tp, pp = parallel_sizes(first)
    if (
        any(len(key) > 2 for key in paths)
        or (first.args.get("expert_model_parallel_size") or 1) > 1
    ):
        raise InputError(
            f"{folder} holds an expert-parallel checkpoint (a mixture of experts); "
            "mlm-eval reads dense GPT and BERT models only"
        )
    tp = tp or max(key[0] for key in paths) + 1
    pp = pp or max((key[1] if len(key) > 1 else 0) for key in paths) + 1
    keys: dict[tuple[int, int], tuple[int, ...]] = {}
    # Stop at the first missing rank: a damaged file may claim huge sizes.
    for t, p in ((t, p) for t in range(tp) for p in range(pp)):
        key = keys[t, p] = (t,) if pp == 1 and (t,) in paths else (t, p)
        if key not in paths:
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
            raise InputError(
                f"{folder / name} has no model file: the checkpoint was saved by {tp} "
                f"tensor-parallel x {pp} pipeline ranks, and {len(paths)} of {tp * pp} files are "
                "here; copy the missing folder"
            )
    extra = sorted(set(paths) - set(keys.values()))
    if extra:
        raise InputError(
            f"{paths[extra[0]].parent} does not belong here: the checkpoint was saved by {tp} "
            f"tensor-parallel x {pp} pipeline ranks; if two checkpoints are mixed in {folder}, "
            "remove the other one's folders"
        )
    files = {
        rank: first if key == first_key else read_rank(paths[key]) for rank, key in keys.items()
    }
    return _merge(folder, files, tp, pp, overrides)


def _merge(
    where: Path,
    files: dict[tuple[int, int], RankFile],
    tp: int,
    pp: int,
    overrides: dict[str, Any],
) -> Checkpoint:
    first = files[0, 0]
    everything = sorted({key for file in files.values() for chunk in file.chunks for key in chunk})
    check_same_run(files, tp, where)
    names.refuse_unsupported(everything, str(where))
    family = names.family_of(everything)
    code = names.run_code(everything)
    version = _version(first, code, overrides)
    warnings: list[str] = []
    if version == 0.0 and "checkpoint_version" not in overrides:
        warnings.append(UNVERSIONED)

    shards = [_stage_tensors(files, t, pp, family) for t in range(tp)]
    check_dims({name: tensor.shape for name, tensor in shards[0].items()}, str(where))
    _check_same_keys(shards, files, where)
    shapes = {name: _full_shape(name, [shard[name] for shard in shards]) for name in shards[0]}
    build = build_config(
        shapes,
        first.args,
        family=family,
        code=code,
        overrides=overrides,
        where=str(where),
        params_dtype=dtype_name(shards[0][WORD_EMBEDDINGS].dtype),
    )
    config = build.config
    tied = not config.untie_embeddings_and_output_weights
    odd_copies = _drop_head_copies(shards, where, tied=tied)
    warnings += [f"{what}; the first is used" for what in odd_copies]
    table = parameters(config)
    tensors: dict[str, LazyTensor] = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        if ".linear_qkv." in name:
            parts = _in_group_order(parts, version, config, where)
        # A parameter that the table lacks is refused below.
        tensors[name] = table[name].rule.merge(parts) if name in table else parts[0]
    warnings += build.warnings + _compare_replicas(shards, table, where)
    provenance = Provenance(
        path=where,
        format="megatron-torch",
        names="core" if code == "core" else "legacy",
        checkpoint_version=version,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        iteration=saved_iteration(where, first.iteration),
        config_sources=build.sources,
        pickle_classes=sorted({c for file in files.values() for c in file.torch_file.classes}),
        hostile=sorted({c for file in files.values() for c in file.torch_file.hostile}),
        warnings=warnings,
        odd_copies=odd_copies,
        training_state=training_state(_everything_else(files, where)),
        notes=_notes(files),
        files=[file.path for file in files.values()],
        digest=_digest(files),
        args=first.args,
    )
    return Checkpoint(config, tensors, provenance).check()


def _version(first: RankFile, code: RunCode, overrides: Mapping[str, Any]) -> float:
    """Return the checkpoint version: the QKV order follows from it.

    Source: docs/megatron.md, "Checkpoint version".
    """
    if "checkpoint_version" in overrides:
        version = float(overrides["checkpoint_version"])
    elif first.version is None:
        # megatron-core names came years after the last change of order.
        return 3.0 if code == "core" else 0.0
    else:
        version = float(first.version)
    if version not in (0.0, 1.0, 2.0, 3.0):
        raise InputError(
            f"{first.path}: checkpoint_version {version} is unknown, known are 0, 1.0, 2.0 and "
            "3.0; correct it with --set checkpoint_version=3.0"
        )
    return version


def _stage_tensors(
    files: dict[tuple[int, int], RankFile], t: int, pp: int, family: str
) -> dict[str, LazyTensor]:
    """Return one tensor-parallel rank's tensors of all stages, under canonical names.

    Every stage counts its layers from 0. In the order chunk by chunk (virtual pipeline), stage by
    stage within a chunk, the global number is a running sum, `chunk * L/v + stage * c`.
    Source: docs/megatron.md, "Pipeline stages".
    """
    block = "encoder" if family == "bert" else "decoder"
    tensors: dict[str, LazyTensor] = {}
    offset = 0
    for chunk in range(max(len(files[t, p].chunks) for p in range(pp))):
        for p in range(pp):
            file = files[t, p]
            if chunk >= len(file.chunks):
                raise InputError(
                    f"{file.path} has {len(file.chunks)} virtual pipeline chunk(s) where others "
                    "have more; ranks of two checkpoints may be mixed: copy all ranks of one save"
                )
            found = {}
            for key, tensor in file.chunks[chunk].items():
                if names.strip_prefixes(key) == names.HEAD_COPY:
                    found[names.HEAD_COPY] = tensor
                    continue
                name = names.canonical_name(key, block, offset, str(file.path))
                check_weight_dtype(tensor, name, str(file.path))
                if name in found and not _same_place(found[name], tensor):
                    raise InputError(
                        f"{file.path} has {name} under two names, one of them {key}; the file may "
                        "hold two models: give a file of one"
                    )
                found[name] = tensor
            if (file is not files[t, 0] or chunk) and tensors:
                # A tied embedding's copy in the last stage must not replace the first stage's.
                found = {name: tensor for name, tensor in found.items() if name not in tensors}
            tensors.update(found)
            offset = len(layer_indices({name: () for name in tensors}))
            if WORD_EMBEDDINGS not in tensors:
                swapped = pp > 1 and "; the mp_rank folders may have been renamed or swapped"
                raise InputError(
                    f"{file.path} holds no word embeddings"
                    + (swapped or "; it is not a whole GPT or BERT model")
                )
    return tensors


def _same_place(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors are one storage under two names, as a wrapped module beside itself is."""
    if not isinstance(one, StoredTensor) or not isinstance(other, StoredTensor):
        return False
    return (one.offset, one.shape, one.stride) == (other.offset, other.shape, other.stride)


def _drop_head_copies(shards: list[dict[str, LazyTensor]], where: Path, *, tied: bool) -> list[str]:
    """Remove the last stage's copy of a tied embedding; say where rounding has changed it.

    Raises:
        InputError: It is not a copy.
    """
    worst = 0.0
    copies = (names.HEAD_COPY, "output_layer.weight") if tied else (names.HEAD_COPY,)
    for shard in shards:
        for name in copies:
            if name not in shard:
                continue
            copy, table = shard.pop(name), shard[WORD_EMBEDDINGS]
            gaps = [(math.inf, 1.0)]
            if copy.shape == table.shape:
                gaps = [_gap(a, b) for a, b in zip(runs(copy), runs(table), strict=True)]
            gap, scale = max(gap for gap, _ in gaps), max(scale for _, scale in gaps)
            if not all(one <= DRIFT * scale for one, _ in gaps):
                raise InputError(
                    f"{where}: {name} is not the copy of the word embeddings that it should be; "
                    "if two checkpoints are mixed copy all ranks of one save, and if the model's "
                    "output table is its own use --set untie_embeddings_and_output_weights=true"
                )
            worst = max(worst, gap)
    if worst:
        return [
            "the last pipeline stage's copy of the tied embedding differs from the first stage's "
            f"by up to {worst:.2g}"
        ]
    return []


def _gap(values: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return the largest difference (infinite for other shapes), and the largest value."""
    if values.shape != reference.shape:
        return math.inf, 1.0
    gap = 0.0
    if not torch.equal(values, reference):
        gap = (values.float() - reference.float()).abs().max().item()
    return gap, reference.float().abs().max().item() or 1.0


def _check_same_keys(
    shards: list[dict[str, LazyTensor]], files: dict[tuple[int, int], RankFile], where: Path
) -> None:
    for t, shard in enumerate(shards):
        odd = sorted(set(shard) ^ set(shards[0]))
        if odd:
            raise InputError(
                f"{where} mixes two checkpoints: {odd[0]} is in one of "
                f"{files[0, 0].path.parent.name} and "
                f"{files[t, 0].path.parent.name} only; copy all ranks of one save"
            )
        for name, tensor in shard.items():
            if tensor.shape != shards[0][name].shape or tensor.dtype != shards[0][name].dtype:
                raise InputError(
                    f"{where} mixes two checkpoints: {name} is {list(shards[0][name].shape)} "
                    f"{shards[0][name].dtype} in "
                    f"{files[0, 0].path.parent.name} and {list(tensor.shape)} {tensor.dtype} in "
                    f"{files[t, 0].path.parent.name}; copy all ranks of one save"
                )


def _full_shape(name: str, parts: list[LazyTensor]) -> tuple[int, ...]:
    """Return the shape of a parameter in the whole model, before there is a config."""
    shape, dim = list(parts[0].shape), cut_dim(name)
    if dim is not None:
        shape[dim] = sum(part.shape[dim] for part in parts)
    return tuple(shape)


def _in_group_order(
    parts: list[LazyTensor], version: float, config: ModelConfig, where: Path
) -> list[LazyTensor]:
    """Return the QKV rows of each rank in group order (docs/megatron.md, "QKV row order")."""
    if version >= 2.0:
        return parts
    if config.num_query_groups != config.num_attention_heads:
        raise InputError(
            f"{where}: checkpoint_version {version} is older than grouped-query attention, "
            "which its weights have; correct it with --set checkpoint_version=3.0"
        )
    order = qkv_order(version, config.num_attention_heads // len(parts), config.kv_channels)
    return [Selected(part, order) for part in parts]


def qkv_order(version: float, heads: int, channels: int) -> torch.Tensor:
    """Return where each row of `[heads, 3, channels]` stands in a rank's weight of an old version.

    Version 0 keeps `[3, heads, channels]`, version 1.0 `[heads, channels, 3]`.
    Source: docs/megatron.md, "QKV row order".
    """
    rows = torch.arange(heads * 3 * channels)
    if version == 0.0:
        return rows.view(3, heads, channels).permute(1, 0, 2).reshape(-1)
    if version == 1.0:
        return rows.view(heads, channels, 3).permute(0, 2, 1).reshape(-1)
    return rows


def _compare_replicas(
    shards: list[dict[str, LazyTensor]], table: Mapping[str, Parameter], where: Path
) -> list[str]:
    """Compare the small replicated tensors of all ranks, and return a warning if they drifted.

    Raises:
        InputError: They differ by more than drift.
    """
    drifted, worst = 0, 0.0
    for name, parameter in table.items():
        if parameter.rule.dim is not None or len(parameter.shape) != 1 or name not in shards[0]:
            continue
        reference = shards[0][name].read()
        for t, shard in enumerate(shards[1:], 1):
            gap, scale = _gap(shard[name].read(), reference)
            if not gap <= DRIFT * scale:  # also catches NaN
                raise InputError(
                    f"{where} mixes two checkpoints: {name} differs by {gap:.3g} between "
                    f"tensor-parallel ranks 0 and {t}, where it should be the same; copy all ranks "
                    "of one save"
                )
            drifted, worst = drifted + (gap > 0), max(worst, gap)
    if drifted:
        return [
            f"{drifted} replicated tensor(s) differ between tensor-parallel ranks by up to "
            f"{worst:.2g} (rounding drift in training); rank 0's are used"
        ]
    return []


def _everything_else(files: dict[tuple[int, int], RankFile], where: Path) -> set[str]:
    """Return the names of entries, and of files beside the ranks', that may hold no weights."""
    found = {
        key
        for file in files.values()
        for key, value in file.torch_file.value.items()
        if isinstance(key, str) and value is not None
    }
    if where.is_dir():
        found |= {path.name for path in where.glob("mp_rank_*/*.pt")} - set(MODEL_FILES)
    return found


def _notes(files: dict[tuple[int, int], RankFile]) -> list[str]:
    notes = []
    if any(file.torch_file.form == "stream" for file in files.values()):
        notes.append(
            "files are in torch.save's older stream form (before torch 1.6), read by offset"
        )
    if any(len(file.chunks) > 1 for file in files.values()):
        notes.append(f"virtual pipeline: {len(files[0, 0].chunks)} model chunks in each file")
    return notes


def _digest(files: dict[tuple[int, int], RankFile]) -> str:
    marks = {}
    for (t, p), file in files.items():
        crcs: list[int] | bytes = file.torch_file.crcs
        if not crcs:  # a stream has no CRCs: take its first and last bytes
            with file.path.open("rb") as stream:
                head = stream.read(1 << 16)
                stream.seek(max(file.path.stat().st_size - (1 << 16), 0))
                crcs = head + stream.read()
        marks[f"{t}/{p}"] = (file.path.stat().st_size, crcs)
    return cheap_digest(marks)
