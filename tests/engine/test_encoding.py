"""BERT through the engine: whole inputs, in any layout and batch, in their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import random_models
from support.ranks import run_ranks
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.engine import encode
from mlm_eval.engine.encode import BertInput, BertOutput
from mlm_eval.engine.engine import Engine

VOCAB = 50
PRETRAINED = random_models.BERT
FINE_TUNED = random_models.config(
    random_models.BERT, lm_head=False, binary_head=False, num_classes=3, multichoice_head=True
)
POSITIONS = PRETRAINED.max_position_embeddings


def some_inputs(count: int = 14) -> list[BertInput]:
    """Return inputs of all lengths; some with token types, some with padding at their end."""
    noise = torch.Generator().manual_seed(0)
    inputs = []
    for index in range(count):
        length = 1 + int(torch.randint(POSITIONS, (), generator=noise))
        tokens = torch.randint(VOCAB, (length,), generator=noise)
        types = torch.randint(2, (length,), generator=noise) if index % 2 else None
        mask = (torch.arange(length) <= length // 2).long() if index % 3 == 0 else None
        inputs.append(BertInput(tokens, types, mask))
    return inputs


def alone(config: ModelConfig, item: BertInput) -> dict[str, Tensor]:
    """Return what the model says of one input, nothing else in its batch."""
    model = Engine.load(random_models.checkpoint(config)).model
    mask = torch.ones_like(item.tokens) if item.padding_mask is None else item.padding_mask
    types = None if item.tokentypes is None else item.tokentypes.unsqueeze(0)
    with torch.no_grad():
        states = model(item.tokens.unsqueeze(0), mask.unsqueeze(0), types)
        expected = {"states": states[0], "pooled": model.pooler(states)[0]}
        if config.lm_head:
            logits = (
                model.lm_head(states[0]) @ model.output_layer.table.t() + model.output_layer.bias
            )
            whole = logits.log_softmax(-1)
            expected["logprobs"] = whole.gather(1, item.tokens.unsqueeze(1)).squeeze(1)
            expected["greedy"] = whole.argmax(-1) == item.tokens
        return expected | {name: x[0] for name, x in model.head_logits(states).items()}


def encode_on_a_rank(
    config: ModelConfig, tp: int, dp: int, batch_tokens: int, inputs: list[BertInput]
) -> list[BertOutput]:
    engine = Engine.load(random_models.checkpoint(config), tp=tp, dp=dp, batch_tokens=batch_tokens)
    return engine.encode(inputs, states=True, score=True)


@pytest.mark.parametrize("config", [PRETRAINED, FINE_TUNED], ids=["pretrained", "fine-tuned"])
@pytest.mark.parametrize(
    ("tp", "dp", "batch_tokens"), [(1, 1, 1), (1, 1, 40), (2, 1, 1000), (1, 2, 40), (2, 2, 40)]
)
def test_outputs_do_not_depend_on_the_layout_or_the_batches(config, tp, dp, batch_tokens):
    inputs = some_inputs()
    expected = [alone(config, item) for item in inputs]
    for outputs in run_ranks(tp * dp, encode_on_a_rank, config, tp, dp, batch_tokens, inputs):
        assert len(outputs) == len(inputs)
        for item, output, wanted in zip(inputs, outputs, expected, strict=True):
            found = {name: getattr(output, name) for name in ("states", "pooled")} | output.heads
            if config.lm_head:
                assert output.greedy is not None
                assert torch.equal(output.greedy, wanted["greedy"])
                found |= {"logprobs": output.logprobs}
            else:
                assert output.logprobs is None and output.greedy is None
            assert set(found) == set(wanted) - {"greedy"}
            real = slice(None) if item.padding_mask is None else item.padding_mask.bool()
            for name, value in found.items():
                assert value is not None and value.dtype == torch.float32
                keep = real if name in ("states", "logprobs") else slice(None)
                torch.testing.assert_close(value[keep], wanted[name][keep], rtol=0, atol=2e-5)


def test_heads_are_those_of_the_checkpoint():
    [output] = Engine.load(random_models.checkpoint(PRETRAINED)).encode(some_inputs(1))
    assert {name: tuple(x.shape) for name, x in output.heads.items()} == {"binary_head": (2,)}
    [output] = Engine.load(random_models.checkpoint(FINE_TUNED)).encode(some_inputs(1))
    assert {name: tuple(x.shape) for name, x in output.heads.items()} == {
        "classification_head": (3,),
        "multichoice_head": (1,),
    }


def test_only_what_is_asked_for_is_kept():
    engine = Engine.load(random_models.checkpoint(PRETRAINED))
    [output] = engine.encode(some_inputs(1), states=False, score=True)
    assert output.states is None and output.pooled is None and output.logprobs is not None
    [output] = engine.encode(some_inputs(1), states=True, score=False)
    assert output.states is not None and output.pooled is not None and output.logprobs is None
    assert engine.encode([]) == []


def test_padding_and_types_reach_the_model():
    engine = Engine.load(random_models.checkpoint(PRETRAINED))
    tokens = torch.arange(10)
    half = (tokens < 5).long()
    plain, typed, padded, short = engine.encode(
        [
            BertInput(tokens),
            BertInput(tokens, tokentypes=half),
            BertInput(tokens, padding_mask=half),
            BertInput(tokens[:5]),
        ]
    )
    assert plain.states is not None and typed.states is not None
    assert padded.states is not None and short.states is not None
    assert (plain.states - typed.states).abs().max() > 0.1
    assert (plain.states[:5] - padded.states[:5]).abs().max() > 0.1
    torch.testing.assert_close(padded.states[:5], short.states, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (BertInput(torch.zeros(0).long()), "input 1 has 0 tokens; this BERT takes 1 to 16"),
        (BertInput(torch.zeros(17).long()), "input 1 has 17 tokens; this BERT takes 1 to 16"),
        (BertInput(torch.tensor([1, 50])), "input 1 holds a token id outside .* of 50 rows"),
        (BertInput(torch.tensor([-1, 5])), "input 1 holds a token id outside .* of 50 rows"),
        (
            BertInput(torch.tensor([1, 2]), tokentypes=torch.tensor([0, 2])),
            "input 1 has tokentypes outside 0 to 1",
        ),
        (
            BertInput(torch.tensor([1, 2]), padding_mask=torch.tensor([1, -1])),
            "input 1 has padding_mask outside 0 to 1",
        ),
        (
            BertInput(torch.tensor([1, 2]), tokentypes=torch.tensor([0])),
            "input 1 has 1 tokentypes for 2 tokens",
        ),
        (
            BertInput(torch.tensor([1, 2]), padding_mask=torch.tensor([0, 0])),
            "input 1 has a padding_mask that keeps no token",
        ),
    ],
)
def test_inputs_that_the_model_cannot_run_are_refused(item, message):
    engine = Engine.load(random_models.checkpoint(PRETRAINED))
    with pytest.raises(InputError, match=message):
        engine.encode([BertInput(torch.tensor([1, 2])), item])


def test_a_model_without_token_types_takes_zeros_only():
    engine = Engine.load(
        random_models.checkpoint(random_models.config(PRETRAINED, num_tokentypes=0))
    )
    tokens = torch.tensor([1, 2, 3])
    engine.encode([BertInput(tokens, tokentypes=torch.zeros(3).long())])
    with pytest.raises(InputError, match="has tokentypes outside 0 to 0"):
        engine.encode([BertInput(tokens, tokentypes=torch.ones(3).long())])


def test_a_gpt_encodes_nothing():
    engine = Engine.load(random_models.checkpoint(random_models.GPT))
    with pytest.raises(InputError, match="only BERT checkpoints"):
        engine.encode([BertInput(torch.tensor([1]))])


def test_results_are_fetched_when_the_next_batch_is_on_its_way(monkeypatch: pytest.MonkeyPatch):
    """A copy to the CPU waits for the device, which would idle until the next batch comes."""
    happened: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def called(*given: Any, **options: Any) -> Any:
            happened.append(name)
            return function(*given, **options)

        return called

    monkeypatch.setattr(encode, "_run_batch", noting("run", encode._run_batch))
    monkeypatch.setattr(encode, "_outputs", noting("fetch", encode._outputs))
    inputs = [BertInput(torch.arange(1, 5)) for _ in range(4)]
    engine = Engine.load(random_models.checkpoint(PRETRAINED), batch_tokens=4)
    assert len(engine.encode(inputs)) == 4
    assert happened == ["run", "run", "fetch", "run", "fetch", "run", "fetch", "fetch"]


def test_an_engine_on_a_gpu_by_number_selects_it(monkeypatch: pytest.MonkeyPatch):
    """Events and object collectives go to the current device, whichever the tensors are on."""
    selected = []

    class Selected(Exception):
        pass

    def select(device: torch.device) -> None:
        selected.append(device)
        raise Selected

    monkeypatch.setattr(torch.cuda, "set_device", select)
    with pytest.raises(Selected):
        Engine.load(random_models.checkpoint(PRETRAINED), device="cuda:3")
    assert selected == [torch.device("cuda:3")]
