"""BERT's word pieces, by Megatron's rules and every switch that transformers' files may set.

The rules are those of `FullTokenizer` in Megatron-LM v2.5, megatron/tokenizer/bert_tokenization.py,
which is Google's: control characters go; CJK characters and punctuation are words of their own;
lower case, then without accents; the longest pieces first; a word that cannot be cut is unknown.
They are written down in the terms of `tokenizers`, whose own `BertNormalizer` differs: it drops
characters of private use, splits at the punctuation of an older Unicode, misses 256 CJK
characters, and does not know the final sigma.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.tokenizers.side_files import special_piece

UNKNOWN_PIECE, PIECE_PREFIX = "[UNK]", "##"
LONGEST_WORD = 200
"""Letters of the longest word that is cut, in Megatron's own code; transformers' limit is 100."""

CONTROL_CHARACTER = r"[\p{Cc}\p{Cf}\x{FFFD}&&[^\t\n\r]]"
COMBINING_MARK = r"\p{Mn}"
PUNCTUATION_MARKS = r"!-/:-@\[-`{-~\p{P}"
CJK = (
    r"\x{3400}-\x{4DBF}\x{4E00}-\x{9FFF}\x{F900}-\x{FAFF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2CEAF}"
    r"\x{2F800}-\x{2FA1F}"
)
# Python's rule for the lower case of a capital sigma: a letter with case before it, none after it,
# and in between only what case ignores (here at most four such characters before it).
IGNORED, LETTER = r"\p{Case_Ignorable}", r"[\p{Cased}&&[^\p{Case_Ignorable}]]"
FINAL_SIGMA = (
    f"(?<={'|'.join(LETTER + IGNORED * count for count in range(5))})Σ(?!{IGNORED}*{LETTER})"
)
FIRST_STAND_IN = 0x10F000
"""A character of private use, where the words of `never_split` have their places."""

BERT_CLASSES = {
    f"{name}Tokenizer{fast}"
    for name in (
        *(
            "Bert",
            "DistilBert",
            "Electra",
            "MobileBert",
            "ConvBert",
            "Lxmert",
            "Funnel",
            "LayoutLM",
        ),
        *(
            "RetriBert",
            "SqueezeBert",
            "Splinter",
            "MPNet",
            "VisualBert",
            "MegatronBert",
            "NomicBert",
        ),
        *("DPRContextEncoder", "DPRQuestionEncoder", "DPRReader", "Realm"),
    )
    for fast in ("", "Fast", "Legacy")
} | {"PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"}
"""transformers' tokenizers whose vocab.txt is cut by these rules."""

