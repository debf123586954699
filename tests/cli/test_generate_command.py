"""`generate`: prompts from the line, a file or the keyboard; text, lines, and what is refused."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from support.command_line import assert_one_sentence
from support.paths import SAMPLES

from mlm_eval.checkpoints.tokenizer import find_tokenizer
from mlm_eval.engine.prompts import text_after
from mlm_eval.tasks.zero_shot.generation import TextStream

pytest_plugins = ["support.command_line_fixtures"]

GPT = SAMPLES / "gpt"
SHORT = ("generate", "--ckpt", GPT, "--device", "cpu", "--tp", 1, "--max-new-tokens", 12)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_prompt_and_its_text_are_printed(run):
    ended = run(*SHORT, "--prompt", "A module can")
    assert ended.code == 0 and ended.err == ""
    assert ended.out.startswith("A module can ") and len(ended.out) > 20


def test_lines_come_back_with_their_fields(run, tmp_path):
    words = find_tokenizer(GPT)
    given = [{"id": "a", "prompt": "A module can"}, {"tokens": words.encode("The name"), "n": 1}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    output = tmp_path / "out.jsonl"
    ended = run(*SHORT, "--input", tmp_path / "in.jsonl", "--output", output)
    assert ended.code == 0 and "2 prompt(s) continued" in ended.out
    first, second = lines(output)
    assert set(first) == {"id", "prompt", "text", "tokens", "logprobs", "finish"}
    assert first["id"] == "a" and first["prompt"] == "A module can"
    assert second["n"] == 1 and second["prompt"] == "The name"
    assert second["prompt_tokens"] == given[1]["tokens"]
    assert len(second["tokens"]) == len(second["logprobs"]) == 12
    assert all(value < 0 for value in second["logprobs"]) and second["finish"] == "length"
    assert run(*SHORT, "--input", tmp_path / "in.jsonl", "--output", output).code == 2
    both = (*SHORT, "--input", tmp_path / "in.jsonl", "--output", output, "--overwrite")
    assert run(*both, "--stop", " ").code == 0
    assert lines(output)[0]["finish"] == "stop" and lines(output)[0]["text"] == ""


@pytest.mark.process
@pytest.mark.long
def test_draws_do_not_depend_on_the_layout(run, tmp_path):
    """Nor on what stands beside them: a prompt draws from the seed and its number."""
    warm = (*SHORT[:-4], "--max-new-tokens", 12, "--temperature", 0.9, "--top-p", 0.95)
    texts = ["A module can", "The name", "If the"]
    found = []
    for layout in ((1, 1), (2, 1), (1, 2)):
        output = tmp_path / "-".join(map(str, layout))
        sizes = ("--tp", layout[0], "--dp", layout[1], "--output", output)
        prompts = [part for text in texts for part in ("--prompt", text)]
        assert run(*warm, *prompts, *sizes).code == 0
        found.append([line["tokens"] for line in lines(output)])
    assert found[0] == found[1] == found[2]
    other = tmp_path / "other"
    assert run(*warm, "--prompt", texts[0], "--seed", 7, "--output", other).code == 0
    assert lines(other)[0]["tokens"] != found[0][0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("give one of --prompt TEXT, --input FILE and -i",)),
        (("--prompt", "a", "-i"), ("give one of",)),
        (("--prompt", ""), ("--prompt '' is empty",)),
        (("--prompt", "a", "--top-p", 0.5), ("--top-p", "add --temperature 1")),
        (("--prompt", "a " * 400), ("positions; cut it from the left",)),
    ],
)
def test_what_cannot_be_continued_is_said(run, arguments, parts):
    assert_one_sentence(run(*SHORT, *arguments), *parts)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("[1]", "holds '[1]'"),
        ("{", "is not JSON"),
        ('{"tokens": []}', "at least one integer"),
        ('{"tokens": [true]}', "at least one integer"),
        ('{"text": "a"}', 'neither "prompt" nor "tokens"'),
        ('{"tokens": [99999999]}', "outside the model's vocabulary"),
        ('{"tokens": [9223372036854775808]}', "outside the model's vocabulary"),
        ("\n", "holds no lines"),
    ],
)
def test_a_bad_line_is_named(run, tmp_path, line, part):
    (tmp_path / "in.jsonl").write_text(line)
    assert_one_sentence(run(*SHORT, "--input", tmp_path / "in.jsonl"), part)


def test_a_bert_writes_no_text(run):
    ended = run("generate", "--ckpt", SAMPLES / "bert", "--prompt", "a", "--device", "cpu")
    assert ended.code == 2 and "only a GPT model" in ended.err


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("tp", [1, 2])
def test_typed_lines_are_continued_on_a_terminal(tp):
    """Streamed; a text that cannot be continued is said, and the next one may be."""
    mine, theirs = pty.openpty()
    command = [sys.executable, "-P", "-m", "mlm_eval", *map(str, SHORT[:-4])]
    process = subprocess.Popen(
        [*command, "--tp", str(tp), "--max-new-tokens", "8", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    os.close(theirs)
    os.write(mine, b"A module can\nThe name\n\x04")
    assert process.wait(timeout=120) == 0
    shown = b""
    while True:
        try:
            shown += os.read(mine, 4096)
        except OSError:  # how Linux says that nobody holds the other end
            break
        if not shown.strip():
            break
    os.close(mine)
    found = re.findall(r"> (.*?)(?=> )", shown.decode().replace("\r", ""), flags=re.DOTALL)
    assert any(text.startswith("A module can ") for text in found), shown
    assert "Ctrl-D ends" in process.stderr.read()
    process.stderr.close()


def test_what_may_be_a_stop_string_waits():
    """Each piece is final: put together they are the text, and never a letter too much."""
    words = find_tokenizer(GPT)
    prompt, tokens = words.encode("A"), words.encode(" list of names\n\nand more \u00e9 things")
    whole = text_after(words, prompt, tokens)
    pieces = []
    stream = TextStream(prompt, words, ["\n\nand"], pieces.append)
    for count in range(1, len(tokens) + 1):
        stream.add(tokens[:count])
    assert "".join(pieces) == whole.partition("\n\nand")[0]
    pieces.clear()
    stream = TextStream(prompt, words, ["\n\nnever"], pieces.append)
    for count in range(1, len(tokens) + 1):
        stream.add(tokens[:count])
        assert "\ufffd" not in "".join(pieces)
        assert whole.startswith("".join(pieces))
    stream.finish(whole)
    assert "".join(pieces) == whole
