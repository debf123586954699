"""A converted folder as a repository of the Hugging Face hub.

Source: https://huggingface.co/docs/huggingface_hub/guides/upload
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, first_line, require

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_FROM_THE_START = {".gitattributes", "README.md"}
"""Files of a repository that was made and never filled."""


@dataclass(frozen=True)
class HubTarget:
    """A repository that may be written to."""

    name: str
    """`organisation/name`."""
    is_new: bool

    def push(self, folder: Path, message: str) -> str:
        """Upload a folder, and return the address of what was written.

        A new repository is private. Files of an older model that the new one lacks are removed in
        the same commit.

        Raises:
            InputError: The hub refused it, or was lost on the way; the folder stays as it is.
        """
        api = _api()
        try:
            if self.is_new:
                api.create_repo(self.name, private=True, exist_ok=True)
            done = api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message=message,
                delete_patterns="*",
            )
        except Exception as error:  # of httpx, of huggingface_hub, of the network itself
            raise InputError(
                f"{folder} is whole, but pushing it to {self.name} failed ({first_line(error)}); "
                f"push it with `hf upload {self.name} {folder} .`"
            ) from None
        return f"hf://{self.name}@{done.oid}"


def check_target(name: str, *, overwrite: bool) -> HubTarget:
    """Return the repository that a conversion is to be pushed to, before any work is done for it.

    Args:
        name: `organisation/name`; one that does not exist is made by `HubTarget.push`.
        overwrite: Whether the files of a model that is there may be replaced.

    Raises:
        InputError: The name is no name, nobody is logged in, the hub cannot be reached, or the
            repository holds a model.
    """
    require("huggingface_hub", "--push-to")
    from huggingface_hub import errors

    if not _NAME.fullmatch(name):
        raise InputError(f"--push-to {name} is no ORGANISATION/NAME of a repository; correct it")
    api = _api()
    try:
        api.whoami()
        listed = api.model_info(name).siblings or []
    except errors.RepositoryNotFoundError:
        return HubTarget(name, is_new=True)
    except (errors.LocalTokenNotFoundError, errors.HfHubHTTPError) as error:
        raise InputError(
            f"--push-to {name} needs a token that may write there ({first_line(error)}); log in "
            "with `hf auth login`, or set HF_TOKEN"
        ) from None
    except Exception as error:  # of httpx, of the network itself
        raise InputError(
            f"--push-to {name}: the Hugging Face hub cannot be reached ({first_line(error)}); "
            "leave --push-to out, and push the folder later with `hf upload`"
        ) from None
    held = sorted({entry.rfilename for entry in listed} - _FROM_THE_START)
    if held and not overwrite:
        raise InputError(
            f"--push-to {name}: the repository holds files already ({', '.join(held[:3])}); "
            "replace them with --overwrite, or name another one"
        )
    return HubTarget(name, is_new=False)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="mlm-eval")
