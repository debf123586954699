"""Options of the commands that are plain functions: one spelling, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlm_eval.cli.app import load_config

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Output = Annotated[Path | None, typer.Option(help="Write the result record (JSON) here.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="field=value: a model setting that an old file does not record (repeatable)."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML file with any of these options.", callback=load_config, is_eager=True),
]
