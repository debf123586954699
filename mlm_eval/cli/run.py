"""How a command runs a model: open the checkpoint, get ranks, load the engine, print on rank 0."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.printing import complain, remark, show_text
from mlm_eval.cli.screen import detail, phase, say, say_warning
from mlm_eval.options import RunOptions, TokenizerOptions
from mlm_eval.ranks.faults import advising_on_memory
from mlm_eval.ranks.launch import (
    STOP_CODES,
    LaunchResult,
    init_process_group,
    launch,
    shutdown,
)
from mlm_eval.ranks.signals import STOPPED, raise_stopped
from mlm_eval.ranks.world import LAUNCHED, detect_world

if TYPE_CHECKING:
    import torch

    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.model.costs.memory import Memory
    from mlm_eval.ranks.layout import Need, RankDevice
    from mlm_eval.training.settings import RunSettings


Load = Callable[["Checkpoint", "torch.dtype | str"], "Engine"]
"""Returns an engine for a checkpoint and a dtype."""


@dataclass(frozen=True)
class Placement:
    """Where a run computes: its parallel sizes, its kind of device, its dtype."""

    tp: int
    dp: int
    device: str
    dtype: torch.dtype


class ModelRun:
    """A command that runs a model: opens the checkpoint, gets its ranks, loads the engine."""

    def __init__(self, options: RunOptions, *, checkpoint: Checkpoint | None = None) -> None:
        self.options = options
        self.checkpoint = checkpoint or chosen_checkpoint(options.ckpt, options.overrides)
        tell_settings(self.checkpoint)
        self.world = detect_world()
        self.is_main = self.world is None or self.world.is_main
        self.met = False
        self.said: set[str] = set()
        """Warnings that were printed, and lines that stand once for all of a series."""
        self.gpus: list[RankDevice] = []
        """Of all ranks, once they have met; empty on the CPU."""

    def on(self, checkpoint: Checkpoint, options: RunOptions) -> ModelRun:
        """Return the same run, of the same ranks, on another checkpoint."""
        other = copy.copy(self)
        other.checkpoint, other.options = checkpoint, options
        return other

    def refuse_t5(self, what: str) -> None:
        """Refuse a T5 before anything else is asked for.

        Raises:
            InputError: The checkpoint is one.
        """
        if self.checkpoint.config.family == "t5":
            raise InputError(
                f"{self.checkpoint.provenance.path} is a T5 checkpoint, for which there is "
                f"`mlm-eval score` only, no {what}; give a GPT or BERT model"
            )

    def log(self, text: str) -> None:
        """Print for people who watch: on stderr, from rank 0, unless `-q` is given."""
        if self.is_main:
            say(text)

    def log_once(self, text: str) -> None:
        """Print the same, unless this run has printed it of another checkpoint."""
        if text not in self.said:
            self.said.add(text)
            self.log(text)

    def print_result(self, text: str) -> None:
        """Print a result: on stdout, where no record is written there, from rank 0."""
        if self.is_main:
            print_beside(text, self.options.output)

    def warn(self, warnings: Sequence[str]) -> None:
        """Print warnings on stderr, from rank 0, each once."""
        for warning in warnings:
            if self.is_main and warning not in self.said:
                self.said.add(warning)
                say_warning(warning)

    def warn_of_misfit(self, tokenizer: Tokenizer) -> None:
        """Print a warning where a tokenizer may not be the model's.

        Raises:
            InputError: It cannot be.
        """
        from mlm_eval.checkpoints.tokenizer import check_fits

        config = self.checkpoint.config
        misfit = check_fits(tokenizer, config.vocab_size, config.family)
        self.warn([] if misfit is None else [misfit])

    def start(self, need: Callable[[], Need] | None = None, *, trains: bool = False) -> Placement:
        """Return where this rank computes; without ranks start them, and leave with their end.

        Reading data comes after this call: the ranks do it, and the parent need not.

        Args:
            need: Returns what each rank needs, on a GPU where `--tp` is auto; None: of scoring.
            trains: Whether the model is trained.
        """
        from mlm_eval.checkpoints.dtypes import evaluation_dtype
        from mlm_eval.ranks.layout import (
            choose_layout,
            crosses_machines,
            free_on_gpus,
            fullest,
            pick_device,
        )

        options, world = self.options, self.world
        device = pick_device(options.device)
        if world is not None and device == "cuda":
            self.meet(device)
        free = self._free if world is not None else free_on_gpus

        def needed(tp: int, dp: int) -> Memory:
            return (need or self.scoring_need)()(tp, dp)

        tp, dp = choose_layout(
            self.checkpoint.config,
            tp=options.tp,
            dp=options.dp,
            device=device,
            need=needed,
            running=None if world is None else world.size,
            free=free,
            machines=[gpu.machine for gpu in self.gpus],
            trains=trains,
        )
        if options.tp is None and device == "cuda":
            self.log(f"layout: tp {tp} x dp {dp}; {fullest(free()[: tp * dp])}")
        if self.gpus and crosses_machines([gpu.machine for gpu in self.gpus], tp):
            say_warning(
                f"at tp {tp} the ranks of one copy of the model stand on several machines "
                "and talk over the network; number them by machine (srun --distribution=block)"
            )
        if world is None and tp * dp > 1:
            start_ranks(tp, dp, device)
        # The parent of ranks has not come so far, and has not imported torch for its dtypes.
        dtype = evaluation_dtype(options.dtype, self.checkpoint.config.params_dtype, device)
        return Placement(tp, dp, device, dtype)

    def scoring_need(self, *, cache: int = 0) -> Need:
        """Return what each rank needs to score texts, with so many bytes of keys and values."""
        from mlm_eval.checkpoints.dtypes import evaluation_dtype
        from mlm_eval.model.costs.memory import EvaluationNeed

        config = self.checkpoint.config
        dtype = evaluation_dtype(self.options.dtype, config.params_dtype, "cuda")
        return EvaluationNeed(config, dtype.itemsize, self.gpu_batch_tokens, cache)

    @property
    def gpu_batch_tokens(self) -> int:
        """Padded tokens of a forward pass, on a GPU."""
        from mlm_eval.engine.batching import DEFAULT_BATCH_TOKENS

        return self.options.batch_tokens or DEFAULT_BATCH_TOKENS["cuda"]

    def meet(self, device: str) -> None:
        """Join the other ranks, once."""
        if self.world is not None and self.world.size > 1 and not self.met:
            self.gpus = init_process_group(self.world, device=device, tell=complain)
            self.met = True

    def _free(self) -> list[int]:
        """Return the free bytes of each running rank's GPU."""
        import torch

        return [gpu.free for gpu in self.gpus] or [torch.cuda.mem_get_info()[0]]

    def join(self, place: Placement) -> Load:
        """Join the other ranks, and return what loads an engine in this layout."""
        import torch

        from mlm_eval.checkpoints.tokenizer import entries_within
        from mlm_eval.engine.engine import Engine

        self.meet(place.device)
        device = place.device
        if device == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        true_size = None
        if self.options.vocab == "true":
            true_size = entries_within(self.tokenizer(), self.checkpoint.config.vocab_size)

        def load(checkpoint: Checkpoint, dtype: torch.dtype | str) -> Engine:
            with phase("reading the weights"):
                engine = Engine.load(
                    checkpoint,
                    tp=place.tp,
                    dp=place.dp,
                    dtype=dtype,
                    device=device,
                    vocab=self.options.vocab,
                    true_vocab_size=true_size,
                    batch_tokens=self.options.batch_tokens,
                    compile_model=self.options.compile_model,
                )
            self.warn(engine.load_warnings)
            return engine

        return load

    def on_ranks(
        self, body: Callable[[Engine], None], *, placement: Placement | None = None
    ) -> None:
        """Run `body` with a loaded engine on every rank; start ranks first where there are none."""
        place = placement or self.start()
        load = self.join(place)
        self.warn(self.checkpoint.provenance.warnings)
        with self.advising_on_memory_of(place):
            body(load(self.checkpoint, place.dtype))
        shutdown()

    def advising_on_memory_of(self, place: Placement) -> AbstractContextManager[None]:
        """Return a context that says what to change where scoring has no memory."""
        now = f"(now {self._batch_tokens(place):,})"
        return advising_on_memory(f"lower --batch-tokens {now}, or raise --tp (now {place.tp})")

    def _batch_tokens(self, place: Placement) -> int:
        from mlm_eval.engine.batching import DEFAULT_BATCH_TOKENS

        return self.options.batch_tokens or DEFAULT_BATCH_TOKENS[place.device]

    def advising_on_training_memory(
        self, place: Placement, settings: RunSettings
    ) -> AbstractContextManager[None]:
        """Return a context that says what to change where a training has no memory."""
        ways = [
            f"lower --micro-batch (now {settings.micro_batch}) or --batch-tokens (now "
            f"{self._batch_tokens(place):,})",
            *([] if settings.recompute else ["add --recompute"]),
            *([] if settings.dp_mode == "fsdp2" else ["use --dp-mode fsdp2"]),
            f"raise --tp (now {place.tp})",
        ]
        return advising_on_memory(", or ".join(ways))

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the options name, or the one beside the checkpoint.

        Raises:
            InputError: There is none.
        """
        found = chosen_tokenizer(self.options.ckpt, self.options)
        if found is None:
            raise InputError(
                f"no tokenizer was found beside {self.options.ckpt}; give --tokenizer DIR, or "
                "--vocab-file F and --merge-file F (GPT-2: vocab.json and merges.txt)"
            )
        return found


def print_beside(text: str, output: Path | None) -> None:
    """Print a result for people: on stdout, or on stderr where `--output -` writes to stdout."""
    from mlm_eval.checkpoints.files.output import STDOUT

    (remark if output == STDOUT else show_text)(text)


def chosen_checkpoint(
    ckpt: str, overrides: Sequence[str], *, allow_hostile: bool = False
) -> Checkpoint:
    """Return the checkpoint that `--ckpt` and `--set` name; see `open_checkpoint`."""
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.checkpoints.open import open_checkpoint

    settings = parse_overrides(overrides)
    with phase(f"opening {ckpt}"):
        return open_checkpoint(ckpt, settings, allow_hostile=allow_hostile)


def tell_settings(checkpoint: Checkpoint) -> None:
    """Print, with `-v`, a model's settings and where each came from."""
    if os.environ.get(LAUNCHED) != "1":  # the parent has said it
        for name, source in checkpoint.provenance.config_sources.items():
            detail(f"setting {name} {getattr(checkpoint.config, name, '')} ({source})")


