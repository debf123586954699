"""Checkpoints in Megatron's torch format: read back by this project and by megatron-core."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ORACLES, SUPPORT
from support.random_models import BERT, GPT, LLAMA, checkpoint_from_state_dict, config, state_dict
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.torch_file import read_torch_file
from mlm_eval.checkpoints.megatron.layout import padded_vocabulary
from mlm_eval.checkpoints.megatron.write_torch import write_megatron_torch
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.vocabulary import with_rows

EMBEDDINGS = "embedding.word_embeddings.weight"

CONFIGS: dict[str, ModelConfig] = {
    "gpt": GPT,
    "gpt tanh": config(GPT, activation="gelu_tanh"),
    "gpt tanh without biases": config(
        GPT, activation="gelu_tanh", add_bias_linear=False, add_qkv_bias=False
    ),
    "gpt squared relu": config(GPT, activation="squared_relu"),
    "gpt with wide heads": config(GPT, kv_channels=12),
    "layernorm 1p": config(GPT, layernorm_zero_centered_gamma=True, layernorm_epsilon=1e-6),
    "qk layernorm": config(GPT, qk_layernorm=True, qk_layernorm_bias=True),
    "two kinds of positions": config(GPT, position_embedding_type="learned_absolute+rope"),
    "llama": LLAMA,
    "llama 3.1": config(
        LLAMA, rotary_base=500000.0, rope_scaling=RopeScaling(32.0), layernorm_epsilon=1e-6
    ),
    "qwen": config(LLAMA, add_qkv_bias=True, num_query_groups=1, qk_layernorm=True),
    "neox": config(
        GPT, position_embedding_type="rope", rotary_percent=0.25, rotary_interleaved=True
    ),
    "bert": BERT,
    "bert tanh": config(BERT, activation="gelu_tanh"),
    "bert tanh twice": config(BERT, activation="gelu_tanh", head_activation="gelu_tanh"),
    "bert original order": config(BERT, apply_residual_connection_post_layernorm=True),
    "bert bare": config(BERT, lm_head=False, pooler=False, binary_head=False),
    "classification": config(BERT, lm_head=False, binary_head=False, num_classes=3),
    "multiple choice": config(BERT, lm_head=False, binary_head=False, multichoice_head=True),
    "questions": config(BERT, lm_head=False, binary_head=False, qa_head=True),
}
# Rows that every tensor-parallel size of the tests divides.
CONFIGS = {name: dataclasses.replace(c, vocab_size=52) for name, c in CONFIGS.items()}
LEGACY = {
    "gpt tanh without biases",
    "two kinds of positions",
    "bert tanh twice",
    "bert original order",
    "bert bare",
    "classification",
    "multiple choice",
    "questions",
}


def memory(model: ModelConfig = CONFIGS["gpt"], **args: Any) -> Checkpoint:
    return checkpoint_from_state_dict(model, state_dict(model), args=args)


def rank_files(folder: Path) -> dict[str, Path]:
    """The model files by their folder's name."""
    return {path.parent.name: path for path in sorted(folder.rglob("mp_rank_*/*.pt"))}


def contents(path: Path) -> dict[str, Any]:
    """What plain torch reads, with one class allowed, which Megatron's own list has too."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, the path of keys kept."""
    found = {}
    for key, item in tree.items():
        found |= flat(item, f"{prefix}{key}/") if isinstance(item, dict) else {prefix + key: item}
    return found


def assert_same(actual: Checkpoint, expected: Checkpoint) -> None:
    """The same model: settings, and every tensor bit by bit."""
    assert actual.config == expected.config
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert actual.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(actual.tensors[name].read(), tensor.read()), name
    assert actual.provenance.warnings == [] and actual.provenance.pickle_classes == []


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_reads_back_bit_equal(name: str, tmp_path: Path) -> None:
    # 52 rows are 13 x 4: Megatron v2.5, to which legacy names go, pads by its formula.
    source = memory(CONFIGS[name], make_vocab_size_divisible_by=13)
    for tp in (1, 2, 4):
        for pp in (1, 2):
            folder = write_megatron_torch(source, tmp_path / f"{tp}x{pp}", tp=tp, pp=pp)
            written = open_checkpoint(folder)
            assert_same(written, source)
            assert written.provenance.tensor_parallel == tp
            assert written.provenance.pipeline_parallel == pp
            assert written.provenance.checkpoint_version == 3.0
            keys = contents(next(iter(rank_files(folder).values())))["model"].keys()
            assert ("language_model" in keys) == (name in LEGACY)


