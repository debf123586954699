"""Every tensor and setting of a DeepSpeed folder, changed: one clear sentence, or the same model.

Nothing else may come out of a reader: no traceback, and no model that differs in silence.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.folders import synthetic
from support.folders.deepspeed_folders import NEWER_NAMES, neox_settings, write_fork, write_neox
from support.folders.synthetic import args_of
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint

SMALL: dict[str, Any] = {"num_layers": 2, "vocab_size": 16}
NEOX = dataclasses.replace(
    synthetic.GPT, position_embedding_type="rope", parallel_residual=True, **SMALL
)
LLAMA = dataclasses.replace(synthetic.LLAMA, **SMALL)
BLOOM = dataclasses.replace(
    synthetic.GPT, position_embedding_type="alibi", embedding_layernorm=True, **SMALL
)


def _neox(folder: Path) -> Path:
    return write_neox(folder, synthetic.random_model(NEOX), NEOX, tp=2)


def _llama(folder: Path) -> Path:
    return write_neox(folder, synthetic.random_model(LLAMA), LLAMA, tp=2, names=NEWER_NAMES)


def _w123(folder: Path) -> Path:
    more: dict[str, Any] = {"llama": True, "mlp_type": "llama", "activation": "silu"}
    return write_neox(folder, synthetic.random_model(LLAMA), LLAMA, tp=2, **more)


def _module(folder: Path) -> Path:
    return write_neox(folder, synthetic.random_model(NEOX), NEOX, tp=2, pipeline=False)


def _bloom(folder: Path) -> Path:
    args = args_of(BLOOM, tensor_model_parallel_size=2)
    return write_fork(folder, synthetic.random_model(BLOOM), BLOOM, args, tp=2)


KINDS: dict[str, Callable[[Path], Path]] = {
    "gpt-neox": _neox,
    "Llama": _llama,
    "Llama of 2023": _w123,
    "a module": _module,
    "BLOOM": _bloom,
}
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "lost": lambda t: None,
    "a scalar": lambda t: torch.tensor(1.0),
    "one more dim": lambda t: t[None].clone(),
    "half": lambda t: t[: len(t) // 2].clone(),
    "twice": lambda t: torch.cat([t, t]),
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "whole numbers": lambda t: t.long(),
    "another dtype": lambda t: t.bfloat16(),
    "a word": lambda t: "word",
    "empty": lambda t: t[:0].clone(),
}


def files_of(root: Path) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Yield each file that holds weights, what it holds, and the dict of its tensors."""
    for file in sorted((root / "global_step7").glob("*model*_states.pt")):
        content = torch.load(file, weights_only=False)
        tensors = content.get("module") or content
        if any(isinstance(value, Tensor) for value in tensors.values()):
            yield file, content, tensors


def outcome(root: Path) -> str | dict[str, Tensor]:
    """Return the message of a refusal, or the model's weights."""
    try:
        found = open_checkpoint(root)
        return {name: tensor.read() for name, tensor in found.tensors.items()}
    except InputError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 900, message
        assert str(root) in message or "correct it with --set" in message
        return message


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_tensor_is_refused_or_changes_itself_alone(kind: str, tmp_path: Path):
    root = KINDS[kind](tmp_path)
    expected = outcome(root)
    assert isinstance(expected, dict)
    read = refused = 0
    files = list(files_of(root))
    for file, content, tensors in files[:: 1 if len(files) < 5 else 2]:
        names = [name for name, value in tensors.items() if isinstance(value, Tensor)]
        for number, name in enumerate(names):
            # All changes of some tensors, and of each tensor some.
            for change in itertools.islice(CHANGES, number % 3, None, 1 if number % 4 == 0 else 3):
                whole, value = tensors[name], CHANGES[change](tensors[name])
                if value is None:
                    del tensors[name]
                else:
                    tensors[name] = value
                torch.save(content, file)
                found = outcome(root)
                tensors.pop(name, None)
                tensors[name] = whole
                if isinstance(found, str):
                    refused += 1
                    continue
                read += 1
                assert found.keys() == expected.keys(), (file.name, name, change)
                for key, tensor in found.items():
                    assert tensor.shape == expected[key].shape, (file.name, name, change)
                    gap = (tensor.float() - expected[key].float()).abs().max()
                    assert gap < 0.05, (file.name, name, change, key)
        torch.save(content, file)
    assert refused > 5 * read


ODD = (-1, 0, 3, 10**12, 0.5, float("nan"), "word", "", [1], {"a": 1}, True, False)


@pytest.mark.long
@pytest.mark.parametrize("config", [NEOX, LLAMA], ids=["gpt-neox", "Llama"])
def test_odd_settings_are_refused_or_read(config: ModelConfig, tmp_path: Path):
    """What comes out has a setting of its own, never a traceback."""
    model = synthetic.random_model(config)
    root = write_neox(tmp_path, model, config, names=NEWER_NAMES)
    file = root / "global_step7/configs/run.yml"
    usual = neox_settings(config, 1)
    names = [*usual, "num-kv-heads", "mlp-type", "gpt-j-tied", "onnx-safe", "attention-config"]
    refused = 0
    for name, value in itertools.product(names, ODD):
        file.write_text(yaml.safe_dump(usual | {name: value}))
        found = outcome(root)
        refused += isinstance(found, str)
        if not isinstance(found, str):
            assert found.keys() == model.keys(), (name, value)
    assert refused > len(names)
    for text in ("", "[1]", "a: {b", "a: &x [*x]", "? [1]\n: 2", "\0", "- 1"):
        file.write_text(text)
        assert isinstance(outcome(root), str), text
