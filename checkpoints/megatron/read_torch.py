"""Megatron's `torch` format: mp_rank_XX[_YYY]/model_optim_rng.pt, every era since 2019-07.

Each tensor-parallel rank and pipeline stage wrote one file. This reader merges them lazily: the QKV
order of versions 0 and 1.0 becomes group order, gated fc1 becomes `[gate; up]`, pipeline stages get
global layer numbers.
Source: docs/megatron.md, "Folders and files", "Pipeline stages", "Top-level keys",
"megatron-core names", "Tensor parallelism", "QKV row order", "Gated MLP".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.checkpoint import (
    Checkpoint,
    Provenance,
    cheap_digest,
    check_weight_dtype,
    ends_of,
    training_state,
)
from mlm_eval.checkpoints.config import ConfigBuilder, ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import Concat, LazyTensor, RowOrder, Selected, StoredTensor
from mlm_eval.checkpoints.megatron import names
from mlm_eval.checkpoints.megatron.args import (
    build_config,
    check_dims,
    layer_indices,
    saved_args,
    sources_beside,
    unknown_settings,
    with_losses,
)
from mlm_eval.checkpoints.megatron.fields import RunCode
from mlm_eval.checkpoints.megatron.files import (
    MODEL_FILES,
    NUMBERED,
    Rank,
    RankFile,
    check_same_run,
    merge_experts,
    parallel_sizes,
    read_flat_rank,
    read_rank,
    scan_ranks,
    split_slabs,
    stacked_shapes,
)
from mlm_eval.checkpoints.megatron.iteration import folder_of_ranks, saved_iteration
from mlm_eval.checkpoints.megatron.layout import ExpertLayout
from mlm_eval.checkpoints.parameters import (
    WORD_EMBEDDINGS,
    Parameter,
    cut_dim,
    num_prediction_heads,
    parameters,
    prediction_parameters,
)
from mlm_eval.checkpoints.projects.nemo_1 import NEMO_FILE, nemo_ranks
from mlm_eval.checkpoints.projects.settings import SideSettings, nemo_settings
from mlm_eval.checkpoints.soundness.copies import (
    copied_experts,
    copied_on_purpose,
    copied_ranks,
    copied_stages,
    deeper_or_copied,
    has_one_expert,
    refuse_copied,
)
from mlm_eval.checkpoints.soundness.replicas import (
    DRIFT,
    RankCopies,
    compare_replicas,
    gap_of,
    split_by_size,
)

if TYPE_CHECKING:
    import torch

PREDICTION_HEADS = (
    "heads of multi-token prediction, which the main head never sees: kept by conversions to "
    "Megatron's formats and to Hugging Face's DeepSeek V3, left out elsewhere"
)
RankColumns = dict[tuple[int, int], dict[str, LazyTensor]]
"""What ranks hold by canonical names, by their tensor-parallel and expert-parallel number."""

MOST_RANKS = 1 << 20
"""Tensor-parallel times expert-parallel ranks that are believed."""

UNKNOWN_HEADS = (
    "the heads of multi-token prediction are left out: their layer is of another kind than the "
    "model's last"
)

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
    return merge_ranks(path, {(0, 0, 0): rank_file}, ExpertLayout(1, 1, 1), 1, overrides)


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
    tp = tp or max(key[0] for key in paths) + 1
    layout = ExpertLayout.of(first.args, tp)
    if layout.ep > 1 and layout.ep * layout.tp > MOST_RANKS:
        raise InputError(
            f"{folder}: its args say {layout.tp} tensor-parallel x {layout.ep} expert-parallel "
            "ranks; the file is damaged, copy it again"
        )
    if any(names.is_expert(key) for chunk in first.chunks for key in chunk):
        layout.check(str(folder), {(key[0], key[-1] if layout.ep > 1 else 0) for key in paths})
    pp = pp or max((key[1] if len(key) > 1 else 0) for key in paths) + 1
    keys: dict[Rank, tuple[int, ...]] = {}
    # Stop at the first missing rank: a damaged file may claim huge sizes.
    columns = layout.folders() if layout.ep > 1 else ((t, 0) for t in range(tp))
    for t, p, e in ((t, p, e) for t, e in columns for p in range(pp)):
        key = (t, p) if pp > 1 or ((t,) not in paths and layout.ep == 1) else (t,)
        keys[t, p, e] = key = (*key, e) if layout.ep > 1 else key
        if key not in paths:
            parts = [p] * (pp > 1) + [e] * (layout.ep > 1)
            name = "_".join([f"mp_rank_{t:02d}", *(f"{number:03d}" for number in parts)])
            size = f" x {layout.ep} expert-parallel" if layout.ep > 1 else ""
            count = len(set(layout.folders()) if layout.ep > 1 else range(tp)) * pp
            raise InputError(
                f"{folder / name} has no model file: the checkpoint was saved by {tp} "
                f"tensor-parallel{size} x {pp} pipeline ranks, and {len(paths)} of {count} files "
                "are here; copy the missing folder"
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
    return merge_ranks(folder, files, layout, pp, overrides)


def read_nemo_ranks(root: Path, overrides: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a NeMo 1 folder whose ranks have a file each, a flat state dict.

    Raises:
        InputError: A rank is missing or damaged, or the model is unsupported.
    """
    settings, paths = nemo_settings(root), nemo_ranks(root)
    saved_args(settings.args, str(root))  # refuses sizes that are no numbers
    one = list(paths.values()) == [root / NEMO_FILE]
    tp, pp = (
        1 if one else settings.args.get(name) or 1 + max(rank[dim] for rank in paths)
        for dim, name in enumerate(("tensor_model_parallel_size", "pipeline_model_parallel_size"))
    )
    lost = next(((t, p) for p in range(pp) for t in range(tp) if (t, p) not in paths), None)
    if lost or len(paths) != tp * pp:
        what = (
            f"that of rank {lost[0]} of stage {lost[1]} is missing" if lost else "some are others"
        )
        raise InputError(
            f"{root} has {len(paths)} rank file(s), where {settings.path.name} says {tp} "
            f"tensor-parallel x {pp} pipeline ranks: {what}; copy all folders of one save"
        )
    files = {
        (t, p, 0): read_flat_rank(path, settings.args, oldest=settings.oldest_order)
        for (t, p), path in paths.items()
    }
    return merge_ranks(root, files, ExpertLayout(tp, 1, tp), pp, overrides, beside=settings)


