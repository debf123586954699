"""Generated texts: those of transformers, whatever the layout, the batch, or the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_models
from support.folders.sentencepiece_models import train_pieces
from support.huggingface_models import POSITIONS, VOCAB, gpt_model, tokens
from support.paths import PROJECT
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.checkpoint import Checkpoint
from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.open import open_checkpoint
from mlm_eval.checkpoints.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from mlm_eval.engine.engine import Engine
from mlm_eval.engine.generate import draw, generate
from mlm_eval.engine.prompts import Continuation, Prompt, Sampling, text_after
from mlm_eval.engine.score import Request
from mlm_eval.model.gpt import GPT

SAMPLE = PROJECT / "checkpoints" / "samples" / "gpt"
WARM = Sampling(temperature=1.3)
NARROW = Sampling(temperature=0.8, top_k=6, top_p=0.9)


def prompts(lengths: list[int], **settings: Any) -> list[Prompt]:
    """Return prompts with the first tokens of one row of random ones."""
    row = tokens(1)[0].tolist()
    return [Prompt(row[i : i + n], **settings) for i, n in enumerate(lengths)]


def texts(engine: Engine, asked: list[Prompt]) -> list[list[int]]:
    return [continuation.tokens for continuation in generate(engine, asked)]


# --- Against transformers -----------------------------------------------------------------------


def their_text(model: Any, prompt: Prompt) -> list[int]:
    ids = torch.tensor([list(prompt.tokens)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=prompt.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def enliven(model: Any) -> None:
    """Let the next token depend on the text more: else a random model repeats a few tokens."""
    for name, parameter in model.named_parameters():
        if name.endswith(("ln_f.bias", "final_layer_norm.bias", "wte.weight")):
            parameter.data *= 0.1
        elif parameter.dim() == 2:
            parameter.data *= 3


@pytest.mark.parametrize(
    "kind", ["gpt2", "gpt2-untied", "llama-gqa", "llama3", "qwen3", "neox-half"]
)
def test_greedy_texts_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = gpt_model(kind)
    enliven(model)
    model.save_pretrained(tmp_path)
    asked = [
        *prompts([5, 1, 12, 8], max_new_tokens=POSITIONS - 12),
        *prompts([3], max_new_tokens=4),
    ]
    ours = texts(Engine.load(open_checkpoint(tmp_path)), asked)
    assert ours == [their_text(model, prompt) for prompt in asked]
    assert len({token for text in ours for token in text}) > 8  # no one-word loop


# --- The cache ----------------------------------------------------------------------------------

SHAPES = {
    "learned positions": random_models.GPT,
    "rotary, grouped queries": random_models.LLAMA,
    "rotary, interleaved, half of the channels": random_models.config(
        random_models.LLAMA, rotary_interleaved=True, rotary_percent=0.5
    ),
    "norms of queries and keys": random_models.config(random_models.LLAMA, qk_layernorm=True),
    "Mamba-2, attention and MLP": random_models.config(
        random_models.LLAMA,
        num_layers=3,
        position_embedding_type="none",
        mamba_layers=(0,),
        no_mixer_layers=(2,),
        no_mlp_layers=(0, 1),
        mamba_num_heads=4,
        mamba_head_dim=6,
        mamba_num_groups=2,
        mamba_state_dim=5,
        mamba_conv_width=4,
    ),
    "residual after the norm": random_models.config(apply_residual_connection_post_layernorm=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_are_those_of_the_whole_text(shape: str) -> None:
    """Three texts grow from prompts of other lengths; in the middle one of them leaves."""
    config = SHAPES[shape]
    model = Engine.load(random_models.checkpoint(config)).model
    assert isinstance(model, GPT)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(config.vocab_size, (3, 16), generator=generator)
    lengths, order = [4, 9, 1], [0, 1, 2]
    with torch.inference_mode():
        whole = model.output_layer.logits(model(rows).flatten(0, 1)).view(3, 16, -1)
        padded = rows[:, :9].clone()
        padded[0, 4:], padded[2, 1:] = 0, 0
        states, cache = model.start(padded, lengths, 15)
        for step in range(6):
            ends = torch.tensor([lengths[text] - 1 + step for text in order])
            expected = whole[torch.tensor(order), ends]
            torch.testing.assert_close(
                model.output_layer.logits(states), expected, rtol=0, atol=2e-5
            )
            if step == 2:
                cache.keep([2, 0])
                order, ends = [2, 0], ends[[2, 0]]
            states = model.step(rows[torch.tensor(order), ends + 1], cache)
    assert cache.lengths == [7, 10]


# --- The layout and the batch -------------------------------------------------------------------

MIXED = [
    Prompt([1, 2, 3], max_new_tokens=12),
    Prompt([4], max_new_tokens=7, sampling=WARM, seed=5),
    Prompt([4], max_new_tokens=7, sampling=WARM, seed=6),
    Prompt([9, 8, 7, 6, 5, 4], max_new_tokens=30, sampling=NARROW, seed=5),
    Prompt([30, 31], max_new_tokens=15, sampling=NARROW, seed=1 << 62),
    Prompt([7] * 16, max_new_tokens=3),
    Prompt([11, 12, 13], max_new_tokens=1, sampling=WARM),
]


def engine_on_ranks(config: ModelConfig, tp: int, dp: int, **settings: Any) -> Engine:
    return Engine.load(random_models.checkpoint(config), tp=tp, dp=dp, **settings)


def mixed_texts(config: ModelConfig, tp: int, dp: int) -> tuple[list[Continuation], list[Any]]:
    seen: list[Any] = []
    engine = engine_on_ranks(config, tp, dp)
    return generate(engine, MIXED, on_progress=lambda *counts: seen.append(counts)), seen


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Continuation]]:
    """Each text by itself, on one process."""
    found = {}
    for name, config in (("gpt", random_models.GPT), ("llama", random_models.LLAMA)):
        engine = engine_on_ranks(config, 1, 1)
        found[name] = [generate(engine, [prompt])[0] for prompt in MIXED]
    return found


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_a_text_does_not_depend_on_its_batch(alone: Any, name: str, batch_tokens: int) -> None:
    config = random_models.GPT if name == "gpt" else random_models.LLAMA
    engine = engine_on_ranks(config, 1, 1, batch_tokens=batch_tokens)
    assert generate(engine, MIXED) == alone[name]


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_text_does_not_depend_on_the_layout(alone: Any, tp: int, dp: int) -> None:
    """The vocabulary of 50 does not divide by 4; with tp 4 the two groups of Llama are copied."""
    for name, config in (("gpt", random_models.GPT), ("llama", random_models.LLAMA)):
        answers = run_ranks(tp * dp, mixed_texts, config, tp, dp)
        for rank, (continuations, seen) in enumerate(answers):
            assert continuations == alone[name]
            assert (not seen) if rank else seen[-1] == (len(MIXED), len(MIXED))


def test_seeds_make_texts(alone: Any) -> None:
    first, second = alone["gpt"][1], alone["gpt"][2]
    assert first.tokens != second.tokens  # one prompt, two seeds
    assert {continuation.ended_by for continuation in alone["gpt"]} == {"length"}


def test_positions_end_a_text(alone: Any) -> None:
    """16 positions: the token after the last position can be chosen, but not looked at."""
    lengths = [len(continuation.tokens) for continuation in alone["gpt"]]
    assert lengths == [12, 7, 7, 11, 15, 1, 1]


# --- Collectives over the vocabulary ------------------------------------------------------------


def over_the_vocabulary(rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    head = random_models.vocab_head(table)
    ids, logprobs = head.argmax(rows)
    logits = head.logits(rows)
    return ids, logprobs, logits


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("entries", [3, 5, 10])
def test_argmax_and_logits_of_a_cut_vocabulary(size: int, entries: int) -> None:
    """Whole numbers: sums are exact and ties are real; with 5 rows on 4 ranks one rank has none."""
    generator = torch.Generator().manual_seed(entries)
    rows = torch.randint(-2, 3, (40, 2), generator=generator).float()
    table = torch.randint(-2, 3, (entries, 2), generator=generator).float()
    expected = rows @ table.T
    top = expected.max(dim=-1, keepdim=True).values
    lowest = [row.nonzero()[0].item() for row in expected == top]
    assert ((expected == top).sum(dim=-1) > 1).any()
    for ids, logprobs, logits in run_ranks(size, over_the_vocabulary, rows, table):
        assert torch.equal(logits, expected)
        assert ids.tolist() == lowest
        torch.testing.assert_close(logprobs, expected.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("tp", [1, 2])
def test_log_probabilities_are_those_of_scoring(tp: int) -> None:
    """Each token's, given the prompt and the tokens before it, drawn or not."""
    (first, *_) = run_ranks(tp, mixed_texts, random_models.LLAMA, tp, 1)
    engine = engine_on_ranks(random_models.LLAMA, 1, 1)
    whole = [
        Request(torch.tensor([*prompt.tokens, *text.tokens]), len(text.tokens))
        for prompt, text in zip(MIXED, first[0], strict=True)
    ]
    expected = engine.score(whole).logprobs
    found = torch.tensor([value for text in first[0] for value in text.logprobs])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# --- Sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.7),
        Sampling(2.0, top_k=5),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_k=100),
        Sampling(1.5, top_p=0.6),
        Sampling(1.0, top_p=1e-9),
        Sampling(0.9, top_k=12, top_p=0.8),
    ],
    ids=str,
)
def test_shares_are_the_probabilities_of_transformers(sampling: Sampling) -> None:
    """Evenly spaced numbers: each token comes as often as its probability says."""
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(4)) * 2
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    expected = LogitsProcessorList(warpers)(ids, logits.clone()).softmax(-1)[0]

    count = 20_000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(logits.expand(count, -1), numbers, sampling)
    shares = torch.bincount(drawn, minlength=30) / count
    torch.testing.assert_close(shares, expected, rtol=0, atol=1.5 / count)
    assert not shares[expected == 0].any()


