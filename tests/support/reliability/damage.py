"""Damages checkpoints of every format, each case by its number alone, and judges what then happens.

A case is right when it ends in a sentence, in a warning that a sound checkpoint does not have, or
with the model as it was saved: settings and every bit of every weight.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mlm_eval
from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.soundness.odd_values import OddValues
from mlm_eval.engine.engine import load_model
from mlm_eval.model.tensor_parallel import SINGLE
from support import random_models
from support.folders import dcp_folders, deepspeed_folders, layouts, synthetic

GPT = dataclasses.replace(synthetic.GPT, activation="gelu_tanh", ffn_hidden_size=64)

OF_METADATA = 4096
"""Smaller files hold settings or lists, no weights."""

KINDS = (
    *("cut", "cut at the end", "empty"),
    *("bit of the beginning", "bit of the end", "bit of a small file", "bit", "bit", "bit"),
    *("zeros", "noise", "NaN"),
    *("missing", "extra", "mixed", "copied", "swapped"),
)
"""What a case may do; one that stands several times is as many times as frequent."""


# ---- sound checkpoints of each format ------------------------------------------------------------


def torch_zip(root: Path, seed: int) -> Path:
    """Megatron's torch format, two ranks of four stages."""
    model = synthetic.random_model(GPT, seed=seed)
    return _write(root, model, tp=2, stages=[[[n]] for n in range(4)], era="core")


def torch_stream(root: Path, seed: int) -> Path:
    """The form of torch.save before 1.6, two ranks."""
    model = synthetic.random_model(GPT, seed=seed)
    for file in sorted(_write(root, model, tp=2, era="v2.5").rglob("*.pt")):
        contents = torch.load(file, weights_only=False)
        torch.save(contents, file, _use_new_zipfile_serialization=False)
    return root


def _write(root: Path, model: Any, **how: Any) -> Path:
    args = synthetic.args_of(GPT, seed=1234, consumed_train_samples=64)
    return synthetic.write(root, model, GPT, args=args, **how)


def torch_dist(root: Path, seed: int) -> Path:
    """torch_dist in files of two writers."""
    tensors = synthetic.random_model(GPT, seed=seed)
    cuts = {name: (2,) for name, tensor in tensors.items() if tensor.ndim > 1}
    common = {"args": synthetic.args_of(GPT), "checkpoint_version": 3.0, "iteration": 7}
    dcp_folders.save(layouts.tracked(root), tensors, cuts=cuts, common=common)
    return root


def gpt_neox(root: Path, seed: int) -> Path:
    """DeepSpeed's folder of a gpt-neox run, two ranks and a file for each layer."""
    config = dataclasses.replace(GPT, activation="gelu")
    model = synthetic.random_model(config, seed=seed)
    return deepspeed_folders.write_neox(root, model, config, tp=2)


def safetensors(root: Path, seed: int) -> Path:
    """A Hugging Face folder in shards."""
    source = random_models.checkpoint(layouts.MODEL, seed=seed)
    mlm_eval.convert(source, "hf", root, max_shard_size=16_000)
    (root / "README.md").unlink()
    return root