def merge_ranks(
    where: Path,
    files: dict[Rank, RankFile],
    layout: ExpertLayout,
    pp: int,
    overrides: dict[str, Any],
    *,
    build: Callable[[Mapping[str, tuple[int, ...]], str], ConfigBuilder] | None = None,
    beside: SideSettings | None = None,
) -> Checkpoint:
    """Return the checkpoint of all ranks' files.

    Args:
        where: The checkpoint, for messages.
        files: By rank; of a pipeline every stage's.
        layout: Of the experts over the ranks.
        pp: Pipeline stages.
        overrides: `--set` values.
        build: Makes the config from the full shapes and the stored dtype; None: from the args.
        beside: The file of another project that the args come from.

    Raises:
        InputError: The files are of two checkpoints, or the model is unsupported.
    """
    first, tp = files[0, 0, 0], layout.tp
    everything = sorted({key for file in files.values() for chunk in file.chunks for key in chunk})
    everything = [key for key in everything if not names.is_left_out(key)]
    check_same_run(files, tp, where)
    names.refuse_unsupported(everything, str(where))
    family = names.family_of(everything)
    code = names.run_code(everything)
    if family == "t5" and (pp > 1 or len(first.chunks) > 1):
        raise InputError(
            f"{where} holds a T5 model in pipeline stages, which mlm-eval does not read (nor does "
            "Megatron's pretrain_t5 of core 0.13 and later); write it with Megatron as torch_dist, "
            "or without pipeline stages"
        )
    copied: list[str] = []
    if pp > 1:
        by_rank = [
            copied_stages({p: _all_chunks(files[t, p, e]) for p in range(pp)})
            for t, e in sorted({(t, e) for t, _, e in files})
        ]
        copied += copied_on_purpose(by_rank, where)
    version = _version(first, code, overrides)
    warnings: list[str] = []
    if version == 0.0 and beside is None and "checkpoint_version" not in overrides:
        warnings.append(UNVERSIONED)

    columns = {
        (t, e): _stage_tensors([files[t, p, e] for p in range(pp)], family, layout.ep)
        for t, p, e in files
        if p == 0
    }
    same_experts: list[str | None] = []
    for t in range(tp):
        of_experts = {
            e: {name: tensor for name, tensor in column.items() if NUMBERED.fullmatch(name)}
            for (u, e), column in columns.items()
            if u == t
        }
        found = copied_experts(of_experts)
        if not all(map(has_one_expert, of_experts.values())):
            refuse_copied(found, where)
        if len(of_experts) > 1:
            same_experts.append(found and "expert-parallel ranks hold the same experts")
    copied += copied_on_purpose(same_experts, where)
    experts = _expert_parts(columns, layout, where)
    for column in columns.values():
        for name in [name for name in column if NUMBERED.fullmatch(name)]:
            del column[name]
    shards = _one_of_each(columns)
    _join_down_projections(columns, first.args)
    dense_shapes = {name: tensor.shape for name, tensor in shards[0].items()}
    check_dims(dense_shapes, str(where))
    _check_same_keys(columns, files, where)
    shapes = {name: _full_shape(name, [shard[name] for shard in shards]) for name in shards[0]}
    shapes |= stacked_shapes(experts)
    params_dtype = shards[0][WORD_EMBEDDINGS].kind.name
    built = (
        build(shapes, params_dtype)
        if build
        else build_config(
            shapes,
            first.args,
            family=family,
            code=code,
            overrides=overrides,
            where=str(where),
            params_dtype=params_dtype,
        )
    )
    config = built.config
    tied = not config.untie_embeddings_and_output_weights
    odd_copies = _drop_head_copies(columns.values(), where, tied=tied)
    warnings += [f"{what}; the first is used" for what in odd_copies]
    table = parameters(config)
    tensors: dict[str, LazyTensor] = {}
    for name in shards[0]:
        parts = [shard[name] for shard in shards]
        if ".linear_qkv." in name:
            parts = _in_group_order(parts, version, config, where)
        # A parameter that the table lacks is refused below.
        tensors[name] = table[name].rule.merge(parts) if name in table else parts[0]
    tensors |= merge_experts(experts, table, str(where))
    found_heads, of_heads = _prediction_heads(files, layout, config, where)
    heads, notes = prediction_heads(found_heads, config, str(where))
    small, large = split_by_size({**_replicas(columns, table), **of_heads})
    odd_replicas = compare_replicas(small, where)
    warnings += built.warnings + odd_replicas + deeper_or_copied(copied)
    tp_ranks = dict(enumerate(shards))
    refuse_copied(
        copied_ranks(tp_ranks, lambda name: name in table and table[name].rule.dim is not None),
        where,
    )
    warnings += unknown_settings(beside)
    notes = [*_notes(files), *notes]
    provenance = Provenance(
        path=where,
        format="megatron-torch" if beside is None else beside.format,
        names="core" if code == "core" else "legacy",
        checkpoint_version=version,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        iteration=saved_iteration(where, first.iteration),
        config_sources=sources_beside(built.sources, beside),
        pickle_classes=sorted({c for file in files.values() for c in file.torch_file.classes}),
        hostile=sorted({c for file in files.values() for c in file.torch_file.hostile}),
        warnings=warnings,
        odd_copies=odd_copies,
        same_parts=copied,
        odd_replicas=odd_replicas,
        training_state=training_state(_everything_else(files, where)),
        notes=notes,
        files=[file.path for file in files.values()],
        digest=_digest(files),
        args=with_losses(first.args, overrides),
    )
    return Checkpoint(config, tensors, provenance, heads, large).check()