@pytest.mark.parametrize("name", ["gpt", "llama", "bert", "classification"])
def test_tp_4_to_1_to_2x2_to_4_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Files and all: weights, padding rows, args."""
    model = dataclasses.replace(CONFIGS[name], vocab_size=1024)  # 1000 words, 64 x 4
    source = memory(model, make_vocab_size_divisible_by=64, tensor_model_parallel_size=4)
    first = write_megatron_torch(source, tmp_path / "4", tp=4, iteration=7)
    one = write_megatron_torch(open_checkpoint(first), tmp_path / "1")
    four = write_megatron_torch(open_checkpoint(one), tmp_path / "2x2", tp=2, pp=2)
    last = write_megatron_torch(open_checkpoint(four), tmp_path / "4 again", tp=4)
    assert rank_files(one).keys() == {"mp_rank_00"}
    assert len(rank_files(four)) == 4
    # megatron-core's names keep the rows for any true size, those of v2.5 the run's divisor.
    divisor = contents(rank_files(one)["mp_rank_00"])["args"].make_vocab_size_divisible_by
    assert divisor == (64 if name == "classification" else 256)
    before, after = rank_files(first), rank_files(last)
    assert before.keys() == after.keys()
    for rank, path in before.items():
        assert path.read_bytes() == after[rank].read_bytes(), rank


@pytest.mark.long
def test_every_genuine_checkpoint_reads_back_bit_equal(oracles: Path, tmp_path: Path) -> None:
    roots = [path for path in sorted(oracles.iterdir()) if list(path.glob("iter_*/mp_rank_*"))]
    assert roots, f"no checkpoint in torch format in {oracles}"
    for root in roots:
        source = open_checkpoint(root)
        for tp, pp in ((1, 1), (2, 2), (4, 1)):
            folder = write_megatron_torch(source, tmp_path / f"{root.name}-{tp}-{pp}", tp=tp, pp=pp)
            written = open_checkpoint(folder)
            assert written.provenance.names == source.provenance.names
            rows = source.config.vocab_size
            if source.provenance.names == "legacy":  # GPT-2's 50,432 rows become 50,688 for tp 4
                multiple = source.provenance.args["make_vocab_size_divisible_by"] * tp
                rows = -(-rows // multiple) * multiple
            assert_same(written, with_rows(source, rows))
            assert written.provenance.iteration == source.provenance.iteration == 1
            shutil.rmtree(folder)


# Settings that a rewritten checkpoint may have anew or otherwise than the genuine one.
NEW_ARGS = {
    "apply_layernorm_1p",  # under the name of other years
    "norm_epsilon",
    "iteration",
    "no_save_rng",  # no optimizer, no random state in these files
    "no_save_optim",
    "use_distributed_optimizer",
    "use_mcore_models",
    "apply_query_key_layer_scaling",  # a numerical device of the run
    "bert_binary_head",  # true even in files with a task head
}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("mcore016_gpt2_tp2", "core"),
        ("mcore016_gpt2_tp2_pp2", "core"),
        ("mcore016_gpt2_tp2_fusedgelu", "core"),
        ("mcore016_llama_tp2", "core"),
        ("mcore016_bert_tp2", "core"),
        ("v25_gpt_tp4_h8", "legacy"),
        ("v25_gpt_tp2_fp16", "legacy"),
        ("v25_bert_tp2", "legacy"),
        ("v25_bert_tp2_fusedgelu", "legacy"),
        ("v25_bertmc_tp2", "legacy"),
    ],
)
def test_files_have_the_keys_tensors_and_args_of_genuine_ones(
    name: str, names: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    genuine = genuine_checkpoint(name, request)
    source = open_checkpoint(genuine)
    folder = write_megatron_torch(
        source,
        tmp_path / "out",
        tp=source.provenance.tensor_parallel,
        pp=source.provenance.pipeline_parallel,
        names=names,
    )
    ours, theirs = rank_files(folder), rank_files(genuine)
    assert ours.keys() == theirs.keys()
    for rank in ours:
        mine, real = read_torch_file(ours[rank]).value, read_torch_file(theirs[rank]).value
        for key, expected in (wanted := flat(real["model"])).items():
            actual = flat(mine["model"])[key]
            assert actual is expected is None or torch.equal(actual.read(), expected.read()), key
        assert flat(mine["model"]).keys() == wanted.keys()
        saved = vars(real["args"])
        for field, value in vars(mine["args"]).items():
            if field in saved and field not in NEW_ARGS:
                assert value == saved[field], field
        # What was invented beside them belongs to versions of Megatron that came later.
        added = vars(mine["args"]).keys() - saved.keys() - NEW_ARGS
        assert not added or names == "legacy", added


def genuine_checkpoint(name: str, request: pytest.FixtureRequest) -> Path:
    """One of the copies in tests/oracles, else one of the full set."""
    copy = ORACLES / name
    full = None if copy.is_dir() else request.getfixturevalue("oracles") / name
    if full is not None and not full.is_dir():
        pytest.skip(f"no {name} among the genuine checkpoints")
    return full or copy


def test_a_tied_head_is_copied_to_the_last_stage(tmp_path: Path) -> None:
    source = memory(CONFIGS["gpt"])
    words = source.tensors[EMBEDDINGS].read()
    for names, key in (
        ("core", "output_layer.weight"),
        ("legacy", "word_embeddings_for_head/weight"),
    ):
        folder = write_megatron_torch(
            source, tmp_path / names, tp=2, pp=2, names=names, make_vocab_size_divisible_by=26
        )
        files = rank_files(folder)
        for rank in (0, 1):
            model = flat(contents(files[f"mp_rank_{rank:02d}_001"])["model"])
            assert torch.equal(model[key], words[rank * 26 : (rank + 1) * 26])
            assert not any("embedding/" in name or "embedding." in name for name in model)
            assert key not in flat(contents(files[f"mp_rank_{rank:02d}_000"])["model"])


# GPT-2's and BERT's tables, from docs/megatron.md, "Vocabulary padding".
@pytest.mark.parametrize(
    ("true_size", "tp", "rows"),
    [
        (50257, 1, 50304),
        (50257, 2, 50432),
        (50257, 4, 50688),
        (50257, 8, 51200),
        (30522, 1, 30592),
        (30522, 8, 30720),
        (28996, 1, 29056),
        (28996, 8, 29696),
    ],
)
def test_a_known_vocabulary_is_padded_by_megatrons_formula(
    true_size: int, tp: int, rows: int
) -> None:
    source = memory(dataclasses.replace(GPT, hidden_size=1, vocab_size=51200))
    assert padded_vocabulary(source, tp, true_size, None) == (rows, 128)
    assert padded_vocabulary(source, tp, true_size, 1) == (-(-true_size // tp) * tp, 1)


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("saved_tp", [1, 2, 4, 6])
@pytest.mark.parametrize("saved_divisor", [1, 3, 64, 128])
def test_an_unknown_vocabulary_keeps_its_rows_and_gets_the_divisor_that_gives_them(
    saved_divisor: int, saved_tp: int, tp: int
) -> None:
    """Megatron, told the divisor, arrives at the stored rows whatever the true size was."""
    multiple = saved_divisor * saved_tp
    rows = 16 * multiple
    args = {
        "make_vocab_size_divisible_by": saved_divisor,
        "tensor_model_parallel_size": saved_tp,
    }
    source = memory(dataclasses.replace(GPT, hidden_size=1, vocab_size=rows), **args)
    kept, divisor = padded_vocabulary(source, tp, None, None)
    assert kept == rows
    for true_size in {rows - multiple + 1, rows - multiple // 2, rows}:
        assert -(-true_size // (divisor * tp)) * divisor * tp == rows


def test_rows_are_added_like_the_last_one_and_cut_off_at_the_end(tmp_path: Path) -> None:
    model = dataclasses.replace(GPT, vocab_size=50)
    source = memory(model)
    words = source.tensors[EMBEDDINGS].read()

    padded = open_checkpoint(write_megatron_torch(source, tmp_path / "padded", tp=4))
    assert padded.config == dataclasses.replace(model, vocab_size=512)  # 50 rows are not 4 x n
    read = padded.tensors[EMBEDDINGS].read()
    assert torch.equal(read[:50], words)
    assert torch.equal(read[50:], words[49].expand(462, -1))

    cut = write_megatron_torch(
        padded, tmp_path / "cut", true_vocab_size=50, make_vocab_size_divisible_by=20
    )
    read = open_checkpoint(cut).tensors[EMBEDDINGS].read()
    assert torch.equal(read, torch.cat([words, words[49].expand(10, -1)]))

    longer = write_megatron_torch(source, tmp_path / "longer", make_vocab_size_divisible_by=64)
    assert open_checkpoint(longer).config.vocab_size == 64


def test_weights_take_another_dtype(tmp_path: Path) -> None:
    source = memory(CONFIGS["llama"])
    folder = write_megatron_torch(source, tmp_path / "out", tp=2, dtype=torch.bfloat16)
    written = open_checkpoint(folder)
    assert written.config.params_dtype == "bfloat16"
    for name, tensor in source.tensors.items():
        assert torch.equal(written.tensors[name].read(), tensor.read().bfloat16()), name
    args = contents(rank_files(folder)["mp_rank_01"])["args"]
    assert (args.params_dtype, args.fp16, args.bf16) == (torch.bfloat16, False, True)


@pytest.mark.parametrize(
    ("iteration", "folder", "tracker"),
    [(None, "release", "release"), ("release", "release", "release"), (70, "iter_0000070", "70")],
)
def test_the_tracker_names_the_folder(
    iteration: int | str | None, folder: str, tracker: str, tmp_path: Path
) -> None:
    root = write_megatron_torch(memory(), tmp_path / "out", iteration=iteration)
    assert (root / "latest_checkpointed_iteration.txt").read_text() == tracker
    assert len(list(root.iterdir())) == 2
    assert contents(root / folder / "mp_rank_00" / "model_optim_rng.pt")["iteration"] == (
        70 if iteration == 70 else 0
    )
    assert open_checkpoint(root).provenance.iteration == (iteration or "release")


def test_args_carry_settings_and_nothing_that_names_a_place_or_a_person(tmp_path: Path) -> None:
    class Sealed:
        """Stands for Megatron's enums, which nobody without Megatron can unpickle."""

    source = memory(
        tokenizer_type="GPT2BPETokenizer",
        seq_length=12,
        lr=1.5e-4,
        seed=1234,
        vocab_file="/home/somebody/vocab.json",
        save="secret-bucket",
        wandb_entity="somebody",
        data_path=["/data/corpus"],
        model_type=Sealed(),
        rank=5,
        virtual_pipeline_model_parallel_size=3,
        num_layers=99,
    )
    files = rank_files(write_megatron_torch(source, tmp_path / "out", tp=2, pp=2))
    args = vars(contents(files["mp_rank_01_001"])["args"])
    assert args["tokenizer_type"] == "GPT2BPETokenizer"
    assert (args["seq_length"], args["lr"], args["seed"]) == (12, 1.5e-4, 1234)
    assert args["max_position_embeddings"] == 16
    assert args["num_layers"] == 2
    assert args["virtual_pipeline_model_parallel_size"] is None
    assert (args["rank"], args["world_size"]) == (3, 4)
    assert not {"vocab_file", "save", "wandb_entity", "data_path", "model_type"} & args.keys()
    assert b"somebody" not in files["mp_rank_00_000"].read_bytes()


