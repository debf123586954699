"""From a dataclass to a command: its fields are the options, its body takes the object."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.cli.app import HELP_NAMES, MAKERS, Compact, commands, load_config
from mlm_eval.cli.lists.names import names_of
from mlm_eval.cli.outputs import check_outputs
from mlm_eval.cli.screen import Screen, choose_verbosity, detail
from mlm_eval.options import DATA, KEY, OPTIMIZER, RUN, TASK, Nested, Option, flag_of, option_name
from mlm_eval.ranks.world import LAUNCHED

T = TypeVar("T")

GROUPS = (None, OPTIMIZER, DATA, TASK, RUN)
"""Groups of options in a command's help, in order."""


def _switch(name: str, short: str, help: str) -> inspect.Parameter:
    """Return a switch that every command has."""
    info = typer.Option(short, f"--{name}", help=help, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, info]
    )


VERBOSITY = (
    _switch("quiet", "-q", "Print results and errors only."),
    _switch("verbose", "-v", "Also print where settings come from, and what each phase took."),
)

CONTEXT_PARAMETER = inspect.Parameter(
    "context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
)
"""Says where the value of each option comes from."""

CONFIG_OPTION = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            help="TOML file with any of these options.",
            callback=load_config,
            is_eager=True,
            metavar="PATH",
        ),
    ],
)


def command(
    name: str,
    kind: type[T],
    *,
    help: str | None = None,
    config: bool = True,
    order: Sequence[str] = (),
    shown: Mapping[str, str] | None = None,
) -> Callable[[Callable[[T], None]], Callable[[T], None]]:
    """Return a decorator that makes a function of one object a command.

    Args:
        name: Of the command.
        kind: Class of the object: a dataclass whose fields come from `option`, `given` and
            `nested`. Fields of its base classes come first, those of the last base before all.
            Fields made otherwise are not options and need a default.
        help: What the command's help says below its line in `mlm-eval --help`; None: the
            function's docstring.
        config: Whether it has `--config`.
        order: Names of options that come first in their groups, in this order.
        shown: What the help says for the defaults of some options, instead of their own `shown`.
    """

    def register(body: Callable[[T], None]) -> Callable[[T], None]:
        def run(*, context: typer.Context, quiet: bool, verbose: bool, **values: Any) -> None:
            choose_verbosity(quiet=quiet, verbose=verbose)
            options = dict(declared(kind, name))
            for field, option in options.items():
                if option.choices and values.get(field) is not None:
                    values[field] = _choice(name, field, option, values[field])
            _tell_sources(context, values)
            check_outputs(options, values)
            body(build(kind, values))

        def place(entry: tuple[str | None, inspect.Parameter]) -> tuple[int, int]:
            group, parameter = entry
            first = parameter.name in order
            return GROUPS.index(group), order.index(parameter.name) if first else len(order)

        def with_options() -> Any:
            found = sorted(option_parameters(kind, name, shown=shown or {}), key=place)
            listed = [CONTEXT_PARAMETER, *(parameter for _, parameter in found)]
            listed += [CONFIG_OPTION] * config + [*VERBOSITY]
            run.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
            alone = typer.Typer(add_completion=False)
            entry = commands()[name]
            text = f"{entry.summary}\n\n{_unwrapped(help or inspect.getdoc(body) or '')}"
            panel = entry.panel
            alone.command(
                name,
                cls=_parsing(name, dict(declared(kind, name))),
                rich_help_panel=panel,
                help=text,
                context_settings=HELP_NAMES,
            )(run)
            return typer.main.get_command(alone)

        MAKERS[name] = with_options
        return body

    return register