def pytorch_bin(root: Path, seed: int) -> Path:
    """The same with pytorch_model.bin."""
    from safetensors.torch import load_file

    safetensors(root, seed)
    (root / "model.safetensors.index.json").unlink()
    index = {}
    shards = sorted(root.glob("*.safetensors"))
    for number, shard in enumerate(shards, 1):
        tensors = load_file(shard)
        shard.unlink()
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save(tensors, root / name)
        index |= dict.fromkeys(tensors, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (root / "pytorch_model.bin.index.json").write_text(text)
    return root


def zip_archive(root: Path, seed: int) -> Path:
    """A published archive of Megatron's torch format."""
    made = torch_zip(root / "made", seed)
    with zipfile.ZipFile(root / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(made.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(made))
    shutil.rmtree(made)
    return root / "model.zip"


def _layout(name: str) -> Callable[[Path, int], Path]:
    def make(root: Path, seed: int) -> Path:
        kept = layouts.SEED
        layouts.SEED = seed
        try:
            door = layouts.LAYOUTS[name][0](root)[0]
        finally:
            layouts.SEED = kept
        if (made := root / "made").is_dir():
            shutil.rmtree(made)
        return root / door

    return make


FORMATS: dict[str, Callable[[Path, int], Path]] = {
    "torch": torch_zip,
    "stream": torch_stream,
    "torch_dist": torch_dist,
    "gpt-neox": gpt_neox,
    "safetensors": safetensors,
    "bin": pytorch_bin,
    "zip": zip_archive,
    **{
        name: _layout(name)
        for name in (
            *("Megatron-Bridge", "NeMo 2", "NeMo 1", "NeMo 1, ranks", "NeMo 1, archive"),
            *("verl", "zarr", "torch_dcp", "fsdp_dtensor"),
        )
    },
}
"""Makers of sound checkpoints: a root and a seed in, what `--ckpt` is given out."""


# ---- damage --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound:
    """A sound checkpoint, another one like it, and what reading the first gives."""

    format: str
    root: Path
    other: Path
    door: str
    """What `--ckpt` is given, from the root."""
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    warnings: frozenset[str]


def sound(format: str, folder: Path) -> Sound:
    """Make two sound checkpoints of a format in a folder, and read the first."""
    root, other = folder / "sound", folder / "other"
    for place, seed in ((root, 3), (other, 4)):
        place.mkdir(parents=True)
        place.rmdir()
        given = FORMATS[format](place, seed)
        door = given.relative_to(place).as_posix()
    settings, weights, warnings = _read(root / door)
    return Sound(format, root, other, door, settings, weights, frozenset(warnings))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Read a checkpoint as the commands that run a model do."""
    checkpoint: Checkpoint = open_checkpoint(path)
    odd = OddValues()
    cpu = torch.device("cpu")
    model = load_model(checkpoint, SINGLE, device=cpu, dtype=torch.float32, odd=odd)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    warnings = [*checkpoint.provenance.warnings, *odd.warnings()]
    return checkpoint.config.to_dict(), weights, warnings


def damaged(sound: Sound, number: int, root: Path) -> tuple[str, str]:
    """Copy a checkpoint with the damage of a case; return its kind and what was done."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(sound.root, root)
    chance = random.Random(f"{sound.format} {number}")
    kind = KINDS[number % len(KINDS)]
    files = sorted(path for path in root.rglob("*") if path.is_file())
    small = [file for file in files if file.stat().st_size < OF_METADATA]
    large = [file for file in files if file not in small] or files
    file = chance.choice(large if chance.random() < 0.7 or not small else small)
    if kind == "bit of a small file" and small:
        file = chance.choice(small)
    if kind in ("bit", "zeros", "noise", "NaN"):
        file = chance.choice(large)
    did = _BY_KIND[kind](file, chance, files, sound, root)
    return kind, f"{file.relative_to(root)}: {did}"


def _cut(file: Path, chance: random.Random, *_: Any) -> str:
    size = file.stat().st_size
    return _truncate(file, chance.randrange(max(size, 1)))


def _cut_at_the_end(file: Path, chance: random.Random, *_: Any) -> str:
    size = file.stat().st_size
    return _truncate(file, max(size - chance.choice((1, 2, 16, 300)), 0))


def _truncate(file: Path, size: int) -> str:
    with file.open("rb+") as stream:
        stream.truncate(size)
    return f"cut to {size} bytes"


def _flip(begin: float, end: float, most: int | None = None) -> Callable[..., str]:
    def flip(file: Path, chance: random.Random, *_: Any) -> str:
        data = bytearray(file.read_bytes())
        size = len(data)
        if not size:
            return "empty already"
        low, high = int(begin * size), max(int(end * size), 1)
        if most is not None:
            low, high = (0, min(most, size)) if begin == 0 else (max(size - most, 0), size)
        at, bit = chance.randrange(low, high), chance.randrange(8)
        data[at] ^= 1 << bit
        file.write_bytes(data)
        return f"bit {bit} of byte {at} of {size}"

    return flip


def _overwrite(values: Callable[[random.Random, int], bytes]) -> Callable[..., str]:
    def overwrite(file: Path, chance: random.Random, *_: Any) -> str:
        size = file.stat().st_size
        length = min(chance.choice((4, 64, 512)), size)
        at = chance.randrange(max(size - length, 1)) & ~3
        with file.open("rb+") as stream:
            stream.seek(at)
            stream.write(values(chance, length))
        return f"{length} bytes at {at} of {size}"

    return overwrite


def _missing(file: Path, chance: random.Random, files: list[Path], _: Sound, root: Path) -> str:
    if chance.random() < 0.3 and file.parent != root:
        shutil.rmtree(file.parent)
        return "its folder is gone"
    file.unlink()
    return "gone"


def _extra(file: Path, chance: random.Random, *_: Any) -> str:
    name = file.name
    digits = [at for at, letter in enumerate(name) if letter.isdigit()]
    if digits and chance.random() < 0.5:
        at = chance.choice(digits)
        name = f"{name[:at]}{(int(name[at]) + 1) % 10}{name[at + 1 :]}"
    elif file.parent.name[-1].isdigit() and chance.random() < 0.7:
        folder = file.parent.parent / f"{file.parent.name[:-1]}{int(file.parent.name[-1]) + 1}"
        if not folder.exists():
            shutil.copytree(file.parent, folder)
            return f"and {folder.name} like its folder"
    else:
        name = chance.choice((f"{name}.old", f"copy of {name}", f".{name}.swp", "notes.txt"))
    if not file.with_name(name).exists():
        shutil.copyfile(file, file.with_name(name))
    return f"and a copy {name}"


def _mixed(file: Path, chance: random.Random, files: list[Path], sound: Sound, root: Path) -> str:
    other = sound.other / file.relative_to(root)
    if not other.is_file():
        return "without a counterpart"
    shutil.copyfile(other, file)
    return "of another checkpoint"


def _copied(file: Path, chance: random.Random, files: list[Path], *_: Any) -> str:
    if (other := _like(file, chance, files)) is None:
        return "alone of its kind"
    shutil.copyfile(other, file)
    return f"a copy of {other.parent.name}/{other.name}"


def _swapped(file: Path, chance: random.Random, files: list[Path], *_: Any) -> str:
    if (other := _like(file, chance, files)) is None:
        return "alone of its kind"
    ours, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(ours)
    return f"exchanged with {other.parent.name}/{other.name}"


def _like(file: Path, chance: random.Random, files: list[Path]) -> Path | None:
    others = [f for f in files if f != file and f.suffix == file.suffix]
    return chance.choice(others) if others else None


_BY_KIND: dict[str, Callable[..., str]] = {
    "cut": _cut,
    "cut at the end": _cut_at_the_end,
    "empty": lambda file, *_: _truncate(file, 0),
    "bit of the beginning": _flip(0, 1, most=512),
    "bit of the end": _flip(1, 1, most=2048),
    "bit of a small file": _flip(0, 1),
    "bit": _flip(0, 1),
    "zeros": _overwrite(lambda _, length: bytes(length)),
    "noise": _overwrite(lambda chance, length: chance.randbytes(length)),
    "NaN": _overwrite(lambda _, length: b"\xff" * length),
    "missing": _missing,
    "extra": _extra,
    "mixed": _mixed,
    "copied": _copied,
    "swapped": _swapped,
}


# ---- judgement -----------------------------------------------------------------------------------


def outcome(sound: Sound, root: Path) -> tuple[str, str]:
    """Return what reading a damaged checkpoint comes to, and what was said.

    `sentence`, `warning`, `right`, `silent` where another model came out without a word, or
    `fault`.
    """
    try:
        settings, weights, warnings = _read(root / sound.door)
    except InputError as error:
        return ("sentence" if 20 < len(str(error)) < 1500 else "fault"), str(error)
    except Exception as error:  # the fault that is looked for
        return "fault", f"{type(error).__name__}: {str(error)[:300]}"
    if new := [text for text in warnings if text not in sound.warnings]:
        return "warning", new[0]
    same = settings == sound.settings and weights.keys() == sound.weights.keys()
    if same and all(_same_bits(weights[name], sound.weights[name]) for name in weights):
        return "right", ""
    return "silent", str([k for k in settings if settings[k] != sound.settings.get(k)])


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def cases(first: int, last: int) -> Iterator[tuple[str, int]]:
    """Yield the formats and numbers of cases, the formats in turn."""
    formats = list(FORMATS)
    for at in range(first, last):
        yield formats[at % len(formats)], at // len(formats)
