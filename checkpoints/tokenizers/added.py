"""Tokens that were added to a vocabulary: their ids, and their places in a text.

What `tokenizers` does with such tokens (strips, whole words, normalized text) is what transformers'
fast tokenizers do, so its rules are used for every kind of vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.tokenizers.side_files import AddedEntry, SideFiles, own_pieces

MOST_UNUSED = 8192
"""Ids that may be left out before an added token; more are no tokenizer's."""


def to_add(side: SideFiles, base: Mapping[str, int], rows: int, where: Path) -> list[AddedEntry]:
    """Return the tokens that a text is searched for, each with its id.

    These are all that lie beyond the vocabulary and those of its own entries that were added. The
    vocabulary's own special entries (`<|endoftext|>`, `[MASK]`, or what the files name in their
    place) are left out: written in a text they are strings, as they are for Megatron.

    Args:
        side: What the files beside the vocabulary add.
        base: Piece -> id of the vocabulary itself.
        rows: Rows that its ids can name.
        where: The vocabulary, for messages.

    Raises:
        InputError: The ids contradict the vocabulary, or leave out more than any tokenizer does.
    """
    held = {index: piece for piece, index in base.items()}
    found: list[AddedEntry] = []
    next_index, own_special = rows, own_pieces(side.settings)
    for entry in side.entries:
        own = base.get(entry.content)
        if own is not None:
            if entry.index not in (None, own):
                raise InputError(
                    f"the files beside {where} give the token {entry.content!r} the id "
                    f"{entry.index}, its vocabulary {own}; they do not belong together"
                )
            if not (entry.special and entry.content in own_special):
                found.append(dataclasses.replace(entry, index=own))
            continue
        index = next_index if entry.index is None else entry.index
        if index < rows:
            raise InputError(
                f"the files beside {where} give the id {index} to the added token "
                f"{entry.content!r}, its vocabulary to {held.get(index)!r}; they do not belong "
                "together"
            )
        if index - next_index > MOST_UNUSED:
            raise InputError(
                f"the files beside {where} give the added token {entry.content!r} the id {index}, "
                f"{index - next_index} beyond the one before it; is it damaged?"
            )
        for unused in range(next_index, index):
            found.append(AddedEntry(f"<|unused row {unused}|>", unused, special=True))
        found.append(dataclasses.replace(entry, index=index))
        next_index = index + 1
    return found


def add_to(backend: Any, entries: Sequence[AddedEntry], where: Path) -> None:
    """Add tokens to a backend of `tokenizers` that holds none, as ordinary ones.

    Ordinary, because `encode_special_tokens` would leave special ones unread.

    Raises:
        InputError: The backend gives a token another id, or two tokens are the same once they are
            normalized: which one a text would get is left to chance.
    """
    from tokenizers import AddedToken

    seen: dict[str, str] = {}
    for entry in entries:
        if entry.normalized and backend.normalizer is not None:
            form = backend.normalizer.normalize_str(entry.content)
            if seen.setdefault(form, entry.content) != entry.content:
                raise InputError(
                    f"the files beside {where} add the tokens {seen[form]!r} and "
                    f"{entry.content!r}, which are the same once they are normalized; one of them "
                    "needs normalized = false"
                )
        backend.add_tokens([AddedToken(entry.content, special=False, **switches(entry))])
        if backend.token_to_id(entry.content) != entry.index:
            raise InputError(
                f"the token {entry.content!r} that the files beside {where} add with the id "
                f"{entry.index} cannot get it, since the vocabulary has gaps; give the "
                "tokenizer.json of the model"
            )


def switches(entry: AddedEntry) -> dict[str, bool]:
    """Return how an added token is looked for, by the names of `tokenizers`."""
    return {
        "lstrip": entry.lstrip,
        "rstrip": entry.rstrip,
        "single_word": entry.single_word,
        "normalized": entry.normalized,
    }


class AddedSplitter:
    """Cuts a text at added tokens, for a vocabulary whose own library knows none."""

    def __init__(self, entries: Sequence[AddedEntry]) -> None:
        """Take tokens with their ids."""
        from tokenizers import AddedToken, models
        from tokenizers import Tokenizer as Backend

        self.ids = {entry.content: entry.index for entry in entries}
        self.special = {entry.index: entry.special for entry in entries}
        # A model of one word: all that is no added token becomes this word.
        self.backend = Backend(models.WordLevel({"": 0}, unk_token=""))
        self.backend.add_tokens(
            [AddedToken(entry.content, special=False, **switches(entry)) for entry in entries]
        )

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield the pieces of a text: (an added token, its id) or (text between them, None)."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if index == 0:
                yield text[start:stop], None
            else:
                piece = str(self.backend.id_to_token(index))
                yield piece, self.ids[piece]