def chosen_tokenizer(ckpt: str, options: TokenizerOptions) -> Tokenizer | None:
    """Return the tokenizer that the options name, or the one beside the checkpoint, if any."""
    from mlm_eval.checkpoints.tokenizer import find_tokenizer, load_tokenizer

    folder, vocab_file, merge_file = options.tokenizer, options.vocab_file, options.merge_file
    if folder is None and vocab_file is None and merge_file is None:
        return find_tokenizer(ckpt)
    return load_tokenizer(directory=folder, vocab_file=vocab_file, merge_file=merge_file)


def start_ranks(tp: int, dp: int, device: str) -> None:
    """Run this command line again as tp x dp ranks, and leave with their exit code."""
    # Later options win: the ranks must not choose again. What follows a `--` is not for us.
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    argv[end:end] = ["--tp", str(tp), "--dp", str(dp), "--device", device]
    result = launch(argv, ranks=tp * dp, device=device)
    if result.exit_code in STOP_CODES:
        raise_stopped(result.exit_code - STOPPED)
    complain_of_ranks(result)
    raise SystemExit(result.exit_code)


def complain_of_ranks(result: LaunchResult) -> None:
    """Print why ranks have failed: wrong input in one line, a fault after its traceback."""
    if result.message is None:
        return
    told, *lines = result.message.split("\n")
    if result.exit_code == 2 or not lines:
        complain(result.message)
    else:
        remark("\n".join(lines).rstrip())
        complain(f"{told.removesuffix(':')}; please report it with the lines above")
