"""Which text a language model is trained on, and how it becomes samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mlm_eval.checkpoints.config import ModelConfig
from mlm_eval.checkpoints.errors import InputError
from mlm_eval.options import DATA, TASK, again, option, option_name
from mlm_eval.training.settings import check_options

LANGUAGE = ("lm", "mlm")
"""The tasks that train on text: a causal and a masked language model."""

UNTRAINED = ("Mamba layers", "layers of different kinds")
"""What is evaluated and written only, of `ModelConfig.parts_beyond_dense`."""


def why_untrained(config: ModelConfig) -> str | None:
    """Return what keeps a model from being trained on text, as it follows "it has"."""
    if not config.lm_head:
        return (
            "no language-model head, as fine-tuned files have none; give the checkpoint that it "
            "was fine-tuned from"
        )
    if untrained := [what for what in config.parts_beyond_dense if what in UNTRAINED]:
        return f"{untrained[0]}, which mlm-eval evaluates and does not train"
    if beyond := config.beyond_megatron:
        return (
            f"{beyond}, which mlm-eval evaluates but does not write, so it cannot train it; give "
            "a model of Megatron-LM's kind without"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The text of `mlm-eval lm`."""

    kind: ClassVar[str] = "lm"
    """The command."""
    family: ClassVar[str] = "gpt"
    """The models that it trains."""

    data: Sequence[Path] = option("Text or JSON-lines file (repeatable).")
    """See `data.read_documents`."""
    seq_length: int | None = option(
        "Longest row in tokens.", None, least=2, shown="the model's positions"
    )
    dev: Sequence[Path] = option(
        "Text to evaluate on (repeatable).", (), shown="a part of --data", group=DATA
    )
    dev_share: float = option(
        "Share of --data to evaluate on if there is no --dev.", 0.05, group=DATA
    )
    """The last samples."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: One of them is impossible.
        """
        if not self.data:
            raise InputError("no training text was given; name text files with --data")
        check_options(type(self), vars(self))
        for name in ("dev_share", "mask_probability"):
            if not 0.0 < getattr(self, name, 0.5) < 1.0:
                raise InputError(
                    f"{option_name(name)} is {getattr(self, name)}; it must lie between 0 and 1"
                )


@dataclass(frozen=True, kw_only=True)
class MaskedTextSettings(TextSettings):
    """The text of `mlm-eval mlm`, and what is masked in it."""

    kind: ClassVar[str] = "mlm"
    family: ClassVar[str] = "bert"

    seq_length: int | None = again(TextSettings, "seq_length", least=8)
    mask_probability: float = option("Share of the tokens that are masked.", 0.15, group=TASK)
    whole_words: bool = option("Mask all pieces of a word or none.", True, group=TASK)