def _all_chunks(file: RankFile) -> dict[str, LazyTensor]:
    """Return the tensors of a file, each under its own name behind its chunk's number."""
    chunks = enumerate(file.chunks)
    return {f"{number}.{key}": t for number, chunk in chunks for key, t in chunk.items()}


def _prediction_heads(
    files: Mapping[Rank, RankFile], layout: ExpertLayout, config: ModelConfig, where: Path
) -> tuple[dict[str, LazyTensor], RankCopies]:
    """Return the heads of multi-token prediction, whole, under canonical names, and replicas."""
    columns: RankColumns = {}
    for (t, _, e), file in files.items():
        found = columns.setdefault((t, e), {})
        for chunk in file.chunks:
            for key, tensor in split_slabs(chunk, layout.ep).items():
                if names.is_left_out(key):
                    found[names.prediction_name(key, str(file.path))] = tensor
    experts = _expert_parts(columns, layout, where)
    shards = _one_of_each(columns)
    plain = [
        {n: tensor.shape for n, tensor in shard.items() if not NUMBERED.fullmatch(n)}
        for shard in shards
    ]
    if any(found != plain[0] for found in plain):
        raise InputError(
            f"{where} mixes two checkpoints: the heads of multi-token prediction differ on its "
            "tensor-parallel ranks; copy all ranks of one save"
        )
    _join_down_projections(columns, files[0, 0, 0].args)
    table = prediction_parameters(config, num_prediction_heads(shards[0]))
    whole = {}
    for name in shards[0]:
        if not NUMBERED.fullmatch(name):
            parts = [shard[name] for shard in shards]
            alike = name in table and len(parts[0].shape) == len(table[name].shape)
            whole[name] = table[name].rule.merge(parts) if alike else parts[0]
    return whole | merge_experts(experts, table, str(where)), _replicas(columns, table)


