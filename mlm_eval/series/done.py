"""Whether a record that is there is the one that this run would write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlm_eval.engine.resume import as_json, run_difference


def record_difference(record: Mapping[str, Any], parts: Mapping[str, Any]) -> str | None:
    """Return in words how the run of a record differs from one; '': it does not.

    None: it is no record of such a run.

    Args:
        record: What is there.
        parts: All that decides the other: `task`, `digest`, `config`, `data`, `tokenizer`, `dtype`,
            `vocab`, `limit` and `settings`, as `resume_parts` returns them.
    """
    now = as_json(parts)
    try:
        settings, checkpoint = record["settings"], record["checkpoint"]
        data, tokenizer = settings.get("data"), settings.get("tokenizer")
        before = {
            "task": record["task"],
            "digest": checkpoint["digest"],
            # What an older version did not know of a model says nothing about it.
            "config": {k: v for k, v in checkpoint["config"].items() if k in now["config"]},
            "data": None if data is None else data["sha256"],
            "tokenizer": None if tokenizer is None else tokenizer["sha256"],
            "dtype": settings["dtype"],
            "vocab": settings["vocab"],
            "limit": settings.get("limit"),
            "settings": {name: settings.get(name) for name in now["settings"]},
        }
    except (KeyError, TypeError, AttributeError):
        return None
    now["config"] = {k: v for k, v in now["config"].items() if k in before["config"]}
    return run_difference(before, now)
