"""Reader of Hugging Face folders: config.json and safetensors or pytorch_model.bin, also sharded.

Nothing of transformers is imported: names, layouts and settings come from `families`.
Weights are mapped, packed into canonical form by views, and read when somebody asks for a slice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.checkpoint import (
    Checkpoint,
    Provenance,
    cheap_digest,
    check_weight_dtype,
    training_state,
)
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import STORED_DTYPES
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safetensors_file import read_safetensors
from mlm_eval.checkpoints.files.state_dict import common_prefix, plain_tensor, unwrapped
from mlm_eval.checkpoints.files.text_file import read_json_object
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.folders.file_names import safe_name
from mlm_eval.checkpoints.huggingface.config import read_config
from mlm_eval.checkpoints.huggingface.families import FAMILIES
from mlm_eval.checkpoints.huggingface.families.family import IGNORED_TENSORS, Family, entries
from mlm_eval.checkpoints.huggingface.families.gpt_oss import GPT_OSS
from mlm_eval.checkpoints.huggingface.families.images import text_config, text_tensors
from mlm_eval.checkpoints.huggingface.folds import with_paired_latents
from mlm_eval.checkpoints.huggingface.layers.prediction import (
    COUNT,
    has_place_for_heads,
    pack_heads,
)
from mlm_eval.checkpoints.huggingface.quantized.fp8 import is_fp8, with_fp8_unpacked
from mlm_eval.checkpoints.huggingface.quantized.mxfp4 import with_mxfp4_unpacked
from mlm_eval.checkpoints.huggingface.reader import Found, HubConfigReader
from mlm_eval.checkpoints.huggingface.t5 import OUTPUT_BIAS, queries_factor, with_scaled_queries
from mlm_eval.checkpoints.lazy import LazyTensor, runs, zeros
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.checkpoints.soundness.stored_bits import same_values

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""In transformers' order of preference; each may also be split, with an index beside it."""


WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
"""Names of such files and of their indices."""


@dataclass
class Weights:
    """The tensors of a folder by transformers' current names, and which were asked for."""

    folder: Path
    prefix: str = ""
    other_prefix: str = ""
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """The files' own names of the tensors."""
    used: set[str] = field(default_factory=set)
    files: list[Path] = field(default_factory=list)
    marks: dict[str, tuple[int, list[int] | bytes]] = field(default_factory=dict)
    classes: set[str] = field(default_factory=set)
    hostile: set[str] = field(default_factory=set)

    def find(self, name: str) -> LazyTensor | None:
        """Return a tensor by its name in a model with a head; base models leave the prefix out."""
        bare = name.removeprefix(self.prefix)
        for key in (name, bare, *([self.other_prefix + bare] if self.other_prefix else [])):
            if key in self.tensors:
                self.used.add(key)
                return self.tensors[key]
        return None

    def drop_prefix(self, name: str) -> LazyTensor | None:
        """Take off what a trainer has put before every name; return the tensor of a known name."""
        for known in (name, name.removeprefix(self.prefix)):
            if prefix := common_prefix(self.tensors, known):
                self.tensors = {key.removeprefix(prefix): t for key, t in self.tensors.items()}
                return self.find(name)
        return None

    def add(self, path: Path, mark: list[int] | bytes, tensors: Mapping[str, Any]) -> None:
        """Take in one file's tensors."""
        self.files.append(path)
        self.marks[path.name] = (path.stat().st_size, mark)
        for key, value in tensors.items():
            if not isinstance(key, str) or IGNORED_TENSORS.search(key):
                continue
            tensor = plain_tensor(value, key, str(path))
            if tensor is None:
                continue
            name = _current_name(key)
            if self.keys.setdefault(name, key) != key:
                raise InputError(
                    f"{path} has {name} under two names, {self.keys[name]} and {key}; the folder "
                    "may hold two models: give one of a single model"
                )
            self.tensors[name] = tensor


def _current_name(key: str) -> str:
    """Return today's name of a tensor; BERT as converted in 2018 has others for its norms."""
    key = unwrapped(key)
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", key))


