"""The tokenizer of a converted model, in the form that AutoTokenizer.from_pretrained accepts.

transformers 5 needs a tokenizer.json (from vocab.json and merges.txt alone it raises, or builds an
empty tokenizer), and a tokenizer_config.json whose class takes that file as it is. The generic fast
class is written: the model's own class would rebuild the rules from defaults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.tokenizer import Tokenizer
from mlm_eval.checkpoints.tokenizers.copying import check_own_file, copy_tokenizer_file
from mlm_eval.checkpoints.tokenizers.side_files import SPECIAL_NAMES, TOKENIZER_CONFIG

COPIED = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
CARRIED = (
    *(f"{name}_token" for name in SPECIAL_NAMES),
    *("additional_special_tokens", "extra_special_tokens", "chat_template"),
)
"""Settings of a tokenizer that hold for the fast one, too."""
END_OF_TEXT = "<|endoftext|>"
NO_TOKENIZER = (
    "no tokenizer was found, so the folder holds none and AutoTokenizer refuses it; give "
    "--tokenizer DIR to have it written"
)
INPUTS = {
    # Without this list the generic class also returns token types, which GPT-2 would embed.
    "gpt": ["input_ids", "attention_mask"],
    "t5": ["input_ids", "attention_mask"],
    "bert": ["input_ids", "token_type_ids", "attention_mask"],
}


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files to write, and what the model's own files need to know of them."""

    token_ids: Mapping[str, int]
    """`bos_token_id`, `eos_token_id`, `pad_token_id`: those that the tokenizer has."""
    copied: Mapping[str, Path]
    """File name -> the file to copy."""
    written: Mapping[str, str] = field(default_factory=dict)
    """File name -> text."""
    warnings: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the files."""
        for name, source in self.copied.items():
            copy_tokenizer_file(source, folder / name)
        for name, text in self.written.items():
            (folder / name).write_text(text, encoding="utf-8")


def tokenizer_files(tokenizer: Tokenizer, *, family: str, max_length: int) -> TokenizerFiles:
    """Return what to write for a tokenizer.

    Args:
        tokenizer: Of any kind.
        family: `gpt`, `bert` or `t5`: which inputs the model takes.
        max_length: The model's positions.

    Raises:
        InputError: A file beside the vocabulary is a link that leads out of its folder.
    """
    for file in tokenizer.files:  # what they say is written, be it in a file of another name
        check_own_file(file)
    if tokenizer.kind == "sentencepiece":
        return _sentencepiece_files(tokenizer)
    vocabulary = tokenizer.files[0]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": INPUTS[family],
        **_special_tokens(tokenizer, family),
        **{key: tokenizer.settings[key] for key in CARRIED if tokenizer.settings.get(key)},
    }
    written = {}
    if tokenizer.kind == "tokenizer.json":
        copied = {name: vocabulary.with_name(name) for name in COPIED}
        copied = {name: file for name, file in copied.items() if file.is_file()}
        copied["tokenizer.json"] = vocabulary
    else:
        written["tokenizer.json"] = tokenizer.hub_backend().to_str()
        if tokenizer.kind == "gpt2-bpe":
            copied = dict(zip(("vocab.json", "merges.txt"), tokenizer.files, strict=False))
            settings["add_prefix_space"] = bool(tokenizer.settings.get("add_prefix_space"))
        else:
            copied = {"vocab.txt": vocabulary}
            settings["do_lower_case"] = tokenizer.lower_case
    if TOKENIZER_CONFIG in copied:
        settings = dict(tokenizer.settings)
    else:
        written[TOKENIZER_CONFIG] = json.dumps(settings, indent=2) + "\n"
    stated = dataclasses.replace(tokenizer, settings=settings)
    ids = {f"{name}_token_id": stated.special_id(name) for name in ("bos", "eos", "pad")}
    warnings: tuple[str, ...] = ()
    if tokenizer.without_never_split is not None:
        warnings = (
            f"the words of never_split ({', '.join(tokenizer.settings['never_split'][:5])}) are "
            "cut like others by the tokenizer that is written: fast tokenizers have no such words",
        )
    return TokenizerFiles(
        {key: index for key, index in ids.items() if index is not None}, copied, written, warnings
    )


def no_tokenizer_files(model_type: str) -> TokenizerFiles:
    """Return what to write for a model without a tokenizer: a file at which transformers stops.

    From config.json alone it would make a tokenizer of one entry, which cuts every text into
    nothing.
    """
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if model_type == "qwen2":  # transformers 5 puts its own class in the place of any that is named
        settings["added_tokens_decoder"] = {"0": "no tokenizer was converted with this model"}
    return TokenizerFiles(
        {}, {}, {TOKENIZER_CONFIG: json.dumps(settings, indent=2) + "\n"}, (NO_TOKENIZER,)
    )


def _special_tokens(tokenizer: Tokenizer, family: str) -> dict[str, str]:
    """Return the special tokens by transformers' names, for a tokenizer whose files name none."""
    tokens = {}
    if tokenizer.kind != "bert-wordpiece" and tokenizer.piece_id(END_OF_TEXT) is not None:
        tokens = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk")}
    if tokenizer.kind == "bert-wordpiece" or family == "bert":
        for name, piece in tokenizer.special_pieces().items():
            if tokenizer.piece_id(piece) is not None:
                tokens[f"{name}_token"] = piece
    return tokens


def _sentencepiece_files(tokenizer: Tokenizer) -> TokenizerFiles:
    """Copy a sentencepiece model as it is."""
    model, backend = tokenizer.files[0], tokenizer.backend
    own = {"bos": int(backend.bos_id()), "eos": int(backend.eos_id()), "pad": int(backend.pad_id())}
    named = {name: tokenizer.special_id(name) for name in own}
    ids = {
        f"{name}_token_id": index if named[name] is None else named[name]
        for name, index in own.items()
    }
    warning = (
        f"{model.name} is copied as it is: transformers 5 splits text in another way from a bare "
        "sentencepiece model than its own library does; use the tokenizer.json of the model where "
        "there is one"
    )
    return TokenizerFiles(
        {key: index for key, index in ids.items() if index is not None and index >= 0},
        {"tokenizer.model": model, **{file.name: file for file in tokenizer.files[1:]}},
        warnings=(warning,),
    )
