"""BERT through the engine: states, masked-LM log-probabilities and head logits of whole inputs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.engine.batching import OnProgress, in_order, map_batches, pack, pad_rows
from mlm_eval.engine.products import float32_products
from mlm_eval.engine.resume import KeptScores, PartialScores
from mlm_eval.model.bert import BERT
from mlm_eval.model.layers import to_device
from mlm_eval.ranks.mesh import Mesh

QA_HEAD = "qa_head"
"""The one head with logits for each token."""


@dataclass(frozen=True)
class BertInput:
    """One input of BERT."""

    tokens: Tensor
    """Token ids `[n]`, int64."""

    tokentypes: Tensor | None = None
    """Segment ids `[n]`; None for all zero."""

    padding_mask: Tensor | None = None
    """1 on real tokens, `[n]`; None for all real."""


@dataclass(frozen=True)
class BertOutput:
    """What the model computes for one input."""

    states: Tensor | None
    """Final states `[n, hidden]` float32, when asked for."""

    pooled: Tensor | None
    """The pooler's output `[hidden]` float32, when asked for and there is a pooler."""

    logprobs: Tensor | None
    """Masked-LM log-probability of each token given the whole input, `[n]` float32, nats."""

    greedy: Tensor | None
    """Whether each token is the argmax, `[n]` bool."""

    heads: dict[str, Tensor]
    """Logits by head, float32: `[outputs]` of a sentence-level head, `[n, 2]` of `qa_head`."""


@torch.inference_mode()
@float32_products()
def encode(
    model: BERT,
    inputs: Sequence[BertInput],
    *,
    mesh: Mesh,
    device: torch.device,
    batch_tokens: int,
    states: bool = True,
    score: bool = False,
    head: str | None = None,
    autocast: torch.dtype | None = None,
    on_progress: OnProgress | None = None,
    partial: PartialScores | None = None,
) -> list[BertOutput]:
    """Return the outputs of all inputs in order, on every rank the same.

    Collectives: those of the model over tp; one gather of the results over dp.

    Args:
        model: This rank's shard.
        inputs: Each is read twice; a sequence may make them when they are read.
        mesh: The layout.
        device: Where the model is.
        batch_tokens: Padded tokens of a forward pass.
        states: Keep the final states and the pooler's output.
        score: Keep the masked-LM log-probability of each token.
        head: Keep the logits of this head alone; None: of each sentence-level head there is.
        autocast: Compute matrix products in this dtype; None: in the model's.
        on_progress: Called with (inputs done, inputs in all), on rank 0.
        partial: Results of an interrupted run, and where to keep those of this one; not for states
            or one head alone.

    Raises:
        InputError: An input is empty or too long, or an id is outside a table; or `partial` holds
            other numbers of scores.
    """
    lengths = check_inputs(inputs, model.config)
    scores = score and model.config.lm_head
    done: dict[int, BertOutput] = {}
    if partial is not None:
        assert not states and head is None
        partial.check_counts([length * scores for length in lengths])
        kept = partial.finished().items()
        done = {i: _from_kept(values, scores) for i, values in kept if i < len(inputs)}

    # Copying a batch's results waits for the device: it is done when the next batch is on its way.
    waiting: deque[tuple[list[int], list[BertInput], _Values, list[BertOutput]]] = deque()

    def finish(left: int) -> None:
        while len(waiting) > left:
            indices, items, values, outputs = waiting.popleft()
            outputs += _outputs(items, values)
            if partial is not None and mesh.tp_rank == 0:
                _keep(partial, indices, outputs)

    def run(indices: list[int]) -> list[BertOutput]:
        items = [inputs[i] for i in indices]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            values = _run_batch(model, items, device, keep_states=states, score=score, head=head)
        outputs: list[BertOutput] = []  # filled later
        waiting.append((indices, items, values, outputs))
        finish(left=1)
        return outputs

    def finish_all() -> None:
        finish(left=0)
        if partial is not None:
            partial.flush()

    pending = [index for index in range(len(inputs)) if index not in done]
    packed = pack([lengths[index] for index in pending], batch_tokens)
    results = map_batches(
        run,
        [[pending[i] for i in batch] for batch in packed],
        mesh,
        already_done=len(done),
        on_progress=on_progress,
        before_join=finish_all,
    )
    return in_order([*results, (list(done), list(done.values()))])


