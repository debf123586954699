"""The options that commands share: one spelling, one help text.

The commands that train have some forty options each, most of them the same. Those stand in tables,
`finetuning` and `pretraining`, from which `signature` builds what typer reads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from mlm_eval.checkpoints.dtypes import DTYPE_CHOICES
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

# ---- tables of options -------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
OPTIMIZER, DATA, TASK, RUN = "Optimizer", "Data", "Task", "Run"
"""Titles of groups in a command's help. The options of no group come first."""


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        kind: Type of its values, or one of the annotated types above.
        help: What it is.
        default: Its value where it is not given; without a default it has to be given.
        shown: What the help says for a default of None.
        group: Title of its group in the help.
        least: Smallest value of a whole number.
        flag: For a switch that nobody would switch off: its spelling.
    """

    kind: Any
    help: str = ""
    default: Any = REQUIRED
    shown: str | None = None
    group: str | None = None
    least: int | None = None
    flag: str | None = None

    def annotation(self) -> Any:
        """Return the annotated type that typer reads."""
        if get_origin(self.kind) is Annotated:
            kind, shared = get_args(self.kind)
            info = copy.copy(shared)
            info.rich_help_panel = self.group
            return Annotated[kind, info]
        info = typer.Option(
            *filter(None, [self.flag]),
            help=self.help,
            min=self.least,
            rich_help_panel=self.group,
            show_default=self.shown or True,
        )
        return Annotated[self.kind | None if self.default is None else self.kind, info]


Options = Mapping[str, Option]
"""The options of a command by the names of its parameters, in the order of its help."""


def signature(options: Options) -> inspect.Signature:
    """Return the signature of a function that takes these options."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter(name, keyword, default=row.default, annotation=row.annotation())
            for name, row in options.items()
        ]
    )


# ---- the commands that train -------------------------------------------------------------------

RECIPE = "the recipe's"


def _hyper(kind: type, help: str, group: str | None = None, least: int | None = None) -> Option:
    return Option(kind, help, None, RECIPE, group, least)


HYPER: Options = {
    "epochs": _hyper(int, "Passes over the training data.", least=1),
    "lr": _hyper(float, "Highest learning rate."),
    "global_batch": _hyper(int, "Samples of a step, over all ranks.", least=1),
    "seq_length": _hyper(int, "Longest row in tokens.", least=8),
    "warmup": _hyper(float, "Share of the steps in which the learning rate rises.", OPTIMIZER),
    "lr_decay": _hyper(str, "How the learning rate falls then: linear or cosine.", OPTIMIZER),
    "min_lr": _hyper(float, "Learning rate at the end.", OPTIMIZER),
    "weight_decay": _hyper(float, "Of AdamW; none on biases and norms.", OPTIMIZER),
    "adam_beta1": _hyper(float, "Of AdamW.", OPTIMIZER),
    "adam_beta2": _hyper(float, "Of AdamW.", OPTIMIZER),
    "adam_eps": _hyper(float, "Of AdamW.", OPTIMIZER),
    "clip_grad": _hyper(float, "Largest norm of the gradient; 0: any.", OPTIMIZER),
    "hidden_dropout": _hyper(float, "Probability of dropping a unit.", OPTIMIZER),
    "attention_dropout": _hyper(
        float, "Probability of dropping an attention weight; 0 is faster.", OPTIMIZER
    ),
    "keep_last": _hyper(
        bool,
        "Make a step of an epoch's last samples where they do not fill a global batch.",
        OPTIMIZER,
    ),
}
"""What a recipe sets; for `mlm` and `lm` there are the defaults below."""

OF_TASK: dict[str, Options] = {
    "race": {"max_qa_length": _hyper(int, "Longest question with its answer, in tokens.", TASK, 1)},
    "mnli": {},
    "qqp": {},
    "squad": {
        "doc_stride": _hyper(
            int, "Tokens from the start of one window of a long passage to the next.", TASK, 1
        ),
        "max_query_length": _hyper(int, "Longest question, in tokens.", TASK, 1),
        "max_answer_length": _hyper(int, "Longest answer, in tokens.", TASK, 1),
        "n_best": _hyper(int, "Answers kept for each question.", TASK, 1),
        "null_threshold": _hyper(
            float,
            "SQuAD 2.0: a question has no answer where the score of none is ahead of the best "
            "one's by more. Where the recipe has no value, it is found on the dev sets.",
            TASK,
        ),
    },
}
"""What a recipe sets for one task only."""

PRETRAINING_DEFAULTS: dict[str, Any] = {
    "epochs": 3,
    "lr": 1e-4,  # the paper's for BERT (section 4.3); the others are the trainer's own
    "global_batch": 32,
    "warmup": 0.06,
    "lr_decay": "linear",
    "min_lr": 0.0,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "clip_grad": 1.0,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "keep_last": False,
}
"""Stated here, because `--help` must not wait for torch; a test compares them."""

RESUME_RUN = Option(bool, "Go on from the last saved state.", False, flag="--resume")
OUTPUT_DIR = Option(Path, "Folder for the result, the model, the states and the logs.")
DTYPE = Option(
    str,
    f"Of the matrix products: auto (bfloat16 on CUDA, float32 on the CPU), {DTYPE_CHOICES}.",
    "auto",
    group=RUN,
)

