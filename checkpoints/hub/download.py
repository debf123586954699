"""A repository of the Hugging Face hub as a folder: the files of a checkpoint, in the hub's cache.

Source: https://huggingface.co/docs/huggingface_hub/guides/download
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from mlm_eval.checkpoints.errors import InputError, first_line, require

HUB_PREFIX = "hf://"

_ADDRESS = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/@]+))?(/(?P<inside>[^@]+?))?/?", re.ASCII
)
_OTHER_FRAMEWORKS = (
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".gguf",
    ".tflite",
    ".mlmodel",
    ".llamafile",
)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".pdf")
_OTHER_FOLDERS = ("onnx", "openvino", "coreml", "flax", "tf", "gguf", "runs")


@dataclass(frozen=True)
class HubAddress:
    """A place on the hub."""

    name: str
    """`organisation/name` of the repository."""
    revision: str | None
    """Branch, tag or commit; None: the main branch."""
    inside: str
    """The folder or file in the repository; empty: all of it."""

    def of_commit(self, path: Path) -> str:
        """Return the address of the commit that a file of the cache is of.

        Args:
            path: In `models--org--name/snapshots/COMMIT/...`.
        """
        parts = path.parts
        at = parts.index("snapshots") if "snapshots" in parts[:-1] else None
        commit = f"@{parts[at + 1]}" if at is not None else ""
        return f"{HUB_PREFIX}{self.name}{commit}{self.inside and f'/{self.inside}'}"


def hub_address(path: str | Path) -> HubAddress | None:
    """Return the place that `hf://org/name[@revision][/path]` names; None for any other path.

    A slash in a revision is written %2F, as in `hf://org/name@refs%2Fpr%2F1`.

    Raises:
        InputError: The address is not of that form.
    """
    text = str(path)
    if isinstance(path, Path) and text.startswith("hf:/") and not text.startswith(HUB_PREFIX):
        text = HUB_PREFIX + text.removeprefix("hf:/")  # a Path has joined the two slashes
    if not text.startswith(HUB_PREFIX):
        return None
    found = _ADDRESS.fullmatch(text.removeprefix(HUB_PREFIX))
    inside = (found["inside"] if found else None) or ""
    if found is None or ".." in PurePosixPath(inside).parts:
        raise InputError(
            f"{text} is no address of the Hugging Face hub; write hf://ORGANISATION/NAME, with "
            "@REVISION or /FOLDER behind it where one is meant"
        )
    revision = found["revision"]
    return HubAddress(found["name"], unquote(revision) if revision else None, inside)


def hub_folder(path: str | Path) -> Path | None:
    """Return the local folder or file of `hf://...`, fetched once; None for any other path.

    The files come from huggingface_hub's cache where they are there already. Without a network the
    cache alone is asked.

    Raises:
        InputError: There is no such repository, revision or file, no permission, or no network.
    """
    address = hub_address(path)
    return None if address is None else _fetch(address)


@functools.cache
def _fetch(address: HubAddress) -> Path:
    """Return where the files lie: the tokenizer and the weights of one run are of one commit."""
    require("huggingface_hub", f"hf://{address.name}")
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    name, revision = address.name, address.revision
    try:
        if constants.is_offline_mode():
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        listed = HfApi().model_info(name, revision=revision).siblings or []
    except errors.GatedRepoError:
        raise InputError(
            f"hf://{name} is gated: accept its terms on https://huggingface.co/{name}, then log in "
            "with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"the Hugging Face hub has no model {name}, or it is private; correct the name, or log "
            "in with `hf auth login` or HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"hf://{name} has no revision {revision!r}; correct it") from None
    except errors.HFValidationError as error:
        raise InputError(f"hf://{name} is no name of a repository: {error}") from None
    except Exception as error:  # of httpx, of huggingface_hub, of the network itself
        return _cached(address, error)
    names, inside = [entry.rfilename for entry in listed], address.inside
    files = wanted_files(names, inside)
    if not any(_is_below(file, inside) for file in files):
        where = f"no files under {inside}" if inside else "no files of a checkpoint"
        raise InputError(f"hf://{name} has {where}; it has {_some(names)}")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except OSError as error:
        raise InputError(
            f"hf://{name} could not be fetched to {constants.HF_HUB_CACHE}: {first_line(error)}; "
            "run the command again, which goes on where this ended"
        ) from None
    return _inside(folder, address)


def _cached(address: HubAddress, cause: Exception) -> Path:
    """Return the files of an earlier run, where the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(address.name, revision=address.revision, local_files_only=True)
    except (OSError, ValueError) as missing:
        # Files that were left out on purpose count as missing; the readers know what they need.
        if (partly := getattr(missing, "snapshot_path", None)) is not None:
            return _inside(Path(partly), address)
        raise InputError(
            f"hf://{address.name} is not in the local cache, and the Hugging Face hub cannot be "
            f"reached ({first_line(cause)}); fetch it where there is a network (`hf download "
            f"{address.name}`), or give --ckpt a local folder"
        ) from None
    return _inside(Path(folder), address)


def _inside(folder: Path, address: HubAddress) -> Path:
    found = folder / address.inside
    if not found.exists():
        raise InputError(f"hf://{address.name} has no {address.inside}, or it was not fetched yet")
    return found


def wanted_files(names: Sequence[str], inside: str = "") -> list[str]:
    """Return those files of a repository that a checkpoint consists of, and its tokenizer.

    Left out are weights for other frameworks, pictures, and a second copy of the weights:
    `pytorch_model*.bin` and `original/` beside safetensors.

    Args:
        names: All files of the repository, with `/` between folders.
        inside: Only this folder or file, and the small files at the top, such as a tokenizer.
    """
    kept = []
    tensors = {str(PurePosixPath(n).parent) for n in names if n.endswith(".safetensors")}
    for name in names:
        path = PurePosixPath(name)
        first = path.parts[0] if len(path.parts) > 1 else ""
        if not _is_below(name, inside) and (
            first or path.suffix not in (".json", ".txt", ".model")
        ):
            continue
        if path.suffix.lower() in (*_OTHER_FRAMEWORKS, *_PICTURES) or first in _OTHER_FOLDERS:
            continue
        second = path.name.startswith("pytorch_model") and str(path.parent) in tensors
        if not inside and (second or (first == "original" and "." in tensors)):
            continue
        kept.append(name)
    return kept


def _is_below(name: str, inside: str) -> bool:
    return not inside or name == inside or name.startswith(f"{inside}/")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more if names else "none"
