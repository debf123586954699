"""How a command runs a model: open the checkpoint, get ranks, load the engine, print on rank 0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.options import RunOptions, TokenizerOptions
from mlm_eval.ranks.launch import init_process_group, launch, shutdown
from mlm_eval.ranks.world import World, detect_world

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.resume import PartialScores
    from mlm_eval.reporting.results import Result
    from mlm_eval.tasks.zero_shot.score import Line


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
        from mlm_eval.checkpoints.config import parse_overrides
        from mlm_eval.checkpoints.open import open_checkpoint
        from mlm_eval.reporting.results import check_writable

        self.options = options
        if options.output is not None:
            check_writable(options.output)
        self.checkpoint: Checkpoint = checkpoint or open_checkpoint(
            options.ckpt, parse_overrides(options.overrides)
        )
        self.world: World | None = detect_world()
        self.is_main = self.world is None or self.world.is_main

    def say(self, text: str) -> None:
        """Print for people who watch: on stderr, from rank 0."""
        if self.is_main:
            print(text, file=sys.stderr)

    def tell(self, text: str) -> None:
        """Print a result: on stdout, from rank 0."""
        if self.is_main:
            print(text)

    def warn(self, warnings: Sequence[str]) -> None:
        """Print warnings on stderr, from rank 0."""
        for warning in warnings:
            self.say(f"warning: {warning}")

    def start(self) -> Placement:
        """Return where this rank computes; without ranks start them, and leave with their end.

        Reading data comes after this call: the ranks do it, and the parent need not.
        """
        from mlm_eval.checkpoints.dtypes import evaluation_dtype
        from mlm_eval.ranks.mesh import choose_layout, pick_device

        options = self.options
        device = pick_device(options.device)
        dtype = evaluation_dtype(options.dtype, self.checkpoint.config.params_dtype, device)
        tp, dp = choose_layout(
            self.checkpoint,
            tp=options.tp,
            dp=options.dp,
            device=device,
            itemsize=dtype.itemsize,
            running=None if self.world is None else self.world.size,
        )
        if self.world is None and tp * dp > 1:
            if None in (options.tp, options.dp) and device == "cuda":
                self.say(f"layout: tp {tp} x dp {dp} on {tp * dp} CUDA device(s)")
            start_ranks(tp, dp, device)
        return Placement(tp, dp, device, dtype)

    def join(self, place: Placement) -> Load:
        """Join the other ranks, and return what loads an engine in this layout."""
        import torch

        from mlm_eval.engine.engine import Engine

        if self.world is not None and self.world.size > 1:
            init_process_group(self.world, device=place.device)
        device = place.device
        if device == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        true_size = None
        if self.options.vocab == "true":
            words = self.tokenizer(required=True)
            assert words is not None
            true_size = words.vocab_size

        def load(checkpoint: Checkpoint, dtype: torch.dtype | str) -> Engine:
            return Engine.load(
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

        return load

    def on_ranks(
        self, body: Callable[[Engine], None], *, placement: Placement | None = None
    ) -> None:
        """Run `body` with a loaded engine on every rank; start ranks first where there are none."""
        place = placement or self.start()
        load = self.join(place)
        self.warn(self.checkpoint.provenance.warnings)
        body(load(self.checkpoint, place.dtype))
        shutdown()

    def tokenizer(self, *, required: bool) -> Tokenizer | None:
        """Return the tokenizer that the options name, or the one beside the checkpoint."""
        options = self.options
        found = find_words(options.ckpt, options)
        if found is None and required:
            raise InputError(
                f"no tokenizer was found beside {options.ckpt}; give --tokenizer DIR, or "
                "--vocab-file F and --merge-file F (GPT-2: vocab.json and merges.txt)"
            )
        return found

    def zero_shot(
        self, task: str, unit: str, prepare: Callable[[Tokenizer, int], Any], *, resume: bool
    ) -> None:
        """Run WikiText-103 or LAMBADA."""
        if self.checkpoint.config.family != "gpt":
            raise InputError(
                f"{self.checkpoint.provenance.path} is a BERT checkpoint; {task} needs a GPT model "
                "(left to right)"
            )
        if resume and self.options.output is None:
            raise InputError("--resume needs the --output of the interrupted run")
        from mlm_eval.checkpoints.tokenizer import check_fits

        placement = self.start()
        words = self.tokenizer(required=True)
        assert words is not None
        misfit = check_fits(words, self.checkpoint.config.vocab_size)
        work = prepare(words, self.checkpoint.config.max_position_embeddings)
        if misfit is not None:
            work.settings["warnings"].append(misfit)
        self.on_ranks(
            lambda engine: self._zero_shot(task, unit, engine, work, words, resume),
            placement=placement,
        )

    def _zero_shot(
        self, task: str, unit: str, engine: Engine, work: Any, words: Tokenizer, resume: bool
    ) -> None:
        from importlib import import_module

        from mlm_eval.reporting.text import result_text, work_text

        tokens = sum(request.length for request in work.requests)
        self.say(work_text(unit, len(work.requests), tokens, engine.flops(work.requests)))
        partial = self._partial(task, engine, work, words, resume)
        module = import_module(f"mlm_eval.tasks.zero_shot.{task}")
        with progress(self.is_main) as on_progress, self._kept(partial):
            result: Result = module.score(
                engine, work, tokenizer=words, on_progress=on_progress, partial=partial
            )
        result.settings.update(engine.describe(), seed=self.options.seed)
        if self.options.full_digest and self.is_main:
            from mlm_eval.checkpoints.checkpoint import full_digest

            result.checkpoint["full_digest"] = full_digest(engine.checkpoint)
        self.warn(result.warnings)
        self.tell(result_text(result))
        self.tell(module.megatron_line(result))
        if self.options.output is not None and self.is_main:
            result.write(self.options.output)
        if partial is not None and self.is_main:
            partial.remove()

    def _partial(
        self, task: str, engine: Engine, work: Any, words: Tokenizer, resume: bool
    ) -> PartialScores | None:
        if self.options.output is None:
            return None
        from mlm_eval.engine.resume import PartialScores, resume_key

        settings = {
            k: v for k, v in work.settings.items() if k not in ("warnings", "limit", "data")
        }
        key = resume_key(
            task=task,
            digest=engine.checkpoint.provenance.digest,
            config=engine.config.to_dict(),
            data=work.settings["data"]["sha256"],
            tokenizer=words.sha256,
            dtype=str(engine.dtype),
            vocab=engine.vocab,
            settings=settings,
        )
        folder = self.options.output.with_name(self.options.output.name + ".partial")
        partial = PartialScores(folder, key, resume=resume)
        if resume:
            known = sum(index < len(work.requests) for index in partial.finished())
            self.say(f"resuming: {known:,} of {len(work.requests):,} are done")
        return partial

    @contextmanager
    def _kept(self, partial: PartialScores | None) -> Iterator[None]:
        """On Ctrl-C in a single process, write what is done before leaving."""
        try:
            yield
        except KeyboardInterrupt:
            if partial is not None:
                partial.flush()
            raise

    def score_file(self, input_: Path, stride: int | None) -> None:
        """Run `mlm-eval score`."""
        from mlm_eval.tasks.zero_shot.score import read_lines

        lines = read_lines(input_, self.tokenizer(required=False), limit=self.options.limit)
        self.on_ranks(lambda engine: self._score_lines(engine, lines, stride))

    def _score_lines(self, engine: Engine, lines: Sequence[Line], stride: int | None) -> None:
        from mlm_eval.tasks.zero_shot.score import score_lines, write_lines

        with progress(self.is_main) as on_progress:
            records = list(score_lines(engine, lines, stride=stride, on_progress=on_progress))
        if self.is_main:
            assert self.options.output is not None
            write_lines(self.options.output, records)
            limited = (
                f" (LIMITED to the first {self.options.limit})"
                if self.options.limit is not None
                else ""
            )
            self.tell(f"{len(records):,} line(s) scored{limited}: {self.options.output}")


def find_words(ckpt: str, options: TokenizerOptions) -> Tokenizer | None:
    """Return the tokenizer that the options name, or the one beside the checkpoint."""
    from mlm_eval.checkpoints.tokenizer import find_tokenizer, load_tokenizer

    given = (options.tokenizer, options.vocab_file, options.merge_file)
    if given == (None, None, None):
        return find_tokenizer(ckpt)
    folder, vocab_file, merge_file = given
    return load_tokenizer(directory=folder, vocab_file=vocab_file, merge_file=merge_file)


@contextmanager
def progress(show: bool, unit: str = "tok") -> Iterator[Callable[[int, int], None] | None]:
    """Yield a progress callback that draws a bar with the time left, on a terminal only."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit=unit, unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def start_ranks(tp: int, dp: int, device: str) -> None:
    """Run this command line again as tp x dp ranks, and leave with their exit code."""
    # Later options win: the ranks must not choose again. What follows a `--` is no option of ours.
    argv = sys.argv[1:]
    end = argv.index("--") if "--" in argv else len(argv)
    argv[end:end] = ["--tp", str(tp), "--dp", str(dp), "--device", device]
    result = launch(argv, ranks=tp * dp, device=device)
    if result.exit_code == 130:
        raise KeyboardInterrupt
    if result.message is not None:
        print(f"mlm-eval: {result.message}", file=sys.stderr)
    raise SystemExit(result.exit_code)
