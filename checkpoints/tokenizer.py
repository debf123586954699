"""Tokenizer: text to ids by the rules that Megatron used, from the files of a vocabulary.

This is the one place that knows the files of a tokenizer. Evaluation, conversion and the harness
take the same object; the latter two use `Tokenizer.hub_backend`, which follows transformers' rules.

It wraps the `tokenizers` library (or `sentencepiece`), not transformers, whose import takes seconds
and whose conversion of a bare `tokenizer.model` changes the ids. `Tokenizer.encode` adds no special
tokens and reads none out of the text: `<|endoftext|>` or `[MASK]` written in a text is a string
like any other, as it is for Megatron.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.catalog import is_catalog_name, resolve
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.checkpoints.files.stand_in import refuse_stand_in
from mlm_eval.checkpoints.files.text_file import read_json_object, read_text

TOKENIZER_CONFIG = "tokenizer_config.json"
VOCAB_AND_MERGES = (
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),  # as OpenAI published GPT-2
    ("gpt2-vocab.json", "gpt2-merges.txt"),  # as Megatron's README names them
)
BERT_PIECES = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
EOT_PIECES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# Megatron pads to a multiple of make_vocab_size_divisible_by x tp; nobody runs beyond 128 x 64.
LARGEST_PADDING = 128 * 64
ACCEPTED = (
    "tokenizer.json, vocab.json with merges.txt, encoder.json with vocab.bpe, vocab.txt or "
    "tokenizer.model"
)


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its rules."""

    kind: str
    """`gpt2-bpe`, `bert-wordpiece`, `tokenizer.json` or `sentencepiece`."""
    source: str
    """Folder or file it was read from."""
    vocab_size: int
    """True size: rows that its ids can name. Not Megatron's padded size, and without the `[BOS]`
    and `[EOS]` that later Megatron versions append to a BERT vocabulary."""
    sha256: str
    """Digest of the files' bytes one after the other, vocabulary first."""
    eot_id: int | None
    """The end-of-text id, None where there is none."""
    backend: Any = field(repr=False, compare=False)
    files: tuple[Path, ...] = ()
    """What it was read from, to be copied with a converted checkpoint."""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What tokenizer_config.json says, where it is one of the files."""
    lower_case: bool | None = None
    """Whether text is lower-cased; None where the file itself decides."""
    missing_bytes: frozenset[int] = field(default=frozenset(), repr=False)
    """Bytes that a byte-level vocabulary has no symbol for; `tokenizers` would drop them."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, nothing added before or after it.

        Raises:
            InputError: The vocabulary has no symbol for a byte of the text.
        """
        if self.kind == "sentencepiece":
            return list(self.backend.encode(text))
        if self.missing_bytes:
            lost = self.missing_bytes.intersection(text.encode())
            if lost:
                raise InputError(
                    f"{self.source} has no symbol for the byte(s) {sorted(lost)} of the text, "
                    f"which would be dropped; use a byte-level vocabulary that holds all 256 bytes"
                )
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special pieces included."""
        ids = list(ids)
        if self.kind == "sentencepiece":
            return str(self.backend.decode(ids))
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def piece_id(self, piece: str) -> int | None:
        """Return the id of one entry of the vocabulary, None if it holds no such entry."""
        if self.kind == "sentencepiece":
            index = int(self.backend.piece_to_id(piece))
            return index if self.backend.id_to_piece(index) == piece else None
        index_or_none: int | None = self.backend.token_to_id(piece)
        return index_or_none

    @property
    def cls_id(self) -> int | None:
        """Id of BERT's `[CLS]`."""
        return self.piece_id("[CLS]")

    @property
    def sep_id(self) -> int | None:
        """Id of BERT's `[SEP]`."""
        return self.piece_id("[SEP]")

    @property
    def mask_id(self) -> int | None:
        """Id of BERT's `[MASK]`."""
        return self.piece_id("[MASK]")

    def special_id(self, name: str) -> int | None:
        """Return the id of the `bos`, `eos` or `pad` token that tokenizer_config.json names."""
        piece = _special_piece(self.settings, name)
        return None if piece is None else self.piece_id(piece)

    def hub_backend(self) -> Any:
        """Return a copy of the backend by transformers' rules: special tokens are read in a text.

        The copy of a BERT vocabulary also adds `[CLS]` and `[SEP]` where it is asked for special
        tokens. Not for sentencepiece, whose library has no such switch.
        """
        from tokenizers import AddedToken, processors
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        if self.kind == "gpt2-bpe" and self.eot_id is not None:
            end = backend.id_to_token(self.eot_id)
            backend.add_special_tokens([AddedToken(end, special=True, normalized=False)])
        if self.kind == "bert-wordpiece":
            pieces = [piece for piece in BERT_PIECES if self.piece_id(piece) is not None]
            backend.add_special_tokens(pieces)
            if self.cls_id is not None and self.sep_id is not None:
                backend.post_processor = processors.TemplateProcessing(
                    single="[CLS] $A [SEP]",
                    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                    special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
                )
        return backend

    def record(self) -> dict[str, Any]:
        """Return what a result record says about the tokenizer."""
        return {
            "kind": self.kind,
            "path": self.source,
            "vocab_size": self.vocab_size,
            "sha256": self.sha256,
            "lower_case": self.lower_case,
        }


