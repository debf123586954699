"""Settings that stand once: a dataclass field carries its default, its help and its bounds.

A command takes its options from such a dataclass (`mlm_eval/cli/command.py`), a recipe its fields,
a record its values. Nothing here imports torch or typer, so that `--help` stays quick.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "option"
"""Where a field's metadata holds its `Option`."""

FILE, PAGE, FOLDER = "file", "page", "folder"
"""What a command writes to the place that an option names: a result, a page of `report`, ..."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
SOFTMAX_ROWS = ("padded", "true")
"""Over what the softmax runs: all stored rows, or the entries of the tokenizer."""

OPTIMIZER, DATA, TASK, RUN = "Optimizer", "Data", "Task", "Run"
"""Titles of groups in a command's help. The options of no group come first."""


@dataclass(frozen=True)
class Option:
    """What the command line shows of a field, and what it accepts."""

    help: str
    least: float | None = None
    """Smallest value of a number."""
    most: float | None = None
    """Largest value of a number."""
    flag: str | None = None
    """The spelling, where it does not follow from the field's name; for a switch that nobody would
    switch off, the only one."""
    short: str | None = None
    """Another spelling, of one letter."""
    shown: str | None = None
    """What the help says for a default of None."""
    group: str | None = None
    """Title of its group in the help."""
    below: float | None = None
    """Values lie in [0, below)."""
    choices: tuple[str, ...] = ()
    """The only values; empty: any. On the command line their case does not matter."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Other spellings of choices, in lower case, each with the choice."""
    names: str | None = None
    """What `mlm-eval ls` calls the names that the value may be, beside files: `sizes`, ..."""
    only: tuple[str, ...] = ()
    """The commands that take it; empty: all."""
    parse: Callable[[str], Any] | None = None
    """Turns text into the value; the message of its ValueError says what the text has to be."""
    written: str | None = None
    """For an option with `parse`: how its default is written."""
    positional: bool = False
    """An argument without a flag."""
    hidden: bool = False
    """The help does not show it."""
    metavar: str | None = None
    """What the help says for its value, instead of its type."""
    writes: str | None = None
    """`FILE`, `PAGE` or `FOLDER`, where the command writes what the value names."""
    needs: str | None = None
    """The field without which it means nothing."""
    once: bool = False
    """Whether it is refused where it is given again, instead of the last one being taken."""
    bare: str | None = None
    """What stands for its value where the flag is given alone."""
    reads: bool = False
    """Whether a text may name a file or a folder that the command reads; paths that are not
    written always do."""


@dataclass(frozen=True)
class Nested:
    """A field for the options of another class: an object of it, or those that were given."""

    kind: type[Any]
    shown: str | None = None
    """What the help says for the default of each. Not None: the field maps the names of the options
    that were given to their values."""


def option(help: str, default: Any = dataclasses.MISSING, **settings: Any) -> Any:
    """Return a dataclass field that is an option of every command that takes its class.

    Args:
        help: One sentence: what the setting is.
        default: Its value where it is not given; without one it has to be given.
        settings: Other fields of `Option`.
    """
    return dataclasses.field(default=default, metadata={KEY: Option(help, **settings)})


def again(kind: type[Any], name: str, **changes: Any) -> Any:
    """Return the option that field `name` of a dataclass is, for another dataclass.

    Args:
        kind: The dataclass.
        name: Its field.
        changes: What differs: `default`, or fields of `Option`.
    """
    known = kind.__dataclass_fields__[name]
    default = changes.pop("default", known.default)
    entry = dataclasses.replace(known.metadata[KEY], **changes)
    return dataclasses.field(default=default, metadata={KEY: entry})


def given(kind: type[Any], shown: str) -> Any:
    """Return a field that holds those options of a dataclass that were given, by their names.

    On the command line they stand where this field stands. None of them has to be given, and one
    that is not given is absent: its value is for others to choose, such as a recipe.
    """
    return dataclasses.field(default_factory=dict, metadata={KEY: Nested(kind, shown)})


def nested(kind: type[Any]) -> Any:
    """Return a field that holds an object of another dataclass, made of its options."""
    return dataclasses.field(metadata={KEY: Nested(kind)})


def option_name(name: str) -> str:
    """Return how the command line spells the option of a field."""
    return "--" + name.replace("_", "-")


def flag_of(name: str, entry: Option | None) -> str:
    """Return the same, where the option may have a spelling of its own."""
    return (entry.flag if entry else None) or option_name(name)