def read_folder(path: Path, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Return the checkpoint in a Hugging Face folder; no weight is read yet.

    Args:
        path: A folder with config.json and its weights.
        overrides: Settings that win over config.json's.

    Raises:
        InputError: A file is missing, cut off or damaged, or the model is of an unsupported kind.
    """
    overrides = dict(overrides or {})
    config_path = path / "config.json"
    whole = read_json_object(config_path)
    text = text_config(whole, str(config_path))
    hf = whole if text is None else text
    family = find_family(hf, config_path)
    weights = _open_weights(path, family)
    of_images: list[str] = []
    if text is not None:
        weights.tensors, of_images = text_tensors(weights.tensors, str(path))
    unpacked: list[str] = []
    if family is GPT_OSS and hf.get("quantization_config") is not None:
        settings = hf["quantization_config"]
        stored = len(weights.tensors)
        weights.tensors = with_mxfp4_unpacked(weights.tensors, settings, str(config_path))
        unpacked = [
            f"the experts' {stored - len(weights.tensors)} weights stored as MXFP4 become bfloat16 "
            "as they are read"
        ]
    if is_fp8(settings := hf.get("quantization_config")):
        stored = len(weights.tensors)
        weights.tensors = with_fp8_unpacked(weights.tensors, settings, str(config_path))
        hf = {key: value for key, value in hf.items() if key != "quantization_config"}
        unpacked = [
            f"{stored - len(weights.tensors)} weights stored as 8-bit floats with a scale for each "
            "block become float32 as they are read"
        ]
    weights.marks["config.json"] = (config_path.stat().st_size, config_path.read_bytes())
    found = _inspect(weights, family, hf)
    build = read_config(hf, family, found=found, overrides=overrides, where=str(config_path))
    warnings = list(build.warnings)
    heads, sentences = _prediction_heads(weights, build)
    warnings += sentences
    if text is not None:
        warnings.append(
            f"this is a {whole['model_type']} model of text and images: its language model is "
            f"read, and its {len(of_images)} tensors for images are left out"
        )
    tensors, notes = _pack(weights, family, build.config, build.switches)
    if found.untied and family.kind != "t5":  # T5 v1.1 has two, whatever its file says
        warnings.append(
            "config.json ties the output table to the embeddings, but the file holds two "
            "different ones; both are used, as transformers does"
        )
    provenance = Provenance(
        path=path,
        format="huggingface",
        config_sources=build.sources,
        pickle_classes=sorted(weights.classes),
        hostile=sorted(weights.hostile),
        warnings=warnings,
        training_state=training_state(entry.name for entry in path.iterdir()),
        notes=[
            f"{family.model_type} in {len(weights.files)} {weights.files[0].suffix} file(s)",
            *unpacked,
            *notes,
        ],
        files=[config_path, *weights.files],
        digest=cheap_digest(weights.marks),
    )
    checkpoint = Checkpoint(build.config, tensors, provenance, heads).check()
    if "rope_interleave" in family.table and not build.look("rope_interleave", "bool")[0]:
        checkpoint = with_paired_latents(checkpoint)
    return checkpoint


def _prediction_heads(
    weights: Weights, build: HubConfigReader
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Take out the layers for multi-token prediction behind a model's own.

    Returns:
        What conversions keep of them, by the names of `prediction_parameters`, and a
        sentence where there are any.
    """
    family, config = build.family, build.config
    if COUNT not in family.table:
        return {}, []
    if not has_place_for_heads(family):
        names = [name for name in weights.tensors if name.startswith("mtp.")]
        weights.used.update(names)
        told = f"{len(names)} tensors of heads of multi-token prediction take no part in scoring"
        return {}, [f"{told}; conversions leave them out"] if names else []
    first = config.num_layers
    count, _ = build.look(COUNT, "int")
    later = re.compile(r"(?:^|\.)layers\.(\d+)\.")
    numbers = {
        name: int(found[1])
        for name in weights.tensors
        if (found := later.search(name)) and first <= int(found[1]) < first + count
    }
    # A head has what no layer has: what is merely one layer too many is refused later.
    heads_of = {number for name, number in numbers.items() if name.endswith(".eh_proj.weight")}
    numbers = {name: number for name, number in numbers.items() if number in heads_of}
    if not numbers:
        return {}, []
    layers = sorted(set(numbers.values()))
    weights.used.update(numbers)
    heads = {}
    if layers == list(range(first, first + len(layers))):
        heads = pack_heads(weights.find, family, config, build.switches, len(layers))
        for name, tensor in heads.items():
            check_weight_dtype(tensor, name, str(weights.folder))
    kept = "conversions keep them" if heads else "conversions leave them out"
    return heads, [
        f"the {len(layers)} layer(s) behind layer {first - 1}, heads of multi-token prediction, "
        f"take no part in scoring; {kept}"
    ]


def find_family(hf: Mapping[str, Any], where: Path) -> Family:
    """Return the family that a config.json names.

    Raises:
        InputError: The model is of another kind.
    """
    model_type = hf.get("model_type")
    # Files of 2018 and 2019 name no type; their model class tells.
    classes = _classes(hf)
    if model_type is None and classes:
        known = [f for f in FAMILIES.values() if any(c.startswith(f.model_class) for c in classes)]
        model_type = known[0].model_type if known else None
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = (
            f"a model of model_type {model_type!r}" if model_type else "a model of no model_type"
        )
        raise InputError(
            f"{where} describes {named}, which mlm-eval does not compute; known are "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    key = family.activation
    word = "" if key is None else str(hf.get(key.key, key.default))
    if family.gated is not None and word.startswith("gated-"):
        return family.gated
    return family


def _classes(hf: Mapping[str, Any]) -> list[str]:
    names = hf.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def holds_weights(folder: Path) -> bool:
    """Whether a folder has weights in one of this format's forms, or at least a part of them."""
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return True
        stem, _, suffix = name.rpartition(".")
        if index.is_file() and any(folder.glob(f"{stem}-*-of-*.{suffix}")):
            return True
    return False


def _open_weights(folder: Path, family: Family) -> Weights:
    weights = Weights(folder, family.prefix, family.other_prefix)
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            _add_file(weights, folder / name)
            return weights
        if index.is_file():
            for shard in _shards(index):
                _add_file(weights, shard)
            weights.marks[index.name] = (index.stat().st_size, b"")
            _check_index(weights, index)
            return weights
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6])
    raise InputError(
        f"{folder} has a config.json but no weights: expected model.safetensors or "
        f"pytorch_model.bin, or its shards with their index (found {found}); "
        "copy all files of the model"
    )


