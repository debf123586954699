"""The command line. Every command parses its options, runs on the ranks it needs, and prints; nothing else prints."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlm_eval import __version__
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.launch import (
    World,
    detect_world,
    init_process_group,
    launch,
    prepare_worker,
    reporting_errors,
    shutdown,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlm_eval.checkpoints.checkpoint import Checkpoint
    from mlm_eval.engine import Engine
    from mlm_eval.results import Result
    from mlm_eval.resume import PartialScores
    from mlm_eval.tokenizer import Tokenizer

app = typer.Typer(
    help="Evaluate, reshard and convert Megatron-LM checkpoints, without Megatron.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults of this command's options from a TOML file; options on the line win."""
    if path is None:
        return None
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give --config a TOML file of options") from None
    except (tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no TOML file of options: {error}") from None
    known = {option.lstrip("-"): p.name for p in context.command.params for option in p.opts}
    unknown = sorted(key for key in values if key.replace("_", "-") not in known)
    if unknown:
        raise InputError(
            f"{path} sets {unknown[0]!r}, which is no option of this command (see --help)"
        )
    context.default_map = {known[k.replace("_", "-")]: v for k, v in values.items()}
    return path


Ckpt = Annotated[
    str,
    typer.Option(
        help="Checkpoint: root folder with its tracker file, iter_* or release folder, .pt file, published "
        "zip archive, or Hugging Face folder."
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
        help="padded: softmax over all stored rows, as in Megatron; true: over the tokenizer's entries. "
        "Default: padded (Hugging Face folders have no padding)."
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
    typer.Option(help="TOML file with any of these options.", callback=_load_config, is_eager=True),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run of the same --output.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile.")]
FullDigest = Annotated[
    bool, typer.Option("--full-digest", help="Hash every byte of the checkpoint.")
]


@app.command(rich_help_panel="Checkpoints")
def inspect(
    ckpt: Ckpt,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record.")] = False,
    set_: Sets = None,
    full_digest: FullDigest = False,
    config: Config = None,
) -> None:
    """Show what a checkpoint is: format, sizes, settings and where each came from. Loads no
    weights.

    Example: mlm-eval inspect --ckpt checkpoints/gpt2_345m
    """
    import json

    from mlm_eval.checkpoints.checkpoint import full_digest as hash_everything
    from mlm_eval.checkpoints.checkpoint import open_checkpoint
    from mlm_eval.checkpoints.config import parse_overrides
    from mlm_eval.show import inspect_record, inspect_text

    checkpoint = open_checkpoint(ckpt, parse_overrides(set_ or []), allow_hostile=True)
    digest = hash_everything(checkpoint) if full_digest else checkpoint.provenance.digest
    record = inspect_record(checkpoint, digest)
    print(json.dumps(record, indent=2, default=str) if as_json else inspect_text(record))


@app.command(rich_help_panel="Zero-shot evaluation")
def wikitext103(
    ckpt: Ckpt,
    data: Annotated[
        str | None,
        typer.Option(
            help="wiki.test.tokens, or a `datasets` name; default: the Hub's wikitext-103-v1 test split."
        ),
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, help="Window length; default min(1024, positions).")
    ] = None,
    stride: Annotated[
        int, typer.Option(min=1, help="Tokens that each further window scores.")
    ] = 32,
    resume: Resume = False,
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    vocab: Vocab = "padded",
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    output: Output = None,
    limit: Limit = None,
    seed: Seed = 1234,
    set_: Sets = None,
    compile_: Compile = False,
    full_digest: FullDigest = False,
    config: Config = None,
) -> None:
    """The paper's zero-shot perplexity: per original word, overlapping windows, stride 32.

    Example: mlm-eval wikitext103 --ckpt gpt2_345m --data wiki.test.tokens --tokenizer gpt2 --tp 2
    """
    run = _Run(**_shared(locals()))

    def prepare(words: Tokenizer, positions: int) -> Any:
        from mlm_eval.tasks import wikitext103 as task

        return task.prepare(
            data,
            tokenizer=words,
            positions=positions,
            seq_length=seq_length,
            stride=stride,
            limit=limit,
        )

    run.zero_shot("wikitext103", "windows", prepare, resume=resume)


@app.command(rich_help_panel="Zero-shot evaluation")
def lambada(
    ckpt: Ckpt,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON lines with `text`, or a `datasets` name; default: EleutherAI/lambada_openai."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="word: all tokens of the last word (the paper's); last-token: only the last one."
        ),
    ] = "word",
    resume: Resume = False,
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    vocab: Vocab = "padded",
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    output: Output = None,
    limit: Limit = None,
    seed: Seed = 1234,
    set_: Sets = None,
    compile_: Compile = False,
    full_digest: FullDigest = False,
    config: Config = None,
) -> None:
    """The paper's cloze accuracy: is the last word of each passage the model's greedy choice?

    Example: mlm-eval lambada --ckpt gpt2_345m --data lambada_test.jsonl --tokenizer gpt2
    """
    run = _Run(**_shared(locals()))

    def prepare(words: Tokenizer, positions: int) -> Any:
        from mlm_eval.tasks import lambada as task

        return task.prepare(data, tokenizer=words, positions=positions, target=target, limit=limit)

    run.zero_shot("lambada", "passages", prepare, resume=resume)


@app.command(rich_help_panel="Zero-shot evaluation")
def score(
    ckpt: Ckpt,
    input_: Annotated[
        Path, typer.Option("--input", help='JSON lines: {"tokens": [...]} or {"text": "..."}.')
    ],
    output: Annotated[Path, typer.Option(help='JSON lines: {"tokens", "logprobs", "greedy"}.')],
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that each further window scores, where a sequence is too long for one.",
        ),
    ] = None,
    tp: Tp = "auto",
    dp: Dp = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_tokens: BatchTokens = None,
    vocab: Vocab = "padded",
    tokenizer: TokenizerDir = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    limit: Limit = None,
    seed: Seed = 1234,
    set_: Sets = None,
    compile_: Compile = False,
    full_digest: FullDigest = False,
    config: Config = None,
) -> None:
    """Log-probabilities of given sequences, GPT (left to right) or BERT (each token given the whole
    input).

    Example: mlm-eval score --ckpt gpt2_345m --input sequences.jsonl --output scores.jsonl --tp 2
    """
    run = _Run(**_shared(locals()))
    run.on_ranks(lambda engine: run.score_file(engine, input_, stride))