def test_tokens_as_likely_as_the_last_of_the_top_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    numbers = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    drawn = draw(logits.expand(50, -1), numbers, Sampling(1.0, top_k=2))
    assert set(drawn.tolist()) == {1, 2, 3}


def test_the_number_zero_picks_no_token_that_was_dropped() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0, 4.0]])
    assert draw(logits, torch.zeros(1, dtype=torch.float64), Sampling(1.0, top_k=2)).item() == 2


# --- Where a text ends --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Tokenizer]:
    """A model of bytes: 256 tokens, and 4 rows that only pad the table."""
    config = random_models.config(vocab_size=260, max_position_embeddings=32)
    words = random_models.byte_vocabulary(tmp_path_factory.mktemp("words") / "bytes")
    return Engine.load(random_models.checkpoint(config)), load_tokenizer(directory=words)


def test_a_stop_string_ends_the_text_before_it() -> None:
    """On the sample that ships, which writes sentences: wherever the string lies in the tokens."""
    tokenizer = find_tokenizer(SAMPLE)
    assert tokenizer is not None
    engine = Engine.load(open_checkpoint(SAMPLE))
    beginning = tokenizer.encode("A module can")
    (free,) = generate(engine, [Prompt(beginning, 40)], tokenizer=tokenizer)
    assert free.ended_by == "length" and free.text is not None and len(set(free.text.split())) > 9
    stops = [free.text[at : at + size] for at in (0, 7, 20, 31) for size in (1, 3, 9)]
    asked = [Prompt(beginning, 40, stop=("no such text", stop)) for stop in stops]
    for stop, found in zip(stops, generate(engine, asked, tokenizer=tokenizer), strict=True):
        assert found.ended_by == "stop string"
        assert found.text == free.text.partition(stop)[0]
        length = len(found.tokens)
        assert found.tokens == free.tokens[:length]
        # No token more than the stop string needs.
        assert stop not in tokenizer.decode(free.tokens[: length - 1])