def _add_file(weights: Weights, path: Path) -> None:
    if path.suffix == ".safetensors":
        file = read_safetensors(path)
        weights.add(path, file.header, file.tensors)
        return
    torch_file = read_torch_file(path)
    if not isinstance(torch_file.value, dict):
        raise InputError(
            f"{path} holds a {type(torch_file.value).__name__}, not a state dict; "
            "give the folder of a Hugging Face model"
        )
    weights.classes.update(torch_file.classes)
    weights.hostile.update(torch_file.hostile)
    weights.add(path, torch_file.crcs, torch_file.value)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} holds no weight_map; download or copy the file again")
    return {str(key): str(name) for key, name in weight_map.items()}


def _shards(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        safe_name(name, f"{index}: the shard")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index.parent / missing[0]} is missing: {len(names) - len(missing)} of the "
            f"{len(names)} files named in {index.name} are here; copy the others too"
        )
    return [index.parent / name for name in names]


def _check_index(weights: Weights, index: Path) -> None:
    lost = [
        key
        for key in _weight_map(index)
        if _current_name(key) not in weights.tensors and not IGNORED_TENSORS.search(key)
    ]
    if lost:
        raise InputError(
            f"{index} lists {lost[0]} and {len(lost) - 1} more that its files do not hold; "
            "files of two models may be mixed, copy them again"
        )


def _inspect(weights: Weights, family: Family, hf: Mapping[str, Any]) -> Found:
    """Return what the weights tell about the model, and mark copies of tied tables as used."""
    names = {row.canonical: row.names[0] for row in family.rows if row.weight}
    table_name = f"{names['embedding.word_embeddings']}.weight"
    table = weights.find(table_name) or weights.drop_prefix(table_name)
    if table is None or len(table.shape) != 2:
        raise InputError(
            f"{weights.files[0]} holds no word embeddings {table_name}, which a "
            f"{family.model_type} model has; copy all files of the model"
        )
    stated = hf.get("vocab_size")
    if stated is not None and stated != table.shape[0]:
        raise InputError(
            f"{weights.folder / 'config.json'} says vocab_size {stated!r}, the embeddings have "
            f"{table.shape[0]} rows; files of two models may be mixed"
        )
    tied = hf.get("tie_word_embeddings", family.table["tie_word_embeddings"].default)
    if family.kind == "t5":  # transformers asks the weights alone
        tied = True
        _drop_copies(weights, table)
    copy = weights.find(f"{names['output_layer']}.weight") if tied else None
    return Found(
        vocab_size=table.shape[0],
        params_dtype=table.kind.name,
        untied=copy is not None and not _equal(copy, table),
        heads=_bert_heads(weights, hf) if family.kind == "bert" else {},
        tensors=len(weights.tensors),
    )


