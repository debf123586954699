"""An interrupted run goes on where it stopped, at any layout, never with another run's scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import random_models
from support.ranks import run_ranks

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import load_tokenizer
from mlm_eval.engine import resume, score
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.resume import PartialScores, resume_key, run_difference
from mlm_eval.engine.score import ScoringBatch
from mlm_eval.model.gpt import GPT
from mlm_eval.reporting.results import Result
from mlm_eval.tasks.zero_shot.wikitext103 import WIKITEXT103, WikiTextOptions, strided_windows

CONFIG = random_models.config(vocab_size=256)
PARTS = {"task": "wikitext103", "digest": "abc", "settings": {"stride": 4}}
OTHER = {**PARTS, "settings": {"stride": 5}}
WORDS = " ".join(f"word{n}" for n in range(40))


class Stopped(Exception):
    """Stands for whatever ends a run in the middle."""


@contextmanager
def stopping_after(allowed: int | None) -> Iterator[list[int]]:
    """Note which requests are scored, and stop before the batch after the last allowed one."""
    scored: list[int] = []
    batches = itertools.count()

    def score_batch(model: GPT, batch: ScoringBatch, device: torch.device) -> Any:
        if next(batches) == allowed:
            raise Stopped
        scored.extend(batch.indices)
        return original(model, batch, device)

    original, score.score_batch = score.score_batch, score_batch
    try:
        yield scored
    finally:
        score.score_batch = original


def run_on_a_rank(
    folder: Path, tp: int, dp: int, go_on: bool, allowed: int | None, limit: int | None
) -> tuple[list[int], int, Result | None]:
    """Score a text; return which windows were scored here, how many were known, the result."""
    resume.FLUSH_SECONDS = -1.0  # after every batch
    engine = Engine.load(random_models.checkpoint(CONFIG), tp=tp, dp=dp, batch_tokens=3 * 16)
    words = load_tokenizer(directory=folder / "vocabulary")
    options = WikiTextOptions(data=str(folder / "text"), stride=4)
    work = WIKITEXT103.prepare(options, tokenizer=words, positions=16, limit=limit)
    with closing(PartialScores(folder / "out.json.partial", PARTS, restart=not go_on)) as partial:
        known = len(partial.finished())
        result = None
        with suppress(Stopped), stopping_after(allowed) as scored:
            result = WIKITEXT103.score(engine, work, tokenizer=words, partial=partial)
    return scored, known, result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a text and a vocabulary."""
    (tmp_path / "text").write_text(WORDS)
    random_models.byte_vocabulary(tmp_path / "vocabulary")
    return tmp_path


def run(
    folder: Path,
    tp: int,
    dp: int,
    *,
    go_on: bool = False,
    allowed: int | None = None,
    limit: int | None = None,
) -> tuple[list[int], int, Result | None]:
    """Return the windows that were scored, over all copies of the model, and rank 0's answers."""
    answers = run_ranks(tp * dp, run_on_a_rank, folder, tp, dp, go_on, allowed, limit)
    scored = [i for mine, _, _ in answers[::tp] for i in mine]
    return scored, answers[0][1], answers[0][2]


def kept(folder: Path) -> list[int]:
    """Return the requests of which scores are on the disk."""
    found = []
    for path in folder.glob("out.json.partial/*.safetensors"):
        with safe_open(path, framework="pt") as chunk:
            found += chunk.get_tensor("indices").tolist()
    return found


WINDOWS = len(strided_windows(len(WORDS), 16, 4))


@pytest.mark.parametrize(
    ("before", "after"), [((1, 1), (2, 2)), ((2, 2), (1, 1)), ((1, 2), (2, 1)), ((2, 1), (1, 2))]
)
def test_an_interrupted_run_goes_on_at_another_layout(folder, before, after):
    whole, known, expected = run(folder, 1, 1)
    assert sorted(whole) == list(range(WINDOWS)) and known == 0 and expected is not None

    first, _, result = run(folder, *before, allowed=4)  # clears what is there of the whole run
    assert result is None and len(first) == 4 * 3 * before[1] and len(set(first)) == len(first)
    assert sorted(kept(folder)) == sorted(first)

    second, known, result = run(folder, *after, go_on=True)
    assert known == len(first)
    assert sorted(first + second) == list(range(WINDOWS))  # every window once, in either run
    assert result is not None and result.counts == expected.counts
    for name, value in expected.metrics.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-6), name

    third, known, again = run(folder, 1, 1, go_on=True)  # nothing is left to do
    assert known == WINDOWS and third == [] and again is not None
    assert again.timing["tokens_per_second"] == 0  # the speed is that of this run's work
    assert again.metrics["nll_sum"] == result.metrics["nll_sum"]


