"""Text from a GPT model, greedy or sampled, token by token with a cache of what was seen.

Prompts are packed under the engine's token budget and dealt to the data-parallel ranks. All
tensor-parallel ranks choose the same token: a greedy one from three small all-reduces, a sampled
one from the gathered logits of one position. Every prompt has a random number generator of its own,
which gives one number for each token, so that neither the layout nor the other prompts of a batch
change its text beyond the rounding of the forward itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.engine.batching import OnProgress, in_order, map_batches, pack, pad_rows
from mlm_eval.engine.products import float32_products
from mlm_eval.engine.prompts import Continuation, Prompt, Sampling, text_after, text_of
from mlm_eval.model.costs.memory import FLOAT32
from mlm_eval.model.gpt import GPT
from mlm_eval.ranks.mesh import Mesh

if TYPE_CHECKING:
    from mlm_eval.checkpoints.tokenizer import Tokenizer

OnToken = Callable[[int, Sequence[int]], None]
"""Is told a prompt's number and its new tokens so far."""

CACHE_BYTES = 4 << 30
"""Keys and values of a batch, on each rank: more prompts than fit wait for the next batch."""


class Loaded(Protocol):
    """What a text is written with: the `Engine`."""

    @property
    def model(self) -> torch.nn.Module:
        """The model."""

    @property
    def config(self) -> ModelConfig:
        """Its settings."""

    @property
    def mesh(self) -> Mesh:
        """The ranks."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    @property
    def batch_tokens(self) -> int:
        """Padded tokens of a forward pass."""

    @property
    def vocab_size(self) -> int:
        """Rows of its vocabulary."""


@torch.inference_mode()
@float32_products()
def generate(
    engine: Loaded,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    on_progress: OnProgress | None = None,
    on_token: OnToken | None = None,
) -> list[Continuation]:
    """Return a continuation of each prompt, on every rank the same.

    Collectives: those of the model over tp; one gather of the texts over dp.

    Args:
        engine: A loaded GPT model.
        prompts: Each goes its own way: their settings may differ.
        tokenizer: For stop strings, and for texts beside the tokens.
        on_progress: Told about finished prompts, on rank 0.
        on_token: Told about each token at once, on the ranks that write its text.

    Raises:
        InputError: The model is not a GPT, a prompt is empty, too long or of another vocabulary, or
            the logits are not finite.
    """
    check_prompts(engine, prompts, tokenizer)
    limit = engine.config.max_position_embeddings + 1
    widths = [min(len(p.tokens) + p.max_new_tokens, limit) for p in prompts]

    def run(indices: list[int]) -> list[Continuation]:
        texts = [_Text(i, prompts[i], widths[i], tokenizer, on_token) for i in indices]
        _write(engine, texts)
        return [text.finish() for text in texts]

    most = _texts_in_cache(engine)
    batches = [
        batch[start : start + most]
        for batch in pack(widths, min(engine.batch_tokens, _tokens_in_cache(engine)))
        for start in range(0, len(batch), most)
    ]
    return in_order(map_batches(run, batches, engine.mesh, on_progress=on_progress))


def check_prompts(engine: Loaded, prompts: Sequence[Prompt], tokenizer: Tokenizer | None) -> None:
    """Refuse prompts that the model cannot continue.

    Raises:
        InputError: See `generate`.
    """
    if not isinstance(engine.model, GPT):
        raise InputError(
            f"this is a {engine.config.family.upper()} checkpoint; only a GPT model (left to "
            "right) writes text"
        )
    positions, rows = engine.config.max_position_embeddings, engine.vocab_size
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt.tokens) <= positions:
            raise InputError(
                f"prompt {index} has {len(prompt.tokens)} tokens, the model takes 1 to "
                f"{positions}; cut it from the left"
            )
        if prompt.max_new_tokens < 1:
            raise InputError(
                f"prompt {index} asks for {prompt.max_new_tokens} new tokens, not 1 or more"
            )
        if min(prompt.tokens) < 0 or max(prompt.tokens) >= rows:
            raise InputError(
                f"prompt {index} holds a token id outside the model's vocabulary of {rows} rows; "
                "the tokenizer does not belong to this checkpoint"
            )
        if prompt.stop and tokenizer is None:
            raise InputError(f"prompt {index} has stop strings, which need a tokenizer; give one")


class _Text:
    """A prompt and what has been written so far."""

    def __init__(
        self,
        number: int,
        prompt: Prompt,
        width: int,
        tokenizer: Tokenizer | None,
        on_token: OnToken | None,
    ) -> None:
        self.number = number
        self.prompt = prompt
        self.room = width - len(prompt.tokens)
        self.tokenizer = tokenizer
        self.on_token = on_token
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.ended_by: str | None = None
        self.random = torch.Generator().manual_seed(prompt.seed)
        # A stop string ends with the newest token. Each token is a byte at least; some more are
        # looked at, because decoders treat the first of their tokens in a way of its own.
        longest = max((len(stop.encode()) for stop in prompt.stop), default=0)
        self.looked_at = longest + 8

    def add(self, token: int, logprob: float) -> bool:
        """Take the next token; return whether the text continues."""
        if token in self.prompt.stop_tokens:
            self.ended_by = "stop token"
            return False
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.on_token is not None:
            self.on_token(self.number, self.tokens)
        if self.prompt.stop:
            newest = self._decode(self.tokens[-self.looked_at :])
            if any(stop in newest for stop in self.prompt.stop):
                self.ended_by = "stop string"
                return False
        if len(self.tokens) == self.room:
            self.ended_by = "length"
            return False
        return True

    def finish(self) -> Continuation:
        """Return the result."""
        assert self.ended_by is not None
        if self.tokenizer is None:
            return Continuation(self.tokens, self.logprobs, None, self.ended_by)
        text = text_after(self.tokenizer, self.prompt.tokens, self.tokens)
        ends = [text.find(stop) for stop in self.prompt.stop]
        end = min((place for place in ends if place >= 0), default=len(text))
        return Continuation(self.tokens, self.logprobs, text[:end], self.ended_by)

    def _decode(self, tokens: list[int]) -> str:
        assert self.tokenizer is not None
        return text_of(self.tokenizer, tokens)


def _write(engine: Loaded, texts: Sequence[_Text]) -> None:
    """Write some texts to their ends, all of them one token at a time."""
    model = engine.model
    assert isinstance(model, GPT)
    lengths = [len(text.prompt.tokens) for text in texts]
    tokens = pad_rows(torch.tensor(list(text.prompt.tokens)) for text in texts)  # [B, T]
    # The last token of a text is chosen, never looked at.
    columns = max(length + text.room - 1 for length, text in zip(lengths, texts, strict=True))
    states, cache = model.start(tokens.to(engine.device), lengths, columns)
    running = list(texts)
    while True:
        chosen, logprobs = choose(model, states, running)
        pairs = zip(chosen.tolist(), logprobs.tolist(), strict=True)
        going = [row for row, pair in enumerate(pairs) if running[row].add(*pair)]
        if not going:
            return
        if len(going) < len(running):
            running = [running[row] for row in going]
            chosen = chosen[going]
            cache.keep(going)
        states = model.step(chosen, cache)


def choose(model: GPT, states: Tensor, texts: Sequence[_Text]) -> tuple[Tensor, Tensor]:
    """Return the next token of each text, given its states `[batch, hidden]`.

    Returns:
        Token ids, int64 `[batch]`, and their log-probabilities in nats, float32 `[batch]`.

    Raises:
        InputError: The logits are not finite.
    """
    head = model.output_layer
    chosen = torch.empty(len(texts), dtype=torch.int64, device=states.device)
    logprobs = torch.empty(len(texts), dtype=torch.float32, device=states.device)
    for sampling in dict.fromkeys(text.prompt.sampling for text in texts):
        rows = [row for row, text in enumerate(texts) if text.prompt.sampling == sampling]
        if sampling.temperature == 0.0:
            chosen[rows], logprobs[rows] = head.argmax(states[rows])
            continue
        logits = head.logits(states[rows])
        numbers = [torch.rand((), generator=texts[row].random, dtype=torch.float64) for row in rows]
        drawn = draw(logits, torch.stack(numbers).to(logits.device), sampling)
        chosen[rows] = drawn
        logprobs[rows] = logits.log_softmax(dim=-1).gather(1, drawn[:, None]).squeeze(1)
    if not logprobs.isfinite().all():
        raise InputError(
            "the model's logits are not finite: the checkpoint is damaged, or its numbers are "
            "too large for this --dtype; try float32"
        )
    return chosen, logprobs


def draw(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """Return a token for each row of `logits` `[rows, vocab]` and random number `[rows]` in [0, 1).

    The number picks the token at that share of the cumulated probabilities, in the order of ids
    and in float64: a change of the last bits of a logit changes the choice hardly ever.
    """
    scaled = logits.double() / sampling.temperature  # [N, V]
    if sampling.top_k is not None and sampling.top_k < scaled.shape[1]:
        last = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < last, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        enough = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p  # before this one
        dropped = torch.zeros_like(enough).scatter(1, index, enough)
        scaled = scaled.masked_fill(dropped, -torch.inf)
    cumulated = scaled.softmax(dim=-1).cumsum(dim=-1)
    shares = numbers[:, None] * cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, shares, right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[1] - 1)


def _tokens_in_cache(engine: Loaded) -> int:
    """Return how many tokens' keys and values `CACHE_BYTES` hold."""
    assert isinstance(engine.model, GPT)
    kept = engine.model.cache_widths.values()  # as many on every rank
    token = sum(heads * (keys + values) for heads, keys, values in kept) * engine.dtype.itemsize
    return CACHE_BYTES if not token else max(CACHE_BYTES // token, 1)


def _texts_in_cache(engine: Loaded) -> int:
    """Return how many texts' states, float32, `CACHE_BYTES` hold."""
    assert isinstance(engine.model, GPT)
    return max(CACHE_BYTES // max(FLOAT32 * engine.model.state_size, 1), 1)