OTHER_SETTINGS = {
    *("tokenizer_class", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file"),
    *("model_max_length", "max_len", "max_length", "stride", "truncation", "truncation_side"),
    *("truncation_strategy", "padding", "padding_side", "pad_token_type_id", "pad_to_multiple_of"),
    *(
        "pad_to_max_length",
        "model_input_names",
        "clean_up_tokenization_spaces",
        "added_tokens_decoder",
    ),
    *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
    *("split_special_tokens", "verbose", "use_fast", "backend", "is_local", "local_files_only"),
    *("chat_template", "processor_class", "transformers_version", "add_special_tokens"),
    *("spaces_between_special_tokens", "return_token_type_ids", "_commit_hash", "cache_dir"),
    *("init_inputs", "full_tokenizer_file", "max_model_input_sizes", "special_tokens", "revision"),
    *("is_fast", "from_slow", "trust_remote_code", "_name_or_path", "use_auth_token", "token"),
    *("return_attention_mask", "return_offsets_mapping", "return_tensors", "is_split_into_words"),
    *("cls_token_box", "sep_token_box", "pad_token_box", "only_label_first_subword"),
    *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
}
"""Settings that change no id of a text: lengths, padding, names, what is added around a text."""


@dataclass(frozen=True)
class WordPieceRules:
    """How a text becomes word pieces."""

    lower_case: bool
    strip_accents: bool
    split_cjk: bool = True
    clean: bool = True
    """Whether control characters are dropped."""
    basic: bool = True
    """Whether anything but white space separates words; without it letters stay as they are."""
    never_split: tuple[str, ...] = ()
    """Words that stay as they are where white space surrounds them."""
    unknown: str = UNKNOWN_PIECE
    prefix: str = PIECE_PREFIX
    longest_word: int = LONGEST_WORD

    def describe(self) -> dict[str, Any]:
        """Return what differs from a plain lower-cased or cased vocabulary, for a digest."""
        plain = WordPieceRules(self.lower_case, self.lower_case)
        return {key: value for key, value in vars(self).items() if value != getattr(plain, key)}


def wordpiece_rules(
    settings: Mapping[str, Any], pieces: Sequence[str], where: Path
) -> WordPieceRules:
    """Return the rules that tokenizer_config.json states for a vocabulary, BERT's where it is mute.

    Whether text is lower-cased is decided by the pieces where it is not stated, never by a name.

    Raises:
        InputError: A setting is unknown or of the wrong type, or the class has rules of its own.
    """
    own = settings.get("tokenizer_class")
    if own is not None and own not in BERT_CLASSES:
        raise InputError(
            f"{where}: its tokenizer_class is {own!r}, which does not cut words as BERT does; "
            "give the tokenizer.json of the model"
        )
    lower_case = _value(settings, "do_lower_case", bool, None, where)
    if lower_case is None:
        lower_case = all(piece == piece.lower() for piece in pieces if not piece.startswith("["))
    basic = bool(_value(settings, "do_basic_tokenize", bool, True, where))
    accents = _value(settings, "strip_accents", bool, None, where)
    longest = settings.get("max_input_chars_per_word", LONGEST_WORD)
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
        raise InputError(f"{where}: max_input_chars_per_word is {longest!r}; expected a number")
    never = settings.get("never_split") or ()
    if not isinstance(never, list | tuple) or not all(isinstance(word, str) for word in never):
        raise InputError(f"{where}: never_split is {shown(never)}; expected a list of words")
    rules = WordPieceRules(
        lower_case=lower_case and basic,
        strip_accents=basic and (lower_case if accents is None else accents),
        split_cjk=bool(_value(settings, "tokenize_chinese_chars", bool, True, where)),
        clean=basic and bool(_value(settings, "clean_text", bool, True, where)),
        basic=basic,
        never_split=tuple(dict.fromkeys(word for word in never if word)) if basic else (),
        unknown=special_piece(settings, "unk") or UNKNOWN_PIECE,
        prefix=_value(settings, "wordpieces_prefix", str, PIECE_PREFIX, where),
        longest_word=longest,
    )
    read = {
        *("do_lower_case", "strip_accents", "tokenize_chinese_chars", "clean_text", "never_split"),
        *("do_basic_tokenize", "wordpieces_prefix", "max_input_chars_per_word"),
    }
    # Numbers are lengths and ids; what switches a rule is true or false, a name or a list.
    unknown = sorted(
        key
        for key, value in settings.items()
        if key not in read | OTHER_SETTINGS
        and (isinstance(value, bool) or not isinstance(value, int | float | None))
    )
    if unknown:
        raise InputError(
            f"{where}: tokenizer_config.json beside it sets {unknown[0]} to "
            f"{shown(settings[unknown[0]])}, which is no setting of BERT's tokenizer that is known "
            "here; take it out if it changes nothing, or give the tokenizer.json of the model"
        )
    return rules


def wordpiece_model(vocab: Mapping[str, int], rules: WordPieceRules) -> Any:
    """Return the model of `tokenizers` for a vocabulary, with the words of `never_split`.

    Each of them has two entries, itself and its stand-in, so that the model counts more entries
    than ids: tokens must have been added to a backend before it gets this model.
    """
    from tokenizers import models

    stand_ins = _stand_ins(rules)
    places = {mark: vocab[word] for word, mark in stand_ins.items() if word in vocab}
    return models.WordPiece(
        {**vocab, **places},
        unk_token=rules.unknown,
        max_input_chars_per_word=rules.longest_word,
        continuing_subword_prefix=rules.prefix,
    )


def _stand_ins(rules: WordPieceRules) -> dict[str, str]:
    return {word: chr(FIRST_STAND_IN + number) for number, word in enumerate(rules.never_split)}


def wordpiece_backend(vocab: Mapping[str, int], rules: WordPieceRules) -> Any:
    """Return a tokenizer of `tokenizers` with these rules.

    Its model knows nothing of `never_split` yet: see `wordpiece_model`.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    stand_ins = _stand_ins(rules)
    backend = Backend(wordpiece_model(vocab, dataclasses.replace(rules, never_split=())))
    steps: list[Any] = []
    if rules.clean:
        steps.append(normalizers.Replace(Regex(CONTROL_CHARACTER), ""))
    beside = rf"[^\s{CJK if rules.split_cjk else ''}]"
    for word, mark in stand_ins.items():
        alone = Regex(rf"(?<!{beside}){re.escape(word)}(?!{beside})")
        steps.append(normalizers.Replace(alone, mark))
    if rules.lower_case:
        steps += [normalizers.Replace(Regex(FINAL_SIGMA), "ς"), normalizers.Lowercase()]
    if rules.strip_accents:
        steps += [normalizers.NFD(), normalizers.Replace(Regex(COMBINING_MARK), "")]
    backend.normalizer = normalizers.Sequence(steps)
    apart = (PUNCTUATION_MARKS if rules.basic else "") + (
        CJK if rules.basic and rules.split_cjk else ""
    )
    words: list[Any] = [pre_tokenizers.WhitespaceSplit()]
    if apart:
        words.append(pre_tokenizers.Split(Regex(f"[{apart}]"), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    decode: list[Any] = [decoders.Replace(mark, word) for word, mark in stand_ins.items()]
    backend.decoder = decoders.Sequence([*decode, decoders.WordPiece(prefix=rules.prefix)])
    return backend


def lower_cases(rules: Mapping[str, Any]) -> bool | None:
    """Return whether a tokenizer.json lower-cases text; None where its rules are not BERT's.

    Args:
        rules: Its content. BERT's are those of transformers' class, or ours, plain.
    """
    normalizer = rules.get("normalizer") or {}
    if rules["model"]["type"] != "WordPiece":
        return None
    if normalizer.get("type") == "BertNormalizer":
        return bool(normalizer["lowercase"])
    for lower_case in (True, False):
        rule = WordPieceRules(lower_case, lower_case)
        plain = json.loads(wordpiece_backend({UNKNOWN_PIECE: 0}, rule).to_str())
        if all(rules[part] == plain[part] for part in ("normalizer", "pre_tokenizer")):
            return lower_case
    return None


def _value(settings: Mapping[str, Any], key: str, kind: type, default: Any, where: Path) -> Any:
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        wanted = "true or false" if kind is bool else "a text"
        raise InputError(f"{where}: {key} is {shown(value)}; expected {wanted}")
    return value
