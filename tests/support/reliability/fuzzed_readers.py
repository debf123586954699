"""The readers that are fuzzed: each takes bytes, and raises an InputError or nothing.

No name that a pickle gives may be looked up: an audit hook ends a test in which one is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.distcp import check_coverage, open_folder
from mlm_eval.checkpoints.files.safetensors_file import read_safetensors
from mlm_eval.checkpoints.files.text_file import misfit, read_json, read_toml
from mlm_eval.checkpoints.files.torch_file import read_pickle, read_torch_file
from mlm_eval.checkpoints.lazy import LazyTensor
from mlm_eval.checkpoints.projects.settings import args_of_config, read_yaml
from support.folders import dcp_folders
from support.reliability.pickle_bytes import STOP, torch_stream, torch_zip

Seeds = dict[str, bytes]
"""A right file's bytes, by the name of the reader."""

FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")


def _read_tensors(value: Any) -> None:
    """Read every tensor in nested dicts, of which a checkpoint's own reader would."""
    if isinstance(value, LazyTensor) and value.nbytes < 1 << 20:
        value.read()
    elif isinstance(value, dict):
        for part in list(value.values())[:50]:
            if isinstance(part, LazyTensor):
                _read_tensors(part)


def _torch(path: Path) -> None:
    _read_tensors(read_torch_file(path).value)


def _distcp(path: Path) -> None:
    folder = open_folder(path.parent)
    for key in list(folder.tensors)[:20]:
        check_coverage(folder.tensors[key], path.parent)
    folder.damage(folder.records(folder.tensors))


def _safetensors(path: Path) -> None:
    for tensor in list(read_safetensors(path).tensors.values())[:20]:
        if tensor.nbytes < 1 << 20:
            tensor.read()


def _yaml(path: Path) -> None:
    args_of_config(read_yaml(path))


def _json(path: Path) -> None:
    misfit(read_json(path), {"a": "text?", "b.c": "number?"})


def _toml(path: Path) -> None:
    read_toml(path, "a TOML file")


READERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "pickle": (".metadata", lambda path: None if read_pickle(path) else None),
    "torch zip": ("model.pt", _torch),
    "torch stream": ("model.pt", _torch),
    "distcp": (".metadata", _distcp),
    "safetensors": ("model.safetensors", _safetensors),
    "YAML": ("run_config.yaml", _yaml),
    "JSON": ("config.json", _json),
    "TOML": ("recipe.toml", _toml),
}
"""The name of the file that each reads, and what reads it."""


def _zipped(data: bytes) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return torch_zip(Path(folder, "x.pt"), data, {"0": bytes(16)}).read_bytes()


WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "pickle": lambda data: data,
    "torch zip": _zipped,
    "torch stream": torch_stream,
}
"""Files around a pickle."""


def seeds(folder: Path) -> Seeds:
    """Return right files, one for each reader."""
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    value = {"model": tensors, "args": {"num_layers": 1}, "iteration": 3}
    torch.save(value, folder / "zip.pt")
    torch.save(value, folder / "stream.pt", _use_new_zipfile_serialization=False)
    dcp_folders.save(folder / "dcp", tensors, cuts={"a": (3, 2)}, objects={"c": {"x": 1}})
    metadata = (folder / "dcp/.metadata").read_bytes()
    assert metadata.endswith(STOP)
    return {
        "pickle": metadata,
        "torch zip": (folder / "zip.pt").read_bytes(),
        "torch stream": (folder / "stream.pt").read_bytes(),
        "distcp": metadata,
        "safetensors": save(tensors, metadata={"format": "pt"}),
        "YAML": b"num_layers: 1\nx: &a [1, 2]\ny: {b: *a, c: 1.5}\n_target_: a.b\n",
        "JSON": json.dumps({"a": "x", "b": {"c": 1.5}, "d": [1, None, True]}).encode(),
        "TOML": b'task = "race"\nlr = 1e-5\n[a.b]\nc = [1, 2]\nd = {e = 1979-05-27}\n',
    }


_watching: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.startswith(FORBIDDEN):
        raise AssertionError(f"{_watching[0]}: {event} {arguments!r:.200}")


_hooked = False


def read(name: str, data: bytes, folder: Path) -> bool:
    """Return whether a reader took bytes for a right file.

    Raises:
        AssertionError: It started something, or its message is no sentence.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked = True
    file, reader = READERS[name]
    path = folder / file
    path.write_bytes(data)
    _watching.append(name)
    try:
        reader(path)
    except InputError as error:
        assert str(folder) in str(error) and len(str(error)) < 3000, error
        return False
    finally:
        _watching.clear()
    return True
