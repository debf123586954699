"""Tokenizer: text to ids by the rules that Megatron used, from the files of a vocabulary.

This is the one place that knows the files of a tokenizer. Evaluation, conversion and the harness
take the same object; the latter two use `Tokenizer.hub_backend`, which follows transformers' rules.

It wraps the `tokenizers` library (or `sentencepiece`), not transformers, whose import takes seconds
and whose conversion of a bare `tokenizer.model` changes the ids. `Tokenizer.encode` adds no special
tokens and reads none of the vocabulary's own out of the text: `<|endoftext|>` or `[MASK]` written
in a text is a string like any other, as it is for Megatron. Tokens that were added to a vocabulary,
special ones too, are read: nothing else stands for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.catalog import is_catalog_name, resolve, sample_folder
from mlm_eval.checkpoints.errors import InputError, require, shown
from mlm_eval.checkpoints.files.stand_in import refuse_stand_in
from mlm_eval.checkpoints.files.text_file import read_json_object, read_text
from mlm_eval.checkpoints.hub.download import hub_folder
from mlm_eval.checkpoints.tokenizers.added import MOST_UNUSED, AddedSplitter, add_to, to_add
from mlm_eval.checkpoints.tokenizers.fast_file import (
    LARGEST_TOKENIZER,
    check_ids,
    check_tokenizer_json,
)
from mlm_eval.checkpoints.tokenizers.side_files import (
    TOKEN_FLAGS,
    AddedEntry,
    SideFiles,
    own_pieces,
    read_side_files,
    refuse_tiktoken,
    special_piece,
)
from mlm_eval.checkpoints.tokenizers.wordpiece import (
    wordpiece_backend,
    wordpiece_model,
    wordpiece_rules,
)

VOCAB_AND_MERGES = (
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),  # as OpenAI published GPT-2
    ("gpt2-vocab.json", "gpt2-merges.txt"),  # as Megatron's README names them
)
BERT_PIECES = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
GPT2_CLASSES = {
    f"{name}Tokenizer{fast}"
    for name in ("GPT2", "Roberta", "Bart", "LED", "Longformer", "MVP", "Blenderbot", "CodeGen")
    for fast in ("", "Fast")
} | {"PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"}
"""transformers' tokenizers whose vocab.json and merges.txt are used as GPT-2's are."""
SENTENCEPIECE_CLASSES = {
    f"{name}Tokenizer{fast}"
    for name in ("Llama", "CodeLlama", "Gemma", "Baichuan", "InternLM", "InternLM2", "Yi", "Orion")
    for fast in ("", "Fast")
} | {
    *("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"),
    *("SentencePieceBackend", "LlamaTokenizerLegacy"),
}
"""transformers' tokenizers whose ids are those of their sentencepiece model."""
SPACE_PIECE = "\u2581"
"""What a space is in the pieces of a sentencepiece model."""
EOT_PIECES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# Megatron pads to a multiple of make_vocab_size_divisible_by x tp; nobody runs beyond 128 x 64.
LARGEST_PADDING = 128 * 64
SMALL_PADDING = 128 * 2
"""As much of a small vocabulary may be padding; of a large one, more."""
MOST_PADDED = 8
"""So many times its size a small vocabulary may be padded to, for many ranks."""
ACCEPTED = (
    "tokenizer.json, vocab.json with merges.txt, encoder.json with vocab.bpe, vocab.txt or "
    "tokenizer.model"
)


