"""The tokenizer of a converted model, in the form that AutoTokenizer.from_pretrained accepts.

transformers 5 needs a tokenizer.json (from vocab.json and merges.txt alone it raises, or builds an
empty tokenizer), and a tokenizer_config.json whose class takes that file as it is. The generic fast
class is written: the model's own class would rebuild the rules from defaults.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)
VOCAB_AND_MERGES = (
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("gpt2-vocab.json", "gpt2-merges.txt"),
)
END_OF_TEXT = "<|endoftext|>"
BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
INPUTS = {
    # Without this list the generic class also returns token types, which GPT-2 would embed.
    "gpt": ["input_ids", "attention_mask"],
    "bert": ["input_ids", "token_type_ids", "attention_mask"],
}


@dataclass(frozen=True)
class TokenizerPlan:
    """The tokenizer files to write, and what the model's own files need to know of them."""

    vocab_size: int | None
    token_ids: Mapping[str, int]
    """`bos_token_id`, `eos_token_id`, `pad_token_id`: those that the tokenizer has."""
    copied: Mapping[str, Path] = field(default_factory=dict)
    """File name -> the file to copy."""
    written: Mapping[str, str] = field(default_factory=dict)
    """File name -> text."""
    warnings: tuple[str, ...] = ()

    def write(self, folder: Path) -> list[str]:
        """Write the files; return their names."""
        for name, source in self.copied.items():
            shutil.copyfile(source, folder / name)
        for name, text in self.written.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [*self.copied, *self.written]


def plan_tokenizer(
    source: Path | tuple[Path, Path], *, kind: str, max_length: int
) -> TokenizerPlan:
    """Return what to write for a tokenizer.

    Args:
        source: A folder, one file of the accepted forms, or (vocabulary, merges).
        kind: `gpt` or `bert`: which inputs the model takes.
        max_length: The model's positions.

    Raises:
        InputError: There is no tokenizer, or it is damaged.
    """
    common = {"model_max_length": max_length, "model_input_names": INPUTS[kind]}
    vocab, merges = source if isinstance(source, tuple) else _find(source)
    try:
        if merges is not None:
            return _bpe(vocab, merges, common)
        if vocab.name.endswith(".txt"):
            return _word_piece(vocab, common)
        if vocab.name.endswith(".model"):
            return _sentence_piece(vocab)
        return _ready(vocab, common)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{vocab} is no tokenizer that can be read: {error}") from None


def _find(source: Path) -> tuple[Path, Path | None]:
    """Return the file that defines a tokenizer, and the merges of a byte-level BPE."""
    if source.is_file():
        for vocab, merges in VOCAB_AND_MERGES:
            if source.name == vocab and (source.parent / merges).is_file():
                return source, source.parent / merges
        return source, None
    if (source / "tokenizer.json").is_file():
        return source / "tokenizer.json", None
    for vocab, merges in VOCAB_AND_MERGES:
        if (source / vocab).is_file() and (source / merges).is_file():
            return source / vocab, source / merges
    texts = [source / "vocab.txt", *sorted(source.glob("bert*vocab.txt"))]
    for path in (*texts, source / "tokenizer.model"):
        if path.is_file():
            return path, None
    raise InputError(
        f"{source} holds no tokenizer; expected tokenizer.json, vocab.json with merges.txt, "
        "vocab.txt "
        "or tokenizer.model"
    )


def _config(settings: Mapping[str, Any]) -> str:
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}, indent=2) + "\n"


def _size(backend: Any) -> int:
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _ready(path: Path, common: Mapping[str, Any]) -> TokenizerPlan:
    """Take a tokenizer.json and what lies beside it as they are."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(path))
    copied = {name: path.parent / name for name in COPIED if (path.parent / name).is_file()}
    copied["tokenizer.json"] = path
    settings: dict[str, Any] = {}
    written = {}
    if "tokenizer_config.json" in copied:
        settings = json.loads(copied["tokenizer_config.json"].read_bytes())
    else:
        tokens = {key: END_OF_TEXT for key in ("bos_token", "eos_token")}
        tokens = tokens if backend.token_to_id(END_OF_TEXT) is not None else {}
        tokens |= {
            key: token
            for key, token in BERT_TOKENS.items()
            if "token_type_ids" in common["model_input_names"]
            and backend.token_to_id(token) is not None
        }
        settings = {**common, **tokens}
        written["tokenizer_config.json"] = _config(settings)
    ids = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (index := backend.token_to_id(token)) is not None:
            ids[f"{name}_token_id"] = index
    return TokenizerPlan(_size(backend), ids, copied, written)


def _bpe(vocab: Path, merges: Path, common: Mapping[str, Any]) -> TokenizerPlan:
    """Build GPT-2's byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = backend.token_to_id(END_OF_TEXT)
    tokens, ids = {}, {}
    if end is not None:
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        tokens = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk")}
        ids = {"bos_token_id": end, "eos_token_id": end}
    return TokenizerPlan(
        _size(backend),
        ids,
        {"vocab.json": vocab, "merges.txt": merges},
        {
            "tokenizer.json": backend.to_str(),
            "tokenizer_config.json": _config({**common, **tokens, "add_prefix_space": False}),
        },
    )


def _word_piece(vocab: Path, common: Mapping[str, Any]) -> TokenizerPlan:
    """Build BERT's WordPiece; words of up to 200 letters are cut, as in Megatron's own code."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = [line.strip() for line in vocab.read_text(encoding="utf-8").split("\n")]
    while pieces and not pieces[-1]:
        pieces.pop()
    numbers = {piece: index for index, piece in enumerate(pieces)}
    if "[UNK]" not in numbers:
        raise InputError(
            f"{vocab} is no BERT vocabulary: it has no [UNK] among its {len(pieces)} lines"
        )
    lower_case = _lower_case(vocab, pieces)
    backend = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]", max_input_chars_per_word=200))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    tokens = {key: token for key, token in BERT_TOKENS.items() if token in numbers}
    backend.add_special_tokens(list(tokens.values()))
    if "[CLS]" in numbers and "[SEP]" in numbers:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])],
        )
    ids = {"pad_token_id": numbers["[PAD]"]} if "[PAD]" in numbers else {}
    return TokenizerPlan(
        len(pieces),
        ids,
        {"vocab.txt": vocab},
        {
            "tokenizer.json": backend.to_str(),
            "tokenizer_config.json": _config({**common, **tokens, "do_lower_case": lower_case}),
        },
    )


def _lower_case(vocab: Path, pieces: list[str]) -> bool:
    config = vocab.parent / "tokenizer_config.json"
    if config.is_file():
        stated = json.loads(config.read_bytes()).get("do_lower_case")
        if isinstance(stated, bool):
            return stated
    if "uncased" in f"{vocab.absolute().parent.name} {vocab.name}".lower():
        return True
    return all(piece == piece.lower() for piece in pieces if not piece.startswith("["))


def _sentence_piece(model: Path) -> TokenizerPlan:
    """Copy a sentencepiece model; its size is known only where the library is installed."""
    size, ids = None, {}
    try:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(model))
        size = int(processor.get_piece_size())
        ids = {"bos_token_id": processor.bos_id(), "eos_token_id": processor.eos_id()}
        ids = {key: int(index) for key, index in ids.items() if index >= 0}
    except ImportError:
        pass
    warning = (
        f"{model.name} is copied as it is: transformers 5 splits text in another way from a bare "
        "sentencepiece model "
        "than its own library does; use the tokenizer.json of the model where there is one"
    )
    return TokenizerPlan(size, ids, {"tokenizer.model": model}, warnings=(warning,))