def test_a_run_may_be_interrupted_again_and_again(folder):
    scored: list[int] = []
    for go_on in itertools.chain([False], itertools.repeat(True)):
        new, known, result = run(folder, 1, 1, go_on=go_on, allowed=5)
        assert known == len(scored)
        scored += new
        if result is not None:
            break
    assert sorted(scored) == list(range(WINDOWS))
    _, _, expected = run(folder, 1, 1)
    assert expected is not None
    assert result.metrics["nll_sum"] == pytest.approx(expected.metrics["nll_sum"], rel=1e-7)


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 2)])
def test_a_lower_limit_takes_its_part_of_what_is_there(folder, tp, dp):
    run(folder, 1, 1, allowed=10)
    done = kept(folder)
    limit = 20
    assert max(done) > limit  # more than the second run asks for
    scored, _, result = run(folder, tp, dp, go_on=True, limit=limit)
    assert sorted(scored + [i for i in done if i < limit]) == list(range(limit))
    _, _, expected = run(folder, 1, 1, limit=limit)
    assert result is not None and expected is not None
    assert result.metrics["nll_sum"] == pytest.approx(expected.metrics["nll_sum"], rel=1e-6)


@pytest.mark.parametrize("parts", [PARTS, OTHER], ids=["the same", "another"])
@pytest.mark.parametrize("how", ["restart", "replace", None])
def test_what_an_earlier_run_left_goes_only_when_that_is_said(folder, parts, how):
    run(folder, 1, 1, allowed=4)
    before = sorted(kept(folder))
    place = folder / "out.json.partial"
    again: list[int] = []
    with suppress(InputError), closing(PartialScores(place, parts, **{how: True} if how else {})):
        again = sorted(kept(folder))
    stays = how is None or (how == "replace" and parts == PARTS)
    assert sorted(kept(folder)) == (before if stays else []) and before
    assert again == ([] if parts == OTHER else sorted(kept(folder)))
    assert place.exists() == stays


@pytest.mark.parametrize("how", ["restart", "replace", "remove"])
def test_only_what_we_wrote_is_removed(folder, how):
    run(folder, 1, 1, allowed=4)
    place = folder / "out.json.partial"
    (place / "src").mkdir()
    others = [place / name for name in ("thesis.txt", "model.safetensors", "src/a.py")]
    for other in others:
        other.write_text("years of work")
    if how == "remove":
        with closing(PartialScores(place, PARTS)) as partial:
            partial.remove(WINDOWS)
    else:
        with closing(PartialScores(place, OTHER, **{how: True})):
            pass
    assert [other.read_text() for other in others] == ["years of work"] * 3
    assert sorted(path.name for path in place.iterdir()) == [
        "model.safetensors",
        "src",
        "thesis.txt",
    ]


def test_a_limited_run_leaves_what_a_whole_one_has_kept(folder):
    run(folder, 1, 1, allowed=10)
    before = kept(folder)
    with closing(PartialScores(folder / "out.json.partial", PARTS)) as partial:
        partial.remove(20)
    assert kept(folder) == before and max(before) > 20


def test_two_runs_do_not_write_the_same_output(tmp_path):
    first = PartialScores(tmp_path / "out.partial", PARTS)
    with pytest.raises(InputError, match=r"out\.partial is being written .* \(process \d+ on "):
        PartialScores(tmp_path / "out.partial", PARTS, restart=True)
    first.close()
    PartialScores(tmp_path / "out.partial", PARTS).close()
    assert not (tmp_path / "out.partial").exists()


def open_on_a_rank(folder: Path, parts: dict[str, Any]) -> int:
    with closing(PartialScores(folder, parts)) as partial:
        return len(partial.finished())


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_scores_of_another_run_are_refused_on_every_rank(folder, ranks):
    run(folder, 1, 1, allowed=4)
    place = folder / "out.json.partial"
    assert run_ranks(ranks, open_on_a_rank, place, PARTS) == [12] * ranks
    said = r"out\.json\.partial holds scores .* stride 4, now 5; repeat .* --restart"
    with pytest.raises(InputError, match=said):
        run_ranks(ranks, open_on_a_rank, place, OTHER)
    assert run_ranks(ranks, open_on_a_rank, place, PARTS) == [12] * ranks


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("damage", ["cut off", "not a chunk", "empty"])
def test_a_damaged_chunk_is_named(folder, ranks, damage):
    run(folder, 1, 1, allowed=4)
    chunk = max((folder / "out.json.partial").glob("*.safetensors"))
    content = chunk.read_bytes()
    chunk.write_bytes({"cut off": content[:-9], "not a chunk": b"x" * 99, "empty": b""}[damage])
    with pytest.raises(InputError) as caught:
        run_ranks(ranks, open_on_a_rank, chunk.parent, PARTS)
    message = str(caught.value)
    assert message.startswith(f"{chunk} is damaged (") and "--restart" in message
    assert "\n" not in message
    chunk.unlink()  # as the message says
    assert run_ranks(ranks, open_on_a_rank, chunk.parent, PARTS) == [9] * ranks


def test_an_unfinished_chunk_is_not_read(folder):
    run(folder, 1, 1, allowed=4)
    (folder / "out.json.partial" / "1-0.part").write_bytes(b"half of it")
    assert open_on_a_rank(folder / "out.json.partial", PARTS) == 12


def test_nothing_to_resume_is_a_fresh_start(tmp_path):
    partial = PartialScores(tmp_path / "none", PARTS)
    assert partial.finished() == {}
    partial.flush()
    partial.close()
    assert not (tmp_path / "none").exists()  # a run without results leaves no folder