def _shared(values: dict[str, Any]) -> dict[str, Any]:
    """Return the shared options of a command from its local variables."""
    names = {
        "ckpt", "tp", "dp", "device", "dtype", "batch_tokens", "vocab", "tokenizer", "vocab_file", "merge_file",
        "output", "limit", "seed", "set_", "compile_", "full_digest",
    }  # fmt: skip
    return {name: values[name] for name in names}


class _Run:
    """A command that runs a model: opens the checkpoint, gets its ranks, loads the engine."""

    def __init__(self, **options: Any) -> None:
        from mlm_eval.checkpoints.checkpoint import open_checkpoint
        from mlm_eval.checkpoints.config import parse_overrides

        self.options = options
        self.output: Path | None = options["output"]
        self.limit: int | None = options["limit"]
        self.checkpoint: Checkpoint = open_checkpoint(
            options["ckpt"], parse_overrides(options["set_"] or [])
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

    def on_ranks(self, body: Callable[[Engine], None]) -> None:
        """Run `body` with a loaded engine on every rank; start the ranks first where there are none."""
        from mlm_eval.engine import resolve_dtype
        from mlm_eval.layout import choose_layout, pick_device

        options = self.options
        device = pick_device(options["device"])
        import torch

        dtype = resolve_dtype(options["dtype"], self.checkpoint.config, torch.device(device))
        running = None if self.world is None else self.world.size
        tp, dp = choose_layout(
            self.checkpoint,
            tp=parallel_size("--tp", options["tp"]),
            dp=parallel_size("--dp", options["dp"]),
            device=device,
            itemsize=dtype.itemsize,
            running=running,
        )
        if self.world is None and tp * dp > 1:
            if "auto" in (options["tp"], options["dp"]) and device == "cuda":
                self.say(f"layout: tp {tp} x dp {dp} on {tp * dp} CUDA device(s)")
            _start_ranks(tp, dp, device)
        true_size = None
        if options["vocab"] == "true":
            true_size = self.tokenizer(required=True).vocab_size  # type: ignore[union-attr]
        if self.world is not None and self.world.size > 1:
            init_process_group(self.world, device=device)
        where = device
        if device == "cuda":
            where = f"cuda:{torch.cuda.current_device()}"
        from mlm_eval.engine import Engine

        self.warn(self.checkpoint.provenance.warnings)
        engine = Engine.load(
            self.checkpoint,
            tp=tp,
            dp=dp,
            dtype=dtype,
            device=where,
            vocab=options["vocab"],
            true_vocab_size=true_size,
            batch_tokens=options["batch_tokens"],
            compile_model=options["compile_"],
        )
        body(engine)
        shutdown()

    def tokenizer(self, *, required: bool) -> Tokenizer | None:
        """Return the tokenizer that the options name, or the one beside the checkpoint."""
        from mlm_eval.tokenizer import find_tokenizer, load_tokenizer

        folder, vocab_file = self.options["tokenizer"], self.options["vocab_file"]
        if folder is not None or vocab_file is not None:
            return load_tokenizer(
                directory=folder, vocab_file=vocab_file, merge_file=self.options["merge_file"]
            )
        found = find_tokenizer(self.options["ckpt"])
        if found is None and required:
            raise InputError(
                f"no tokenizer was found beside {self.options['ckpt']}; give --tokenizer DIR, or "
                "--vocab-file F "
                "and --merge-file F (GPT-2: vocab.json and merges.txt)"
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
        if resume and self.output is None:
            raise InputError("--resume needs the --output of the interrupted run")
        words = self.tokenizer(required=True)
        assert words is not None
        from mlm_eval.tokenizer import check_fits

        misfit = check_fits(words, self.checkpoint.config.vocab_size)
        work = prepare(words, self.checkpoint.config.max_position_embeddings)
        if misfit is not None:
            work.settings["warnings"].append(misfit)
        self.on_ranks(lambda engine: self._zero_shot(task, unit, engine, work, words, resume))

    def _zero_shot(
        self, task: str, unit: str, engine: Engine, work: Any, words: Tokenizer, resume: bool
    ) -> None:
        from importlib import import_module

        from mlm_eval.show import result_text, work_text

        tokens = sum(request.length for request in work.requests)
        self.say(work_text(unit, len(work.requests), tokens, engine.flops(work.requests)))
        partial = self._partial(task, engine, work, words, resume)
        module = import_module(f"mlm_eval.tasks.{task}")
        with _progress(self.is_main) as on_progress, self._kept(partial):
            result: Result = module.score(
                engine, work, tokenizer=words, on_progress=on_progress, partial=partial
            )
        result.settings.update(engine.describe(), seed=self.options["seed"])
        if self.options["full_digest"] and self.is_main:
            from mlm_eval.checkpoints.checkpoint import full_digest

            result.checkpoint["full_digest"] = full_digest(engine.checkpoint)
        self.warn(result.warnings)
        self.tell(result_text(result))
        self.tell(module.megatron_line(result))
        if self.output is not None and self.is_main:
            result.write(self.output)
        if partial is not None and self.is_main:
            partial.remove()

    def _partial(
        self, task: str, engine: Engine, work: Any, words: Tokenizer, resume: bool
    ) -> PartialScores | None:
        if self.output is None:
            return None
        from mlm_eval.resume import PartialScores, resume_key

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
        folder = self.output.with_name(self.output.name + ".partial")
        partial = PartialScores(folder, key, resume=resume)
        if resume:
            self.say(f"resuming: {len(partial.finished()):,} of {len(work.requests):,} are done")
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

    def score_file(self, engine: Engine, input_: Path, stride: int | None) -> None:
        """Run `mlm-eval score`."""
        from mlm_eval.tasks.score import read_lines, score_lines, write_lines

        words = self.tokenizer(required=False)
        lines = read_lines(input_, words, limit=self.limit)
        with _progress(self.is_main) as on_progress:
            records = list(score_lines(engine, lines, stride=stride, on_progress=on_progress))
        if self.is_main:
            assert self.output is not None
            count = write_lines(self.output, iter(records))
            limited = f" (LIMITED to the first {self.limit})" if self.limit is not None else ""
            self.tell(f"{count:,} line(s) scored{limited}: {self.output}")


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a progress callback that draws a bar with the time left, on a terminal only."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="tok", unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def parallel_size(option: str, text: str) -> int | None:
    """Return a `--tp` or `--dp` value; None for auto.

    Raises:
        InputError: It is neither a positive number nor `auto`.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} {text!r} must be a positive number or auto")
    return int(text)


def _start_ranks(tp: int, dp: int, device: str) -> None:
    """Run this command line again as tp x dp ranks, and leave with their exit code."""
    # Later options win: the ranks must not choose again.
    argv = [*sys.argv[1:], "--tp", str(tp), "--dp", str(dp), "--device", device]
    result = launch(argv, ranks=tp * dp, device=device)
    if result.exit_code == 130:
        raise KeyboardInterrupt
    if result.message is not None:
        print(f"mlm-eval: {result.message}", file=sys.stderr)
    raise SystemExit(result.exit_code)


def _version(show: bool) -> None:
    if show:
        print(f"mlm-eval {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and leave with its exit code (see INTERFACE in the README)."""
    sys.exit(_main())


def _main() -> int:
    world = None
    try:
        world = detect_world()
        if world is not None:
            prepare_worker()
        with reporting_errors(world):
            code = app(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except InputError as error:
        # Under torchrun every rank finds the same fault in the input: one sentence is enough.
        if world is None or world.is_main:
            print(f"mlm-eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "mlm-eval: interrupted; nothing was written but what an --output run keeps for "
            "--resume",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of a pipe has left, as `head` does
        sys.stderr.close()
        return 1
    except Exception as error:
        # typer keeps its own copy of click: its errors are known by what they can do.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            print(f"mlm-eval: {error.format_message()} (see --help)", file=sys.stderr)
            return 2
        if type(error).__name__ == "Abort":
            return 130
        traceback.print_exc()
        print(
            "mlm-eval: this is a fault of mlm-eval; please report it with the lines above",
            file=sys.stderr,
        )
        return 1