def prediction_heads(
    found: Mapping[str, LazyTensor], config: ModelConfig, where: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return the heads of multi-token prediction that conversions keep, and notes about them."""
    table = prediction_parameters(config, num_prediction_heads(found))
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if shapes != {name: parameter.shape for name, parameter in table.items()}:
        return {}, [UNKNOWN_HEADS]
    for name, tensor in found.items():
        check_weight_dtype(tensor, name, where)
    return dict(found), [PREDICTION_HEADS] if found else []


def _expert_parts(
    columns: RankColumns, layout: ExpertLayout, where: Path
) -> dict[str, list[LazyTensor]]:
    """Return the parts of each expert's matrices, by canonical names with global numbers.

    Raises:
        InputError: Files of ranks with the same experts hold different ones.
    """
    parts: dict[str, list[LazyTensor]] = {}
    for expert_rank in range(layout.ep):
        held = [columns[layout.holder(expert_rank, part)] for part in range(layout.etp)]
        for name in held[0]:
            match = NUMBERED.fullmatch(name)
            if not match:
                continue
            alike = f"{re.escape(match['head'])}\\d+\\.{re.escape(match['tail'])}"
            local = sum(bool(re.fullmatch(alike, other)) for other in held[0])
            number = expert_rank * local + int(match["number"])
            found = [column.get(name) for column in held]
            if None in found:
                raise InputError(
                    f"{where} mixes two checkpoints: {name} is in some of the files of expert rank "
                    f"{expert_rank} only; copy all ranks of one save"
                )
            parts[f"{match['head']}{number}.{match['tail']}"] = [p for p in found if p is not None]
    return parts


def _join_down_projections(columns: RankColumns, args: Mapping[str, Any]) -> None:
    """Make the down projections of latent attention whole on every rank.

    megatron-core's local layers cut them by rows, wherever that falls; TransformerEngine's hold
    them whole. Source: docs/megatron.md, "Multi-latent attention".
    """
    shards = _one_of_each(columns)
    for name in [name for name in shards[0] if name.endswith("_down_proj.weight")]:
        up = shards[0].get(name.replace("_down_proj", "_up_proj"))
        if up is None or len(up.shape) != 2:
            continue  # the table misses it
        latent, rows = up.shape[1], shards[0][name].shape[0]
        turned = args.get("qk_pos_emb_head_dim") or 0
        if "linear_kv_down_proj" in name:
            whole = rows == latent + turned if turned else rows > latent
        else:
            whole = rows == latent
        if len(shards) > 1 and not whole:
            parts = {rank: column[name] for rank, column in columns.items()}
            others = [shard[name] for shard in shards]
            for (_, e), column in columns.items():
                of_e = [parts.get((t, e), other) for t, other in enumerate(others)]
                column[name] = Concat(of_e, 0)


def _one_of_each(columns: RankColumns) -> list[dict[str, LazyTensor]]:
    """Return what one rank of each tensor-parallel number holds, in their order."""
    numbers = sorted({t for t, _ in columns})
    return [columns[t, min(e for u, e in columns if u == t)] for t in numbers]


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


def _stage_tensors(stages: list[RankFile], family: str, ep: int) -> dict[str, LazyTensor]:
    """Return one rank's tensors of all stages, under canonical names; experts by local numbers.

    Every stage counts its layers from 0. In the order chunk by chunk (virtual pipeline), stage by
    stage within a chunk, the global number is a running sum, `chunk * L/v + stage * c`.
    Source: docs/megatron.md, "Pipeline stages".
    """
    block = names.block_of(family)
    tensors: dict[str, LazyTensor] = {}
    offset = 0
    for chunk in range(max(len(file.chunks) for file in stages)):
        for file in stages:
            if chunk >= len(file.chunks):
                raise InputError(
                    f"{file.path} has {len(file.chunks)} virtual pipeline chunk(s) where others "
                    "have more; ranks of two checkpoints may be mixed: copy all ranks of one save"
                )
            found = {}
            pieces = split_slabs(file.chunks[chunk], ep)
            first_names = names.without_second_names(pieces, family)
            for key, tensor in pieces.items():
                if key not in first_names:
                    continue
                if names.strip_prefixes(key) == names.HEAD_COPY:
                    found[names.HEAD_COPY] = tensor
                    continue
                if names.is_left_out(key):
                    continue
                name = names.canonical_name(key, block, offset, str(file.path))
                check_weight_dtype(tensor, name, str(file.path))
                if name in found and not _same_place(found[name], tensor):
                    raise InputError(
                        f"{file.path} has {name} under two names, one of them {key}; the file may "
                        "hold two models: give a file of one"
                    )
                found[name] = tensor
            if (file is not stages[0] or chunk) and tensors:
                # A tied embedding's copy in the last stage must not replace the first stage's.
                found = {name: tensor for name, tensor in found.items() if name not in tensors}
            tensors.update(found)
            # The number of the last, not of all: a heterogeneous layer may hold nothing.
            offset = max(layer_indices({name: () for name in tensors}), default=-1) + 1
            if WORD_EMBEDDINGS not in tensors:
                swapped = (
                    len(stages) > 1 and "; the mp_rank folders may have been renamed or swapped"
                )
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


def _drop_head_copies(
    columns: Iterable[dict[str, LazyTensor]], where: Path, *, tied: bool
) -> list[str]:
    """Remove the last stage's copy of a tied embedding; say where rounding has changed it.

    Raises:
        InputError: It is not a copy.
    """
    worst = 0.0
    copies = (names.HEAD_COPY, "output_layer.weight") if tied else (names.HEAD_COPY,)
    for shard in columns:
        for name in copies:
            if name not in shard:
                continue
            copy, table = shard.pop(name), shard[WORD_EMBEDDINGS]
            gap, scale = gap_of(copy, table)
            if not gap <= DRIFT * scale:
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


def _check_same_keys(
    columns: RankColumns,
    files: dict[Rank, RankFile],
    where: Path,
) -> None:
    ours, first = columns[0, 0], files[0, 0, 0].called
    for (t, e), column in columns.items():
        theirs = files[t, 0, e].called
        odd = sorted(set(column) ^ set(ours))
        if odd:
            raise InputError(
                f"{where} mixes two checkpoints: {odd[0]} is in one of {first} and {theirs} only; "
                "copy all ranks of one save"
            )
        for name, tensor in column.items():
            if tensor.kind != ours[name].kind or (
                tensor.shape != ours[name].shape and not name.endswith("_down_proj.weight")
            ):
                raise InputError(
                    f"{where} mixes two checkpoints: {name} is {list(ours[name].shape)} "
                    f"{ours[name].kind} in {first} and {list(tensor.shape)} {tensor.kind} in "
                    f"{theirs}; copy all ranks of one save"
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
    heads, channels = config.num_attention_heads // len(parts), config.kv_channels
    order = RowOrder(heads * 3 * channels, qkv_order, version, heads, channels)
    return [Selected(part, order) for part in parts]


def qkv_order(version: float, heads: int, channels: int) -> torch.Tensor:
    """Return where each row of `[heads, 3, channels]` stands in a rank's weight of an old version.

    Version 0 keeps `[3, heads, channels]`, version 1.0 `[heads, channels, 3]`.
    Source: docs/megatron.md, "QKV row order".
    """
    import torch

    rows = torch.arange(heads * 3 * channels)
    if version == 0.0:
        return rows.view(3, heads, channels).permute(1, 0, 2).reshape(-1)
    if version == 1.0:
        return rows.view(heads, channels, 3).permute(0, 2, 1).reshape(-1)
    return rows


def _replicas(columns: RankColumns, table: Mapping[str, Parameter]) -> RankCopies:
    """Return what more than one rank holds whole."""
    if len(columns) < 2:
        return {}
    (first, reference), *others = columns.items()
    pairs = {
        (t, e): f"tensor-parallel ranks {first[0]} and {t}" if t else f"expert ranks 0 and {e}"
        for (t, e), _ in others
    }
    return {
        name: {"": reference[name]}
        | {pairs[rank]: column[name] for rank, column in others if name in column}
        for name, parameter in table.items()
        if parameter.rule.dim is None and name in reference
    }


def _everything_else(files: dict[Rank, RankFile], where: Path) -> set[str]:
    """Return the names of entries, and of files beside the ranks', that may hold no weights."""
    found = {
        key
        for file in files.values()
        for key, value in file.torch_file.value.items()
        if isinstance(key, str) and value is not None
    }
    if where.is_dir():
        folders = [path for path in where.iterdir() if path.name.startswith("mp_rank_")]
        inside = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
        found |= {path.name for path in inside if path.suffix == ".pt"} - set(MODEL_FILES)
    return found


def _notes(files: dict[Rank, RankFile]) -> list[str]:
    notes = []
    if any(file.torch_file.form == "stream" for file in files.values()):
        notes.append(
            "files are in torch.save's older stream form (before torch 1.6), read by offset"
        )
    if any(len(file.chunks) > 1 for file in files.values()):
        notes.append(f"virtual pipeline: {len(files[0, 0, 0].chunks)} model chunks in each file")
    return notes


def _digest(files: dict[Rank, RankFile]) -> str:
    marks = {}
    for (t, p, e), file in files.items():
        crcs: list[int] | bytes = file.torch_file.crcs
        if not crcs:  # a stream has no CRCs: take its first and last bytes
            crcs = ends_of(file.path, 1 << 16)
        marks[f"{t}/{p}/{e}" if e else f"{t}/{p}"] = (file.path.stat().st_size, crcs)
    return cheap_digest(marks)
