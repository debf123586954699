"""The catalog: what its entries say, where files are looked for, and what is applied."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from support import random_models

from mlm_eval import cli
from mlm_eval.checkpoints import catalog
from mlm_eval.checkpoints.catalog import catalog_entries, find_entry, local_folder, locate
from mlm_eval.checkpoints.config import check_overrides
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint

NAME = "megatron-gpt2-345m"


def released_file(folder: Path) -> Path:
    """Write a checkpoint as NVIDIA released them: one rank, no args, no version; return its root.

    Nothing in it tells the number of heads, nor the activation.
    """
    config = random_models.config(hidden_size=32, vocab_size=64)
    weights = random_models.state_dict(config)
    layers = {}
    old = {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_qkv": "attention.query_key_value",
        "self_attention.linear_proj": "attention.dense",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc1": "mlp.dense_h_to_4h",
        "mlp.linear_fc2": "mlp.dense_4h_to_h",
    }
    for name, value in weights.items():
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if found:
            layers[f"layers.{found[1]}.{old[found[2]]}.{found[3]}"] = value.half()
    for leaf in ("weight", "bias"):
        layers[f"final_layernorm.{leaf}"] = weights[f"decoder.final_layernorm.{leaf}"].half()
    embedding = {
        f"{kind}_embeddings": {"weight": weights[f"embedding.{kind}_embeddings.weight"].half()}
        for kind in ("word", "position")
    }
    model = {"language_model": {"embedding": embedding, "transformer": layers}}
    rank = folder / "release" / "mp_rank_00"
    rank.mkdir(parents=True)
    torch.save({"model": model, "iteration": 1}, rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local folder of the catalog, empty."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv(catalog.FOLDER_VARIABLE, str(folder))
    return folder


# --- what the entries say ---


def test_the_public_checkpoints_are_there():
    assert set(catalog_entries()) == {
        NAME,
        "megatron-bert-345m-uncased",
        "megatron-bert-345m-cased",
    }


@pytest.mark.parametrize("name", list(catalog_entries()))
def test_an_entry_says_all_that_is_needed(name: str):
    entry = catalog_entries()[name]
    assert entry.settings["num_attention_heads"] == 16
    assert entry.settings["activation"] == ("gelu_tanh" if entry.family == "gpt" else "gelu")
    check_overrides(entry.settings)
    assert all(re.search("https://|hf download", command) for command in entry.get)
    # What a command writes is a name under which the file is found.
    for command in entry.get:
        written = re.search(r"(-O|--local-dir) (\S+)", command)
        assert written and written[2] in entry.files
    assert entry.holds and entry.tokenizer and entry.publisher


def test_expected_figures_say_from_whom():
    for name, entry in catalog_entries().items():
        assert entry.expect, name
        for item in entry.expect:
            assert item.value > 0 and item.who and item.where
            assert item.unit in ("%", "perplexity")


def test_the_345m_expectations_are_the_reported_ones():
    found = {(item.task, item.value) for item in find_entry(NAME).expect}
    assert {("lambada", 46.26), ("wikitext103", 19.37), ("wikitext103", 19.31)} <= found


# --- where files are looked for ---


def test_a_missing_checkpoint_says_how_to_get_it(shelf: Path):
    with pytest.raises(InputError) as refused:
        open_checkpoint(f"catalog:{NAME}")
    message = str(refused.value)
    assert str(shelf) in message and "wget " in message and catalog.FOLDER_VARIABLE in message


def test_an_unknown_name_is_refused_with_the_known_ones(shelf: Path):
    with pytest.raises(InputError, match=f"no checkpoint 'gpt9'; it has .*{NAME}"):
        open_checkpoint("catalog:gpt9")


def test_a_wrong_variable_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(catalog.FOLDER_VARIABLE, "/no/such/folder")
    with pytest.raises(InputError, match="which is not a folder"):
        open_checkpoint(f"catalog:{NAME}")


def test_without_the_variable_it_is_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(catalog.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert local_folder() == tmp_path / "mlm_eval" / "catalog"
    assert locate(find_entry(NAME)) is None
    released_file(local_folder() / NAME)
    assert locate(find_entry(NAME)) == local_folder() / NAME


# --- what is applied ---


@pytest.fixture
def eight_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry for the small checkpoint of these tests, which has 8 heads."""
    import dataclasses

    entry = dataclasses.replace(
        catalog_entries()[NAME], settings={"num_attention_heads": 8, "activation": "gelu"}
    )
    monkeypatch.setattr(catalog, "catalog_entries", lambda: {NAME: entry})


