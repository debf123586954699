"""Text from the command line: of one prompt, of a file of prompts, or of what is typed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import decode
from mlm_eval.cli.command import command
from mlm_eval.cli.printing import show_text
from mlm_eval.cli.run import ModelRun, chosen_tokenizer
from mlm_eval.cli.screen import progress
from mlm_eval.cli.sequences.standard_input import STDIN, STDIN_NAME, standard_input
from mlm_eval.engine.prompts import Sampling
from mlm_eval.options import FILE, RunOptions, TokenizersBosOption, again, option

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer
    from mlm_eval.engine.engine import Engine
    from mlm_eval.engine.prompts import Continuation
    from mlm_eval.ranks.layout import Need
    from mlm_eval.tasks.zero_shot.generation import PromptLine


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(TokenizersBosOption, RunOptions):
    """The options of `generate`."""

    prompt: tuple[str, ...] = option("Text to continue (repeatable).", ())
    input: Path | None = option(
        'JSON lines: {"prompt": "..."} or {"tokens": [...]}; - is stdin.', None
    )
    interactive: bool = option(
        "Continue each line that is typed, until Ctrl-D.",
        False,
        flag="--interactive",
        short="-i",
    )
    max_new_tokens: int = option("Tokens to write at most.", 128, least=1)
    temperature: float = option(
        "0: the likeliest token each time; above, a random one of the logits divided by this.",
        0.0,
        least=0.0,
    )
    top_k: int | None = option("Draw among the k likeliest tokens only.", None, least=1)
    top_p: float | None = option(
        "Draw among the likeliest tokens that together reach this probability only.",
        None,
        least=0.0,
        most=1.0,
    )
    stop: tuple[str, ...] = option("A string that ends the text (repeatable).", ())
    seed: int = again(
        RunOptions, "seed", help="Of random draws; prompt n, from 0, draws from this plus n."
    )
    output: Path | None = option(
        'JSON lines: {"prompt", "text", "tokens", "logprobs", "finish"}; - is stdout.',
        None,
        writes=FILE,
    )


OWN = ("prompt", "input", "interactive", "output")
DRAWS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "bos")


@command("generate", GenerateOptions, order=("ckpt", *OWN, *DRAWS))
def generate_command(options: GenerateOptions) -> None:
    """Greedy, unless a temperature is given.

    The end-of-text token, a stop string or the length end a text. A line of the output has the
    input's own fields beside the text; `logprobs` are the model's own, in nats, whatever the
    temperature; `finish` is `stop` or `length`.

    Example: mlm-eval generate --ckpt gpt2_345m --tokenizer gpt2 --prompt "Once upon a time"
    """
    from mlm_eval.checkpoints.tokenizers.begin_of_text import choose_begin

    sources = (bool(options.prompt), options.input is not None, options.interactive)
    if sum(sources) != 1:
        raise InputError("give one of --prompt TEXT, --input FILE and -i")
    sampling = _sampling(options)
    run = ModelRun(options)
    run.refuse_t5("generation of text")
    tokenizer = chosen_tokenizer(options.ckpt, options)
    if options.interactive and tokenizer is None:
        tokenizer = run.tokenizer()  # names what is missing
    if options.stop and tokenizer is None:
        raise InputError("--stop needs the tokenizer; give --tokenizer DIR or --vocab-file F")
    begin = choose_begin(options.bos, tokenizer, as_tokenizer=True).ids
    given = _given(options, tokenizer, begin) if options.input != STDIN else []
    place = run.start(partial(_need, run))
    if tokenizer is not None:
        run.warn_of_misfit(tokenizer)

    def body(engine: Engine) -> None:
        if options.interactive:
            assert tokenizer is not None
            _converse(run, engine, tokenizer, options, sampling, begin)
            return
        lines = given or _given(options, tokenizer, begin)
        made = _continue(run, engine, lines, tokenizer, options, sampling)
        if run.is_main:
            _give(run, options, lines, made)

    run.on_ranks(body, placement=place)


def _sampling(options: GenerateOptions) -> Sampling:
    for flag, value in (("--top-k", options.top_k), ("--top-p", options.top_p)):
        if value is not None and options.temperature == 0.0:
            raise InputError(
                f"{flag} chooses among random tokens; add --temperature 1, or leave it out"
            )
    return Sampling(options.temperature, options.top_k, options.top_p)


def _need(run: ModelRun) -> Need:
    from mlm_eval.engine.generate import CACHE_BYTES

    return run.scoring_need(cache=CACHE_BYTES)


def _given(
    options: GenerateOptions, tokenizer: Tokenizer | None, begin: Sequence[int]
) -> list[PromptLine]:
    """Return the prompts of the options or of the file; none where they are typed."""
    from mlm_eval.tasks.zero_shot.generation import parse_prompts, prompt_line, read_prompts

    if options.input == STDIN:
        text = decode(standard_input(), STDIN_NAME)
        return parse_prompts(text, STDIN_NAME, tokenizer, limit=options.limit, begin=begin)
    if options.input is not None:
        return read_prompts(options.input, tokenizer, limit=options.limit, begin=begin)
    return [
        prompt_line(text, tokenizer, f"--prompt {shown(text)}", begin)
        for text in options.prompt[: options.limit]
    ]


def _continue(
    run: ModelRun,
    engine: Engine,
    lines: Sequence[PromptLine],
    tokenizer: Tokenizer | None,
    options: GenerateOptions,
    sampling: Sampling,
) -> list[Continuation]:
    """Return the continuations; a single one is printed as it comes, on a terminal."""
    from mlm_eval.engine.generate import generate
    from mlm_eval.tasks.zero_shot.generation import TextStream, as_prompts

    prompts = as_prompts(
        lines,
        tokenizer,
        positions=engine.config.max_position_embeddings,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        seed=options.seed,
    )
    watched = len(lines) == 1 and options.output is None and sys.stdout.isatty()
    if not (watched and run.is_main and tokenizer is not None):
        with progress(run.is_main and len(lines) > 1, unit="text", what="writing") as on_progress:
            return generate(engine, prompts, tokenizer=tokenizer, on_progress=on_progress)
    stream = TextStream(lines[0].tokens, tokenizer, options.stop, _print_now)
    _print_now(lines[0].text or "")
    made = generate(
        engine, prompts, tokenizer=tokenizer, on_token=lambda _, tokens: stream.add(tokens)
    )
    stream.finish(made[0].text or "")
    _print_now("\n")
    return made


def _give(
    run: ModelRun,
    options: GenerateOptions,
    lines: Sequence[PromptLine],
    made: Sequence[Continuation],
) -> None:
    """Write the continuations where they are wanted."""
    from mlm_eval.tasks.zero_shot.generation import record_of
    from mlm_eval.tasks.zero_shot.score import write_lines

    if options.output is not None:
        write_lines(options.output, map(record_of, lines, made))
        limited = f" (LIMITED to the first {options.limit})" if options.limit else ""
        run.print_result(f"{len(made):,} prompt(s) continued{limited}: {options.output}")
    elif not (len(lines) == 1 and sys.stdout.isatty()):
        for line, text in zip(lines, made, strict=True):
            show_text(text.tokens if text.text is None else f"{line.text}{text.text}")
    elif made[0].text is None:
        show_text(made[0].tokens)


def _converse(
    run: ModelRun,
    engine: Engine,
    tokenizer: Tokenizer,
    options: GenerateOptions,
    sampling: Sampling,
    begin: Sequence[int],
) -> None:
    """Continue each line that rank 0 reads, until its input ends."""
    from mlm_eval.ranks.collectives import from_main
    from mlm_eval.tasks.zero_shot.generation import prompt_line

    run.log("type a text to continue; Ctrl-D ends")
    typed = _typed()
    while (text := from_main(next(typed, None) if run.is_main else None)) is not None:
        try:
            line = prompt_line(text, tokenizer, "the text", begin)
            made = _continue(run, engine, [line], tokenizer, options, sampling)
        except InputError as error:
            if engine.dp > 1:  # the other copies of the model wait for this one's text
                raise
            run.log(str(error))
            continue
        if run.is_main and not sys.stdout.isatty():
            _print_now(f"{text}{made[0].text}\n")


def _typed() -> Iterator[str]:
    """Yield the lines of standard input, each after a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            _print_now("> ")
        try:
            text = input()
        except EOFError:
            return
        if text.strip():
            yield text


def _print_now(text: str) -> None:
    show_text(text, end="", flush=True)
