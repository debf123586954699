"""How much work each benchmark is for a model, known without its data: for `mlm-eval plan`.

Zero-shot: exact for the paper's files and GPT-2's tokenizer. Fine-tuning: the published sets'
counts; mean lengths in BERT's uncased WordPiece, with [CLS] and [SEP], measured on what the
comments say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.dtypes import evaluation_dtype, training_dtype
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.model.costs.memory import EvaluationNeed, Memory, TrainingBatch, TrainingNeed
from mlm_eval.planning.plan import Passes, Training, Workload, spread
from mlm_eval.tasks.finetune.settings import load_recipe
from mlm_eval.tasks.language.settings import LANGUAGE, TextSettings, why_untrained
from mlm_eval.tasks.paper import paper_recipe
from mlm_eval.tasks.zero_shot import benchmarks
from mlm_eval.training.settings import Hyperparameters

if TYPE_CHECKING:
    from mlm_eval.tasks.finetune.settings import FinetuneOptions
    from mlm_eval.training.settings import TrainSettings

TEXT_TOKENS = 1_000_000
"""Language modelling has no set of its own: its work is given for a million tokens of text."""

MLM_SHARE = 0.15
"""Tokens that masked-LM training hides."""


@dataclasses.dataclass(frozen=True)
class _FineTuning:
    """Sizes of a fine-tuning benchmark."""

    title: str
    train: int
    """Samples of the training set."""
    evaluated: int
    """Samples of the sets that are evaluated."""
    rows: int
    """Rows of one sample (RACE: one for each answer)."""
    length: float
    """Mean length of a row, in tokens."""
    longest: int
    """Where rows are cut."""
    head: dict[str, int | bool]
    """Settings of the model's head."""


FINE_TUNING = {
    # 21,536 rows of train, every 17th file: mean 353, 7 % cut at 512; 25,421 + 62,445 questions
    "race": _FineTuning(
        "RACE, middle and high", 87_866, 4_887 + 4_934, 4, 353.0, 512, {"multichoice_head": True}
    ),
    # 2,000 pairs of dev: mean 40.9
    "mnli": _FineTuning("MNLI", 392_702, 9_815 + 9_832, 1, 40.9, 128, {"num_classes": 3}),
    # only 78 pairs were at hand: mean 28.6
    "qqp": _FineTuning("QQP", 363_846, 40_430, 1, 28.6, 128, {"num_classes": 2}),
    # 1,190 questions of dev: mean 179
    "squad1": _FineTuning("SQuAD 1.1", 87_599, 10_570, 1, 179.3, 512, {"qa_head": True}),
    # 6,078 questions of dev: 6,217 windows of mean 191
    "squad2": _FineTuning("SQuAD 2.0", 130_319, 11_873, 1, 195.7, 512, {"qa_head": True}),
}


def tasks_of(family: str) -> list[str]:
    """Return the names of the tasks of `gpt` or `bert` models; T5 has none."""
    if family == "t5":
        return []
    if family == "bert":
        return [*FINE_TUNING, "mlm"]
    measured = [name for name, b in benchmarks().items() if b.workload(1024) is not None]
    return [*measured, "lm"]


def workloads(
    config: ModelConfig,
    *,
    task: str | None = None,
    size: str | None = None,
    batch: TrainingBatch | None = None,
) -> list[Workload]:
    """Return what the benchmarks ask of a model.

    Args:
        config: The model.
        task: Only this one; `squad` is both versions.
        size: The paper's size whose recipes apply; None or an unknown one: those of the smallest.
        batch: Dropout, precision, recomputation of training; `rows` are the samples of a forward
            pass on one rank; the lengths are the tasks'.

    What cannot be trained has no training; see `why_untrained`.

    Raises:
        InputError: There is no such task for this kind of model, or it cannot be trained.
    """
    known = tasks_of(config.family)
    if not known:
        raise InputError(
            f"a {config.family.upper()} model has no benchmark here, only `mlm-eval score`; plan "
            "is for GPT and BERT models"
        )
    names = known
    if task is not None:
        names = [name for name in names if name == task or name.rstrip("12") == task]
        if not names:
            kind = {"gpt": "GPT", "bert": "BERT"}[config.family]
            raise InputError(
                f"--task {task} is not a task of a {kind} model; choose {', '.join(known)}"
            )
    if (why := why_untrained(config)) and task in LANGUAGE:
        raise InputError(f"--task {task}: this model has {why}")
    if why:
        names = [name for name in names if name not in LANGUAGE]
    batch = batch or TrainingBatch(rows=8, length=1)
    return [_workload(name, config, size, batch) for name in names]


