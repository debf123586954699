"""Hugging Face folders give the log-probabilities that transformers computes from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.huggingface_models import (
    BERT,
    BERT_MODELS,
    GPT_MODELS,
    POSITIONS,
    gpt_model,
    our_log_probs,
    their_log_probs,
    theirs,
    tokens,
)
from support.rounding import assert_same_but_for_rounding

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.safetensors_file import read_safetensors
from mlm_eval.checkpoints.huggingface.read import read_folder
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.parameters import parameters
from mlm_eval.engine.engine import load_model
from mlm_eval.model.tensor_parallel import SINGLE


@pytest.mark.parametrize("kind", GPT_MODELS)
def test_gpt_families_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    model = gpt_model(kind)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    ours, expected = our_log_probs(checkpoint, tokens()), their_log_probs(model, tokens())
    assert expected.std() > 0.5  # far from uniform: an agreement says something
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", BERT_MODELS)
def test_bert_heads_agree_with_transformers(name: str, tmp_path: Path) -> None:
    extra = {"num_labels": 3} if name.endswith("SequenceClassification") else {}
    model = theirs(name, BERT | extra)
    model.save_pretrained(tmp_path)
    bert: Any = load_model(
        open_checkpoint(tmp_path), SINGLE, device=torch.device("cpu"), dtype=torch.float32
    )
    ids, mask = tokens(), torch.ones(2, POSITIONS, dtype=torch.int64)
    mask[1, 15:] = 0
    types = (torch.arange(POSITIONS) > 8).long().expand(2, -1)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    if name.endswith("MultipleChoice"):
        given = {key: value[None] for key, value in given.items()}
    real = mask.bool()
    with torch.inference_mode():
        expected = model(**given)
        states = bert(ids, mask, types)
        heads = bert.head_logits(states)
        if name.endswith("Model"):
            torch.testing.assert_close(
                states[real], expected.last_hidden_state[real], rtol=0, atol=1e-4
            )
            torch.testing.assert_close(
                bert.pooler(states), expected.pooler_output, rtol=0, atol=1e-4
            )
        elif name.endswith("QuestionAnswering"):
            spans = torch.stack([expected.start_logits, expected.end_logits], dim=-1)
            torch.testing.assert_close(bert.qa_head(states)[real], spans[real], rtol=0, atol=1e-4)
        elif name.endswith("MultipleChoice"):
            torch.testing.assert_close(
                heads["multichoice_head"].T, expected.logits, rtol=0, atol=1e-4
            )
        elif name.endswith("SequenceClassification"):
            torch.testing.assert_close(
                heads["classification_head"], expected.logits, rtol=0, atol=1e-4
            )
        elif name.endswith("NextSentencePrediction"):
            torch.testing.assert_close(heads["binary_head"], expected.logits, rtol=0, atol=1e-4)
        else:
            logits = expected.logits if name.endswith("MaskedLM") else expected.prediction_logits
            ours, _ = bert.log_probs(states[real], ids[real])
            theirs_ = logits[real].log_softmax(-1).gather(-1, ids[real][:, None]).squeeze(-1)
            torch.testing.assert_close(ours, theirs_, rtol=0, atol=1e-4)
        if name.endswith("PreTraining"):
            next_sentence = expected.seq_relationship_logits
            torch.testing.assert_close(heads["binary_head"], next_sentence, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa", "llama-biases", "neox", "deepseek-v3"])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_slices_of_ranks_are_slices_of_the_whole(kind: str, tp_size: int, tmp_path: Path) -> None:
    gpt_model(kind).save_pretrained(tmp_path)
    checkpoint = read_folder(tmp_path)
    for name, parameter in parameters(checkpoint.config).items():
        whole = checkpoint.tensors[name].read()
        dim = parameter.rule.dim or 0
        for tp_rank in range(tp_size):
            index = parameter.index(tp_rank, tp_size)
            rows = torch.arange(whole.shape[dim])
            rows = rows if index is None else rows[index]
            assert torch.equal(
                checkpoint.tensors[name].read(dim, index), whole.index_select(dim, rows)
            )


def test_a_bin_file_and_shards_and_base_names_are_read_alike(tmp_path: Path) -> None:
    model = gpt_model("gpt2")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    # As transformers wrote in 2019: no prefix, the causal mask as a buffer, the tied table twice.
    state = {key.removeprefix("transformer."): value for key, value in model.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril().byte()
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    for name, pickled in (("bin", {}), ("old-bin", {"_use_new_zipfile_serialization": False})):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "one" / "config.json", tmp_path / name)
        torch.save(state, tmp_path / name / "pytorch_model.bin", **pickled)

    expected = read_folder(tmp_path / "one")
    digests = {expected.provenance.digest}
    for name in ("shards", "bin", "old-bin"):
        checkpoint = read_folder(tmp_path / name)
        assert checkpoint.config == expected.config
        for key, tensor in expected.tensors.items():
            assert torch.equal(checkpoint.tensors[key].read(), tensor.read()), key
        digests.add(checkpoint.provenance.digest)
    assert len(digests) == 4


def test_two_tables_in_a_tied_model_are_both_used(tmp_path: Path) -> None:
    model = gpt_model("gpt2-untied")
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    checkpoint = read_folder(tmp_path)
    assert checkpoint.config.untie_embeddings_and_output_weights
    assert "two different ones" in checkpoint.provenance.warnings[0]
    ours, expected = our_log_probs(checkpoint, tokens()), their_log_probs(model, tokens())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_every_row_of_a_tied_table_is_compared(tmp_path: Path) -> None:
    """A retrained special token may be all that differs."""
    model = gpt_model("gpt2-untied")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    rows = len(model.lm_head.weight)
    for row in range(0, rows, 7):
        with torch.no_grad():
            model.lm_head.weight[row] += 1
        model.save_pretrained(tmp_path)
        edit_config(tmp_path, tie_word_embeddings=True)
        assert read_folder(tmp_path).config.untie_embeddings_and_output_weights, row
        with torch.no_grad():
            model.lm_head.weight[row] = model.transformer.wte.weight[row]
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    assert not read_folder(tmp_path).config.untie_embeddings_and_output_weights


def test_norms_named_gamma_and_beta(tmp_path: Path) -> None:
    """bert-base-uncased still holds the names that it had in TensorFlow."""
    model = theirs("BertForPreTraining", BERT)
    model.save_pretrained(tmp_path / "new")
    expected = read_folder(tmp_path / "new").tensors
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in model.state_dict().items()
    }
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old")
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    tensors = read_folder(tmp_path / "old").tensors
    assert all(torch.equal(tensors[key].read(), expected[key].read()) for key in expected)


def test_a_sliding_window_of_another_class_limits_the_positions(tmp_path: Path) -> None:
    gpt_model("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, sliding_window=16)
    checkpoint = read_folder(tmp_path)
    assert checkpoint.config.max_position_embeddings == 16
    assert "window of 16" in checkpoint.provenance.warnings[0]
    with pytest.raises(InputError, match="window of 16"):
        read_folder(tmp_path, {"max_position_embeddings": 24})


def test_sources_and_overrides(tmp_path: Path) -> None:
    gpt_model("gpt2").save_pretrained(tmp_path)
    provenance = read_folder(tmp_path, {"activation": "gelu"}).provenance
    assert provenance.format == "huggingface"
    assert provenance.config_sources["activation"] == "--set"
    assert provenance.config_sources["num_layers"] == "config.json n_layer"
    assert read_folder(tmp_path).config.activation == "gelu_tanh"


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded GPT-2 folder and some others, to be copied and damaged."""
    root = tmp_path_factory.mktemp("saved")
    gpt_model("gpt2").save_pretrained(root / "gpt2", max_shard_size="20KB")
    for kind in ("llama", "llama-yarn", "neox", "gemma2", "gemma3"):
        gpt_model(kind).save_pretrained(root / kind)
    return root


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "gpt2",
            {"model_type": "mamba"},
            "'mamba', which mlm-eval does not compute; known are gpt2, llama",
        ),
        ("gpt2", {"scale_attn_weights": False}, "unscaled attention scores"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scores scaled by layer"),
        ("gpt2", {"activation_function": "quick_gelu"}, "'quick_gelu' is not supported"),
        ("gpt2", {"n_layer": "two"}, "n_layer is 'two', expected a value of type int"),
        ("gpt2", {"n_layer": 1}, "does not have, such as transformer.h.1.attn.c_attn.bias"),
        ("gpt2", {"n_layer": 3}, "lacks transformer.h.2.ln_1.weight"),
        ("gpt2", {"n_inner": 64}, "config.json calls for"),
        ("gpt2", {"n_head": 5}, "do not divide the hidden size"),
        ("gpt2", {"vocab_size": 41}, "says vocab_size 41, the embeddings have 40 rows"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantized weights"),
        ("llama", {"hidden_act": "relu"}, "'relu' is not supported for llama"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "'dynamic' .rope_scaling. are not",
        ),
        ("llama", {"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias"),
        ("neox", {"use_parallel_residual": 3}, "use_parallel_residual is 3, expected a value of"),
        ("gpt2", {"n_layer": 10**9}, "says 1000000000 layers, the files hold"),
        ("llama", {"rope_parameters": {"mrope_section": [4]}}, "rotary setting mrope_section"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        (
            "llama",
            {"rope_theta": 10**400, "rope_parameters": None},
            "is not JSON .a whole number of 401 digits",
        ),
        (
            "llama-yarn",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1e999}},
            "attention_factor is inf, expected",
        ),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            "truncate of full_attention .* false, which transformers does not heed",
        ),
        (
            "gemma2",
            {"query_pre_attn_scalar": 10**400},
            "is not JSON .a whole number of 401 digits",
        ),
    ],
)
def test_other_models_are_refused_by_name(
    kind: str, changes: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        read_folder(folder)


@pytest.mark.parametrize(
    "override",
    [{"qk_layernorm": True}, {"softmax_type": "learnable"}, {"num_tokentypes": 2}],
    ids=str,
)
def test_a_setting_that_asks_for_parameters_of_another_class_is_refused(
    override: dict[str, Any], saved: Path
) -> None:
    with pytest.raises(InputError, match="the settings call for .*, which no llama model has"):
        read_folder(saved / "llama", override)


def test_damaged_folders_end_in_one_sentence(saved: Path, tmp_path: Path) -> None:
    def fresh() -> tuple[Path, list[Path]]:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / "gpt2", folder)
        return folder, sorted(folder.glob("*.safetensors"))

    folder, shards = fresh()
    shards[1].unlink()
    with pytest.raises(InputError, match="is missing: [0-9]+ of the [0-9]+ files"):
        read_folder(folder)

    folder, shards = fresh()
    data = shards[0].read_bytes()
    for cut, message in (
        (len(data) - 4, "cut off, .*file not fully covered"),
        (40, "cut off, .*invalid header length"),
        (3, "cut off, .*header too small"),
    ):
        shards[0].write_bytes(data[:cut])
        with pytest.raises(InputError, match=message):
            read_folder(folder)
    shards[0].write_bytes(data + b"1234")
    with pytest.raises(InputError, match="cut off, damaged .*file not fully covered"):
        read_folder(folder)
    shards[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\n")
    with pytest.raises(InputError, match="is a Git LFS pointer, .*git lfs pull"):
        read_folder(folder)
    shards[0].write_bytes(data.replace(b'"F32"', b'"F3X"'))
    with pytest.raises(InputError, match="damaged .*unknown variant `F3X`"):
        read_folder(folder)
    shards[0].write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[4,'))
    with pytest.raises(InputError, match="damaged .*invalid offset"):
        read_folder(folder)
    shutil.copy(shards[1], shards[0])
    with pytest.raises(InputError, match="lists .* that its files do not hold"):
        read_folder(folder)

    folder, shards = fresh()
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[0].name, "../elsewhere.safetensors"))
    with pytest.raises(InputError, match="cannot name a file .it is a path"):
        read_folder(folder)
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        read_folder(folder)
    index.unlink()
    with pytest.raises(InputError, match="no weights: expected model.safetensors"):
        read_folder(folder)
    (folder / "config.json").write_text("[1, 2")
    with pytest.raises(InputError, match="config.json is not JSON"):
        read_folder(folder)


