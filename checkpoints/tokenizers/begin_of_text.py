"""The token that begins a text (BOS): which it is, and whether a tokenizer puts it there unasked.

Megatron's protocols put none before a text. Models whose tokenizers add one (Gemma, Llama,
DeepSeek) have hardly seen a text without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer

BOS_CHOICES = ("auto", "yes", "no")

_ADDING = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
"""transformers' classes for sentencepiece that add one unless their settings say otherwise."""

_PIECES = ("<s>", "<bos>", "<|begin_of_text|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")


@dataclass(frozen=True)
class BeginOfText:
    """What stands before each text, as `--bos` asks."""

    asked: str
    ids: tuple[int, ...] = ()
    """One id, or none."""
    warning: str | None = None
    """That the tokenizer would add one which is left out."""

    def record(self) -> dict[str, Any]:
        """Return what a record says of it."""
        return {"bos": self.asked, "bos_id": self.ids[0] if self.ids else None}


def begin_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the begin-of-text token; None where the tokenizer has none.

    It is the one that tokenizer_config.json names or the file's own rules add, else a usual piece,
    and for GPT-2, as in transformers, the end of text.
    """
    named = tokenizer.special_id("bos")
    if named is not None:
        return named
    if tokenizer.kind == "sentencepiece":
        own = int(tokenizer.backend.bos_id())
        return own if own >= 0 else None
    added = _added_by_rules(tokenizer)
    if added is not None:
        return added
    found = (tokenizer.piece_id(piece) for piece in _PIECES)
    usual = next((index for index in found if index is not None), None)
    return tokenizer.eot_id if usual is None and tokenizer.kind == "gpt2-bpe" else usual


def adds_begin(tokenizer: Tokenizer) -> bool:
    """Return whether transformers' tokenizer of these files puts the token before a text."""
    if begin_id(tokenizer) is None:
        return False
    said = tokenizer.settings.get("add_bos_token")
    if tokenizer.kind == "sentencepiece":
        name = str(tokenizer.settings.get("tokenizer_class") or "").removesuffix("Fast")
        return bool(name in _ADDING if said is None else said)
    return said is True or _added_by_rules(tokenizer) is not None


def choose_begin(
    asked: str, tokenizer: Tokenizer | None, *, as_tokenizer: bool = False
) -> BeginOfText:
    """Return what stands before each text.

    Args:
        asked: `yes`, `no` or `auto`.
        tokenizer: The model's; None where there are no texts.
        as_tokenizer: `auto` does as the tokenizer would, instead of adding none.

    Raises:
        InputError: `yes` where there is no such token.
    """
    if asked not in BOS_CHOICES:
        raise InputError(f"--bos {asked} is unknown; choose {', '.join(BOS_CHOICES)}")
    if tokenizer is None:
        if asked == "yes":
            raise InputError("--bos yes needs the tokenizer; give --tokenizer DIR")
        return BeginOfText(asked)
    if asked == "no":
        return BeginOfText(asked)
    adds = adds_begin(tokenizer)
    found = begin_id(tokenizer)
    if asked == "yes" or (adds and as_tokenizer):
        if found is None:
            raise InputError(
                f"{tokenizer.source} has no begin-of-text token, which --bos yes puts before each "
                "text; leave --bos out"
            )
        return BeginOfText(asked, (found,))
    if not adds:
        return BeginOfText(asked)
    assert found is not None
    return BeginOfText(
        asked,
        warning=f"{tokenizer.source} puts {tokenizer.decode([found])} before a text, which "
        "Megatron's protocol does not: a model that was trained with it is lost without it; use "
        "--bos yes, or --bos no to leave out this warning",
    )


def _added_by_rules(tokenizer: Tokenizer) -> int | None:
    """Return the token that the rules of a tokenizer.json put before a text."""
    if tokenizer.kind != "tokenizer.json":
        return None
    plain = tokenizer.encode("a")
    whole = list(tokenizer.backend.encode("a", add_special_tokens=True).ids)
    if len(whole) <= len(plain) or whole[: len(plain)] == plain:
        return None
    return int(whole[0])