def _drop_copies(weights: Weights, table: LazyTensor) -> None:
    """Pass over the copies of the embeddings that older versions stored for each stack of a T5.

    Raises:
        InputError: One is not a copy.
    """
    for stack in ("encoder", "decoder"):
        copy = weights.find(f"{stack}.embed_tokens.weight")
        if copy is not None and not _equal(copy, table):
            raise InputError(
                f"{weights.folder} has {stack}.embed_tokens.weight that is not shared.weight: the "
                "two stacks have embeddings of their own, which mlm-eval does not compute"
            )


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Compare all rows of two tables: new or retrained special tokens may be all that differs."""
    same = same_values(one, other)
    if same is not None:
        return same
    import torch

    return one.shape == other.shape and all(
        torch.equal(a.double(), b.double()) for a, b in zip(runs(one), runs(other), strict=True)
    )


def _bert_heads(weights: Weights, hf: Mapping[str, Any]) -> dict[str, Any]:
    classifier = weights.find("classifier.weight")
    classes = _classes(hf)
    choices = any(name.endswith("ForMultipleChoice") for name in classes)
    if any(name.endswith("ForTokenClassification") for name in classes):
        raise InputError(
            f"{weights.folder / 'config.json'} describes {classes[0]}, whose head labels single "
            "tokens, which mlm-eval does not compute; give the folder of the pretrained model"
        )
    return {
        "lm_head": weights.find("cls.predictions.transform.dense.weight") is not None,
        "pooler": weights.find("bert.pooler.dense.weight") is not None,
        "binary_head": weights.find("cls.seq_relationship.weight") is not None,
        "num_classes": 0 if classifier is None or choices else classifier.shape[0],
        "multichoice_head": classifier is not None and choices,
        "qa_head": weights.find("qa_outputs.weight") is not None,
    }


def _pack(
    weights: Weights, family: Family, config: ModelConfig, switches: Mapping[str, bool]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return the canonical tensors, and notes; every tensor of the files must be accounted for."""
    count = config.num_layers + config.decoder_num_layers
    if count > len(weights.tensors):  # before anything is made for each of them
        raise InputError(
            f"{weights.folder / 'config.json'} says {count} layers, the files hold "
            f"{len(weights.tensors)} tensors in all; files of two models may be mixed"
        )
    table = parameters(config)
    known = entries(
        family,
        config.num_layers,
        switches,
        experts=config.num_experts,
        decoder_layers=config.decoder_num_layers,
    )
    by_name = {entry.canonical: entry for entry in known}
    tensors: dict[str, LazyTensor] = {}
    filled = []
    for name, parameter in table.items():
        entry = by_name.get(name)
        if name == OUTPUT_BIAS and weights.find("lm_head.bias") is None:
            entry = None if config.family == "t5" else entry
        if entry is None:  # a bias where only some linear layers have one
            if not name.endswith(".bias"):
                raise InputError(
                    f"{weights.folder / 'config.json'}: the settings call for {name}, which no "
                    f"{family.model_type} model has; a --set value is wrong"
                )
            tensors[name] = zeros(parameter.shape, STORED_DTYPES[config.params_dtype])
            filled.append(name)
            continue
        if entry.whole and weights.find(entry.whole) is not None:
            tensors[name] = _part(weights, entry.whole, parameter.shape, family)
            continue
        shapes = entry.layout.shapes(parameter.shape, config)
        parts = [
            _part(weights, key, shape, family)
            for key, shape in zip(entry.names, shapes, strict=True)
        ]
        tensors[name] = entry.layout.pack(parts, config)
    extra = sorted(set(weights.tensors) - weights.used)
    if extra:
        raise InputError(
            f"{weights.folder} holds {len(extra)} tensor(s) that a {family.model_type} model of "
            f"{config.num_layers} layers with the settings of its config.json does not have, such "
            f"as {extra[0]}; mlm-eval would compute something else than the model does, "
            "so it stops here"
        )
    if config.family == "t5" and config.softmax_scale is None:
        factor = queries_factor(config.kv_channels)
        assert factor is not None
        tensors = with_scaled_queries(tensors, config, factor)
    notes = [f"{len(filled)} biases that the model lacks are read as zeros"] if filled else []
    return tensors, notes


def _part(weights: Weights, key: str, shape: tuple[int, ...], family: Family) -> LazyTensor:
    tensor = weights.find(key)
    if key == "cls.predictions.bias":  # where a file holds both, transformers takes the second
        tensor = weights.find("cls.predictions.decoder.bias") or tensor
    where = weights.files[0] if len(weights.files) == 1 else weights.folder
    if tensor is None:
        raise InputError(
            f"{where} lacks {key} {list(shape)}, which a {family.model_type} model has; copy all "
            "files of the model"
        )
    check_weight_dtype(tensor, key, str(where))  # first: packed values have other shapes
    if tensor.shape != shape:
        raise InputError(
            f"{where}: {key} has shape {list(tensor.shape)}, config.json calls for {list(shape)}; "
            "files of two models may be mixed, or a --set value is wrong"
        )
    return tensor
