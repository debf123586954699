"""NeMo 1: archives and folders, with and without megatron-core, and the words of its settings."""

from __future__ import annotations

import dataclasses
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import random_models
from support.folders import layouts
from support.folders.synthetic import GPT

from mlm_eval.checkpoints.archives.tar_archive import MemberPath
from mlm_eval.checkpoints.archives.unpacking import LARGEST_RATIO
from mlm_eval.checkpoints.checkpoint import Checkpoint, full_digest
from mlm_eval.checkpoints.config import ModelConfig, RopeScaling
from mlm_eval.checkpoints.convert import convert
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.lazy import StoredTensor
from mlm_eval.checkpoints.open import open_checkpoint

MODEL = layouts.MODEL
TANH = dataclasses.replace(GPT, activation="gelu_tanh")
PLAIN_QUERIES = dataclasses.replace(MODEL, num_query_groups=MODEL.num_attention_heads)
NEMO_LLAMA = dataclasses.replace(PLAIN_QUERIES, rotary_base=10000.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_is(found: Checkpoint, model: ModelConfig) -> None:
    """The checkpoint has a model's settings, and the weights that were made for it."""
    assert found.config == model
    for name, tensor in layouts.weights_of(model).items():
        assert torch.equal(found.tensors[name].read(), tensor), name


@pytest.fixture(params=["folder", "tar", "gzip"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Path]:
    """Leave a folder as it is, or pack it."""

    def store(folder: Path) -> Path:
        if request.param == "folder":
            return folder
        mode = "w" if request.param == "tar" else "w:gz"
        return layouts.packed(folder, tmp_path / "model.nemo", mode)

    return store


RANKS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "core": (MODEL, {}),
    "core, tp 2": (MODEL, {"tp": 2}),
    "core, tp 2 x pp 2": (MODEL, {"tp": 2, "pp": 2}),
    "NeMo's": (TANH, {"mcore_gpt": False}),
    "NeMo's, tp 2": (TANH, {"mcore_gpt": False, "tp": 2}),
    "NeMo's, tp 2 x pp 4": (TANH, {"mcore_gpt": False, "tp": 2, "pp": 4}),
    "NeMo's, oldest": (TANH, {"mcore_gpt": False, "tp": 2, "megatron_legacy": True}),
    "NeMo's, gated": (PLAIN_QUERIES, {"mcore_gpt": False, "tp": 2}),
    "NeMo's, two matrices": (
        PLAIN_QUERIES,
        {"mcore_gpt": False, "tp": 2, "activation": "swiglu", "two_matrices": True},
    ),
}


@pytest.mark.parametrize("kind", RANKS)
def test_every_rank_makes_up_the_model(kind: str, stored: Callable[[Path], Path], tmp_path: Path):
    model, how = RANKS[kind]
    version = 0.0 if how.get("megatron_legacy") else 3.0
    layouts.nemo_ranks(tmp_path / "made", model, version=version, **how)
    found = open_checkpoint(stored(tmp_path / "made"))
    assert_is(found, model)
    assert found.provenance.names == ("core" if how.get("mcore_gpt", True) else "legacy")
    assert found.provenance.tensor_parallel == how.get("tp", 1)
    assert found.provenance.pipeline_parallel == how.get("pp", 1)
    assert not found.provenance.warnings


@pytest.mark.parametrize("make", [layouts.nemo_dist, layouts.nemo_zarr])
def test_whole_tensors_are_read(
    make: Callable[[Path], list[str]], stored: Callable[[Path], Path], tmp_path: Path
):
    make(tmp_path / "made")
    assert_is(open_checkpoint(stored(tmp_path / "made")), MODEL)


# ---- archives ----------------------------------------------------------------------------------


def test_an_archive_is_read_where_it_is(tmp_path: Path, cache: Path):
    """Nothing is unpacked, and what depends on the bytes is that of the folder."""
    layouts.nemo_dist(tmp_path / "made")
    unpacked = open_checkpoint(tmp_path / "made")
    archive = layouts.packed(tmp_path / "made", tmp_path / "model.nemo")
    found = open_checkpoint(archive)
    assert found.provenance.path == MemberPath(archive) / "model_weights"
    assert found.provenance.digest == unpacked.provenance.digest
    assert full_digest(found) == full_digest(unpacked)
    assert_is(found, MODEL)
    assert not cache.exists()


def test_slices_of_an_archive_touch_no_more(tmp_path: Path):
    """A rank's file is mapped at its offset, wherever in the archive that is."""
    layouts.nemo_ranks(tmp_path / "made", TANH, mcore_gpt=False)
    (tmp_path / "made/a_first_file").write_bytes(b"x" * 5000)
    found = open_checkpoint(layouts.packed(tmp_path / "made", tmp_path / "model.nemo"))
    tensor = found.tensors["embedding.word_embeddings.weight"]
    assert isinstance(tensor, StoredTensor)
    archive, offset = tensor.file.path.place()  # type: ignore[attr-defined]
    assert archive == tmp_path / "model.nemo" and offset > 5000
    whole = layouts.weights_of(TANH)["embedding.word_embeddings.weight"]
    assert torch.equal(tensor.read(0, slice(3, 7)), whole[3:7])


def test_an_archive_is_converted_as_its_folder_is(tmp_path: Path):
    layouts.nemo_dist(tmp_path / "made")
    archive = layouts.packed(tmp_path / "made", tmp_path / "model.nemo")
    for name, source in (("a", tmp_path / "made"), ("b", archive)):
        convert(open_checkpoint(source), "hf", tmp_path / name)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert one == other


def test_an_archive_of_a_folder_of_any_name(tmp_path: Path):
    layouts.nemo_dist(tmp_path / "made")
    archive = layouts.packed(tmp_path / "made", tmp_path / "model", prefix="my-model/")
    assert_is(open_checkpoint(archive), MODEL)


def test_a_compressed_archive_is_unpacked_once(tmp_path: Path, cache: Path):
    layouts.nemo_ranks(tmp_path / "made")
    archive = layouts.packed(tmp_path / "made", tmp_path / "model.nemo", "w:gz")
    first, second = (open_checkpoint(archive).provenance.path for _ in range(2))
    assert first == second
    assert [path.name for path in (cache / "mlm-eval/unpacked").iterdir()] == [first.name]


def test_an_archive_that_was_replaced_is_read_anew(tmp_path: Path):
    archive = tmp_path / "model.nemo"
    for model in (TANH, dataclasses.replace(TANH, hidden_size=32, kv_channels=8)):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        layouts.nemo_ranks(tmp_path / "made", model, mcore_gpt=False)
        assert_is(open_checkpoint(layouts.packed(tmp_path / "made", archive)), model)


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


TRICKS = {
    "absolute": (member("/etc/evil"), "unsafe name /etc/evil"),
    "up": (member("model_weights/../../evil"), "unsafe name"),
    "backslash": (member("..\\evil"), "unsafe name"),
    "symbolic link": (member("a", tarfile.SYMTYPE, linkname="/etc/passwd"), "holds a, a link"),
    "hard link": (member("a", tarfile.LNKTYPE, linkname="model_config.yaml"), "holds a, a link"),
    "character device": (member("a", tarfile.CHRTYPE), "holds a, a device"),
    "block device": (member("a", tarfile.BLKTYPE), "holds a, a device"),
    "pipe": (member("a", tarfile.FIFOTYPE), "holds a, a device or other special file"),
    "file below a file": (member("model_config.yaml/a"), "below a file"),
}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_of_archives_are_refused(trick: str, mode: str, tmp_path: Path, cache: Path):
    layouts.nemo_dist(tmp_path / "made")
    info, message = TRICKS[trick]
    archive = tmp_path / "model.nemo"
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        for entry in sorted((tmp_path / "made").iterdir()):
            tar.add(entry, f"./{entry.name}")
        tar.addfile(info)
    if mode == "w:gz" and trick == "file below a file":
        message = "cannot be unpacked"
    with pytest.raises(InputError, match=message):
        open_checkpoint(archive)
    assert not (tmp_path / "evil").exists() and not (tmp_path.parent / "evil").exists()
    left = list((cache / "mlm-eval/unpacked").iterdir()) if cache.exists() else []
    assert left == []


def test_a_sparse_file_is_refused(tmp_path: Path):
    """GNU tar's files with holes do not stand in the archive as they are."""
    header = bytearray(member("model_config.yaml", size=0).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:398] = b"%011o " % 0
    header[398:410] = b"%011o " % 4
    header[483:495] = b"%011o " % 4
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.nemo").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(InputError, match="a file with holes"):
        open_checkpoint(tmp_path / "a.nemo")


@pytest.mark.long
def test_what_unpacks_to_far_too_much_is_refused(tmp_path: Path, cache: Path):
    with tarfile.open(tmp_path / "bomb.nemo", "w:gz", compresslevel=1) as tar:
        for number in range(3):
            info = member(f"zeros{number}", size=1 << 25)
            tar.addfile(info, io.BytesIO(bytes(1 << 25)))
    assert (tmp_path / "bomb.nemo").stat().st_size * LARGEST_RATIO < 3 << 25
    with pytest.raises(InputError, match="more than 20 times its size"):
        open_checkpoint(tmp_path / "bomb.nemo")
    assert list((cache / "mlm-eval/unpacked").iterdir()) == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_cut_off_archive_is_one_sentence(share: float, mode: str, tmp_path: Path):
    layouts.nemo_dist(tmp_path / "made")
    archive = layouts.packed(tmp_path / "made", tmp_path / "model.nemo", mode)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError) as caught:
        open_checkpoint(archive)
    assert str(caught.value).isprintable()