def test_swapped_rank_folders_are_found_out(tmp_path: Path) -> None:
    folder = write_megatron_torch(memory(), tmp_path / "out", tp=2) / "release"
    (folder / "mp_rank_00").rename(folder / "x")
    (folder / "mp_rank_01").rename(folder / "mp_rank_00")
    (folder / "x").rename(folder / "mp_rank_01")
    with pytest.raises(InputError, match="renamed or swapped"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("gpt", {"tp": 3}, "tp must divide both; it allows tp in 1, 2, 4"),
        ("gpt", {"pp": 3}, "cannot split 2 layers over pp=3 .* pp in 1, 2"),
        ("gpt", {"tp": 0}, "at least 1"),
        ("bert original order", {"names": "core"}, "BERT's original order.* write legacy names"),
        ("classification", {"names": "core"}, "no task heads"),
        ("qk layernorm", {"names": "legacy"}, "norm of queries and keys.* write core names"),
        ("gpt", {"true_vocab_size": 53}, "the tokenizer has 53 entries but the model has 52 rows"),
        ("gpt", {"make_vocab_size_divisible_by": 0}, "at least 1"),
    ],
)
def test_what_megatron_could_not_load_is_refused(
    model: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_megatron_torch(memory(CONFIGS[model]), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"head_activation": "gelu_tanh"},  # erf in the MLP, tanh in the head
        {"activation": "gelu_tanh", "add_bias_linear": False, "add_qkv_bias": False},
        {"add_qkv_bias": False},
        {"position_embedding_type": "rope", "rope_scaling": RopeScaling(8.0, 2.0)},
    ],
)
def test_models_that_no_megatron_has_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="so its names cannot hold this model"):
        write_megatron_torch(memory(config(CONFIGS["bert"], **changes)), tmp_path / "out")


