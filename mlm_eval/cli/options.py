"""The options that commands share: one spelling, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlm_eval.cli.app import load_config

Ckpt = Annotated[
    str,
    typer.Option(
        help="Checkpoint: root folder with its tracker file, iter_* or release folder, .pt file, "
        "published zip archive, or Hugging Face folder."
    ),
]
Tp = Annotated[
    str, typer.Option(help="Tensor-parallel size: ranks that share one copy of the model, or auto.")
]
Dp = Annotated[str, typer.Option(help="Data-parallel size: copies of the model, or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's on CUDA, float32 on CPU), float32, bfloat16 or float16."
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens per forward pass and rank. Results do not depend on it."),
]
Vocab = Annotated[
    str,
    typer.Option(
        help="padded: softmax over all stored rows, as in Megatron; true: over the tokenizer's "
        "entries only."
    ),
]
TokenizerDir = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Folder with the tokenizer; default: beside the checkpoint."),
]
VocabFile = Annotated[
    Path | None, typer.Option(help="vocab.json or vocab.txt, instead of --tokenizer.")
]
MergeFile = Annotated[Path | None, typer.Option(help="merges.txt that goes with --vocab-file.")]
Output = Annotated[Path | None, typer.Option(help="Write the result record (JSON) here.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N; marked in every output.")]
Seed = Annotated[int, typer.Option(help="Recorded; zero-shot evaluation draws nothing at random.")]
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
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run of the same --output.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")]
FullDigest = Annotated[
    bool, typer.Option("--full-digest", help="Hash every byte of the checkpoint.")
]
