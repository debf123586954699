"""Commands that train: race, mnli, qqp, squad, mlm, lm; and ensemble, for their predictions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.app import TRAINING, app
from mlm_eval.cli.options import (
    BatchTokens,
    Ckpt,
    Config,
    Device,
    Dp,
    MergeFile,
    Output,
    Seed,
    Sets,
    TokenizerDir,
    Tp,
    VocabFile,
)
from mlm_eval.cli.run import ModelRun
from mlm_eval.launch import shutdown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlm_eval.results import Result
    from mlm_eval.training_settings import TrainingProgress

FINETUNING = {
    "race": "RACE: which of four answers does the article support? Trains on middle and high.",
    "mnli": "MNLI: does the premise entail the hypothesis? Reports matched and mismatched.",
    "qqp": "QQP: do two questions ask the same? Reports accuracy and F1.",
    "squad": "SQuAD 1.1 and 2.0: where in the paragraph does the answer stand? Reports EM and F1.",
}

PRETRAINING_LR = 1e-4
"""The paper's for BERT (section 4.3)."""

OutputDir = Annotated[
    Path, typer.Option(help="Folder for the result, the model, the states and the logs.")
]
Files = Annotated[list[str] | None, typer.Option(help="File or folder (repeatable), not --data.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the training data.")]
Lr = Annotated[float | None, typer.Option(help="Highest learning rate.")]
GlobalBatch = Annotated[int | None, typer.Option(min=1, help="Samples of a step, all ranks.")]
MicroBatch = Annotated[
    int | None, typer.Option(min=1, help="Samples of a forward pass on one rank; changes nothing.")
]
HiddenDropout = Annotated[float | None, typer.Option(help="Probability of dropping a unit.")]
AttentionDropout = Annotated[
    float | None, typer.Option(help="Probability of dropping an attention weight; 0 is faster.")
]
TrainDtype = Annotated[
    str, typer.Option(help="Of the matrix products: auto (bfloat16 on CUDA), float32, bfloat16 ...")
]
Warmup = Annotated[float | None, typer.Option(help="Share of the steps with a rising rate.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Steps, whatever --epochs says.")]
SeqLength = Annotated[int | None, typer.Option(min=2, help="Longest row in tokens.")]
ResumeRun = Annotated[bool, typer.Option("--resume", help="Go on from the last saved state.")]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Recompute activations in the backward pass.")
]
DpMode = Annotated[str, typer.Option(help="ddp or fsdp2.")]
SaveMinutes = Annotated[float | None, typer.Option(help="Minutes between training states.")]


def _register(task: str, what: str) -> None:
    """Add the command of one benchmark."""
    example = f"mlm-eval {task} --ckpt bert_345m --data {task.upper()} --output-dir out --tp 2"

    @app.command(task, rich_help_panel=TRAINING, help=f"{what}\n\nExample: {example}")
    def command(
        ckpt: Ckpt,
        output_dir: OutputDir,
        data: Annotated[
            str | None, typer.Option(help="The benchmark's folder, or a `datasets` name.")
        ] = None,
        train: Files = None,
        dev: Files = None,
        test: Files = None,
        recipe: Annotated[
            str | None, typer.Option(help="Such as race-megatron-336m, or a TOML file.")
        ] = None,
        epochs: Epochs = None,
        lr: Lr = None,
        global_batch: GlobalBatch = None,
        micro_batch: MicroBatch = None,
        warmup: Warmup = None,
        weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
        hidden_dropout: HiddenDropout = None,
        attention_dropout: AttentionDropout = None,
        seq_length: SeqLength = None,
        seeds: Annotated[str, typer.Option(help="One run for each, such as 1,2,3,4,5.")] = "1234",
        resume: ResumeRun = False,
        eval_only: Annotated[
            bool, typer.Option("--eval-only", help="Evaluate a fine-tuned checkpoint.")
        ] = False,
        train_limit: Annotated[int | None, typer.Option(min=1, help="First N examples.")] = None,
        dev_limit: Annotated[
            int | None, typer.Option(min=1, help="First N examples of each dev set.")
        ] = None,
        test_limit: Annotated[
            int | None, typer.Option(min=1, help="First N examples of each test set.")
        ] = None,
        max_steps: MaxSteps = None,
        save_minutes: SaveMinutes = None,
        recompute: Recompute = False,
        dp_mode: DpMode = "ddp",
        dtype: TrainDtype = "auto",
        tp: Tp = "auto",
        dp: Dp = "auto",
        device: Device = "auto",
        batch_tokens: BatchTokens = None,
        tokenizer: TokenizerDir = None,
        vocab_file: VocabFile = None,
        merge_file: MergeFile = None,
        output: Output = None,
        set_: Sets = None,
        config: Config = None,
    ) -> None:
        values = {name: value for name, value in locals().items() if name != "config"}
        _finetune(task, values)