def test_the_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {
        "a": torch.randn(3, 5),
        "b": torch.randn(2, 3, 4).to(torch.bfloat16),
        "c": torch.arange(7, dtype=torch.int64),
        "d": torch.randn(0, 4),
        "e": torch.tensor(2.5, dtype=torch.float16),
    }
    save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = read_safetensors(tmp_path / "x.safetensors").tensors
    assert set(tensors) == set(state)
    for name, value in state.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name].read(), value)


def test_pickles_that_do_harm_are_named(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return os.mkdir, (str(tmp_path / "harm"),)

    model = gpt_model("gpt2")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(dict(model.state_dict()) | {"x": Harm()}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="mkdir"):
        open_checkpoint(tmp_path / "model")
    assert not (tmp_path / "harm").exists()


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["gpt-nano-sort", "stories260K"])
def test_trained_models_agree_with_transformers(name: str, shared_data: Path) -> None:
    import transformers

    folder = shared_data / "models" / name / "hf"
    checkpoint = open_checkpoint(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    config = checkpoint.config
    generator = torch.Generator().manual_seed(3)
    length = min(config.max_position_embeddings, 64)
    ids = torch.randint(config.vocab_size, (3, length), generator=generator)
    ours, expected = our_log_probs(checkpoint, ids), their_log_probs(model, ids)
    # Trained weights make logits of 20 and more, through eight layers.
    assert_same_but_for_rounding(ours, expected, ulp=256)