@dataclass(frozen=True)
class _Values:
    """What a batch came to, on the device: `[batch, seq, ...]`, or `[batch, ...]` of heads."""

    states: Tensor | None
    pooled: Tensor | None
    logprobs: Tensor | None
    greedy: Tensor | None
    heads: dict[str, Tensor]


def _run_batch(
    model: BERT,
    inputs: list[BertInput],
    device: torch.device,
    *,
    keep_states: bool,
    score: bool,
    head: str | None,
) -> _Values:
    tokens, types, mask = (to_device(x, device) for x in _pad(inputs))
    states = model(tokens, mask, types)  # [B, T, h]
    logprobs = greedy = None
    if score and model.config.lm_head:
        flat, flags = model.log_probs(states.flatten(0, 1), tokens.flatten())
        logprobs, greedy = flat.view(tokens.shape), flags.view(tokens.shape)
    heads = {head: model.qa_logits(states)} if head == QA_HEAD else model.head_logits(states)
    return _Values(
        states.float() if keep_states else None,
        model.pooler(states) if keep_states and model.config.pooler else None,
        logprobs,
        greedy,
        {name: logits for name, logits in heads.items() if head in (None, name)},
    )


def _outputs(inputs: list[BertInput], values: _Values) -> list[BertOutput]:
    """Return a batch's outputs, on the CPU."""
    kept, pooled, logprobs, greedy = (
        None if value is None else value.cpu()
        for value in (values.states, values.pooled, values.logprobs, values.greedy)
    )
    heads = {name: logits.cpu() for name, logits in values.heads.items()}
    outputs = []
    for line, item in enumerate(inputs):
        length = item.tokens.numel()
        outputs.append(
            BertOutput(
                states=_own(kept, line, length),
                pooled=_own(pooled, line),
                logprobs=_own(logprobs, line, length),
                greedy=_own(greedy, line, length),
                heads={
                    name: logits[line, : length if name == QA_HEAD else None].clone()
                    for name, logits in heads.items()
                },
            )
        )
    return outputs


def _keep(partial: PartialScores, indices: list[int], outputs: list[BertOutput]) -> None:
    """Keep a batch's scores and the logits of its heads."""
    logprobs = [torch.zeros(0) if o.logprobs is None else o.logprobs for o in outputs]
    greedy = [torch.zeros(0, dtype=torch.bool) if o.greedy is None else o.greedy for o in outputs]
    partial.add(
        indices,
        [values.numel() for values in logprobs],
        torch.cat(logprobs),
        torch.cat(greedy),
        {name: torch.stack([o.heads[name] for o in outputs]) for name in outputs[0].heads},
    )


def _from_kept(kept: KeptScores, scores: bool) -> BertOutput:
    logprobs, greedy = (kept.logprobs, kept.greedy) if scores else (None, None)
    return BertOutput(None, None, logprobs, greedy, kept.heads)


def _own(values: Tensor | None, line: int, length: int | None = None) -> Tensor | None:
    """Return one input's part of a batch's values, a copy: a view would carry the whole batch."""
    return None if values is None else values[line, :length].clone()


def _pad(inputs: list[BertInput]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, segment ids and mask of a batch, `[batch, seq]` each."""
    types, masks = [], []
    for item in inputs:
        zeros = torch.zeros_like(item.tokens)
        types.append(zeros if item.tokentypes is None else item.tokentypes)
        masks.append(zeros + 1 if item.padding_mask is None else item.padding_mask)
    return pad_rows(item.tokens for item in inputs), pad_rows(types), pad_rows(masks)


def check_inputs(inputs: Sequence[BertInput], config: ModelConfig) -> list[int]:
    """Return the length of each input; refuse inputs that the model cannot run.

    Raises:
        InputError: Lengths differ, an input is empty or too long, or an id is outside its table.
    """
    lengths = []
    for index, item in enumerate(inputs):
        fault = find_fault(item, config)
        if fault is not None:
            raise InputError(f"input {index} {fault}")
        lengths.append(item.tokens.numel())
    return lengths


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