def load_tokenizer(
    *,
    directory: str | Path | None = None,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
) -> Tokenizer:
    """Return the tokenizer of a folder (`--tokenizer`) or of its files (`--vocab-file`).

    Args:
        directory: Folder with one of the accepted forms, or the one file of such a form.
        vocab_file: vocab.json (with `merge_file`), a BERT vocabulary in text form, a
            tokenizer.json or a sentencepiece model.
        merge_file: The merges of a byte-level BPE.

    Raises:
        InputError: The files are missing, damaged or do not belong together.
    """
    if (directory is None) == (vocab_file is None):
        raise InputError(
            "name the tokenizer either by its folder (--tokenizer) or by its files (--vocab-file "
            "and, for GPT-2, --merge-file)"
        )
    if directory is None:
        assert vocab_file is not None
        return _load_file(Path(vocab_file), None if merge_file is None else Path(merge_file))
    if merge_file is not None:
        raise InputError("--merge-file goes with --vocab-file, not with --tokenizer")
    folder = Path(directory)
    if not folder.is_dir():
        return _load_file(folder, None)
    tokenizer = _load_folder(folder)
    if tokenizer is None:
        raise InputError(f"{folder} holds no tokenizer; expected {ACCEPTED}")
    return tokenizer


def find_tokenizer(checkpoint_path: str | Path) -> Tokenizer | None:
    """Return the tokenizer stored with a checkpoint, None if there is none.

    Looks in the checkpoint's folder and in its `tokenizer/` subfolder, then, where the path is a
    part of a Megatron checkpoint (`iter_*`, `release`, `mp_rank_*`), in the folders up to its root.
    """
    if is_catalog_name(checkpoint_path):
        _, checkpoint_path = resolve(checkpoint_path)
    folder = Path(checkpoint_path).absolute()
    if not folder.is_dir():
        folder = folder.parent
    while True:
        for candidate in (folder, folder / "tokenizer"):
            if candidate.is_dir() and (tokenizer := _load_folder(candidate)) is not None:
                return tokenizer
        if not (folder.name == "release" or folder.name.startswith(("iter_", "mp_rank_"))):
            return None
        folder = folder.parent


def check_entries(entries: int, rows: int, tokenizer: str = "the tokenizer") -> None:
    """Refuse a tokenizer for a model with `rows` rows in its vocabulary.

    Raises:
        InputError: It has more entries than that, or none.
    """
    if not 1 <= entries <= rows:
        raise InputError(
            f"{tokenizer} has {entries} entries but the model has {rows} rows in its vocabulary: "
            "it is not the tokenizer of this model; give its own with --tokenizer"
        )


def check_fits(tokenizer: Tokenizer, vocab_rows: int) -> str | None:
    """Return a warning if the vocabulary hardly belongs to a model of `vocab_rows`, else None.

    Raises:
        InputError: The model has fewer rows than the vocabulary has entries.
    """
    size = tokenizer.vocab_size
    check_entries(size, vocab_rows, str(tokenizer.source))
    if vocab_rows - size >= LARGEST_PADDING:
        return (
            f"{tokenizer.source} has {size} entries and the model {vocab_rows} rows, more than any "
            f"padding of Megatron adds: it may not be the tokenizer of this model"
        )
    return None


