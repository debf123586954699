"""lm-evaluation-harness' own command line with a model of ours in it.

It knows models by registered names and makes them from strings; ours is made before, and handed in.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, ClassVar

from lm_eval.api.registry import register_model

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.harness.model import MegatronLM

MODEL_NAME = "mlm-eval"
MODEL_ARGUMENTS = ("max_length", "max_gen_toks", "prefix_token_id", "add_bos_token", "seed")
"""What `--model_args` may set."""


@register_model(MODEL_NAME)
class CommandLineLM(MegatronLM):
    """What `--model mlm-eval` is in the harness' command line: the model that is there already."""

    loaded: ClassVar[MegatronLM | None] = None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> MegatronLM:
        """Return the model that `run_command_line` was given."""
        if cls.loaded is None:
            raise InputError(
                f"--model {MODEL_NAME} needs a checkpoint: run `mlm-eval harness --ckpt C -- ...`"
            )
        return cls.loaded


def run_command_line(lm: MegatronLM, arguments: Sequence[str]) -> dict[str, Any]:
    """Run lm-evaluation-harness' command line with a model of ours, on this rank.

    Args:
        lm: The model.
        arguments: The arguments of `lm-eval run`, without the model.

    Returns:
        What its `simple_evaluate` has returned, without the samples.

    Raises:
        InputError: The harness does not accept an argument, a task or a data file.
    """
    from lm_eval.__main__ import cli_evaluate

    # The harness names the folder of its results after the model's path.
    given, _ = read_arguments(arguments)
    about = {**given, "path": str(lm.engine.checkpoint.provenance.path)}
    more = ["--model", MODEL_NAME, "--model_args", json.dumps(about)]
    CommandLineLM.loaded = lm
    try:
        with (
            _command_line([*arguments, *more, "--device", str(lm.engine.device)]),
            _overheard() as results,
        ):
            cli_evaluate()
    except InputError:
        raise
    except Exception as error:
        if _passed_through_us(error):
            raise
        logging.getLogger("lm_eval").debug("where it stopped:", exc_info=True)
        first = str(error).strip().split("\n")[0][:300]
        raise InputError(
            f"lm-evaluation-harness stopped: {type(error).__name__}: {first} "
            "(LMEVAL_LOG_LEVEL=DEBUG shows where)"
        ) from error
    finally:
        CommandLineLM.loaded = None
    return results


@contextmanager
def _overheard() -> Iterator[dict[str, Any]]:
    """Yield what will be filled with the results that the command line gets and prints."""
    import lm_eval

    results: dict[str, Any] = {}
    evaluate = lm_eval.simple_evaluate

    def listening(*given: Any, **more: Any) -> Any:
        found = evaluate(*given, **more)
        if found is not None:
            results.update({k: v for k, v in found.items() if k != "samples"})
        return found

    lm_eval.simple_evaluate = listening
    try:
        yield results
    finally:
        lm_eval.simple_evaluate = evaluate


def read_arguments(arguments: Sequence[str]) -> tuple[dict[str, Any], float | None]:
    """Return what `--model_args` says and how many examples of each task are asked for.

    All arguments of the harness are looked at; None: all examples.

    Raises:
        InputError: The harness does not know an argument, or it is for the options before the `--`.
        SystemExit: The arguments ask for help, which is printed.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    complaint = io.StringIO()
    try:
        with _command_line(arguments), redirect_stderr(complaint):
            asked = HarnessCLI().parse_args()
    except SystemExit as leaving:
        if not leaving.code:
            raise
        sentence = complaint.getvalue().strip().rpartition("error: ")[2]
        hint = "`lm-eval ls tasks` lists them" if "ls" in arguments else "see `lm-eval run --help`"
        raise InputError(f"lm-evaluation-harness: {sentence} ({hint})") from None
    for name in ("model", "device", "batch_size", "max_batch_size"):
        value = getattr(asked, name, None)
        if value is not None:
            raise InputError(
                f"--{name} {value} is not for the harness here; before the `--`, --ckpt names the "
                "model, --device the device and --batch-tokens the size of a batch"
            )
    try:
        with redirect_stdout(io.StringIO()):  # it would show a YAML file's settings, as it will
            settings = EvaluatorConfig.from_cli(asked)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"lm-evaluation-harness: {error}") from None
    if not settings.tasks:
        raise InputError(
            "no task is named; give --tasks after the `--` (`lm-eval ls tasks` lists them)"
        )
    given = {k: v for k, v in settings.model_args.items() if k != "trust_remote_code"}
    unknown = sorted(set(given) - set(MODEL_ARGUMENTS))
    if unknown:
        raise InputError(
            f"--model_args {unknown[0]} is unknown here; known are {', '.join(MODEL_ARGUMENTS)}"
        )
    limit = settings.limit
    return given, int(limit) if limit is not None and limit == int(limit) else limit


def _passed_through_us(error: BaseException) -> bool:
    """Return whether code of ours was running, called by the harness, when it came to an error."""
    frames = traceback.walk_tb(error.__traceback__)
    names = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    # This file called the harness, and listens to what it finds.
    return any(name.startswith("mlm_eval.") and name != __name__ for name in names)


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Let the harness find arguments where it looks for them."""
    before = sys.argv
    sys.argv = ["lm-eval", "run", *arguments]
    try:
        yield
    finally:
        sys.argv = before
