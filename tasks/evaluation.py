"""Any task by one call from Python: what its command does, with the same options."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.reporting.results import Result


def evaluate(
    task: str,
    engine: Engine,
    *,
    data: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Result:
    """Return the result of a task on the engine's model: what the command of that name does.

    On several ranks each of them makes this call and gets the same result. Tasks that train load
    the checkpoint anew, in the engine's layout and on its device: its own weights stay.

    Example:
        >>> engine = mlm_eval.Engine.load(mlm_eval.open_checkpoint("sample:gpt"))
        >>> mlm_eval.evaluate("lambada", engine, data="lambada_test.jsonl", limit=100)
        >>> bert = mlm_eval.Engine.load(mlm_eval.open_checkpoint("bert_345m"))
        >>> mlm_eval.evaluate("race", bert, data="RACE", output_dir="out", epochs=3, lr=2e-5)
        >>> mlm_eval.evaluate("race", tuned, data="RACE", output_dir="dev", eval_only=True)

    Args:
        task: `wikitext103`, `lambada`; `race`, `mnli`, `qqp`, `squad`; `lm`, `mlm`.
        engine: The loaded model.
        data: A file, a folder or a `datasets` name; for `lm` and `mlm` one file, or a list of
            them. None: a zero-shot benchmark's own test split from the Hub.
        tokenizer: None: the one stored with the checkpoint.
        options: Those of the command by their names, `-` as `_`: `limit`, `stride`, `target`; of a
            task that trains `output_dir`, which it needs, `recipe`, `epochs`, `seeds`, ...

    Raises:
        InputError: No such task or option, no tokenizer, or what the task finds wrong.
    """
    # Imported here to keep `import mlm_eval` fast.
    from mlm_eval.tasks.finetune.task import TASKS
    from mlm_eval.tasks.language.settings import LANGUAGE
    from mlm_eval.tasks.zero_shot import benchmarks

    known = benchmarks()
    names = (*known, *TASKS, *LANGUAGE)
    if task not in names:
        raise InputError(f"there is no task {task!r}; evaluate knows {', '.join(names)}")
    words = tokenizer or engine.tokenizer
    if task in known:
        _check_names(task, options, _fields(known[task].options) | {"limit"})
        return known[task].evaluate(engine, data, tokenizer=words, **options)
    if "output_dir" not in options:
        raise InputError(f"{task} writes its model and figures to a folder; give output_dir=FOLDER")
    trained = _finetuned if task in TASKS else _trained_on_text
    return trained(task, engine, data, words, options)


def _finetuned(
    task: str, engine: Engine, data: Any, tokenizer: Tokenizer, options: dict[str, Any]
) -> Result:
    from mlm_eval.tasks.finetune.run import finetune
    from mlm_eval.tasks.finetune.settings import FinetuneOptions, Recipe

    own = _fields(FinetuneOptions) - {"overrides"}
    _check_names(task, options, own | _fields(Recipe) - {"task"})
    mine = {name: value for name, value in options.items() if name in own}
    given = {name: value for name, value in options.items() if name not in own}
    mine["output_dir"] = Path(mine["output_dir"])
    for name in {"train", "dev", "test"} & set(mine):
        mine[name] = tuple(map(str, _several(mine[name])))
    chosen = FinetuneOptions(data=None if data is None else str(data), overrides=given, **mine)
    return finetune(task, engine.checkpoint, chosen, tokenizer=tokenizer, load=engine.another)


def _trained_on_text(
    task: str, engine: Engine, data: Any, tokenizer: Tokenizer, options: dict[str, Any]
) -> Result:
    from mlm_eval.tasks.language.pretraining import pretrain
    from mlm_eval.tasks.language.settings import MaskedTextSettings, TextSettings
    from mlm_eval.training.settings import TrainSettings

    kind = MaskedTextSettings if task == "mlm" else TextSettings
    of_text, of_training = _fields(kind), _fields(TrainSettings)
    beside = {"output_dir", "restart", "overwrite"}
    _check_names(task, options, of_text | of_training | beside)
    if data is None:
        raise InputError(f"{task} is trained on text; give data=FILE, or a list of files")
    if "dev" in options:
        options = {**options, "dev": tuple(map(Path, _several(options["dev"])))}
    return pretrain(
        engine.another(engine.checkpoint, "float32"),
        tokenizer,
        kind(
            data=tuple(map(Path, _several(data))),
            **{k: v for k, v in options.items() if k in of_text},
        ),
        TrainSettings(**{k: v for k, v in options.items() if k in of_training}),
        **{k: v for k, v in options.items() if k in beside},
    )


def _several(paths: Any) -> Sequence[Any]:
    """Return a list of what is given once or several times."""
    return [paths] if isinstance(paths, (str, Path)) else list(paths)


def _fields(kind: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} - {"data"}


def _check_names(task: str, options: Mapping[str, Any], known: set[str]) -> None:
    """Refuse an option that a task does not have."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}"
            raise InputError(f"{task} has no option {name}{hint}")
