"""What is to be continued, how tokens are chosen, and what became of it; torch is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer

CONTEXT = 8
"""Tokens of a prompt that are decoded with what follows it."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 0.0
    """0: the most likely token, the lowest id on a tie. Above: a random one, the logits divided by
    this number."""
    top_k: int | None = None
    """Only among the k most likely (and those as likely as the last of them); None: all."""
    top_p: float | None = None
    """Only among the most likely that together reach this probability; None: all."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature} must be a number from 0 up")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(
                f"top_k {self.top_k} must be 1 or more; leave it out to take all tokens"
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p {self.top_p} must be above 0 and at most 1")


GREEDY = Sampling()


@dataclass(frozen=True)
class Prompt:
    """What is to be continued."""

    tokens: Sequence[int]
    """At least one token id, at most the model's positions."""
    max_new_tokens: int
    """The text ends after so many, or where the positions end: its last token may be the one after
    the last position."""
    stop_tokens: frozenset[int] = frozenset()
    """Ids that end the text and are not part of it."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they need the tokenizer."""
    sampling: Sampling = GREEDY
    """How tokens are chosen."""
    seed: int = 0
    """Of this text's random numbers."""


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt."""

    tokens: list[int]
    """The new tokens, those of a stop string included."""
    logprobs: list[float] = field(compare=False)
    """Of each, in nats: what the model gives it among the whole vocabulary, whatever the
    temperature and the choice were. Two texts are equal whatever their last bits are."""
    text: str | None
    """Them as text up to the stop string; None without a tokenizer."""
    ended_by: str
    """`stop token`, `stop string` or `length`."""


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text of `tokens` as it stands after a prompt: sentencepiece keeps its space."""
    before = list(prompt[-CONTEXT:])
    start, whole = text_of(tokenizer, before), text_of(tokenizer, [*before, *tokens])
    return whole[len(start) :] if whole.startswith(start) else text_of(tokenizer, tokens)


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text of tokens, but for those that only pad the model's table."""
    size = tokenizer.vocab_size
    return tokenizer.decode(token for token in tokens if token < size)
