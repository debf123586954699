"""From a dataclass to a command: its fields are the options, its body takes the object."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.app import app, load_config
from mlm_eval.options import KEY, Given, Option

T = TypeVar("T")

OPTIMIZER, DATA, TASK, RUN = "Optimizer", "Data", "Task", "Run"
"""Titles of groups in a command's help. The options of no group come first."""
GROUPS = (None, OPTIMIZER, DATA, TASK, RUN)

CONFIG_OPTION = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            help="TOML file with any of these options.", callback=load_config, is_eager=True
        ),
    ],
)


def command(
    name: str, kind: type[T], *, panel: str, help: str | None = None, config: bool = True
) -> Callable[[Callable[[T], None]], Callable[[T], None]]:
    """Return a decorator that makes a function of one object a command.

    Args:
        name: Of the command.
        kind: Class of the object: a dataclass whose fields come from `option` and `given`. Those
            of its base classes come first, of the last base first of all. Fields made otherwise
            are no options and need a default.
        panel: Title of the command's group in `mlm-eval --help`.
        help: The command's; None: the function's docstring.
        config: Whether it has `--config`.
    """

    def register(body: Callable[[T], None]) -> Callable[[T], None]:
        def run(**values: Any) -> None:
            body(build(kind, values))

        found = sorted(option_parameters(kind), key=lambda entry: GROUPS.index(entry[0]))
        listed = [parameter for _, parameter in found] + [CONFIG_OPTION] * config
        run.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
        app.command(name, rich_help_panel=panel, help=help or inspect.getdoc(body))(run)
        return body

    return register


def option_parameters(
    kind: type[Any], shown: str | None = None
) -> Iterator[tuple[str | None, inspect.Parameter]]:
    """Yield the options of a dataclass as typer reads them, each after the title of its group.

    Args:
        kind: The dataclass.
        shown: What the help says for the defaults; then nothing has to be given.
    """
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        entry = field.metadata.get(KEY)
        if isinstance(entry, Given):
            yield from option_parameters(entry.kind, entry.shown)
        elif entry is not None:
            parameter = _parameter(field, hints[field.name], entry, shown)
            yield entry.group, parameter


def _parameter(
    field: dataclasses.Field[Any], hint: Any, entry: Option, shown: str | None
) -> inspect.Parameter:
    default: Any = field.default
    if entry.parse is not None:
        hint, default = str, entry.written
    if get_origin(hint) in (tuple, Sequence):
        hint, default = GenericAlias(list, get_args(hint)[:1]), default or None
    if shown is not None:
        default = None
    elif default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    flags = [entry.flag] if entry.flag else []
    show: Any = shown or entry.shown or True
    make = typer.Argument if entry.positional else typer.Option
    info = make(
        *flags,
        help=entry.help,
        min=entry.least,
        rich_help_panel=entry.group,
        show_default=show,
        **entry.more,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint | None if default is None else hint, info],
    )


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the object that a command's values make; what is absent or None has its default.

    Raises:
        InputError: A text cannot be parsed.
    """
    made: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        entry = field.metadata.get(KEY)
        if isinstance(entry, Given):
            names = [inner.name for inner in dataclasses.fields(entry.kind)]
            made[field.name] = {n: v for n in names if (v := values.get(n)) is not None}
        elif entry is not None:
            value = values.get(field.name)
            if value is None:
                value = field.default
            elif entry.parse is not None:
                try:
                    value = entry.parse(value)
                except ValueError as error:
                    flag = entry.flag or f"--{field.name.replace('_', '-')}"
                    raise InputError(f"{flag} {value!r} {error}") from None
            made[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)
