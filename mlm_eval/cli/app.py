"""The typer application: its list of commands, its root options, and `--config`.

A command's module is imported when the command is chosen: `mlm-eval --help` shows the list alone.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

if find_spec("rich") is None:
    os.environ["TYPER_USE_RICH"] = "0"  # typer's own switch: its help in plain text

import typer
from typer.core import TyperCommand, TyperGroup

from mlm_eval import __version__
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.cli.printing import show_text
from mlm_eval.options import Option
from mlm_eval.tasks.zero_shot import BENCHMARKS

CHECKPOINTS, ZERO_SHOT = "Checkpoints", "Zero-shot evaluation"
REPORTS, TRAINING = "Tables and planning", "Training"
"""Titles of the groups that `mlm-eval --help` shows."""


class Listed(NamedTuple):
    """A command as `mlm-eval --help` shows it, and the module of this room that it is in."""

    module: str
    panel: str
    summary: str


SUMMARIES = {
    "inspect": "Show what a checkpoint is: format, sizes, settings and where each came from.",
    "convert": "Change a checkpoint's format or its parallel sizes, in memory for a few tensors.",
    "verify": "Compare two checkpoints by their logits on the same tokens.",
    "harness": "Any task of lm-evaluation-harness, on the checkpoint as it is.",
    "score": "Log-probabilities of given sequences.",
    "generate": "Text that continues given prompts: greedy, or drawn at a temperature.",
    "report": "Show measured figures among the paper's: differences, and what is not comparable.",
    "plan": "Show what runs will need: memory of each rank, floating-point operations, time.",
    "catalog": "List the public checkpoints we know, how to get them, and what to expect of them.",
    "data": "Show which files the tasks want, where they are from, and check yours.",
    "ls": "List names: tasks, recipes, sizes, samples, catalog.",
    "race": "RACE: which of four answers does the article support? Trains on middle and high.",
    "mnli": "MNLI: does the premise entail the hypothesis? Reports matched and mismatched.",
    "qqp": "QQP: do two questions ask the same? Reports accuracy and F1.",
    "squad": "SQuAD 1.1 and 2.0: where in the paragraph does the answer stand? Reports EM and F1.",
    "mlm": "Train a BERT on text: masked tokens, and sentence order where it has that head.",
    "lm": "Train a GPT on text: each token from the ones before.",
    "ensemble": "Average the probabilities of fine-tuned models, as the paper's ensemble rows do.",
    "bench": "Measure tokens/s, the share of the device's matrix-product peak, how that scales.",
}
"""What each command does; the zero-shot benchmarks have their own list."""
MAKERS: dict[str, Callable[[], Any]] = {}
"""What makes a command with its options, by the command's name; the modules fill it."""


def commands() -> dict[str, Listed]:
    """Return all commands by name, in the order of the help."""
    modules = (
        ("checkpoints", CHECKPOINTS, ("inspect", "convert", "verify")),
        ("harness", ZERO_SHOT, ("harness",)),
        ("report", REPORTS, ("report", "plan", "catalog")),
        ("lists.ls", REPORTS, ("ls",)),
        ("lists.data", REPORTS, ("data",)),
        ("training", TRAINING, ("race", "mnli", "qqp", "squad", "mlm", "lm", "ensemble")),
        ("zero_shot", ZERO_SHOT, tuple(BENCHMARKS)),
        ("sequences.score", ZERO_SHOT, ("score",)),
        ("sequences.generate", ZERO_SHOT, ("generate",)),
        ("bench", REPORTS, ("bench",)),
    )
    texts = SUMMARIES | BENCHMARKS
    return {
        name: Listed(module, panel, texts[name])
        for module, panel, names in modules
        for name in names
    }


def full_command(name: str) -> Any:
    """Return a command with its options."""
    import_module(f"mlm_eval.cli.{commands()[name].module}")
    return MAKERS[name]()


LONGEST_VALUE = 15
"""Characters that a help has for the values of an option, beside the names and the text."""


class Compact:
    """A command whose help shows every name whole on 80 columns: what its columns need is short."""

    params: list[Any]

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters; a switch has no value to be shown."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in params:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        compact = copy(self)
        compact.params = [_compact(parameter) for parameter in self.params]
        super(Compact, compact).format_help(ctx, formatter)  # type: ignore[misc]


