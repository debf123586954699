"""The typer application, its root options, and `--config`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mlm_eval import __version__
from mlm_eval.checkpoints.errors import InputError

COMMANDS: dict[str, Callable[[], Any]] = {}
"""What makes a command with its options, by the command's name."""


class _Commands(TyperGroup):
    """The commands; one gets its options when it is chosen, so that `--help` makes none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else COMMANDS[name](), rest


app = typer.Typer(
    cls=_Commands,
    help="Evaluate, reshard and convert Megatron-LM checkpoints, without Megatron.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CHECKPOINTS, ZERO_SHOT = "Checkpoints", "Zero-shot evaluation"
TRAINING = "Training"
"""Titles of the groups that `mlm-eval --help` shows."""


def _version(show: bool) -> None:
    if show:
        print(f"mlm-eval {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults of this command's options from a TOML file; options on the line win."""
    if path is None:
        return None
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give --config a TOML file of options") from None
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML file of options: {error}") from None
    known = {option.lstrip("-"): p.name for p in context.command.params for option in p.opts}
    unknown = sorted(key for key in values if key.replace("_", "-") not in known)
    if unknown:
        raise InputError(
            f"{path} sets {unknown[0]!r}, which is no option of this command (see --help)"
        )
    context.default_map = {known[k.replace("_", "-")]: v for k, v in values.items()}
    return path