def _workload(name: str, config: ModelConfig, size: str | None, batch: TrainingBatch) -> Workload:
    positions = config.max_position_embeddings
    zero_shot = benchmarks().get(name)
    if zero_shot is not None:
        work = zero_shot.workload(positions)
        assert work is not None
        return work
    if name in LANGUAGE:
        return _language_modelling(name, positions, batch)
    return _fine_tuning(name, positions, size, batch)


def _language_modelling(name: str, positions: int, batch: TrainingBatch) -> Workload:
    count = -(-TEXT_TOKENS // positions)
    predicted = positions if name == "lm" else round(MLM_SHARE * positions)
    title = f"{name}, each million tokens of text, rows of {positions:,}"
    sample = dataclasses.replace(batch, rows=1, length=positions, predicted=predicted)
    passes = [Passes(count, positions, positions, predicted)]
    training = Training(passes, 1, sample, batch.rows, Hyperparameters.global_batch, {})
    return Workload(name, title, [], training=training)


def _fine_tuning(name: str, positions: int, size: str | None, batch: TrainingBatch) -> Workload:
    task = FINE_TUNING[name]
    longest = min(task.longest, positions)
    mean = min(task.length, longest)
    recipe = paper_recipe(name, size) or paper_recipe(name, "bert-336m")
    assert recipe is not None
    sample = dataclasses.replace(batch, rows=task.rows, length=longest)
    epoch = list(_rows(task.train * task.rows, mean))
    title = f"{task.title}, {task.train:,} samples x {recipe['epochs']} epochs"
    return Workload(
        name,
        title,
        list(_rows(task.evaluated * task.rows, mean)),
        training=Training(
            epoch, recipe["epochs"], sample, batch.rows, recipe["global_batch"], _heads(task)
        ),
    )


# ---- memory of a run ---------------------------------------------------------------------------


def finetuning_need(
    task: str, config: ModelConfig, options: FinetuneOptions, *, batch_tokens: int
) -> Callable[[int, int], Memory]:
    """Return what each rank of a fine-tuning needs on a GPU, as a function of tp and dp.

    Args:
        task: `race`, `mnli`, `qqp` or `squad`.
        config: The model that it starts from.
        options: The command's.
        batch_tokens: Padded tokens of a forward pass in the evaluations.

    Raises:
        InputError: The recipe cannot be used.
    """
    known = FINE_TUNING["squad1" if task == "squad" else task]
    config = dataclasses.replace(config, **_heads(known))
    dtype = training_dtype(options.dtype, "cuda")
    if options.eval_only:
        itemsize = evaluation_dtype(options.dtype, config.params_dtype, "cuda").itemsize
        return EvaluationNeed(config, itemsize, batch_tokens)
    usual = "squad-v1-megatron-336m" if task == "squad" else f"{task}-megatron-336m"
    recipe = load_recipe(options.recipe or usual, task=task, overrides=options.overrides)
    sample = TrainingBatch(
        rows=known.rows,
        length=min(recipe.seq_length, config.max_position_embeddings),
        hidden_dropout=recipe.hidden_dropout,
        attention_dropout=recipe.attention_dropout,
        half=dtype != "float32",
        recompute=options.recompute,
    )
    return TrainingNeed(
        config,
        sample,
        micro_batch=options.micro_batch,
        global_batch=recipe.global_batch,
        batch_tokens=batch_tokens,
        sharded=options.dp_mode == "fsdp2",
    )


def pretraining_need(
    config: ModelConfig, text: TextSettings, settings: TrainSettings, *, batch_tokens: int
) -> TrainingNeed:
    """Return what each rank of `mlm-eval mlm` or `lm` needs on a GPU.

    Args:
        config: The model.
        text: How the text is cut, and what is masked in it.
        settings: How it is trained.
        batch_tokens: Padded tokens of a forward pass in the evaluations.
    """
    positions = config.max_position_embeddings
    length = min(text.seq_length or positions, positions)
    share = getattr(text, "mask_probability", 1.0)
    sample = TrainingBatch(
        rows=1,
        length=length,
        predicted=math.ceil(share * length),
        hidden_dropout=settings.hidden_dropout,
        attention_dropout=settings.attention_dropout,
        half=training_dtype(settings.dtype, "cuda") != "float32",
        recompute=settings.recompute,
    )
    return TrainingNeed(
        config,
        sample,
        micro_batch=settings.micro_batch,
        global_batch=settings.global_batch,
        batch_tokens=batch_tokens,
        sharded=settings.dp_mode == "fsdp2",
    )


def _heads(task: _FineTuning) -> dict[str, Any]:
    return {
        "lm_head": False,
        "binary_head": False,
        "pooler": "qa_head" not in task.head,
        **task.head,
    }


def _rows(count: int, mean: float) -> Iterator[Passes]:
    for number, length in spread(round(count * mean), count):
        yield Passes(number, length, length, 0)
