"""Text to ids and back as transformers does it: with special tokens read, added and left out."""

from __future__ import annotations

from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.checkpoints.tokenizers.begin_of_text import adds_begin, begin_id


class HubEncoding:
    """A tokenizer by the rules of transformers, which lm-evaluation-harness' results rest on.

    `Tokenizer` follows Megatron: `<|endoftext|>` written in a text is a string like any other, and
    nothing is added. Here it is read as the token, BOS is added where the tokenizer's own files say
    so, and special tokens are left out of the text of ids. (A bare sentencepiece model is run by
    its own library: added tokens are read, BOS is added where its tokenizer_config.json says so.)
    """

    def __init__(self, tokenizer: Tokenizer, *, add_bos: bool | None = None) -> None:
        """Take a tokenizer; `add_bos` overrides what its files say."""
        self.tokenizer = tokenizer
        self.add_bos = add_bos
        if tokenizer.kind == "sentencepiece":
            self.backend = tokenizer.backend
            bos = int(self.backend.bos_id())
            self.bos_id = bos if bos >= 0 else None
            self.adds_bos = bool(tokenizer.settings.get("add_bos_token", False))
        else:
            self.backend = tokenizer.hub_backend()
            self.bos_id = tokenizer.special_id("bos")
            self.adds_bos = False  # beyond what the backend's own rules add
        self.begin_id = begin_id(tokenizer)
        if add_bos and self.begin_id is None:
            raise InputError(
                f"{tokenizer.source} has no begin-of-text token to put before each text; leave "
                "out --bos yes (or add_bos_token)"
            )

    def begin(self) -> dict[str, Any]:
        """Return what a record says of the token before each text."""
        asked = {None: "auto", True: "yes", False: "no"}[self.add_bos]
        adds = self.add_bos
        if adds is None:
            adds = self.adds_bos or (
                self.tokenizer.kind != "sentencepiece" and adds_begin(self.tokenizer)
            )
        return {"bos": asked, "bos_id": self.begin_id if adds else None}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text; `special`: with what the tokenizer adds to a text."""
        if self.tokenizer.kind == "sentencepiece":
            ids = self.tokenizer.encode(text)
        else:
            if self.tokenizer.missing_bytes:
                self.tokenizer.encode(text)  # refuses what would be dropped
            by_rules = special and self.add_bos is None
            ids = list(self.backend.encode(text, add_special_tokens=by_rules).ids)
        add = self.adds_bos if self.add_bos is None else self.add_bos
        if special and add and self.begin_id is not None:
            ids.insert(0, self.begin_id)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids without special tokens and rows that only pad the table."""
        known = [index for index in ids if index < self.tokenizer.vocab_size]
        if self.tokenizer.kind == "sentencepiece":
            special = {entry.index for entry in self.tokenizer.added if entry.special}
            return self.tokenizer.decode(index for index in known if index not in special)
        return str(self.backend.decode(known, skip_special_tokens=True))
