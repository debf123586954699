"""Keys and values of the tokens that a model has seen: the next token costs one position only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of a batch of texts that grow by one token at a time.

    Texts are aligned on the left: position t is column t in every text, whatever its length. The
    columns behind a shorter prompt hold what its padding gave; the text's own tokens overwrite
    them, and until then the mask hides them.

    Attributes:
        lengths: Tokens of each text that are in the cache.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        columns: int,
        *,
        layers: int,
        width: tuple[int, int],
        like: Tensor,
    ) -> None:
        """Make room.

        Args:
            lengths: Of the prompts.
            columns: Positions that the longest text may take.
            layers: Of the model.
            width: This rank's query groups, and channels of a head.
            like: Has the device and dtype of the keys and values.
        """
        self.lengths = list(lengths)
        self._positions: Tensor | None = None  # of the tokens that come in, one for each text
        shape = (len(self.lengths), width[0], columns, width[1])  # [B, G, T, d]
        # Zeros, because what is masked is still multiplied, by 0: it must not be NaN.
        self._keys = [like.new_zeros(shape) for _ in range(layers)]
        self._values = [like.new_zeros(shape) for _ in range(layers)]

    def advance(self) -> tuple[Tensor, Tensor]:
        """Make the next token of each text the one that comes in.

        Returns:
            Its position `[batch]`, and which columns it may see, bool `[batch, 1, 1, longest]`.
        """
        device = self._keys[0].device
        self._positions = torch.tensor(self.lengths, device=device)
        self.lengths = [length + 1 for length in self.lengths]
        columns = torch.arange(max(self.lengths), device=device)
        return self._positions, (columns <= self._positions[:, None])[:, None, None]

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values `[batch, groups, new, channels]`.

        Returns:
            Those that the new queries look at: prompts at themselves, later tokens at all columns
            up to the longest text's last.
        """
        keys, values = self._keys[layer], self._values[layer]
        if self._positions is None:
            keys[:, :, : key.shape[2]], values[:, :, : key.shape[2]] = key, value
            return key, value
        texts = torch.arange(key.shape[0], device=key.device)
        keys[texts, :, self._positions] = key.squeeze(2)
        values[texts, :, self._positions] = value.squeeze(2)
        longest = max(self.lengths)
        return keys[:, :, :longest], values[:, :, :longest]

    def keep(self, texts: Sequence[int]) -> None:
        """Drop all texts but some, given by their places in the batch."""
        self.lengths = [self.lengths[text] for text in texts]
        index = torch.tensor(texts, device=self._keys[0].device)
        for layer in range(len(self._keys)):  # one at a time: the copies need little room
            self._keys[layer] = self._keys[layer][index]
            self._values[layer] = self._values[layer][index]