def _compact(parameter: Any) -> Any:
    """Return a parameter as the help shows it: long lists and second names are in its text."""
    shown = copy(parameter)
    choices = "|" in (shown.metavar or "")
    if choices and shown.param_type_name == "argument":
        shown.metavar = shown.name.upper()
    elif choices and len(shown.metavar) > LONGEST_VALUE:
        shown.metavar = "CHOICE"
    if shown.param_type_name == "argument":  # its name says what its value is
        usage = shown.metavar if shown.required else f"[{shown.metavar}]"
        shown.get_usage_pieces = lambda _: [usage + "..." * (shown.nargs != 1)]
        shown.display_type_rich = lambda **_: ""
    if shown.secondary_opts:
        shown.help = f"{shown.help} {', '.join(shown.secondary_opts)}: not so."
        shown.secondary_opts = []
    return shown


class _Commands(Compact, TyperGroup):
    """The commands; one gets its options when it is chosen, so that `--help` makes none of them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        listed = commands().get(cmd_name)
        if listed is None:
            return None
        return TyperCommand(cmd_name, help=listed.summary, rich_help_panel=listed.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] not in commands() and not ctx.resilient_parsing:  # as completion parses
            near = difflib.get_close_matches(args[0], commands(), n=1)
            hint = f"did you mean {near[0]}?" if near else "`mlm-eval --help` lists them"
            raise InputError(f"there is no command {shown(args[0])}; {hint}")
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else full_command(name), rest


HELP_NAMES = {"help_option_names": ["-h", "--help"]}
"""How every command's help is asked for."""

app = typer.Typer(
    cls=_Commands,
    help="Evaluate, reshard and convert Megatron-LM checkpoints, without Megatron.",
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        show_text(f"mlm-eval {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def _is_option_value(value: Any) -> bool:
    """Return whether a value of TOML can be an option's: no table, no date, no endless number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | bool) or (type(value) is int and abs(value) < 1 << 63)


def _fitted(value: Any, hint: Any, entry: Option | None) -> Any:
    """Return a value of TOML as an option takes it; None: as if it were not given.

    click takes true for 1, 1.7 for 1, and 3 for true.

    Args:
        value: The value, one of a list's.
        hint: The parameter's annotation.
        entry: The option, where it is one of the command's own.

    Raises:
        ValueError: It is none of the option's; the message says what is.
    """
    kinds = set(_plain_types(hint))
    if isinstance(value, bool) and bool not in kinds:
        if entry is not None and entry.bare is not None:  # the flag alone, or no flag
            return entry.bare if value else None
        if entry is not None and str(value).lower() in entry.choices:
            return str(value).lower()
        raise ValueError("a number or a text")
    if kinds <= {bool, type(None)} and not isinstance(value, bool):
        raise ValueError("true or false")
    if isinstance(value, float) and int in kinds and float not in kinds:
        if not value.is_integer():
            raise ValueError("a whole number")
        return int(value)
    return value


def _plain_types(hint: Any) -> Iterator[Any]:
    """Yield the types in an annotation: int and NoneType of `Annotated[int | None, ...]`."""
    inner = get_args(hint)
    if get_origin(hint) is Annotated:
        inner = inner[:1]
    for part in inner:
        yield from _plain_types(part)
    if not inner:
        yield hint


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults of this command's options from a TOML file; options on the line win."""
    if path is None:
        return None
    from mlm_eval.checkpoints.files.text_file import read_toml

    values = read_toml(path, "a TOML file of options")
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if key == "config" or not all(map(_is_option_value, items)):
            raise InputError(
                f"{path} sets {shown(key)} to {shown(value)}; expected the value of an option"
            )
    known = {option.lstrip("-"): p.name for p in context.command.params for option in p.opts}
    unknown = sorted(key for key in values if key.replace("_", "-") not in known)
    if unknown:
        raise InputError(
            f"{path} sets {shown(unknown[0])}, which is not an option of this command (see --help)"
        )
    assert context.command.callback is not None
    hints = inspect.signature(context.command.callback).parameters
    listed = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    entries: Mapping[str, Option] = getattr(context.command, "entries", {})
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = known[key.replace("_", "-")]
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items):
            try:
                items[number] = _fitted(item, hints[name].annotation, entries.get(name))
            except ValueError as error:
                raise InputError(f"{path} sets {key} to {shown(item)}; expected {error}") from None
        named[name] = items if name in listed or isinstance(value, list) else items[0]
    context.default_map = {name: value for name, value in named.items() if value is not None}
    return path