@dataclass(frozen=True, repr=False)
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
    backend: Any = field(compare=False)
    files: tuple[Path, ...] = ()
    """What it was read from, to be copied with a converted checkpoint."""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What tokenizer_config.json says, where it is one of the files, with what
    special_tokens_map.json adds."""
    added: tuple[AddedEntry, ...] = ()
    """Tokens beside the vocabulary that are read in a text, each with its id."""
    unnumbered: int = 0
    """How many of the last entries are special tokens that the files name without an id."""
    lower_case: bool | None = None
    """Whether text is lower-cased; None where the file itself decides."""
    without_never_split: Any = field(default=None, compare=False)
    """The backend without the words of `never_split`, where there are such words: no tokenizer.json
    can say them, and transformers' fast tokenizers do not heed them."""
    missing_bytes: frozenset[int] = frozenset()
    """Bytes that a byte-level vocabulary has no symbol for; `tokenizers` would drop them."""

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size:,} entries, {self.source!r})"

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, nothing added before or after it.

        Raises:
            InputError: The vocabulary has no symbol for a byte of the text, or no entry for what
                is unknown.
        """
        if self.kind == "sentencepiece":
            return self._sentencepiece_ids(text)
        with self._naming_what_is_missing():
            encoding = self.backend.encode(text, add_special_tokens=False)
        if self.missing_bytes.intersection(text.encode()):
            self._check_bytes(text, encoding)
        return list(encoding.ids)

    def encodings(self, texts: Sequence[str]) -> list[Any]:
        """Return what the library makes of texts, with their places; not for sentencepiece.

        Raises:
            InputError: The vocabulary has no entry for what is unknown.
        """
        with self._naming_what_is_missing():
            return list(self.backend.encode_batch(texts, add_special_tokens=False))

    @contextlib.contextmanager
    def _naming_what_is_missing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises nothing narrower
            raise InputError(
                f"{self.source} cannot cut a text into its entries ({error}); is it whole, with "
                "its entry for what is unknown?"
            ) from error

    def _check_bytes(self, text: str, encoding: Any) -> None:
        """Refuse bytes without a symbol, but for those that an added token stands for."""
        added = {entry.index for entry in self.added}
        rest, last = [], 0
        for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if index in added:
                rest.append(text[last:start])
                last = stop
        lost = self.missing_bytes.intersection("".join([*rest, text[last:]]).encode())
        if lost:
            raise InputError(
                f"{self.source} has no symbol for the byte(s) {sorted(lost)} of the text, "
                f"which would be dropped; use a byte-level vocabulary that holds all 256 bytes"
            )

    def _sentencepiece_ids(self, text: str) -> list[int]:
        """Return the ids of a text: the library's own between added tokens.

        The library puts a space before every text that it is given. Without `legacy` only one
        stands there, before the whole text, and none with `add_prefix_space` = false (as in
        transformers' LlamaTokenizer, 4.x).
        """
        legacy = self.settings.get("legacy") is not False
        bare = not legacy and self.settings.get("add_prefix_space") is False
        if not self.added and not bare:
            return list(self.backend.encode(text))
        ids: list[int] = []
        for number, (piece, index) in enumerate(self._splitter.split(text)):
            is_first = number == 0 and not bare
            if index is not None:
                if is_first and not (legacy or self._splitter.special[index]):
                    ids += self._without_prefix.encode(SPACE_PIECE)
                ids.append(index)
            elif is_first or legacy:
                ids += self.backend.encode(piece)
            elif piece.startswith((" ", SPACE_PIECE)):  # the library may drop a space at the start
                before = special_piece(self.settings, "unk") or "<unk>"
                skipped = len(self._without_prefix.encode(before))
                ids += self._without_prefix.encode(before + piece)[skipped:]
            else:
                ids += self._without_prefix.encode(piece)
        return ids

    @cached_property
    def _splitter(self) -> AddedSplitter:
        return AddedSplitter(self.added)

    @cached_property
    def _without_prefix(self) -> Any:
        """The sentencepiece model without the space that it puts before a text."""
        from sentencepiece import SentencePieceProcessor

        # Fields of a protocol buffer that come later win: normalizer_spec.add_dummy_prefix = false.
        model = self.backend.serialized_model_proto() + b"\x1a\x02\x18\x00"
        return SentencePieceProcessor(model_proto=model)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special pieces included."""
        ids = list(ids)
        if self.kind == "sentencepiece":
            names = {entry.index: entry.content for entry in self.added}
            parts: list[str] = []
            run: list[int] = []
            for index in [*ids, -1]:
                if index in names or index < 0:
                    parts += [str(self.backend.decode(run)), names.get(index, "")]
                    run = []
                else:
                    run.append(index)
            return "".join(parts)
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def piece_id(self, piece: str) -> int | None:
        """Return the id of one entry of the vocabulary, None if it holds no such entry."""
        if self.kind == "sentencepiece":
            for entry in self.added:
                if entry.content == piece:
                    return entry.index
            index = int(self.backend.piece_to_id(piece))
            return index if self.backend.id_to_piece(index) == piece else None
        index_or_none: int | None = self.backend.token_to_id(piece)
        return index_or_none

    @property
    def cls_id(self) -> int | None:
        """Id of BERT's `[CLS]`, or of the piece that stands for it."""
        return self.piece_id(self.special_pieces()["cls"])

    @property
    def sep_id(self) -> int | None:
        """Id of BERT's `[SEP]`, or of the piece that stands for it."""
        return self.piece_id(self.special_pieces()["sep"])

    @property
    def mask_id(self) -> int | None:
        """Id of BERT's `[MASK]`, or of the piece that stands for it."""
        return self.piece_id(self.special_pieces()["mask"])

    def special_id(self, name: str) -> int | None:
        """Return the id of the `bos`, `eos` or `pad` token that tokenizer_config.json names."""
        piece = special_piece(self.settings, name)
        return None if piece is None else self.piece_id(piece)

    def special_pieces(self) -> dict[str, str]:
        """Return BERT's special pieces by transformers' names: the stated ones, else BERT's own."""
        names = [piece[1:-1].lower() for piece in BERT_PIECES]
        return {
            name: special_piece(self.settings, name) or piece
            for name, piece in zip(names, BERT_PIECES, strict=True)
        }

    def hub_backend(self) -> Any:
        """Return a copy of the backend by transformers' rules: special tokens are read in a text.

        The copy of a BERT vocabulary also adds `[CLS]` and `[SEP]` where it is asked for special
        tokens, that of a BPE the begin of text where its files say `add_bos_token`. Not for
        sentencepiece, whose library has no such switch.
        """
        from tokenizers import AddedToken, processors
        from tokenizers import Tokenizer as Backend

        special = {entry.content for entry in self.added if entry.special}
        content = json.loads((self.without_never_split or self.backend).to_str())
        for token in content["added_tokens"]:
            token["special"] = token["special"] or token["content"] in special
        backend = Backend.from_str(json.dumps(content))
        backend.encode_special_tokens = False
        if self.kind == "gpt2-bpe" and self.eot_id is not None:
            end = backend.id_to_token(self.eot_id)
            backend.add_special_tokens([AddedToken(end, special=True, normalized=False)])
        bos = self.special_id("bos")
        if (
            self.kind == "gpt2-bpe"
            and self.settings.get("add_bos_token") is True
            and bos is not None
        ):
            begin = backend.id_to_token(bos)
            backend.post_processor = processors.TemplateProcessing(
                single=[begin, "$A"],
                pair=[begin, "$A", f"{begin}:1", "$B:1"],
                special_tokens=[(begin, bos)],
            )
        if self.kind == "bert-wordpiece":
            named = self.special_pieces()
            held = [piece for piece in named.values() if self.piece_id(piece) is not None]
            backend.add_special_tokens(held)
            if self.cls_id is not None and self.sep_id is not None:
                cls, sep = named["cls"], named["sep"]
                backend.post_processor = processors.TemplateProcessing(
                    single=[cls, "$A", sep],
                    pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
                    special_tokens=[(cls, self.cls_id), (sep, self.sep_id)],
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
        directory: Folder with one of the accepted forms, the one file of such a form, or
            `sample:NAME` for that of a sample.
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
    sample = sample_folder(directory)
    folder = Path(directory) if sample is None else sample / "tokenizer"
    if not folder.is_dir():
        return _load_file(folder, None)
    tokenizer = _load_folder(folder)
    if tokenizer is None:
        for file in sorted(folder.iterdir()):
            refuse_tiktoken(file)
        raise InputError(f"{folder} holds no tokenizer; expected {ACCEPTED}")
    return tokenizer


def find_tokenizer(checkpoint_path: str | Path) -> Tokenizer | None:
    """Return the tokenizer stored with a checkpoint, None if there is none.

    Looks in the checkpoint's folder and in its `tokenizer/` subfolder, then, where the path is a
    part of a checkpoint (`iter_*`, `release`, `mp_rank_*`, `global_step*`), in the folders up to
    its root; then where Megatron-Bridge, NeMo 2, verl and gpt-neox keep it. A NeMo 1 model's own
    comes first.

    Raises:
        InputError: The one that is there cannot be read.
    """
    # Imported here to load a tokenizer without torch.
    from mlm_eval.checkpoints.projects.tokenizer_places import neox_tokenizer, tokenizer_folders

    if is_catalog_name(checkpoint_path):
        _, checkpoint_path = resolve(checkpoint_path)
    found = sample_folder(checkpoint_path) or hub_folder(checkpoint_path) or Path(checkpoint_path)
    path = found.absolute()
    if (tokenizer := _nemo_tokenizer(path)) is not None:
        return tokenizer
    folder = path if path.is_dir() else path.parent
    while folder.is_dir():
        for candidate in (folder, folder / "tokenizer"):
            if candidate.is_dir() and (tokenizer := _load_folder(candidate)) is not None:
                return tokenizer
        parts = ("iter_", "mp_rank_", "global_step")
        if not (folder.name == "release" or folder.name.startswith(parts)):
            break
        folder = folder.parent
    for candidate in tokenizer_folders(path):
        if (tokenizer := _load_folder(candidate)) is not None:
            return tokenizer
    files = neox_tokenizer(path)
    return None if files is None else _load_file(*files)


def _nemo_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer in a NeMo 1 folder or archive, given any of its doors."""
    from mlm_eval.checkpoints.archives.tar_archive import (
        archive_in,
        is_tar,
        real_file,
        tar_folder,
    )
    from mlm_eval.checkpoints.projects.nemo_1 import nemo_root
    from mlm_eval.checkpoints.projects.tokenizer_places import nemo_tokenizer

    if path.is_dir():
        path = archive_in(path) or path
    if path.is_file() and is_tar(path):
        path = tar_folder(path)
    root = nemo_root(path)
    files = None if root is None else nemo_tokenizer(root)
    if files is None:
        return None
    vocabulary, merges = files
    found = _load_file(real_file(vocabulary), None if merges is None else real_file(merges))
    return dataclasses.replace(found, source=str(vocabulary))


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


def entries_within(tokenizer: Tokenizer, rows: int) -> int:
    """Return the entries of a tokenizer, less special tokens that a table of `rows` has no row for.

    Files may name a special token (mostly for padding) that was never given a row: those, and only
    those, may be missing.
    """
    return max(min(tokenizer.vocab_size, rows), tokenizer.vocab_size - tokenizer.unnumbered)


def check_fits(tokenizer: Tokenizer, vocab_rows: int, family: str = "") -> str | None:
    """Return a warning if the vocabulary hardly belongs to a model of `vocab_rows`, else None.

    Args:
        tokenizer: The model's, as somebody says.
        vocab_rows: Of the model.
        family: The model's, where its texts are looked at too.

    Raises:
        InputError: The model has fewer rows than the vocabulary has entries.
    """
    size = entries_within(tokenizer, vocab_rows)
    check_entries(size, vocab_rows, str(tokenizer.source))
    if size < tokenizer.vocab_size:
        return (
            f"{tokenizer.source} names {tokenizer.vocab_size - size} special token(s) for which "
            f"the model, with {vocab_rows} rows, has none"
        )
    unused = vocab_rows - size
    padded = _is_padded(size, vocab_rows) and size * MOST_PADDED >= vocab_rows
    if family == "gpt" and tokenizer.kind == "bert-wordpiece" and unused and not padded:
        return (
            f"{tokenizer.source} is a vocabulary of BERT's word pieces and the model a GPT of "
            f"{vocab_rows} rows, which are not those of its {size} entries: it may not be the "
            "tokenizer of this model"
        )
    few = unused >= SMALL_PADDING and unused > size and not padded
    if unused >= LARGEST_PADDING or few:
        return (
            f"{tokenizer.source} has {size} entries and the model {vocab_rows} rows, more than any "
            f"padding of Megatron adds: it may not be the tokenizer of this model"
        )
    return None


def _is_padded(size: int, rows: int) -> bool:
    """Whether so many rows are what Megatron pads a vocabulary to: a multiple of 128 x tp."""
    return any(rows == -(-size // (128 << power)) * (128 << power) for power in range(7))


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
    refuse_tiktoken(path)
    if path.suffix != ".json":
        raise InputError(f"{path} is not a known form of a tokenizer; expected {ACCEPTED}")
    if "model" in read_json_object(path, most=LARGEST_TOKENIZER):
        return _load_tokenizer_json(path)
    for vocab, merge_name in VOCAB_AND_MERGES:
        if path.name == vocab and (path.parent / merge_name).is_file():
            return _load_gpt2(path, path.parent / merge_name, source=path)
    raise InputError(f"{path} is the vocabulary of a BPE; give its merges too, with --merge-file")


def _load_gpt2(vocab_file: Path, merge_file: Path, *, source: Path) -> Tokenizer:
    """Return GPT-2's byte-level BPE: no special token of its own is read from the text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = read_json_object(vocab_file)
    check_ids(vocab.values(), vocab_file)
    read_text(merge_file, most=LARGEST_TOKENIZER)  # the library names no fault of it
    side = read_side_files(vocab_file)
    _check_class(side, vocab_file, GPT2_CLASSES, "GPT-2")
    prefix = side.settings.get("add_prefix_space") or False
    if not isinstance(prefix, bool):
        raise InputError(f"{vocab_file}: add_prefix_space beside it is no true or false: {prefix}")
    try:
        read, merges = models.BPE.read_file(str(vocab_file), str(merge_file))
        rows = 1 + max(read.values(), default=-1)
        added = to_add(side, read, rows, vocab_file)
        backend = Backend(
            models.BPE(_without_gaps(read, rows, vocab_file) if added else read, merges)
        )
    except InputError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{vocab_file} and {merge_file} do not make a byte-level BPE ({error}); give the "
            f"vocabulary and the merges of one tokenizer"
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    add_to(backend, added, vocab_file)
    symbols = _byte_symbols()
    return Tokenizer(
        kind="gpt2-bpe",
        source=str(source),
        vocab_size=_rows(backend),
        sha256=_sha256(vocab_file, merge_file, rules=[added, prefix]),
        files=(vocab_file, merge_file, *side.files),
        settings=side.settings,
        added=tuple(added),
        unnumbered=_unnumbered(side, rows, added),
        eot_id=_end_of_text(backend, side),
        backend=backend,
        missing_bytes=frozenset(b for b in range(256) if symbols[b] not in vocab),
    )


def _load_bert(path: Path) -> Tokenizer:
    """Return BERT's WordPiece, by Megatron's rules; see `tokenizers/wordpiece.py`."""
    pieces = [line.strip() for line in read_text(path).split("\n")]
    while pieces and not pieces[-1]:
        pieces.pop()
    vocab = {piece: index for index, piece in enumerate(pieces)}
    side = read_side_files(path)
    rules = wordpiece_rules(side.settings, pieces, path)
    if rules.unknown not in vocab:
        raise InputError(
            f"{path} is not a BERT vocabulary: it has no {rules.unknown} among its {len(pieces)} "
            f"lines; expected one piece a line"
        )
    added = to_add(side, vocab, len(pieces), path)
    filled = _without_gaps(vocab, len(pieces), path) if added else vocab
    backend = wordpiece_backend(filled, rules)
    add_to(backend, added, path)
    plain = None
    if rules.never_split:
        plain = wordpiece_backend(filled, dataclasses.replace(rules, never_split=()))
        add_to(plain, added, path)
        backend.model = wordpiece_model(filled, rules)
    return Tokenizer(
        kind="bert-wordpiece",
        source=str(path),
        vocab_size=max(len(pieces), _rows(backend)),
        sha256=_sha256(path, rules=[added, rules.describe()]),
        files=(path, *side.files),
        settings=side.settings,
        added=tuple(added),
        unnumbered=_unnumbered(side, len(pieces), added),
        eot_id=None,
        backend=backend,
        without_never_split=plain,
        lower_case=rules.lower_case,
    )


def _load_tokenizer_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    side = read_side_files(path)
    check_tokenizer_json(path)
    try:
        backend = Backend.from_file(str(path))
        content = json.loads(backend.to_str())
        base = backend.get_vocab(with_added_tokens=False)
        rules = _file_rules(content, base, side)
        if rules:
            backend = Backend.from_str(json.dumps(content))
    except InputError:
        raise
    except Exception as error:  # the library raises nothing narrower
        refuse_stand_in(path)
        raise InputError(f"{path} is not a readable tokenizer.json: {error}") from error
    unknown = content["model"].get("unk_token")
    if content["model"]["type"] in ("WordPiece", "WordLevel") and unknown not in base:
        raise InputError(
            f"{path} has no entry {unknown!r}, which stands for what is unknown to it; is it "
            "damaged?"
        )
    own = {token["content"]: token for token in content["added_tokens"]}
    for entry in side.entries:
        if entry.content in own and entry.index not in (None, own[entry.content]["id"]):
            raise InputError(
                f"the files beside {path} give the token {entry.content!r} the id {entry.index}, "
                f"{path.name} {own[entry.content]['id']}; they do not belong together"
            )
    # The file may ask for these; both would change what is scored without a word.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    held = backend.get_vocab(with_added_tokens=True)
    rest = tuple(entry for entry in side.entries if entry.content not in own)
    more = to_add(dataclasses.replace(side, entries=rest), held, _rows(backend), path)
    add_to(backend, more, path)
    return Tokenizer(
        kind="tokenizer.json",
        source=str(path),
        vocab_size=_rows(backend),
        sha256=_sha256(path, rules=[more, rules]),
        files=(path, *side.files),
        settings=side.settings,
        added=(*_read_in_text(own, rules), *more),
        unnumbered=_unnumbered(side, len(held), more),
        eot_id=_end_of_text(backend, side),
        backend=backend,
    )


def _file_rules(
    content: dict[str, Any], base: Mapping[str, int], side: SideFiles
) -> dict[str, Any]:
    """Change a tokenizer.json as the files beside it ask, and return what was changed.

    - Special tokens are read in a text like others, but for the model's own pieces.
    - The switches of BERT's normalizer are those of tokenizer_config.json, where the class is
      BERT's.
    """
    changed: dict[str, Any] = {}
    own_special = own_pieces(side.settings)
    for token in content["added_tokens"]:
        piece = token["content"]
        if token["special"] and not (piece in base and piece in own_special):
            token["special"] = False
            changed[f"{piece} is read"] = True
    normalizer = content["normalizer"] or {}
    is_bert = str(side.settings.get("tokenizer_class")).startswith("Bert")
    if is_bert and normalizer.get("type") == "BertNormalizer":
        for key, name in (
            ("do_lower_case", "lowercase"),
            ("strip_accents", "strip_accents"),
            ("tokenize_chinese_chars", "handle_chinese_chars"),
        ):
            value = side.settings.get(key, normalizer[name])
            if value != normalizer[name]:
                normalizer[name] = changed[key] = value
    return changed


def _read_in_text(
    own: Mapping[str, Mapping[str, Any]], rules: Mapping[str, Any]
) -> Iterable[AddedEntry]:
    """Return the added tokens of a tokenizer.json that a text is searched for."""
    for piece, token in own.items():
        if not token["special"]:
            flags = {name: token[name] for name in TOKEN_FLAGS if name != "special"}
            yield AddedEntry(piece, token["id"], special=f"{piece} is read" in rules, **flags)


def _load_sentencepiece(path: Path) -> Tokenizer:
    """Return a sentencepiece model, run by its own library as in Megatron.

    Converted by transformers 5 a bare tokenizer.model gives other ids (measured: the leading space
    is lost, unknown words are split otherwise), so that way is not taken.
    """
    require("sentencepiece", str(path), "give the tokenizer.json of the model with --tokenizer")
    from sentencepiece import SentencePieceProcessor

    try:
        backend = SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # RuntimeError, OSError or a protobuf error, by version
        refuse_stand_in(path)
        refuse_tiktoken(path)
        raise InputError(
            f"{path} is not a sentencepiece model that can be read: {error}"
        ) from error
    side = read_side_files(path)
    _check_class(side, path, SENTENCEPIECE_CLASSES, "a plain sentencepiece model")
    if side.settings.get("sp_model_kwargs"):
        raise InputError(
            f"tokenizer_config.json beside {path} sets sp_model_kwargs to "
            f"{shown(side.settings['sp_model_kwargs'])}, which would change its ids and is not "
            "supported; give the tokenizer.json of the model"
        )
    rows = int(backend.get_piece_size())
    added = to_add(side, {backend.id_to_piece(index): index for index in range(rows)}, rows, path)
    end = int(backend.eos_id()) if backend.eos_id() >= 0 else None
    for entry in added:
        if entry.content == special_piece(side.settings, "eos"):
            end = entry.index
        if entry.single_word:
            raise InputError(
                f"the files beside {path} add the token {entry.content!r} with single_word, which "
                "transformers' own tokenizers read in different ways; give the tokenizer.json of "
                "the model"
            )
    return Tokenizer(
        kind="sentencepiece",
        source=str(path),
        vocab_size=max([rows, *(1 + (entry.index or 0) for entry in added)]),
        sha256=_sha256(path, rules=[added, *_prefix_rules(side, added)]),
        files=(path, *side.files),
        settings=side.settings,
        added=tuple(added),
        unnumbered=_unnumbered(side, rows, added),
        eot_id=end,
        backend=backend,
    )


def _prefix_rules(side: SideFiles, added: Sequence[AddedEntry]) -> list[bool]:
    """Return what decides about spaces at the start, for a digest; nothing where it is plain."""
    if side.settings.get("legacy") is not False:
        return []
    return [bool(added), side.settings.get("add_prefix_space") is False]


def _check_class(side: SideFiles, path: Path, known: set[str], what: str) -> None:
    """Refuse a class of transformers that uses such a vocabulary by other rules."""
    own = side.settings.get("tokenizer_class")
    if own is not None and own not in known:
        raise InputError(
            f"{path}: the tokenizer_class beside it is {own!r}, which does not use it as {what} "
            "does; give the tokenizer.json of the model"
        )


def _unnumbered(side: SideFiles, rows: int, added: Sequence[AddedEntry]) -> int:
    without = {entry.content for entry in side.entries if entry.index is None}
    return sum((entry.index or 0) >= rows and entry.content in without for entry in added)


def _without_gaps(vocab: Mapping[str, int], rows: int, path: Path) -> dict[str, int]:
    """Return the vocabulary with an entry for every id; `tokenizers` counts entries, not ids."""
    held = set(vocab.values())
    if rows - len(held) > MOST_UNUSED:
        raise InputError(
            f"{path} has {len(held)} entries with ids up to {rows - 1}, which leaves "
            f"{rows - len(held)} ids out; is it damaged?"
        )
    gaps = {f"\0row {index}": index for index in range(rows) if index not in held}
    return {**vocab, **gaps}


def _rows(backend: Any) -> int:
    """Return the rows that ids can name: more than the entries where numbers are skipped."""
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _end_of_text(backend: Any, side: SideFiles) -> int | None:
    """Return the id of the end of text: the piece that the files name, else a usual one."""
    pieces = (special_piece(side.settings, "eos"), *EOT_PIECES)
    found = (backend.token_to_id(piece) for piece in pieces if piece is not None)
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


def _sha256(*paths: Path, rules: Sequence[Any] = ()) -> str:
    """Return the digest of files, and of rules that are more than the plain ones."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    if any(rules):
        text = json.dumps(rules, default=dataclasses.asdict, sort_keys=True)
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()