def small_batch() -> tuple[list[int], list[int], torch.Tensor, torch.Tensor]:
    return [1, 0], [1, 2], torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([True, False, True])


def test_chunks_hold_each_requests_own_scores(tmp_path):
    partial = PartialScores(tmp_path / "kept", PARTS)
    partial.add(*small_batch())
    assert list((tmp_path / "kept").glob("*.safetensors")) == []  # not with every batch
    partial.flush()
    partial.close()
    partial = PartialScores(tmp_path / "kept", PARTS)
    found = partial.finished()
    assert {i: (kept.logprobs.tolist(), kept.greedy.tolist()) for i, kept in found.items()} == {
        1: ([-1.0], [True]),
        0: ([-2.0, -3.0], [False, True]),
    }
    partial.remove(2)
    partial.close()
    assert not (tmp_path / "kept").exists()


def test_a_second_run_does_not_overwrite_the_chunks_of_the_first(tmp_path):
    """Not even with the same process id, as in a container."""
    for _ in range(3):
        with closing(PartialScores(tmp_path / "kept", PARTS)) as partial:
            partial.add(*small_batch())
            partial.flush()
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    partial = PartialScores(tmp_path / "file" / "kept", PARTS)
    partial.add(*small_batch())
    with pytest.raises(InputError, match="the scores so far cannot be kept in"):
        partial.flush()


def test_what_ranks_share_does_not_grow_with_the_square_of_the_requests(tmp_path):
    """Pickled one by one, views of a chunk would each carry the whole of it."""
    import pickle

    count = 2000
    chunk = {
        "indices": torch.arange(count),
        "counts": torch.full((count,), 32),
        "logprobs": torch.zeros(32 * count),
        "greedy": torch.zeros(32 * count, dtype=torch.bool),
    }
    (tmp_path / "kept").mkdir()
    save_file(chunk, tmp_path / "kept" / "1-0.safetensors", metadata={"key": resume_key(PARTS)})
    partial = PartialScores(tmp_path / "kept", PARTS)
    partial.close()
    assert len(pickle.dumps(partial._open(False, False))) < 1_000_000
    assert len(partial.finished()) == count


def test_the_key_depends_on_every_part():
    parts = {"task": "wikitext103", "digest": "abc", "settings": {"stride": 32, "seq_length": 16}}
    key = resume_key(parts)
    assert key == resume_key(dict(reversed(parts.items())))  # not on their order
    others = [
        {**parts, "task": "lambada"},
        {**parts, "digest": "abd"},
        {**parts, "settings": {"stride": 31, "seq_length": 16}},
        {**parts, "dtype": "float32"},
    ]
    assert len({key, *(resume_key(other) for other in others)}) == 5
    assert [run_difference(parts, other) for other in others] == [
        "task wikitext103, now lambada",
        "another checkpoint",
        "stride 32, now 31",
        "dtype None, now float32",
    ]
    many = {"settings": dict(zip("abcde", range(5), strict=True))}
    less = {"settings": dict(zip("abcde", range(1, 6), strict=True))}
    assert run_difference(many, less) == "a 0, now 1; b 1, now 2; c 2, now 3 and 2 more"


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.tensor([1, 3])},
        {"counts": torch.tensor([4, -1])},
        {"indices": torch.tensor([-1, 0])},
        {"indices": torch.tensor([1])},
        {"indices": torch.tensor([0.5, 1.0])},
        {"logprobs": torch.zeros(2, 2)},
        {"greedy": torch.ones(3)},
        {"more": torch.ones(3)},
    ],
    ids=str,
)
def test_a_chunk_that_does_not_add_up_is_damaged(tmp_path, change):
    good = {
        "indices": torch.tensor([1, 0]),
        "counts": torch.tensor([1, 2]),
        "logprobs": torch.zeros(3),
        "greedy": torch.zeros(3, dtype=torch.bool),
    }
    (tmp_path / "kept").mkdir()
    for chunk in (good, {**good, **change}):
        path = tmp_path / "kept" / "1-0.safetensors"
        save_file(chunk, path, metadata={"key": resume_key(PARTS)})
        if chunk is good:
            assert open_on_a_rank(path.parent, PARTS) == 2
            continue
        with pytest.raises(InputError, match="1-0.safetensors is damaged .*--restart"):
            open_on_a_rank(path.parent, PARTS)


def test_scores_of_other_lengths_are_damage(folder):
    run(folder, 1, 1, allowed=4)
    place = folder / "out.json.partial"
    with safe_open(min(place.glob("*.safetensors")), framework="pt") as file:
        chunk = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    chunk["counts"][:2] += torch.tensor([1, -1])
    save_file(chunk, place / "1-0.safetensors", metadata={"key": resume_key(PARTS)})
    for path in place.glob("*-0.safetensors"):
        if path.name != "1-0.safetensors":
            path.unlink()
    with pytest.raises(InputError, match="score.s. of sequence .* --restart"):
        run(folder, 1, 1, go_on=True)