def test_a_stop_string_is_found_across_characters_of_several_bytes(writer: Any) -> None:
    """The text is spelled by a table of logits, so that the test chooses every token."""
    engine, tokenizer = writer
    spelled = "x\u00e9\u20acy.z"
    asked = [Prompt([0], 20, stop=("\u20acy",)), Prompt([0], 20, stop=("z", ".")), Prompt([0], 4)]
    found = _spelling(engine, tokenizer, spelled, asked)
    assert [(text.text, text.ended_by) for text in found] == [
        ("x\u00e9", "stop string"),
        ("x\u00e9\u20acy", "stop string"),
        ("x\u00e9\ufffd", "length"),
    ]


def test_a_stop_token_is_no_part_of_the_text(writer: Any) -> None:
    engine, tokenizer = writer
    end = tokenizer.encode("y")[0]
    asked = [Prompt([0], 20, stop_tokens=frozenset([end])), Prompt([0], 2, stop_tokens=frozenset())]
    first, second = _spelling(engine, tokenizer, "wxyz", asked)
    assert (first.text, first.ended_by) == ("wx", "stop token")
    assert (second.text, second.ended_by) == ("wx", "length")


def test_sentencepiece_keeps_the_space_before_a_text(tmp_path: Path) -> None:
    """Its decoder drops the space of the first piece, which is here in the middle of a text."""
    words = load_tokenizer(directory=train_pieces(tmp_path, 300).parent)
    before, after = words.encode("a list"), words.encode("is made")
    assert words.decode(after) == "is made"
    assert text_after(words, before, after) == " is made"


