"""QSGD: each entry of an update is rounded up or down to one of a few levels, by a coin that leaves its mean alone.

Alistarh, Grubic, Li, Tomioka, Vojnovic. QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding.
NeurIPS 2017. https://arxiv.org/abs/1610.02132 (section 3.1)

Kind           channel
Learns         nothing beyond updates
Departs        of updates of many local steps (paper: of gradients); of each tensor (paper's experiments: of buckets of
               512 entries); levels take equally many bits (paper: Elias codes); tensors below 256 entries are sent
               whole; what the server sends is whole
Elsewhere      FedLab scales entries by the largest one of them, not by the norm
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Compression, Tree, bits, keys, register


@register("qsgd")
@dataclass(frozen=True, kw_only=True)
class QSGD(Compression):
    """Nothing is kept: what arrives is the update in the mean, the less exactly the more entries a tensor has."""

    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"levels": [1, 7, 127]}

    levels: Annotated[int, Interval(ge=1, le=32_767)] = 127
    """Levels s between 0 and the norm of a tensor; an entry takes 1 + ceil(log2(s + 1)) bits, of 127 a byte (paper: 2,
    4 and 8 bits)."""

    @property
    def _width(self) -> int:
        return (2 * self.levels).bit_length()

    def encode(self, path: str, entries: Tensor, key: Tensor) -> Tree:
        """Send the norm, and each entry's sign and level."""
        norm = entries.norm()
        exact = self.levels * entries.abs() / norm.clamp(min=1e-30)
        up = keys.uniform(keys.fold(key, path), len(entries)) < exact - exact.floor()
        level = (exact.floor() + up).clamp(max=self.levels) * entries.sign()
        return {"norm": norm, "levels": bits.pack(level.to(torch.int32) + self.levels, self._width)}

    def decode(self, sent: Tree, like: Tensor) -> Tensor:
        """Give each entry the size of its level."""
        values: Tensor = (
            sent["norm"] * (bits.unpack(sent["levels"], self._width, len(like)) - self.levels) / self.levels
        )
        return values