def parallel_size(text: str) -> int | None:
    """Return a `--tp` or `--dp` value; None for auto.

    Raises:
        ValueError: It is neither a positive number nor `auto`.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a positive number or auto")
    return int(text)


def minutes(text: str) -> float:
    """Return the minutes of `--watch`: infinity where it stands alone.

    Raises:
        ValueError: It is no number of minutes.
    """
    if text.lower() == WITHOUT_END:
        return math.inf
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found >= 0:
        raise ValueError("must be a number of minutes, or stand alone")
    return found


WITHOUT_END = "forever"
"""What `--watch` alone means."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOption:
    """The checkpoint of a command."""

    ckpt: str = option(
        "Checkpoint: root folder with its tracker file, iter_* or release folder (torch, "
        "torch_dist, torch_dcp, fsdp_dtensor, zarr), .pt file, published zip archive, folder of "
        "Megatron-Bridge, NeMo, verl or DeepSpeed, .nemo file, Hugging Face folder, "
        "hf://org/name@revision on the hub, or sample:gpt, which ships.",
        reads=True,
        once=True,
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where a model runs, and how."""

    tp: int | None = option(
        "Tensor-parallel size: ranks that share one copy of the model, or auto.",
        None,
        parse=parallel_size,
        written="auto",
        metavar="N",
    )
    dp: int | None = option(
        "Data-parallel size: copies of the model, or auto.",
        None,
        parse=parallel_size,
        written="auto",
        metavar="N",
    )
    device: str = option("auto, cpu or cuda.", "auto", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto (the checkpoint's on CUDA, float32 on CPU), float32, bfloat16 or float16.",
        "auto",
        choices=DTYPES,
    )
    batch_tokens: int | None = option(
        "Tokens per forward pass and rank. Results do not depend on it.",
        None,
        least=1,
        shown="4,096 on the CPU, 32,768 on CUDA",
    )
    vocab: str = option(
        "padded: softmax over all stored rows, as in Megatron; true: over the tokenizer's entries "
        "only.",
        "padded",
        choices=SOFTMAX_ROWS,
    )


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """The tokenizer that belongs to a checkpoint."""

    tokenizer: Path | None = option(
        "Folder with the tokenizer, or sample:gpt; default: beside the checkpoint.", None
    )
    vocab_file: Path | None = option("vocab.json or vocab.txt, instead of --tokenizer.", None)
    merge_file: Path | None = option("merges.txt that goes with --vocab-file.", None)


@dataclass(frozen=True, kw_only=True)
class BosOption:
    """The token that begins a text."""

    bos: str = option(
        "yes: the begin-of-text token stands before each text; no: it does not; auto: it does not, "
        "with a warning where the tokenizer would put it there.",
        "auto",
        choices=("auto", "yes", "no"),
    )


@dataclass(frozen=True, kw_only=True)
class TokenizersBosOption(BosOption):
    """The same, where auto is what the tokenizer does itself."""

    bos: str = again(
        BosOption,
        "bos",
        help="yes: the begin-of-text token stands before each text; no: it does not; auto: where "
        "the tokenizer's files say so.",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(TokenizerOptions, EngineOptions):
    """What every command that evaluates a model takes, but for the checkpoint.

    On the command line the options of the last base class come first.
    """

    output: Path | None = option(
        "Write the result record (JSON) here; - is stdout.", None, writes=FILE
    )
    overwrite: bool = option("Replace a result that is there already.", False, flag="--overwrite")
    limit: int | None = option("Only the first N; marked in every output.", None, least=1)
    seed: int = option("Recorded; zero-shot evaluation draws nothing at random.", 1234)
    overrides: tuple[str, ...] = option(
        "field=value: a model setting that an old file does not record (repeatable).",
        (),
        flag="--set",
    )
    compile_model: bool = option("Compile the model with torch.compile.", False, flag="--compile")
    full_digest: bool = option("Hash every byte of the checkpoint.", False, flag="--full-digest")


@dataclass(frozen=True, kw_only=True)
class RunOptions(EvaluationOptions, CheckpointOption):
    """What every command that evaluates one model takes."""


@dataclass(frozen=True, kw_only=True)
class CheckpointsOption:
    """The checkpoints of a command that may evaluate a series of them."""

    ckpt: tuple[str, ...] = again(
        CheckpointOption,
        "ckpt",
        help=CheckpointOption.__dataclass_fields__["ckpt"].metadata[KEY].help
        + " Repeatable: a series.",
        once=False,
    )
    iterations: str | None = option(
        "A series below --ckpt: all, latest, 1000,2000 or 1000:5000:500 (both ends included). Each "
        "has a record of its own, F.iter_0001000.json of --output F.json, and F.json lists them; "
        "those that are done are skipped.",
        None,
    )
    watch: float | None = option(
        "Go on as finished iterations appear, until Ctrl-C, or until so many minutes bring none.",
        None,
        parse=minutes,
        bare=WITHOUT_END,
        metavar="[MINUTES]",
    )


@dataclass(frozen=True, kw_only=True)
class SeriesOptions(EvaluationOptions, CheckpointsOption):
    """What a command takes that evaluates one model, or a series."""

    @property
    def is_series(self) -> bool:
        """Whether they ask for a series."""
        return asks_for_series(vars(self))

    def one(self, ckpt: str, output: Path | None) -> RunOptions:
        """Return the options of one of the checkpoints."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunOptions)}
        return RunOptions(**{**values, "ckpt": ckpt, "output": output})


def asks_for_series(values: Mapping[str, Any]) -> bool:
    """Return whether the values of a command's options, by name, ask for a series."""
    several = isinstance(values.get("ckpt"), (list, tuple)) and len(values["ckpt"]) > 1
    return several or values.get("iterations") is not None or values.get("watch") is not None