def test_rows_that_pad_the_table_have_no_text(writer: Any) -> None:
    engine, tokenizer = writer
    (found,) = _spelling(engine, tokenizer, [tokenizer.encode("a")[0], 258], [Prompt([0], 2)])
    assert found.tokens[1] == 258 and found.text == "a"


def _spelling(
    engine: Engine, tokenizer: Tokenizer, spelled: str | list[int], asked: list[Prompt]
) -> list[Continuation]:
    """Generate with a model that writes a given text, then its last token for ever."""
    ids = tokenizer.encode(spelled) if isinstance(spelled, str) else spelled
    model = engine.model
    assert isinstance(model, GPT)
    taken = {"steps": 0}

    def argmax(rows: Tensor) -> tuple[Tensor, Tensor]:
        token = ids[min(taken["steps"], len(ids) - 1)]
        taken["steps"] += 1
        return torch.full((len(rows),), token), torch.zeros(len(rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.output_layer, "argmax", argmax)
        found = []
        for prompt in asked:
            taken["steps"] = 0
            found += generate(engine, [prompt], tokenizer=tokenizer)
    return found


# --- What is wrong ------------------------------------------------------------------------------


def loaded(checkpoint: Checkpoint) -> Engine:
    return Engine.load(checkpoint)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Prompt([], 3), "prompt 1 has 0 tokens, the model takes 1 to 16"),
        (Prompt([1] * 17, 3), "prompt 1 has 17 tokens"),
        (Prompt([1], 0), "prompt 1 asks for 0 new tokens"),
        (Prompt([1, VOCAB + 10], 1), "token id outside the model's vocabulary of 50 rows"),
        (Prompt([-1], 1), "token id outside"),
        (Prompt([1], 1, stop=("x",)), "stop strings, which need a tokenizer"),
    ],
)
def test_prompts_that_cannot_be_continued(asked: Prompt, message: str) -> None:
    engine = Engine.load(random_models.checkpoint(random_models.GPT))
    with pytest.raises(InputError, match=message):
        generate(engine, [Prompt([1], 1), asked])


@pytest.mark.parametrize(
    "settings",
    [(-1.0,), (float("nan"),), (float("inf"),), (1.0, 0), (1.0, None, 0.0), (1.0, None, 1.1)],
)
def test_settings_out_of_their_range(settings: tuple[Any, ...]) -> None:
    with pytest.raises(InputError):
        Sampling(*settings)


def test_a_bert_writes_no_text() -> None:
    engine = Engine.load(random_models.checkpoint(random_models.BERT))
    with pytest.raises(InputError, match="BERT"):
        generate(engine, [Prompt([1], 1)])


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=str)
def test_logits_that_are_no_numbers_are_not_taken_for_a_choice(sampling: Sampling) -> None:
    weights = random_models.state_dict(random_models.GPT)
    weights["decoder.final_layernorm.bias"][3] = torch.nan
    engine = Engine.load(random_models.checkpoint(random_models.GPT, weights))
    with pytest.raises(InputError, match="not finite"):
        generate(engine, [Prompt([1], 2, sampling=sampling)])
