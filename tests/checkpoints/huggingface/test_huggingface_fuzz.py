"""Random config.json files of every family: what is read equals transformers, the rest is named.

`MLM_EVAL_FUZZ_SEEDS=1000:2000` runs that range of cases instead of the first few, so that a long
run is many ranges, one after another or beside each other; about eight cases a second.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from support.fuzz import conversion_fuzz
from support.fuzz import huggingface_fuzz as fuzz

from mlm_eval.checkpoints.huggingface.families import FAMILIES
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.fields import Use

FIRST, LAST = map(int, os.environ.get("MLM_EVAL_FUZZ_SEEDS", "0:100").split(":"))
BLOCK = 20
BLOCKS = range(FIRST, LAST, BLOCK)
FEWEST = 100
LEAST_READ = 2 / 3
"""Of the cases that transformers loads: a fuzz that refuses everything proves nothing."""


@pytest.fixture(scope="module")
def outcomes() -> list[fuzz.Outcome]:
    """What became of the cases so far."""
    return []


@pytest.mark.long
@pytest.mark.parametrize("first", BLOCKS)
def test_what_is_read_equals_transformers(
    first: int, outcomes: list[fuzz.Outcome], tmp_path: Path
) -> None:
    cases = [
        fuzz.run_case(seed, tmp_path / "model") for seed in range(first, min(first + BLOCK, LAST))
    ]
    outcomes += cases
    different = [case for case in cases if not case.gap <= fuzz.TOLERANCE]
    assert not different, different
    unnamed = [case for case in cases if case.result == fuzz.REFUSED and not fuzz.names_a_key(case)]
    assert not unnamed, unnamed


@pytest.mark.long
def test_most_cases_are_read(
    outcomes: list[fuzz.Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = Counter(case.result for case in outcomes)
    loaded = counts[fuzz.READ] + counts[fuzz.REFUSED]
    if not loaded:
        pytest.skip("run it with the cases")
    worst = max(case.gap for case in outcomes)
    with capsys.disabled():
        print(
            f"\nconfig.json fuzz, cases {FIRST} to {LAST - 1}: {counts[fuzz.READ]} read and equal "
            f"(largest gap {worst:.1e}), {counts[fuzz.REFUSED]} refused by name, "
            f"{counts[fuzz.UNLOADABLE]} that transformers does not load; "
            f"{counts[fuzz.READ] / loaded:.1%} read"
        )
    if len(outcomes) < FEWEST:
        pytest.skip(f"fewer than {FEWEST} cases say nothing about shares")
    assert counts[fuzz.UNLOADABLE] < len(outcomes) / 10
    assert counts[fuzz.READ] >= LEAST_READ * loaded


@pytest.mark.long
@pytest.mark.parametrize("first", BLOCKS)
def test_what_is_written_equals_transformers(first: int, tmp_path: Path) -> None:
    cases = [
        fuzz.write_case(seed, tmp_path)
        for seed in range(first, min(first + BLOCK, LAST), 3)  # 3 and 10 share no factor
    ]
    assert not [case for case in cases if not case.gap <= fuzz.TOLERANCE]
    refused = [case for case in cases if case.result == fuzz.REFUSED]
    written = [case for case in cases if case.result == fuzz.READ]
    # Llama writes biases in all linear layers or in none, among other things that have no form.
    assert len(written) >= len(refused), refused


@pytest.mark.long
@pytest.mark.parametrize("first", BLOCKS)
def test_megatrons_models_are_written_as_they_are(first: int, tmp_path: Path) -> None:
    """Gains minus 1, interleaved channels, no positions: all that has another form there."""
    cases = [
        conversion_fuzz.convert_case(seed, tmp_path / "out")
        for seed in range(first, min(first + BLOCK, LAST), 2)
    ]
    assert not [case for case in cases if not case.gap <= fuzz.TOLERANCE]
    refused = [case.why for case in cases if case.result == fuzz.REFUSED]
    assert len(refused) <= len(cases) / 3, refused


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_key_that_decides_is_drawn(family: Family) -> None:
    drawn: set[str] = set()
    for seed in range(3000):
        drawn |= set(fuzz.draw_config(fuzz.Draw(seed), family))
    decisive = {
        key
        for key, row in family.table.items()
        if row.use in (Use.READ, Use.REFUSED) and key not in ("architectures", "auto_map")
    }
    assert sorted(decisive - drawn) == []
    assert any(family.table[key].use is Use.METADATA for key in drawn & set(family.table))
    assert drawn - set(family.table), "no key that is unknown"