for _task, _what in FINETUNING.items():
    _register(_task, _what)


def _finetune(task: str, values: dict[str, Any]) -> None:
    from mlm_eval.show import training_text
    from mlm_eval.tasks.finetune import finetune
    from mlm_eval.tasks.finetune_options import FinetuneOptions, Observer

    names = (
        "output_dir data recipe epochs lr global_batch micro_batch warmup weight_decay "
        "hidden_dropout attention_dropout seq_length resume eval_only train_limit dev_limit "
        "test_limit max_steps save_minutes recompute dp_mode dtype"
    ).split()
    given: dict[str, Any] = {name: values[name] for name in names}
    given |= {name: tuple(values[name] or ()) for name in ("train", "dev", "test")}
    options = FinetuneOptions(**given, seeds=parse_seeds(values["seeds"]))
    run = _model_run(values)
    place = run.start()
    words = run.tokenizer(required=True)
    assert words is not None
    load = run.join(place)
    run.warn(run.checkpoint.provenance.warnings)
    with _training_bar(run.is_main) as on_step:
        observer = Observer(say=run.say, warn=lambda text: run.warn([text]), on_step=on_step)
        result = finetune(
            task, run.checkpoint, options, tokenizer=words, load=load, observer=observer
        )
    _finish(run, result, training_text(result), values["output"])


@app.command(rich_help_panel=TRAINING)
def mlm(
    output_dir: OutputDir,
    data: Annotated[list[Path], typer.Option(help="Text or JSON-lines file (repeatable).")],
    ckpt: Annotated[str | None, typer.Option(help="Checkpoint to start from.")] = None,
    init: Annotated[
        str | None, typer.Option(help="Or a new model: the name of a size, or a TOML file.")
    ] = None,
    dev: Annotated[list[Path] | None, typer.Option(help="Text to evaluate on.")] = None,
    mask_probability: Annotated[float, typer.Option(help="Share of hidden tokens.")] = 0.15,
    epochs: Epochs = None,
    lr: Lr = None,
    global_batch: GlobalBatch = None,
    micro_batch: MicroBatch = None,
    warmup: Warmup = None,
    hidden_dropout: HiddenDropout = None,
    attention_dropout: AttentionDropout = None,
    seq_length: SeqLength = None,
    seed: Seed = 1234,
    resume: ResumeRun = False,
    max_steps: MaxSteps = None,
    save_minutes: SaveMinutes = None,
    recompute: Recompute = False,
    dp_mode: DpMode = "ddp",
    dtype: TrainDtype = "auto",
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    batch_tokens: BatchTokens = None,
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    output: Output = None,
    set_: Sets = None,
    config: Config = None,
) -> None:
    """Train a BERT on text: masked language model, and sentence order where it has that head.

    Example: mlm-eval mlm --init bert.toml --data text.txt --tokenizer words --output-dir out
    """
    _pretrain("mlm", dict(locals()))


@app.command(rich_help_panel=TRAINING)
def lm(
    output_dir: OutputDir,
    data: Annotated[list[Path], typer.Option(help="Text or JSON-lines file (repeatable).")],
    ckpt: Annotated[str | None, typer.Option(help="Checkpoint to start from.")] = None,
    init: Annotated[
        str | None, typer.Option(help="Or a new model: the name of a size, or a TOML file.")
    ] = None,
    dev: Annotated[list[Path] | None, typer.Option(help="Text to evaluate on.")] = None,
    epochs: Epochs = None,
    lr: Lr = None,
    global_batch: GlobalBatch = None,
    micro_batch: MicroBatch = None,
    warmup: Warmup = None,
    hidden_dropout: HiddenDropout = None,
    attention_dropout: AttentionDropout = None,
    seq_length: SeqLength = None,
    seed: Seed = 1234,
    resume: ResumeRun = False,
    max_steps: MaxSteps = None,
    save_minutes: SaveMinutes = None,
    recompute: Recompute = False,
    dp_mode: DpMode = "ddp",
    dtype: TrainDtype = "auto",
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    batch_tokens: BatchTokens = None,
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    output: Output = None,
    set_: Sets = None,
    config: Config = None,
) -> None:
    """Train a GPT on text: each token from the ones before.

    Example: mlm-eval lm --ckpt gpt2_345m --data text.txt --output-dir out --tp 2
    """
    _pretrain("lm", dict(locals()))