def _unwrapped(text: str) -> str:
    """Return a text whose paragraphs are a line each, for a help of any width."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def _parsing(command: str, options: Mapping[str, Option]) -> type[TyperCommand]:
    """Return what parses the command line of a command, as its options want it."""
    flags = {flag_of(name, option): option for name, option in options.items()}

    class Parsing(Compact, TyperCommand):
        entries = options

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            args = with_bare_values(args, flags)
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for flag, option in flags.items():
                times = sum(flag in parameter.opts for parameter in order)
                if option.once and times > 1:
                    raise InputError(
                        f"{flag} is given {times} times, and {command} takes one; wikitext103, "
                        "lambada, score and harness evaluate a series"
                    )
            return super().parse_args(ctx, args)

    return Parsing


def with_bare_values(args: Sequence[str], flags: Mapping[str, Option]) -> list[str]:
    """Return arguments in which a flag that may stand alone has its value behind it."""
    end = args.index("--") if "--" in args else len(args)
    made: list[str] = []
    for place, arg in enumerate(args):
        made.append(arg)
        option = flags.get(arg)
        if place >= end or option is None or option.bare is None or option.parse is None:
            continue
        try:
            option.parse(args[place + 1] if place + 1 < end else "")
        except ValueError:
            made.append(option.bare)
    return made


def declared(kind: type[Any], name: str) -> Iterator[tuple[str, Option]]:
    """Yield the options of a dataclass by the names of their fields; see `option_parameters`."""
    for field in dataclasses.fields(kind):
        entry = field.metadata.get(KEY)
        if isinstance(entry, Nested):
            yield from declared(entry.kind, name)
        elif entry is not None and (not entry.only or name in entry.only):
            yield field.name, entry


def option_parameters(
    kind: type[Any], name: str, *, shown: Mapping[str, str], given: str | None = None
) -> Iterator[tuple[str | None, inspect.Parameter]]:
    """Yield the options of a dataclass as typer reads them, each after the title of its group.

    Args:
        kind: The dataclass.
        name: Of the command.
        shown: See `command`.
        given: What the help says for the default of each; then nothing has to be given.
    """
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        entry = field.metadata.get(KEY)
        if isinstance(entry, Nested):
            yield from option_parameters(entry.kind, name, shown=shown, given=entry.shown)
        elif entry is not None and (not entry.only or name in entry.only):
            said = shown.get(field.name, given or entry.shown)
            names = names_of(entry.names, name) if entry.names else []
            yield (
                entry.group,
                _parameter(field, hints[field.name], entry, given is None, said, names),
            )


def _parameter(
    field: dataclasses.Field[Any],
    hint: Any,
    entry: Option,
    has_default: bool,
    shown: str | None,
    names: Sequence[str],
) -> inspect.Parameter:
    """Return an option as typer reads it; `names` are some of its values."""
    default: Any = field.default
    if entry.parse is not None:
        hint, default = str, entry.written
    if get_origin(hint) in (tuple, Sequence):
        hint, default = GenericAlias(list, get_args(hint)[:1]), default or None
    if not has_default:
        default = None
    elif default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    make: Any = typer.Argument if entry.positional else typer.Option
    info = make(
        *filter(None, [entry.flag, entry.short]),
        help=f"{entry.help} Names: {', '.join(names)}." if names else entry.help,
        min=entry.least,
        max=entry.most,
        rich_help_panel=entry.group,
        show_default=shown or True,
        hidden=entry.hidden,
        metavar=_value_shown(field.name, entry, hint),
        autocompletion=(lambda: [*entry.choices, *names]) if entry.choices or names else None,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[hint | None if default is None else hint, info],
    )


def _value_shown(name: str, entry: Option, hint: Any) -> str | None:
    """Return what stands for an option's value in the help."""
    if entry.choices:
        return f"[{'|'.join(entry.choices)}]"
    if entry.metavar or entry.positional:
        return entry.metavar or name.upper()
    text = "NAME" if entry.names else "PATH" if entry.reads else "TEXT"
    kinds = {hint, *get_args(hint)}
    known = {int: "N", float: "X", Path: "PATH", str: text}
    return next((name for kind, name in known.items() if kind in kinds), None)


def _choice(command: str, name: str, option: Option, value: str) -> str:
    """Return a value that is one of the option's choices, also where its case is another.

    Raises:
        InputError: It is none of them.
    """
    chosen = dict(option.aliases).get(value.lower(), value.lower())
    if chosen in option.choices:
        return chosen
    what = command if option.positional else flag_of(name, option)
    *others, last = option.choices
    raise InputError(f"{what} {value!r} is unknown; use {', '.join(others)} or {last}")


def _tell_sources(context: typer.Context, values: Mapping[str, Any]) -> None:
    """Print, with `-v`, the options that are not at their defaults, and where they were given."""
    if not Screen.verbose or os.environ.get(LAUNCHED) == "1":  # the parent has said it
        return
    places = {"COMMANDLINE": "command line", "DEFAULT_MAP": str(values.get("config"))}
    for name, value in values.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name in places and value is not None:
            detail(f"option {option_name(name)} {value} ({places[source.name]})")


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the object that a command's values make; what is absent or None has its default.

    Raises:
        InputError: A text cannot be parsed.
    """
    made: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        entry = field.metadata.get(KEY)
        if isinstance(entry, Nested) and entry.shown is None:
            made[field.name] = build(entry.kind, values)
        elif isinstance(entry, Nested):
            names = [inner.name for inner in dataclasses.fields(entry.kind) if inner.metadata]
            made[field.name] = {n: v for n in names if (v := values.get(n)) is not None}
        elif entry is not None:
            value, flag = values.get(field.name), flag_of(field.name, entry)
            if value is None:
                value = field.default
            elif entry.parse is not None:
                try:
                    value = entry.parse(value)
                except ValueError as error:
                    raise InputError(f"{flag} {value!r} {error}") from None
            for number in value if isinstance(value, list) else [value]:
                endless = isinstance(number, int) and abs(number) >= 1 << 62
                if endless or number != number:  # the second: NaN
                    raise InputError(f"{flag} {shown(number)} is no number that can be meant")
            made[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)
