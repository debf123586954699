"""The iterations below a checkpoint's root: their folders, and the tracker file that names one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.output import write_text
from mlm_eval.checkpoints.files.text_file import read_text
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.lazy import StoredTensor

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "latest_train_state.pt"
"""What Megatron-Bridge kept before it had a tracker file, and keeps beside it."""

RELEASE = "release"
"""What a checkpoint without an iteration is called."""


_RANK = re.compile(r"mp_rank_\d\d.*")


def iteration_folder(iteration: int | None) -> str:
    """Return the name of an iteration's folder; None: of a release."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def write_tracker(root: Path, iteration: int | None) -> None:
    """Write the file that names the iteration to load; a reader finds the old or the new one."""
    write_text(root / TRACKER, RELEASE if iteration is None else str(iteration), option=None)


def saved_iteration(folder: Path, saved: object) -> int | str | None:
    """Return the iteration of a folder, in which `saved` stands for it; None where unknown."""
    if folder.name == RELEASE:
        return RELEASE
    return saved if isinstance(saved, int) else None


def holds_ranks(folder: Path) -> bool:
    """Whether a folder holds the folders of ranks."""
    return any(_RANK.fullmatch(entry.name) and entry.is_dir() for entry in folder.iterdir())


def folder_of_ranks(rank: Path) -> Path | None:
    """Return the folder of the ranks to which the folder `rank` belongs; None if it is of none.

    Ranks may be links to where each node wrote its own. The neighbours are looked for beside the
    path that was given, and where more are beside the folder that it leads to, there.
    """
    given = Path(os.path.abspath(rank))  # not `resolve`, which leaves the links behind
    found = [
        (sum(bool(_RANK.fullmatch(entry.name)) for entry in path.parent.iterdir()), path.parent)
        for path in (given, rank.resolve())
        if _RANK.fullmatch(path.name)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _train_state(root: Path) -> str:
    """Return the folder that Megatron-Bridge's record of the latest step names; '' without one."""
    if not (root / TRAIN_STATE).is_file():
        return ""
    value = read_torch_file(root / TRAIN_STATE).value
    step = value.get("step") if isinstance(value, dict) else None
    if not isinstance(step, StoredTensor) or step.numel != 1 or step.kind.is_floating_point:
        return ""
    if step.checksum is not None:
        step.checksum.compare()
    number = b"".join(step.file.blocks(step.offset, step.nbytes))
    return iteration_folder(int.from_bytes(number, "little", signed=True))


def find_iteration(root: Path) -> Path:
    """Return the folder that holds the weights: by the tracker file, or `root` itself.

    Raises:
        InputError: The tracker file is damaged or names a folder that is not there.
    """
    names = {entry.name for entry in root.iterdir()}
    if any(name.endswith(".pt") for name in names) and (ranks := folder_of_ranks(root)):
        return ranks
    if ".metadata" in names or any(
        re.match(r"mp_rank_\d", name) or name.endswith(".distcp") for name in names
    ):
        return root
    steps = sorted(name for name in names if re.fullmatch(r"iter_\d{7,}|release", name))
    tracker = root / TRACKER
    if not tracker.is_file():
        if len(steps) == 1:
            return root / steps[0]
        if (saved := _train_state(root)) in steps:
            return root / saved
        if steps:
            raise InputError(
                f"{root} has no {TRACKER} and several checkpoints ({', '.join(steps[:5])}); "
                "give --ckpt one of these folders"
            )
        return root
    try:
        text = read_text(tracker).strip()
        folder = root / iteration_folder(None if text == RELEASE else int(text))
    except InputError as error:
        raise InputError(f"{error}; or give --ckpt an iter_* folder instead") from None
    except ValueError:
        raise InputError(
            f"{tracker} holds neither an iteration number nor 'release'; give --ckpt an iter_* "
            "folder instead"
        ) from None
    if not folder.is_dir():
        found = ", ".join(steps[:5]) or "no iter_* folder"
        raise InputError(
            f"{tracker} names {folder.name}, which is not there (found {found}); give --ckpt an "
            "iter_* folder"
        )
    return folder
