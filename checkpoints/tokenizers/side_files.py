"""What stands beside a vocabulary: settings, and the tokens that were added to it.

A slow tokenizer of transformers keeps added tokens in `added_tokens.json`, or in
`added_tokens_decoder` of `tokenizer_config.json`, never in vocab.json, vocab.txt or
tokenizer.model; which of them are special stands in `special_tokens_map.json` or, again, in
`tokenizer_config.json`. The order of precedence is that of transformers'
`PreTrainedTokenizerBase._from_pretrained` (tokenization_utils_base.py, 5.x).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.files.text_file import misfit, read_json_object

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens by transformers' names, in the order in which it adds those without an id."""


@dataclass(frozen=True)
class AddedEntry:
    """One token that was added to a vocabulary."""

    content: str
    index: int | None
    """Its id; None where no file states one: it comes after all others."""
    special: bool = False
    lstrip: bool = False
    """Whether it takes the white space before it."""
    rstrip: bool = False
    """Whether it takes the white space after it."""
    single_word: bool = False
    """Whether it is read only where no letter or digit touches it."""
    normalized: bool = True
    """Whether it is looked for in the normalized text."""


TOKEN_FLAGS = tuple(
    entry.name for entry in dataclasses.fields(AddedEntry) if entry.name not in ("content", "index")
)


OWN_PIECES = (
    *("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", "<unk>", "<s>", "</s>", "<pad>", "<bos>"),
    *("<eos>", "<mask>", "<|endoftext|>", "<|end_of_text|>"),
)
"""Special pieces that vocabularies have from the start."""


@dataclass(frozen=True)
class SideFiles:
    """What the files beside a vocabulary say."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json, with what special_tokens_map.json adds to it."""
    entries: tuple[AddedEntry, ...] = ()
    """Added tokens: those with an id by their ids, then special tokens without one."""
    files: tuple[Path, ...] = ()
    """Those that exist."""


def read_side_files(vocabulary: Path) -> SideFiles:
    """Return what stands in the folder of a vocabulary.

    Raises:
        InputError: A file is damaged, or names a token in a form that is not known.
    """
    found = {
        name: vocabulary.with_name(name)
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
        if vocabulary.with_name(name).is_file()
    }
    content = {name: read_json_object(path) for name, path in found.items()}
    settings = content.get(TOKENIZER_CONFIG, {})
    where = vocabulary.with_name(TOKENIZER_CONFIG)
    if fault := misfit(settings, {"tokenizer_class": "text?"}):
        raise InputError(f"{where}: {fault}; correct it")
    stated = settings.get("added_tokens_decoder")
    if stated is None:
        settings = {**settings, **content.get(SPECIAL_TOKENS_MAP, {})}
    specials = _specials(settings, where)
    if stated is not None:
        if not isinstance(stated, dict):
            raise InputError(f"{where}: added_tokens_decoder is no JSON object of ids; correct it")
        listed = [_entry(token, index, where) for index, token in stated.items()]
    else:
        where = vocabulary.with_name(ADDED_TOKENS)
        named = {entry.content for entry in specials}
        # transformers 5 takes those that only the older list names for ordinary ones here.
        older = set(map(str, settings.get("additional_special_tokens") or ()))
        older -= {special_piece(settings, name) for name in SPECIAL_NAMES}
        older -= set(map(str, settings.get("extra_special_tokens") or ()))
        listed = [
            _entry(
                {
                    "content": token,
                    "special": token in named,
                    "normalized": token not in named or token in older,
                },
                index,
                where,
            )
            for token, index in content.get(ADDED_TOKENS, {}).items()
        ]
    for key, values in (
        ("token", [entry.content for entry in listed]),
        ("id", [str(entry.index) for entry in listed]),
    ):
        twice = sorted(value for value, count in Counter(values).items() if count > 1)
        if twice:
            raise InputError(f"{where} adds the {key} {twice[0]!r} twice; correct it")
    listed.sort(key=lambda entry: entry.index or 0)
    known = {entry.content for entry in listed}
    rest = {entry.content: entry for entry in specials if entry.content not in known}
    return SideFiles(settings, (*listed, *rest.values()), tuple(found.values()))


def special_piece(settings: Mapping[str, Any], name: str) -> str | None:
    """Return the special token of a name (`bos`, `cls`, ...) that the settings state, if any."""
    piece = settings.get(f"{name}_token")
    piece = piece.get("content") if isinstance(piece, dict) else piece
    return piece if isinstance(piece, str) else None


def own_pieces(settings: Mapping[str, Any]) -> set[str]:
    """Return the special tokens that a model has from the start, not those that a user added."""
    named = (special_piece(settings, name) for name in SPECIAL_NAMES)
    return {*OWN_PIECES, *(piece for piece in named if piece is not None)}


def _specials(settings: Mapping[str, Any], where: Path) -> list[AddedEntry]:
    """Return the special tokens that the settings name, by name first, without their ids."""
    tokens = [settings.get(f"{name}_token") for name in SPECIAL_NAMES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        if not isinstance(more, list | dict):
            raise InputError(f"{where}: {key} is no list of tokens; correct it")
        tokens += more.values() if isinstance(more, dict) else more
    found = []
    for token in tokens:
        if isinstance(token, str):
            found.append(AddedEntry(token, None, special=True, normalized=False))
        elif isinstance(token, dict):
            found.append(_entry({**token, "special": True}, None, where))
        elif token is not None and token is not False:
            raise InputError(f"{where} names {token!r} as a special token; expected a text")
    return [entry for entry in found if entry.content]


def _entry(token: Any, index: Any, where: Path) -> AddedEntry:
    """Return one token of a file, with transformers' defaults for what it does not say."""
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise InputError(f"{where} adds {shown(token)} as a token; expected an object with content")
    content = token["content"]
    if index is not None:
        try:
            number = int(index)
        except (TypeError, ValueError):
            number = -1
        if number < 0 or isinstance(index, bool | float) or not content:
            raise InputError(
                f"{where} adds the token {content!r} with the id {shown(index)}; expected a text "
                "and an id of 0 or more"
            )
        index = number
    given = {key: value for key, value in token.items() if key not in ("content", "__type", "id")}
    for key, value in given.items():
        if key not in TOKEN_FLAGS or not isinstance(value, bool):
            raise InputError(
                f"{where} gives the token {content!r} the setting {key} = {shown(value)}, which is "
                f"not known; use {', '.join(TOKEN_FLAGS)}, true or false each"
            )
    given.setdefault("normalized", not given.get("special", False))
    return AddedEntry(content, index, **given)


_RANKED = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def refuse_tiktoken(file: Path) -> None:
    """Refuse a vocabulary of tiktoken, by name: pieces with ranks, and no rule how text is cut.

    Llama 3's own release calls such a file tokenizer.model, Mistral's is tekken.json.

    Raises:
        InputError: It is one, or cannot be read.
    """
    if not file.is_file():
        return
    try:
        with file.open("rb") as stream:
            head = stream.read(256)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    listed = file.suffix == ".json" and (
        file.name == "tekken.json" or b'"token_bytes"' in head and head.lstrip()[:1] == b"["
    )
    if listed or (file.suffix in (".tiktoken", ".model", ".bpe") and _RANKED.match(head)):
        raise InputError(
            f"{file} is a vocabulary of tiktoken, without the rule by which its model cuts text "
            "into words; it is not read: give the tokenizer.json of the model"
        )