def _load_folder(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of `folder`, in the order of the forms' precision, or None."""
    if (folder / "tokenizer.json").is_file():
        return _load_tokenizer_json(folder / "tokenizer.json")
    for vocab, merges in VOCAB_AND_MERGES:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return _load_gpt2(folder / vocab, folder / merges, source=folder)
    texts = [folder / "vocab.txt", *sorted(folder.glob("bert*vocab.txt"))]
    texts = [path for path in texts if path.is_file()]
    if len(texts) > 1 and texts[0].name != "vocab.txt":
        raise InputError(
            f"{folder} holds several vocabularies ({', '.join(path.name for path in texts)}); "
            f"choose one with --vocab-file"
        )
    if texts:
        return _load_bert(texts[0])
    if (folder / "tokenizer.model").is_file():
        return _load_sentencepiece(folder / "tokenizer.model")
    return None


def _load_file(path: Path, merges: Path | None) -> Tokenizer:
    for file in (path, merges):
        if file is not None and not file.is_file():
            raise InputError(f"{file} does not exist; expected a tokenizer: {ACCEPTED}")
    if merges is not None:
        return _load_gpt2(path, merges, source=path)
    if path.suffix == ".txt":
        return _load_bert(path)
    if path.suffix == ".model":
        return _load_sentencepiece(path)
    if path.suffix != ".json":
        raise InputError(f"{path} is not a known form of a tokenizer; expected {ACCEPTED}")
    if "model" in read_json_object(path):
        return _load_tokenizer_json(path)
    for vocab, merge_name in VOCAB_AND_MERGES:
        if path.name == vocab and (path.parent / merge_name).is_file():
            return _load_gpt2(path, path.parent / merge_name, source=path)
    raise InputError(f"{path} is the vocabulary of a BPE; give its merges too, with --merge-file")


def _load_gpt2(vocab_file: Path, merge_file: Path, *, source: Path) -> Tokenizer:
    """Return GPT-2's byte-level BPE: no prefix space, no special token read from the text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = read_json_object(vocab_file)
    refuse_stand_in(merge_file)
    try:
        backend = Backend(models.BPE.from_file(str(vocab_file), str(merge_file)))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{vocab_file} and {merge_file} do not make a byte-level BPE ({error}); give the "
            f"vocabulary and the merges of one tokenizer"
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    symbols = _byte_symbols()
    return Tokenizer(
        kind="gpt2-bpe",
        source=str(source),
        vocab_size=_rows(backend),
        sha256=_sha256(vocab_file, merge_file),
        files=(vocab_file, merge_file),
        eot_id=_first_id(backend, EOT_PIECES),
        backend=backend,
        missing_bytes=frozenset(b for b in range(256) if symbols[b] not in vocab),
    )


def _load_bert(path: Path) -> Tokenizer:
    """Return BERT's WordPiece; words of up to 200 letters are cut, as in Megatron's own code."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = [line.strip() for line in read_text(path).split("\n")]
    while pieces and not pieces[-1]:
        pieces.pop()
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if "[UNK]" not in vocab:
        raise InputError(
            f"{path} is not a BERT vocabulary: it has no [UNK] among its {len(pieces)} lines; "
            f"expected one piece a line"
        )
    settings = _settings(path)
    lower_case = settings.get("do_lower_case")
    if not isinstance(lower_case, bool):  # not stated: the pieces decide, never a name
        lower_case = all(piece == piece.lower() for piece in pieces if not piece.startswith("["))
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(
        kind="bert-wordpiece",
        source=str(path),
        vocab_size=len(pieces),
        sha256=_sha256(path),
        files=_with_config(path),
        settings=settings,
        eot_id=None,
        backend=backend,
        lower_case=lower_case,
    )


def _load_tokenizer_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        refuse_stand_in(path)
        raise InputError(f"{path} is not a readable tokenizer.json: {error}") from error
    # The file may ask for these; both would change what is scored without a word.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    settings = _settings(path)
    end = _special_piece(settings, "eos")
    return Tokenizer(
        kind="tokenizer.json",
        source=str(path),
        vocab_size=_rows(backend),
        sha256=_sha256(path),
        files=_with_config(path),
        settings=settings,
        eot_id=_first_id(backend, EOT_PIECES if end is None else (end, *EOT_PIECES)),
        backend=backend,
    )


def _load_sentencepiece(path: Path) -> Tokenizer:
    """Return a sentencepiece model, run by its own library as in Megatron.

    Converted by transformers 5 a bare tokenizer.model gives other ids (measured: the leading space
    is lost, unknown words are split otherwise), so that way is not taken.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise InputError(
            f"{path} needs the sentencepiece library, which is not installed: run `pip install "
            f"sentencepiece`, or give the tokenizer.json of the model with --tokenizer"
        ) from None
    try:
        backend = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # RuntimeError, OSError or a protobuf error, by version
        refuse_stand_in(path)
        raise InputError(
            f"{path} is not a sentencepiece model that can be read: {error}"
        ) from error
    return Tokenizer(
        kind="sentencepiece",
        source=str(path),
        vocab_size=int(backend.get_piece_size()),
        sha256=_sha256(path),
        files=_with_config(path),
        settings=_settings(path),
        eot_id=int(backend.eos_id()) if backend.eos_id() >= 0 else None,
        backend=backend,
    )


def _with_config(path: Path) -> tuple[Path, ...]:
    """Return a tokenizer's file and its configuration in the same folder, if there is one."""
    config = path.with_name(TOKENIZER_CONFIG)
    return (path, config) if config.is_file() else (path,)


def _settings(path: Path) -> dict[str, Any]:
    config = path.with_name(TOKENIZER_CONFIG)
    return read_json_object(config) if config.is_file() else {}


def _special_piece(settings: Mapping[str, Any], name: str) -> str | None:
    piece = settings.get(f"{name}_token")
    piece = piece.get("content") if isinstance(piece, dict) else piece
    return piece if isinstance(piece, str) else None


def _rows(backend: Any) -> int:
    """Return the rows that ids can name: more than the entries where numbers are skipped."""
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _first_id(backend: Any, pieces: Iterable[str]) -> int | None:
    found = (backend.token_to_id(piece) for piece in pieces)
    return next((index for index in found if index is not None), None)


def _byte_symbols() -> list[str]:
    """Return GPT-2's printable symbol of each byte, in byte order.

    Printable Latin-1 bytes stand for themselves; the others take the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, spare = [], 0x100
    for byte in range(256):
        symbols.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return symbols


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