PLACE: Options = {
    "tp": Option(Tp, default="auto"),
    "dp": Option(Dp, default="auto"),
    "device": Option(Device, default="auto"),
    "tokenizer": Option(TokenizerDir, default=None),
    "config": Option(Config, default=None),
}
"""Where a run computes, and two more that everybody needs."""

RUNNING: Options = {
    "max_steps": Option(int, "Steps of the run.", None, "as --epochs says", RUN, 1),
    "evaluate_every": Option(
        int, "Steps between evaluations.", None, "at the end of each epoch", RUN, 1
    ),
    "save_minutes": Option(
        float, "Minutes between training states; one is saved at evaluations too.", 10.0, group=RUN
    ),
    "micro_batch": Option(
        int, "Samples of a forward pass on one rank; changes no result.", 8, group=RUN, least=1
    ),
    "recompute": Option(
        bool,
        "Recompute activations in the backward pass: needs less memory.",
        False,
        group=RUN,
        flag="--recompute",
    ),
    "dp_mode": Option(
        str, "ddp, or fsdp2: weights and moments cut over the --dp ranks.", "ddp", group=RUN
    ),
    "batch_tokens": Option(BatchTokens, default=None, group=RUN),
    "vocab_file": Option(VocabFile, default=None, group=RUN),
    "merge_file": Option(MergeFile, default=None, group=RUN),
    "set_": Option(Sets, default=None, group=RUN),
    "output": Option(Output, default=None, group=RUN),
}
"""How a run computes."""


def finetuning(task: str) -> Options:
    """Return the options of the command of a benchmark."""
    recipe = f"{task}-megatron-336m"
    if task == "squad":
        recipe = "squad-v1-megatron-336m, or squad-v2-megatron-336m for SQuAD 2.0"
    instead = "(repeatable; file, folder or `datasets` name)"
    of_data = "what --data has"
    return {
        "ckpt": Option(Ckpt),
        "data": Option(
            str, "The benchmark's folder, or a `datasets` name; or give --train and --dev.", None
        ),
        "output_dir": OUTPUT_DIR,
        "recipe": Option(str, "Name of a recipe, or a TOML file.", None, recipe),
        **HYPER,
        "seeds": Option(str, "One run for each, such as 1,2,3,4,5.", "1234"),
        "resume": RESUME_RUN,
        "eval_only": Option(
            bool, "Train nothing: evaluate a fine-tuned checkpoint.", False, flag="--eval-only"
        ),
        **PLACE,
        "train": Option(list[str], f"Data to train on {instead}.", None, of_data, DATA),
        "dev": Option(list[str], f"Data to evaluate on {instead}.", None, of_data, DATA),
        "test": Option(list[str], f"Data to test at the end {instead}.", None, of_data, DATA),
        "train_limit": Option(int, "First N examples to train on.", None, "all", DATA, 1),
        "dev_limit": Option(int, "First N examples of each dev set.", None, "all", DATA, 1),
        "test_limit": Option(int, "First N examples of each test set.", None, "all", DATA, 1),
        **OF_TASK[task],
        "dtype": replace(
            DTYPE,
            help=f"{DTYPE.help} With --eval-only of the evaluation; auto on CUDA then is the "
            "checkpoint's.",
        ),
        "eval_dtype": Option(
            str,
            "Of the matrix products of evaluations while training: auto (--dtype on CUDA, float32 "
            f"on the CPU), {DTYPE_CHOICES}.",
            "auto",
            group=RUN,
        ),
        **RUNNING,
    }


def pretraining(kind: str) -> Options:
    """Return the options of `mlm` or `lm`."""
    masked: Options = {
        "mask_probability": Option(float, "Share of the tokens that are hidden.", 0.15, group=TASK),
        "whole_words": Option(bool, "Hide all pieces of a word or none.", True, group=TASK),
    }
    hyper = {
        name: replace(HYPER[name], default=value, shown=None)
        for name, value in PRETRAINING_DEFAULTS.items()
    }
    least = 8 if kind == "mlm" else 2
    return {
        "ckpt": Option(str, "Checkpoint to start from.", None),
        "init": Option(str, "Or a new model: the name of a size, or a TOML file.", None),
        "data": Option(list[Path], "Text or JSON-lines file (repeatable)."),
        "output_dir": OUTPUT_DIR,
        **hyper,
        "seq_length": Option(
            int, "Longest row in tokens.", None, "the model's positions", least=least
        ),
        "seed": Option(int, "Of the order, dropout, masks and new weights.", 1234, least=0),
        "resume": RESUME_RUN,
        **PLACE,
        "dev": Option(
            list[Path], "Text to evaluate on (repeatable).", None, "a part of --data", DATA
        ),
        "dev_share": Option(
            float, "Share of --data to evaluate on where there is no --dev.", 0.05, group=DATA
        ),
        **(masked if kind == "mlm" else {}),
        "dtype": DTYPE,
        **RUNNING,
    }