def test_settings_that_the_file_does_not_record_are_applied(shelf: Path, eight_heads: None):
    released_file(shelf / "megatron_lm_345m_v0.0")
    checkpoint = open_checkpoint(f"catalog:{NAME}")
    assert checkpoint.config.num_attention_heads == 8
    assert checkpoint.config.activation == "gelu"
    sources = checkpoint.provenance.config_sources
    assert sources["num_attention_heads"] == sources["activation"] == f"catalog:{NAME}"
    assert sources["hidden_size"] == "shapes"


def test_set_wins_over_the_catalog(shelf: Path, eight_heads: None):
    released_file(shelf / NAME)
    checkpoint = open_checkpoint(f"catalog:{NAME}", {"num_attention_heads": 4})
    assert checkpoint.config.num_attention_heads == 4
    assert checkpoint.provenance.config_sources["num_attention_heads"] == "--set"
    assert checkpoint.config.activation == "gelu"


def test_a_published_archive_is_opened_as_it_was_downloaded(
    shelf: Path, eight_heads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = released_file(tmp_path / "unpacked")
    with zipfile.ZipFile(shelf / "megatron_lm_345m_v0.0.zip", "w") as archive:
        for file in root.rglob("*"):
            if file.is_file():
                archive.write(file, file.relative_to(root))
    plain = open_checkpoint(root, {"num_attention_heads": 8, "activation": "gelu"})
    from_catalog = open_checkpoint(f"catalog:{NAME}")
    assert from_catalog.config == plain.config
    name = "embedding.word_embeddings.weight"
    assert torch.equal(from_catalog.tensors[name].read(), plain.tensors[name].read())


def test_the_tokenizer_beside_the_files_is_found(shelf: Path, monkeypatch: pytest.MonkeyPatch):
    from mlm_eval.checkpoints.tokenizer import find_tokenizer

    released_file(shelf / NAME)
    elsewhere = shelf.parent / "elsewhere"
    random_models.byte_vocabulary(elsewhere)
    monkeypatch.chdir(elsewhere)  # not the folder to look in
    assert find_tokenizer(f"catalog:{NAME}") is None
    random_models.byte_vocabulary(shelf / NAME / "tokenizer")
    found = find_tokenizer(f"catalog:{NAME}")
    assert found is not None and found.source.startswith(str(shelf))


# --- the command ---


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Run a command line in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["mlm-eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err


def test_the_command_lists_describes_and_refuses(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    released_file(shelf / NAME)
    code, out, _ = run_cli(monkeypatch, capsys, "catalog")
    assert code == 0 and all(name in out for name in catalog_entries())
    assert f"here: {shelf / NAME}" in out and out.count("not here") == 2
    code, out, _ = run_cli(monkeypatch, capsys, "catalog", NAME)
    assert "num_attention_heads=16, activation=gelu_tanh" in out
    assert "lambada accuracy 46.26 %: PaddlePaddle/PaddleNLP" in out
    code, out, _ = run_cli(monkeypatch, capsys, "catalog", "--json")
    records = {record["name"]: record for record in json.loads(out)}
    assert records[NAME]["path"] == str(shelf / NAME)
    assert records["megatron-bert-345m-cased"]["path"] is None
    code, _, err = run_cli(monkeypatch, capsys, "catalog", "nothing")
    assert code == 2 and len(err.splitlines()) == 1


def test_inspect_shows_where_the_settings_came_from(
    shelf: Path,
    eight_heads: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    released_file(shelf / NAME)
    code, out, _ = run_cli(monkeypatch, capsys, "inspect", "--ckpt", f"catalog:{NAME}", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["config"]["num_attention_heads"] == 8
    assert record["config_sources"]["activation"] == f"catalog:{NAME}"
    shutil.rmtree(shelf / NAME)
    code, _, err = run_cli(monkeypatch, capsys, "inspect", "--ckpt", f"catalog:{NAME}")
    assert code == 2 and "wget" in err
