"""The folder of one step that DeepSpeed saved: which files it holds, and what it lacks.

A root has a file `latest` with the name of a step, `global_stepN`. Below it stand a file a layer
and tensor-parallel rank (pipelines), or a file a rank that holds the whole module, and ZeRO's parts
of the optimizer, which are passed over. Source: docs/megatron.md, "DeepSpeed".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.text_file import read_text
from mlm_eval.checkpoints.folders.file_names import is_file_name
from mlm_eval.checkpoints.megatron.relatives import (
    EXPERT_FILE,
    LAYER_FILE,
    MODULE_FILE,
    STEP,
    ZERO_FILE,
    is_deepspeed_file,
)

LATEST = "latest"


@dataclass(frozen=True)
class Step:
    """The files of one step."""

    path: Path
    layers: dict[tuple[int, int], Path] = field(default_factory=dict)
    """By the layer's place in the pipeline's list and the tensor-parallel rank."""
    modules: dict[int, Path] = field(default_factory=dict)
    """By rank: tensor-parallel ones, or in a pipeline all of a copy of the model."""
    zero: list[str] = field(default_factory=list)
    """ZeRO's parts of the optimizer, in stage 3 of the weights too."""
    experts: list[str] = field(default_factory=list)

    def refuse_without_weights(self) -> None:
        """Refuse a step whose model is not in these files.

        Raises:
            InputError: Always; it says what is missing and the way out.
        """
        found = (self.zero or [path.name for path in self.modules.values()] or ["nothing"])[0]
        raise InputError(
            f"{self.path} is a DeepSpeed checkpoint without the model's own files (found {found}): "
            "it needs layer_XX-model_YY-model_states.pt, or mp_rank_XX_model_states.pt with a "
            "module in it; copy them too, and where ZeRO stage 3 has cut the weights join them "
            "with the run's zero_to_fp32.py, then give --ckpt a folder of Megatron's or Hugging "
            "Face's form"
        )


def find_step(path: Path) -> Step | None:
    """Return the step that a root, its folder, or one of its files leads to; None: it is no such.

    Raises:
        InputError: `latest` names a step that is not there, or several steps are there without it.
    """
    if path.is_file():
        if path.name != LATEST and not is_deepspeed_file(path.name):
            return None
        path = path.parent
    step = _scan(path)
    if step is not None:
        return step
    names = {name for name in _names(path) if STEP.fullmatch(name)}
    named = read_text(path / LATEST).strip() if (path / LATEST).is_file() else None
    if named is not None and is_file_name(named):  # runs may call their steps otherwise
        names.add(named)
    steps = {name: found for name in sorted(names) if (found := _scan(path / name))}
    if not steps:
        return None
    if named is None:
        if len(steps) == 1:
            return next(iter(steps.values()))
        raise InputError(
            f"{path} has no file {LATEST} and several steps ({', '.join(sorted(steps)[:5])}); give "
            "--ckpt one of these folders"
        )
    if named not in steps:
        shown = named if named.isprintable() and len(named) < 80 else "something else"
        raise InputError(
            f"{path / LATEST} names {shown}, which is not there (found "
            f"{', '.join(sorted(steps)[:5])}); give --ckpt one of these folders"
        )
    return steps[named]


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _scan(folder: Path) -> Step | None:
    """Return the files of a step; None where there are none."""
    step = Step(folder)
    for name in _names(folder):
        if match := LAYER_FILE.fullmatch(name):
            step.layers[int(match[1]), int(match[2])] = folder / name
        elif match := MODULE_FILE.fullmatch(name):
            step.modules[int(match[1])] = folder / name
        elif ZERO_FILE.fullmatch(name):
            step.zero.append(name)
        elif EXPERT_FILE.fullmatch(name):
            step.experts.append(name)
    found = step.layers or step.modules or step.zero or step.experts
    return step if found else None
