"""BERT through the engine: states, masked-LM log-probabilities and head logits of whole inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.engine.batching import pack
from mlm_eval.model.bert import BERT
from mlm_eval.ranks.collectives import gather_over_dp

if TYPE_CHECKING:
    from mlm_eval.engine.engine import Engine


@dataclass(frozen=True)
class BertInput:
    """One input of BERT.

    Attributes:
        tokens: Token ids `[n]`, int64.
        tokentypes: Segment ids `[n]`; None for all zero.
        padding_mask: 1 on real tokens, `[n]`; None for all real.
    """

    tokens: Tensor
    tokentypes: Tensor | None = None
    padding_mask: Tensor | None = None


@dataclass(frozen=True)
class BertOutput:
    """What the model says about one input.

    Attributes:
        states: Final states `[n, hidden]` float32, when asked for.
        pooled: The pooler's output `[hidden]` float32, when asked for and there is a pooler.
        logprobs: Masked-LM log-probability of each token given the whole input, `[n]`
            float32, nats.
        greedy: Whether each token is the argmax, `[n]` bool.
        heads: Logits of the sentence-level heads by name, float32.
    """

    states: Tensor | None
    pooled: Tensor | None
    logprobs: Tensor | None
    greedy: Tensor | None
    heads: dict[str, Tensor]


@torch.inference_mode()
def run_bert(
    engine: Engine, inputs: Sequence[BertInput], *, states: bool = False, score: bool = True
) -> list[BertOutput]:
    """Return the outputs of all inputs in order, on every rank the same.

    Collectives: those of the model over tp; one gather of the results over dp.

    Raises:
        InputError: The model is no BERT, an input is empty or too long, or an id is outside
            a table.
    """
    if not isinstance(engine.model, BERT):
        raise InputError("this is a GPT checkpoint; only BERT checkpoints encode whole inputs")
    check_inputs(inputs, engine)
    batches = pack([item.tokens.numel() for item in inputs], engine.batch_tokens)
    mine: dict[int, BertOutput] = {}
    for indices in batches[engine.mesh.dp_rank :: engine.dp]:
        mine.update(
            zip(
                indices,
                _run_batch(engine, [inputs[i] for i in indices], states, score),
                strict=True,
            )
        )
    for part in gather_over_dp(mine, engine.mesh):
        mine.update(part)
    return [mine[index] for index in range(len(inputs))]


def _run_batch(
    engine: Engine, inputs: list[BertInput], keep_states: bool, score: bool
) -> Iterator[BertOutput]:
    model = engine.model
    assert isinstance(model, BERT)
    lengths = [item.tokens.numel() for item in inputs]
    tokens, types, mask = _pad(inputs, max(lengths))
    tokens, types, mask = (x.to(engine.device) for x in (tokens, types, mask))
    states = model(tokens, mask, types)  # [B, T, h]
    heads = {name: values.cpu() for name, values in model.head_logits(states).items()}
    pooled = model.pooler(states).float().cpu() if keep_states and model.config.pooler else None
    logprobs = greedy = None
    if score and model.config.lm_head:
        flat, flags = model.log_probs(states.flatten(0, 1), tokens.flatten())
        logprobs, greedy = flat.view(tokens.shape).cpu(), flags.view(tokens.shape).cpu()
    kept = states.float().cpu() if keep_states else None
    for line, length in enumerate(lengths):
        yield BertOutput(
            states=None if kept is None else kept[line, :length].clone(),
            pooled=None if pooled is None else pooled[line].clone(),
            logprobs=None if logprobs is None else logprobs[line, :length].clone(),
            greedy=None if greedy is None else greedy[line, :length].clone(),
            heads={name: values[line].clone() for name, values in heads.items()},
        )


def _pad(inputs: list[BertInput], width: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(inputs), width)
    tokens, types, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for line, item in enumerate(inputs):
        length = item.tokens.numel()
        tokens[line, :length] = item.tokens
        mask[line, :length] = 1 if item.padding_mask is None else item.padding_mask
        if item.tokentypes is not None:
            types[line, :length] = item.tokentypes
    return tokens, types, mask


def check_inputs(inputs: Sequence[BertInput], engine: Engine) -> None:
    """Refuse inputs that the model cannot run.

    Raises:
        InputError: Lengths differ, an input is empty or too long, or an id is outside its table.
    """
    for index, item in enumerate(inputs):
        fault = find_fault(item, engine.config)
        if fault is not None:
            raise InputError(f"input {index} {fault}")


def find_fault(item: BertInput, config: ModelConfig) -> str | None:
    """Return why a model cannot run an input, as the rest of a sentence; None if it can."""
    length = item.tokens.numel()
    positions = config.max_position_embeddings
    if not 1 <= length <= positions:
        return f"has {length} tokens; this BERT takes 1 to {positions}, so shorten it"
    if int(item.tokens.min()) < 0 or int(item.tokens.max()) >= config.vocab_size:
        return (
            f"holds a token id outside the vocabulary of {config.vocab_size} rows; the tokenizer "
            "does not belong to this checkpoint"
        )
    for name, values, limit in (
        ("tokentypes", item.tokentypes, max(config.num_tokentypes, 1)),
        ("padding_mask", item.padding_mask, 2),
    ):
        if values is None:
            continue
        if values.numel() != length:
            return f"has {values.numel()} {name} for {length} tokens; give one for each token"
        if int(values.min()) < 0 or int(values.max()) >= limit:
            return f"has {name} outside 0 to {limit - 1}, which is all that this model knows"
    if item.padding_mask is not None and not item.padding_mask.any():
        return "has a padding_mask that keeps no token; mark the real tokens with 1"
    return None