def _pretrain(kind: str, values: dict[str, Any]) -> None:
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.cli.run import find_words
    from mlm_eval.pretraining import TextSettings, pretrain, start_from
    from mlm_eval.show import training_text
    from mlm_eval.training_settings import TrainSettings

    if (values["ckpt"] is None) == (values["init"] is None):
        raise InputError("give either --ckpt, to go on from a checkpoint, or --init, for a new one")
    checkpoint = None
    if values["init"] is not None:
        words = find_words("", values["tokenizer"], values["vocab_file"], values["merge_file"])
        if words is None:
            raise InputError("--init needs the vocabulary of the new model; give --tokenizer")
        overrides = parse_overrides(values["set_"] or [])
        checkpoint = start_from(
            kind, init=values["init"], tokenizer=words, seed=values["seed"], overrides=overrides
        )
    run = _model_run(values, checkpoint)
    place = run.start()
    words = run.tokenizer(required=True)
    assert words is not None
    text = TextSettings(
        data=tuple(values["data"]),
        dev=tuple(values["dev"] or ()),
        seq_length=values["seq_length"],
        **({"mask_probability": values["mask_probability"]} if kind == "mlm" else {}),
    )
    names = (
        "epochs lr global_batch micro_batch warmup hidden_dropout attention_dropout max_steps "
        "save_minutes"
    ).split()
    given: dict[str, Any] = {"lr": PRETRAINING_LR}
    given |= {name: values[name] for name in names if values[name] is not None}
    dtype = values["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if place.device == "cuda" else "float32"
    settings = TrainSettings(
        **given,
        seed=values["seed"],
        dtype=dtype,
        recompute=values["recompute"],
        dp_mode=values["dp_mode"],
    )
    engine = run.join(place)(run.checkpoint, "float32")
    with _training_bar(run.is_main) as on_step:
        result = pretrain(
            kind,
            engine,
            words,
            text,
            settings,
            output_dir=values["output_dir"],
            resume=values["resume"],
            on_progress=on_step,
        )
    _finish(run, result, training_text(result), values["output"])


@app.command(rich_help_panel=TRAINING)
def ensemble(
    predictions: Annotated[
        list[Path], typer.Option(help="File or folder of saved predictions (repeatable).")
    ],
    output: Output = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write the ensemble's own predictions here.")
    ] = None,
) -> None:
    """Average the probabilities of several fine-tuned models, as the paper's ensemble rows do.

    Example: mlm-eval ensemble --predictions seed-1/predictions --predictions seed-2/predictions
    """
    from mlm_eval.show import training_text
    from mlm_eval.tasks.predictions import ensemble as join

    result = join(predictions, output=output_dir)
    print(training_text(result))
    if output is not None:
        result.write(output)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `--seeds 1,2,3`.

    Raises:
        InputError: One of them is no number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--seeds {text!r}: give numbers divided by commas, such as 1,2,3"
        ) from None


def _model_run(values: dict[str, Any], checkpoint: Any = None) -> ModelRun:
    """Return the run of a command that trains: weights in float32, the stored vocabulary."""
    names = ("ckpt", "tp", "dp", "device", "batch_tokens", "tokenizer", "vocab_file", "merge_file")
    return ModelRun(
        checkpoint=checkpoint,
        **{name: values[name] for name in (*names, "set_", "output")},
        dtype="float32",
        vocab="padded",
        limit=None,
        seed=None,
        compile_=False,
        full_digest=False,
    )


def _finish(run: ModelRun, result: Result, text: str, output: Path | None) -> None:
    run.warn(result.warnings)
    run.tell(text)
    if output is not None and run.is_main:
        result.write(output)
    shutdown()


@contextmanager
def _training_bar(show: bool) -> Iterator[Callable[[TrainingProgress], None] | None]:
    """Yield a callback that draws a bar with loss, accuracy and the time left, on a terminal."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="step", dynamic_ncols=True, file=sys.stderr) as bar:

        def update(progress: TrainingProgress) -> None:
            bar.total = progress.total_steps
            bar.set_postfix(
                loss=f"{progress.loss:.4f}",
                acc=f"{progress.accuracy:.3f}",
                samples_s=f"{progress.samples_per_second:.1f}",
                refresh=False,
            )
            bar.update(progress.step - bar.n)

        yield update
