"""Examples of one optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import keys

_UNKNOWN = torch.empty(0, dtype=torch.int64)
BY_HAND = keys.key(0)
"""Key of what a person made, and no run."""


@dataclass(frozen=True)
class Batch:
    """Examples of one optimiser step; of several views the first of all examples come first, then the second."""

    x: Tensor
    """(B, channels, height, width) float32, normalised, stored channels-last; (B, ...) where examples are no images."""
    y: Tensor
    """(B,) int64; -1 where the label is not known."""
    weight: Tensor
    """(B,) float32: 1 for an example, 0 for padding."""
    example: Tensor = _UNKNOWN
    """(B,) int64, its number within the client: `data.y[batch.example]` is `batch.y`. Empty if made by hand."""
    key: Tensor = BY_HAND
    """() int64, randomness of the pass over the client's examples that this batch is a part of."""
    first: int | Tensor = 0
    """Place of the first example in that pass."""
    views: int = 1
    """How often each example is there, each time augmented anew."""

    @property
    def real(self) -> Tensor:
        """Whether there is any example, and not padding only: () bool."""
        return self.weight.sum() > 0

    def parts(self, size: int) -> Iterator[Batch]:
        """Part a batch of one view into batches of so many examples; the last may be smaller."""
        columns = (each.split(size) for each in (self.x, self.y, self.weight, self.example))
        for k, (x, y, weight, example) in enumerate(zip(*columns, strict=True)):
            yield Batch(x, y, weight, example, self.key, self.first + k * size)

    @property
    def keys(self) -> Tensor:
        """Randomness of each example, for noise, mixing or dropout: (B,) int64.

        It depends on the place in the client's stream, and on neither B nor padding: draw rows by
        `keys.normal_rows(batch.keys, d)`, not a matrix by the batch's shape.
        """
        place = self.first + torch.arange(len(self.weight) // self.views, device=self.weight.device)
        return torch.cat([keys.fold(of_view(self.key, view), "place", place) for view in range(self.views)])


def of_view(key: Tensor, view: int) -> Tensor:
    """Give the randomness of one of several views; the first has that of a single one."""
    return keys.fold(key, "view", view) if view else key
