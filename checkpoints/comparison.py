"""What two models differ in, by their settings, weights and outputs, and the verdict on it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ElementDifference:
    """One element that two models have different values of."""

    tensor: str
    """Canonical name."""
    index: tuple[int, ...]
    """Where in the whole tensor."""
    values: tuple[float, float]
    """Ours, theirs."""

    @property
    def layer(self) -> int | None:
        """The number of the layer, from 0; None for what belongs to no layer of the model's."""
        if self.tensor.startswith("mtp."):
            return None
        numbers = [part for part in self.tensor.split(".") if part.isdecimal()]
        return int(numbers[0]) if numbers else None


@dataclass(frozen=True)
class WeightComparison:
    """How far the weights of two models are apart, every element of every tensor compared.

    The rows that pad the vocabulary are apart, in `PaddingComparison`.
    """

    tensors: int
    """Tensors compared."""
    elements: int
    """Elements compared."""
    differing: tuple[str, ...] = ()
    """Canonical names of the tensors that differ, in the order of the forward pass."""
    first: ElementDifference | None = None
    """The first element that differs."""
    largest: float = 0.0
    """The largest difference of any two elements; NaN where one is not a number."""
    structure: tuple[str, ...] = ()
    """Tensors that one side lacks or has in another shape, a phrase each."""
    rounded_to: tuple[str, ...] = ()
    """Dtypes that one side has to be rounded to: then it has the same elements."""
    forms: tuple[str, ...] = ()
    """What was brought to one form first, which changes no function."""

    @property
    def same(self) -> bool:
        """Whether all elements are the same, after rounding where the dtypes differ."""
        return not self.differing and not self.structure

    @property
    def identical(self) -> bool:
        """Whether all elements are the same as they are stored."""
        return self.same and not self.rounded_to and not self.forms


@dataclass(frozen=True)
class PaddingComparison:
    """The rows behind the tokenizer's entries, which only make the vocabulary divide evenly."""

    entries: int
    """Rows before them."""
    rows: tuple[int, int]
    """How many rows of padding each side has."""
    largest: float = 0.0
    """The largest difference of any two elements in the rows that both have."""

    @property
    def same(self) -> bool:
        """Whether both have the same rows."""
        return self.rows[0] == self.rows[1] and self.largest == 0.0

    def __str__(self) -> str:
        """Return the verdict on the padding, in words."""
        ours, theirs = self.rows
        where = (
            f"rows {self.entries:,} to {self.entries + max(ours, theirs) - 1:,}, which pad the "
            "vocabulary,"
        )
        if self.same:
            return f"{where} are the same"
        counted = f"are {ours:,} on one side and {theirs:,} on the other"
        if self.largest == 0.0:
            return f"{where} {counted}"
        differ = f"{where} differ by up to {self.largest:.3g}"
        return differ if ours == theirs else f"{differ}; they {counted}"


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart: settings, weights, and outputs on the same tokens."""

    max_difference: float
    """Largest absolute difference of any log-probability or head logit."""
    mean_difference: float
    """Mean absolute difference of the log-probabilities (of the logits of a model without)."""
    greedy_agreement: float
    """Share of positions with the same most likely token; 1.0 for models without."""
    tolerance: float
    """The largest difference of an output that passes, as a share of the output's spread."""
    by_output: dict[str, float]
    """Largest difference of each output."""
    allowed: dict[str, float] = field(default_factory=dict)
    """The largest difference of each output that passes, absolute."""
    outputs: tuple[str, ...] = ()
    """Outputs that one side alone has or that have two shapes, a phrase each."""
    settings: tuple[str, ...] = ()
    """Settings that differ and change the function, a phrase each."""
    weights: WeightComparison | None = None
    """None where only outputs were compared."""
    vocab: str = "padded"
    """`true`: the verdict is about the tokenizer's entries; `padded`: about all rows."""
    padding: PaddingComparison | None = None
    """None where no row is known to be padding."""
    measured: bool = True
    """Whether outputs were computed: the same weights and settings give the same ones."""
    tokens: int = 0
    """How many tokens the outputs were computed for."""
    last_position: int | None = None
    """The last position among them, from 0."""
    approximations: tuple[str, ...] = ()
    """Differences that were asked for; where these are all, nothing else differs."""
    notes: tuple[str, ...] = ()
    """What the reader of the verdict should know."""
    sides: tuple[str, str] = ("the first", "the second")
    """What phrases call the two models."""

    def differences(self) -> list[str]:
        """Return what differs, one phrase each: settings, weights, outputs, rows of padding."""
        found = [*self.settings]
        if self.weights is not None:
            found += self.weights.structure
            if self.weights.first is not None:
                found.append(self._first_element(self.weights, self.weights.first))
        found += self.outputs
        for name, gap in self.by_output.items():
            limit = self.allowed.get(name, self.tolerance)
            if not gap <= limit:  # NaN is a difference
                found.append(f"{name} differ by up to {gap:.3g} (allowed: {limit:.3g})")
        if self.vocab == "padded" and self.padding is not None and not self.padding.same:
            found.append(str(self.padding))
        return [*found, *self.approximations]

    def _first_element(self, weights: WeightComparison, first: ElementDifference) -> str:
        place = f"{first.tensor} {list(first.index)}"
        if first.layer is not None:
            place = f"layer {first.layer}: {place}"
        ours, theirs = (
            f"{value:.9g} in {side}" for value, side in zip(first.values, self.sides, strict=True)
        )
        rest = f"{len(weights.differing)} of {weights.tensors} tensors differ"
        return f"{place} is {ours}, {theirs} ({rest}, by up to {weights.largest:.3g})"

    @property
    def same(self) -> bool:
        """The verdict."""
        return not self.differences()

    @property
    def as_allowed(self) -> bool:
        """Whether nothing differs but what was asked for."""
        return len(self.differences()) == len(self.approximations)

    @property
    def verdict(self) -> str:
        """The verdict in words, with what it is about."""
        if not self.same and self.as_allowed:
            return "approximate, as allowed"
        over = ""
        if self.padding is not None and self.vocab == "true":
            over = f" over the first {self.padding.entries:,} rows of the vocabulary"
        if not self.same:
            return f"DIFFERENT{over}"
        rounded = () if self.weights is None else self.weights.rounded_to
        return f"the same{over}" + (f", after rounding to {' and '.join(rounded)}" * bool(rounded))

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values, with the verdict."""
        record = dataclasses.asdict(self)
        if self.weights is not None and self.weights.first is not None:
            record["weights"]["first"]["layer"] = self.weights.first.layer
        if self.padding is not None:
            record["padding"]["same"] = self.padding.same
        record["allowed"] = {
            name: limit if math.isfinite(limit) else None for name, limit in self.allowed.items()
        }
        words = {"verdict": self.verdict, "differences": self.differences()}
        return {**record, **words, "same": self.same}
