"""score: log-probabilities of given sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.cli.command import command
from mlm_eval.cli.run import ModelRun, chosen_tokenizer
from mlm_eval.cli.screen import Screen, phase, progress
from mlm_eval.cli.sequences.standard_input import STDIN, STDIN_NAME, standard_input
from mlm_eval.cli.zero_shot import ResumeOptions, kept_beside, kept_scores
from mlm_eval.options import FILE, BosOption, RunOptions, option

if TYPE_CHECKING:
    from mlm_eval.engine.engine import Engine
    from mlm_eval.tasks.zero_shot.sequences import GivenSequences, InputLine


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ResumeOptions, BosOption, RunOptions):
    """The options of `score`."""

    input: Path = option(
        'JSON lines: {"tokens": [...]} or {"text": "..."}; for BERT also with '
        '"tokentypes" and "padding_mask", or {"choices": [[...], [...]]}; for T5 '
        '{"encoder_tokens": [...], "encoder_mask": [...], "tokens": [...]}. Or a parquet file with '
        "such columns, or text (.txt), a sequence a line. - is stdin."
    )
    input_format: str = option(
        "auto (parquet by its content, text by the name's .txt, else JSON lines), jsonl, text or "
        "parquet.",
        "auto",
        choices=("auto", "jsonl", "text", "parquet"),
    )
    output: Path = option(
        'JSON lines: the input\'s own fields, "tokens", "logprobs", "greedy", "sum_logprob"; - is '
        "stdout.",
        writes=FILE,
    )
    stride: int | None = option(
        "Tokens that each further window scores, where a sequence is too long for one.",
        None,
        least=1,
    )


@command("score", ScoreOptions, order=("ckpt", "input", "input_format", "output", "stride"))
def score_command(options: ScoreOptions) -> None:
    """GPT: each token given the ones before. BERT: each given the whole input. T5: the decoder's.

    Example: mlm-eval score --ckpt gpt2_345m --input sequences.jsonl --output scores.jsonl --tp 2
    """
    from mlm_eval.checkpoints.files.text_file import read_bytes
    from mlm_eval.checkpoints.tokenizers.begin_of_text import choose_begin
    from mlm_eval.reporting.text import work_text
    from mlm_eval.tasks.zero_shot.score import resume_parts, score_lines, score_work, write_lines
    from mlm_eval.tasks.zero_shot.sequences import GivenSequences, parse_lines

    Screen.keeps = kept_beside(options.output)
    run = ModelRun(options)
    tokenizer = chosen_tokenizer(options.ckpt, options)
    family = run.checkpoint.config.family
    if family != "gpt" and options.bos == "yes":
        raise InputError(f"--bos yes is for GPT models; this is a {family.upper()} checkpoint")
    begin = choose_begin(options.bos, tokenizer if family == "gpt" else None)

    def take_apart(name: str, content: bytes) -> tuple[GivenSequences, list[InputLine]]:
        given = GivenSequences.of(name, content, options.input_format)
        with phase("reading and tokenizing the lines"):
            lines = parse_lines(
                given, tokenizer, family=family, limit=options.limit, begin=begin.ids
            )
        return given, lines

    # Faults of a file are found before ranks are started; standard input is read once, by one rank.
    is_file = options.input != STDIN
    read = take_apart(str(options.input), read_bytes(options.input)) if is_file else None

    def body(engine: Engine) -> None:
        given, lines = read or take_apart(STDIN_NAME, standard_input())
        if begin.warning is not None and any(line.is_text for line in lines):
            run.warn([begin.warning])
        if empty := [line.where for line in lines if line.is_empty]:
            run.warn([f"{len(empty):,} line(s) hold no token, the first is {empty[0]}"])
        stride = options.stride
        count, tokens, flops = score_work(engine, lines, stride)
        run.log(work_text("sequence(s)", count, tokens, flops))
        parts = resume_parts(engine, given, tokenizer, stride, begin.ids)
        with kept_scores(run, count, parts, restart=options.restart) as partial:
            unit = "rows" if family == "bert" else "tok"
            with progress(run.is_main, unit) as on_progress:
                records = list(
                    score_lines(
                        engine, lines, stride=stride, on_progress=on_progress, partial=partial
                    )
                )
            if run.is_main:
                write_lines(options.output, records)
                limited = f" (LIMITED to the first {options.limit})" if options.limit else ""
                run.print_result(f"{len(records):,} line(s) scored{limited}: {options.output}")
                if partial is not None:
                    partial.remove(count)

    run.on_ranks(body)