def test_values_beyond_a_narrower_dtype_are_refused(tmp_path: Path) -> None:
    weights = state_dict(CONFIGS["gpt"])
    weights["decoder.final_layernorm.weight"][3] = 70000.0
    source = checkpoint_from_state_dict(CONFIGS["gpt"], weights)
    with pytest.raises(InputError, match=r"final_layernorm.weight has values up to 7e\+04"):
        write_megatron_torch(source, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    write_megatron_torch(source, tmp_path / "out", dtype=torch.bfloat16)


def test_an_existing_target_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "empty").parent.mkdir()
    first = open_checkpoint(write_megatron_torch(memory(), target, tp=2))  # an empty one is free
    with pytest.raises(InputError, match="already exists.*--overwrite"):
        write_megatron_torch(memory(CONFIGS["bert"]), target)
    assert_same(open_checkpoint(target), first)

    # Never onto itself, whatever may be replaced.
    with pytest.raises(InputError, match="holds the checkpoint that is being converted"):
        write_megatron_torch(first, target, tp=4, overwrite=True)
    assert_same(open_checkpoint(target), memory())
    write_megatron_torch(memory(CONFIGS["bert"]), target, tp=2, overwrite=True)
    assert_same(open_checkpoint(target), memory(CONFIGS["bert"]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to my mother.txt").write_text("dear")
    with pytest.raises(InputError, match="holds no checkpoint .found to my mother.txt."):
        write_megatron_torch(memory(), tmp_path / "letters", overwrite=True)


def test_an_interrupted_write_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = write_megatron_torch(memory(), tmp_path / "out")
    before = rank_files(target)["mp_rank_00"].read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    for place in (target, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_megatron_torch(memory(), place, tp=4, overwrite=True, on_progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert rank_files(target)["mp_rank_00"].read_bytes() == before


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    target = write_megatron_torch(
        memory(), tmp_path / "out", tp=2, pp=2, on_progress=lambda *step: steps.append(step)
    )
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    files = [flat(contents(path)["model"]).values() for path in rank_files(target).values()]
    stored = sum(x.nbytes for file in files for x in file if isinstance(x, Tensor))
    assert steps[-1] == (stored, stored)
    assert {total for _, total in steps} == {stored}


def test_a_state_dict_must_fit_its_config() -> None:
    weights = state_dict(GPT)
    del weights["decoder.final_layernorm.bias"]
    with pytest.raises(InputError, match="lacks the parameter decoder.final_layernorm.bias"):
        checkpoint_from_state_dict(GPT, weights)
    half = {name: tensor.half() for name, tensor in state_dict(GPT).items()}
    assert checkpoint_from_state_dict(GPT, half).config.params_dtype == "float16"


@pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_core_loads_and_runs_the_files(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Strictly, key by key; and its own forward on them gives what other versions' gave."""
    triples: list[Path | str] = []
    for name in ("gpt with wide heads", "qk layernorm", "qwen", "neox", "bert"):
        folder = write_megatron_torch(memory(CONFIGS[name]), tmp_path / name)
        triples += [rank_files(folder)["mp_rank_00"], "-", folder / "output.pt"]
    genuine = {
        name: genuine_checkpoint(name, request)
        for name in ("v115_gpt_tp2", "v20_gpt_tp1_pp2", "mcore016_llama_tp2")
    }
    for name, path in genuine.items():
        folder = write_megatron_torch(open_checkpoint(path), tmp_path / name, names="core")
        triples += [rank_files(folder)["mp_rank_00"], path / "golden.pt", folder / "output.pt"]
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            SUPPORT / "fuzz" / "megatron_core_torch.py",
            tmp_path,
            *triples,
        ],
        check=True,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1", "PYTORCH_JIT": "0", "OMP_NUM_THREADS": "1"},
    )
    for output in triples[2::3]:
        assert Path(output).is_file()
    for name, path in genuine.items():
        golden = torch.load(path / "golden.pt", weights_only=True)
        logits = torch.load(tmp_path / name / "output.pt")["logits"]
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), golden["labels"], reduction="none"
        )
        torch.testing.assert_close(loss, golden["token_loss"], rtol=0, atol=1e-4)
