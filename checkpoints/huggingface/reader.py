"""The builder that collects the settings of a config.json, by the table of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlm_eval.checkpoints.config import ConfigBuilder, is_of_kind
from mlm_eval.checkpoints.errors import InputError, shown
from mlm_eval.checkpoints.huggingface.families.family import Family
from mlm_eval.checkpoints.huggingface.fields import Use

DEFAULT = "transformers' default"


@dataclass(frozen=True)
class Found:
    """What the weights themselves tell: the size of the vocabulary, dtype, heads, tying."""

    vocab_size: int
    params_dtype: str
    untied: bool | None = None
    """True where a tied model's output table differs from its embeddings all the same."""
    heads: Mapping[str, Any] = field(default_factory=dict)
    tensors: int | None = None
    """How many there are: no model has more layers. None: it is not known."""

    def check_layers(self, count: int, where: str) -> None:
        """Refuse more layers than tensors, before anything is made for each of them.

        Raises:
            InputError: There are more.
        """
        if self.tensors is not None and count > self.tensors:
            raise InputError(
                f"{where} says {count} layers, the files hold {self.tensors} tensors in all; "
                "files of two models may be mixed"
            )


@dataclass
class HubConfigReader(ConfigBuilder):
    """Collects the settings of config.json."""

    hf: Mapping[str, Any] = field(default_factory=dict)
    family: Family = field(kw_only=True)
    switches: dict[str, bool] = field(default_factory=dict)
    """config.json's keys that say which modules have biases."""

    def look(self, key: str, kind: str) -> tuple[Any, str]:
        """Return the value of a key of the family's table, checked, and its source."""
        row = self.family.table[key]
        for name in (*row.aliases, row.key):
            if name in self.hf:
                value = self.hf[name]
                if value is None and row.use is Use.TRAINING:
                    break
                if value is not None or not row.nullable:
                    value = self.checked(name, value, kind)
                return value, f"config.json {name}"
        return row.default, DEFAULT

    def checked(self, key: str, value: Any, kind: str) -> Any:
        """Return a value of config.json, if it is of its kind.

        Raises:
            InputError: It is not.
        """
        if not is_of_kind(value, kind):
            raise InputError(
                f"{self.where}: {key} is {shown(value)}, expected a value of type {kind}; correct "
                "the file"
            )
        return float(value) if kind == "float" else value