def test_archives_of_something_else_are_named(tmp_path: Path):
    (tmp_path / "made/data").mkdir(parents=True)
    (tmp_path / "made/data/x.txt").write_text("x")
    archive = layouts.packed(tmp_path / "made", tmp_path / "x.tar")
    with pytest.raises(InputError, match="is a tar archive, and not of a NeMo model"):
        open_checkpoint(archive)
    (tmp_path / "x.nemo").write_text("not a tar at all, and long enough to be looked at")
    with pytest.raises(InputError, match="not the tar archive that a .nemo file is"):
        open_checkpoint(tmp_path / "x.nemo")


def test_an_archive_alone_in_a_folder_is_found_and_two_are_not(tmp_path: Path):
    layouts.nemo_archive(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/made")
    (tmp_path / "run/README.md").write_text("a model")
    (tmp_path / "run/.git").mkdir()
    assert_is(open_checkpoint(tmp_path / "run"), MODEL)
    shutil.copy(tmp_path / "run/model.nemo", tmp_path / "run/second.nemo")
    with pytest.raises(InputError, match="no checkpoint that mlm-eval knows"):
        open_checkpoint(tmp_path / "run")


# ---- settings ----------------------------------------------------------------------------------


def config_of(tmp_path: Path, model: ModelConfig = MODEL, **config: Any) -> ModelConfig:
    layouts.nemo_ranks(tmp_path / "made", model, **config)
    return open_checkpoint(tmp_path / "made").config


def test_interpolated_positions_act_as_nemo_builds_them(tmp_path: Path):
    """Megatron-LM's own model is never given the factor; NeMo's is, old and new."""
    found = config_of(tmp_path / "a", seq_len_interpolation_factor=4)
    assert found.rotary_seq_len_interpolation_factor == 4
    found = config_of(
        tmp_path / "b", PLAIN_QUERIES, mcore_gpt=False, seq_len_interpolation_factor=2
    )
    assert found.rotary_seq_len_interpolation_factor == 2 and found.rotary_base == 500000
    assert config_of(tmp_path / "c", scale_positional_embedding=True).rope_scaling == RopeScaling()


def test_gemmas_embeddings_are_scaled(tmp_path: Path):
    found = config_of(tmp_path, apply_embedding_scaling=True)
    assert found.embedding_multiplier == MODEL.hidden_size**0.5


@pytest.mark.parametrize(
    ("model", "said", "expected"),
    [
        (TANH, {"activation": "gelu"}, "gelu_tanh"),
        (TANH, {"activation": "gelu", "bias_activation_fusion": None}, "gelu"),
        (TANH, {"activation": "gelu", "bias_activation_fusion": False}, "gelu"),
        (TANH, {"activation": "gelu", "bias_activation_fusion": False, "openai_gelu": True},
         "gelu_tanh"),
        (TANH, {"activation": "squared-relu"}, "squared_relu"),
        (MODEL, {"activation": "fast-swiglu"}, "swiglu"),
        (MODEL, {"activation": "swiglu"}, "swiglu"),
        (MODEL, {"activation": "fast-geglu", "bias_activation_fusion": True}, "geglu_tanh"),
        (MODEL, {"activation": "geglu", "bias_activation_fusion": False}, "geglu"),
        (MODEL, {"activation": "geglu", "openai_gelu": True}, "geglu_tanh"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mcore", [True, False])
def test_activations_by_nemos_words(
    model: ModelConfig, said: dict[str, Any], expected: str, mcore: bool, tmp_path: Path
):
    if not mcore:
        model = dataclasses.replace(model, num_query_groups=model.num_attention_heads)
    assert config_of(tmp_path, model, mcore_gpt=mcore, **said).activation == expected


def test_fusion_is_on_where_nothing_is_said(tmp_path: Path):
    layouts.nemo_ranks(tmp_path, TANH)
    path = tmp_path / "model_config.yaml"
    said = yaml.safe_load(path.read_text())
    del said["bias_activation_fusion"]
    path.write_text(yaml.safe_dump(said))
    assert open_checkpoint(tmp_path).config.activation == "gelu_tanh"


def test_zero_centred_gains_references_and_numbers(tmp_path: Path):
    found = config_of(tmp_path / "a", TANH, normalization="layernorm1p")
    assert found.layernorm_zero_centered_gamma
    found = config_of(
        tmp_path / "b",
        encoder_seq_length=48,
        max_position_embeddings="${model.encoder_seq_length}",
        ffn_hidden_size="${multiply:4, ${.hidden_size}}",
        layernorm_epsilon="1e-5",  # without a point YAML takes it for a text
    )
    assert (found.max_position_embeddings, found.layernorm_epsilon) == (48, 1e-5)


REFUSED_WORDS = [
    ({"position_embedding_type": "kerple"}, "position_embedding_type = kerple"),
    ({"position_embedding_type": "xpos"}, "position_embedding_type = xpos"),
    ({"position_embedding_type": "sandwich"}, "position_embedding_type = sandwich"),
    ({"activation": "reglu"}, "reglu"),
    ({"activation": "approx-gelu"}, "approx-gelu"),
    ({"transformer_block_type": "post_ln"}, "transformer_block_type = post_ln"),
    ({"transformer_block_type": "normformer"}, "transformer_block_type = normformer"),
    ({"attention_type": "sliding"}, "attention_type = sliding"),
    ({"normalize_attention_scores": False}, "normalize_attention_scores = False"),
    ({"headscale": True}, "headscale = True"),
    ({"multi_query_attention": True}, "multi_query_attention = True"),
    ({"hyena": {"order": 2}}, "hyena"),
    ({"mcore_customization_config": {"new_decoder_architecture": True}}, "Falcon or Gemma 2"),
    ({"drop_layers": [1]}, "drop_layers"),
    ({"normalization": "low_precision_layernorm"}, "normalization = low_precision_layernorm"),
    ({"num_moe_experts": 8}, "mixture of experts"),
]


@pytest.mark.parametrize(("said", "message"), REFUSED_WORDS)
def test_what_is_not_computed_is_refused_by_nemos_word(
    said: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(InputError, match=message):
        config_of(tmp_path, **said)


def test_unknown_words_are_listed_and_those_of_the_run_are_not(tmp_path: Path):
    layouts.nemo_ranks(tmp_path, attention_twist=0.5, sequence_parallel=True, fp8=False)
    [warning] = open_checkpoint(tmp_path).provenance.warnings
    assert warning.endswith("not heeded: attention_twist")


@pytest.mark.parametrize(
    "text", ["a: !!python/object/apply:os.system ['touch {canary}']\n", "!x {}\n", "[1, 2\n", "5\n"]
)
def test_nothing_in_the_settings_runs(text: str, tmp_path: Path):
    layouts.nemo_ranks(tmp_path / "made")
    canary = tmp_path / "canary"
    (tmp_path / "made/model_config.yaml").write_text(text.replace("{canary}", str(canary)))
    archive = layouts.packed(tmp_path / "made", tmp_path / "model.nemo")
    for door in (tmp_path / "made", archive):
        with pytest.raises(InputError, match="model_config.yaml"):
            open_checkpoint(door)
    assert not canary.exists()


# ---- what is missing -----------------------------------------------------------------------------


def test_a_missing_rank_is_named(tmp_path: Path):
    layouts.nemo_ranks(tmp_path, tp=2, pp=2)
    shutil.rmtree(tmp_path / "tp_rank_01_pp_rank_001")
    with pytest.raises(InputError, match="3 rank file.* 2 tensor-parallel x 2.*rank 1 of stage 1"):
        open_checkpoint(tmp_path)


def test_settings_or_weights_alone_are_named(tmp_path: Path):
    layouts.nemo_ranks(tmp_path / "a", tp=2)
    (tmp_path / "a/model_config.yaml").unlink()
    for door in ("a", "a/mp_rank_00", "a/mp_rank_00/model_weights.ckpt"):
        with pytest.raises(InputError, match="is a NeMo checkpoint without model_config.yaml"):
            open_checkpoint(tmp_path / door)
    layouts.nemo_folder(tmp_path / "b", **layouts.nemo_config())
    with pytest.raises(InputError, match="model_config.yaml without weights"):
        open_checkpoint(tmp_path / "b")


def test_adapters_are_refused_by_name(tmp_path: Path):
    layouts.nemo_ranks(tmp_path)
    path = tmp_path / "model_weights.ckpt"
    state = torch.load(path)
    name = "model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight"
    torch.save({**state, name: torch.ones(2, 2)}, path)
    with pytest.raises(InputError, match="unmerged adapters"):
        open_checkpoint(tmp_path)


def test_other_weights_under_the_name_are_refused(tmp_path: Path):
    layouts.nemo_ranks(tmp_path)
    for content in ({"a": 1}, [1, 2], {}):
        torch.save(content, tmp_path / "model_weights.ckpt")
        with pytest.raises(InputError, match="model_weights.ckpt"):
            open_checkpoint(tmp_path)


def test_random_models_of_both_codes_score_the_same(tmp_path: Path):
    """The same weights, under megatron-core's names and NeMo's, are one function."""
    tokens = torch.arange(7)[None]
    found = []
    for mcore in (True, False):
        layouts.nemo_ranks(tmp_path / str(mcore), NEMO_LLAMA, tp=2, mcore_gpt=mcore)
        checkpoint = open_checkpoint(tmp_path / str(mcore))
        weights = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
        model = random_models.on_one_rank(checkpoint.config, weights)
        found.append(random_models.all_log_probs(model, model(tokens)))
    assert torch.equal(*found)


@pytest.mark.parametrize("mcore", [True, False])
def test_the_last_stages_copy_of_a_tied_embedding_is_left_out(mcore: bool, tmp_path: Path):
    """NeMo's own layers call it word_embeddings, megatron-core's output_layer."""
    model = dataclasses.replace(TANH, untie_embeddings_and_output_weights=False)
    layouts.nemo_ranks(tmp_path, model, tp=2, pp=2, mcore_gpt=mcore)
    name = "model.module.output_layer.weight" if mcore else "model.word_embeddings.weight"
    for rank in range(2):
        first, last = (
            tmp_path / f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/model_weights.ckpt"
            for stage in range(2)
        )
        table = next(v for k, v in torch.load(first).items() if "word_embeddings" in k)
        torch.save({**torch.load(last), name: table.clone()}, last)
    assert_is(open_checkpoint(tmp_path), model)


def test_a_mixture_of_experts_in_an_archive(tmp_path: Path):
    """Experts in one tensor a matrix, below `model.`, with NeMo's words for the router."""
    model = dataclasses.replace(
        MODEL,
        num_experts=4,
        moe_layers=(0, 1, 2, 3),
        moe_ffn_hidden_size=24,
        moe_router_topk=2,
    )
    layouts.nemo_folder(
        tmp_path / "made",
        **layouts.nemo_config(model, num_moe_experts=4, moe_router_topk=2),
    )
    keys = {}
    for name, tensor in layouts.weights_of(model).items():
        inner = name.replace(".mlp.experts.", ".mlp.experts.experts.")
        keys[f"model.{inner}"] = tensor
    layouts.dcp_folders.save(tmp_path / "made/model_weights", keys, common={})
    found = open_checkpoint(layouts.packed(tmp_path / "made", tmp_path / "model.nemo"))
    assert_is(found, model)
