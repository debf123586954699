"""Attacks: inputs made to do harm, each with the command that is given it; and right inputs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from support import random_models, tiny_bert
from support.reliability.short_form import thinned
from support.reliability.warm_commands import MEMORY, Done, Sandbox, WarmCommands, told

T = TypeVar("T")

Words = Sequence[object]
"""A command line."""

SIZES = {"num_layers": 1, "vocab_size": 256, "max_position_embeddings": 32}


class Bases:
    """Right inputs, made once: attacks change copies of them."""

    def __init__(self, folder: Path, warm: WarmCommands) -> None:
        self.folder, self.warm = folder, warm

    @cached_property
    def gpt(self) -> Path:
        """A GPT of one file in Megatron's torch format, with its tokenizer."""
        path = self.folder / "gpt"
        model = random_models.config(**SIZES)
        write_megatron_torch(random_models.checkpoint(model), path)
        random_models.byte_vocabulary(path / "tokenizer")
        return path

    @cached_property
    def bert(self) -> Path:
        """A BERT with its tokenizer."""
        path = self.folder / "bert"
        tiny_bert.checkpoint(path, num_layers=1)
        tiny_bert.write_vocabulary(path / "tokenizer")
        return path

    @cached_property
    def dist(self) -> Path:
        """The GPT in torch_dist's format: the folder of the step."""
        root = self._converted("torch_dist", "dist")
        return next(root.glob("iter_*"), root / "release")

    @cached_property
    def hub(self) -> Path:
        """The GPT as a Hugging Face folder."""
        return self._converted("hf", "hub")

    @cached_property
    def data_pickle(self) -> bytes:
        """The pickle of the GPT's file, whose value is a dict."""
        import zipfile

        with zipfile.ZipFile(model_file(self.gpt)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return archive.read(name)

    def _converted(self, to: str, name: str) -> Path:
        sandbox = self.warm.sandbox()
        words = ["convert", "--ckpt", self.gpt, "--to", to, "--output", sandbox.output]
        done = self.warm.run(sandbox, words)
        assert done.code == 0, told(done)
        return Path(shutil.move(sandbox.output, self.folder / name))


Prepare = Callable[[Sandbox, Bases], Words]


@dataclass(frozen=True)
class Attack:
    """An input made to do harm."""

    name: str
    """What it is."""
    prepare: Prepare
    """Makes it, and returns the command line that is given it."""
    refused: bool | None = True
    """Whether it must end with exit code 2; None: a right result does, too."""
    says: str = ""
    """Words of the message."""
    memory: int = MEMORY
    """Bytes that it may take."""

    def __str__(self) -> str:
        return self.name

    def run(self, warm: WarmCommands, bases: Bases) -> Done:
        """Return how the command ended."""
        sandbox = warm.sandbox()
        return warm.run(sandbox, self.prepare(sandbox, bases))

    def faults(self, done: Done) -> list[str]:
        """Return what was wrong with how it ended."""
        found = done.faults(refused=self.refused, memory=self.memory)
        if self.says and not found and self.says not in done.err:
            found.append(f"it does not say {self.says!r}: {done.err!r:.300}")
        return found


def check(attack: Attack, warm: WarmCommands, bases: Bases) -> None:
    """Run an attack and fail on what is wrong."""
    done = attack.run(warm, bases)
    faults = attack.faults(done)
    assert not faults, f"{faults}\n{told(done)}"


def each(
    kind: str,
    cases: Mapping[str, T],
    prepare: Callable[[T], Prepare],
    *,
    may_be_read: Collection[str] = (),
) -> list[Attack]:
    """Return an attack for each of the named cases.

    Args:
        kind: What is attacked; with the case's name it is that of the attack.
        cases: By their names.
        prepare: Returns what makes the attack of a case.
        may_be_read: Names of those that may end with a right result too.
    """
    assert set(may_be_read) <= set(cases), f"{kind}: some that may be read are no cases"
    return [
        Attack(f"{kind}: {what}", prepare(case), refused=None if what in may_be_read else True)
        for what, case in cases.items()
    ]


def attacks(cases: Sequence[Attack], *, every: int = 5) -> Any:
    """Return the decorator that gives a test the attacks, by its argument `attack`."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two attacks have one name"
    return pytest.mark.parametrize("attack", thinned(cases, every=every))


# ---- copies of right inputs --------------------------------------------------------------------


def model_file(root: Path) -> Path:
    """Return the file of a checkpoint of one rank."""
    (file,) = root.glob("*/mp_rank_00/model_optim_rng.pt")
    return file


def copied(source: Path, target: Path) -> Path:
    """Return a copy of a folder."""
    shutil.copytree(source, target, symlinks=True)
    return target


def inspecting(path: Path) -> Words:
    """Return the command line that shows a checkpoint."""
    return ["inspect", "--ckpt", path]


def converting(path: Path, sandbox: Sandbox, to: str = "megatron", *more: object) -> Words:
    """Return the command line that converts a checkpoint."""
    return ["convert", "--ckpt", path, "--to", to, "--output", sandbox.output, *more]


def replacing(attack: Attack, **changes: Any) -> Attack:
    """Return an attack with other fields."""
    return dataclasses.replace(attack, **changes)


def saved(path: Path, value: Any) -> Path:
    """Write a value with torch.save and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path
