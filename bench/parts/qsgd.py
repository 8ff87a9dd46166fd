"""QSGD: each entry of an update is rounded up or down to one of a few levels, by a coin that leaves its mean alone.

Alistarh, Grubic, Li, Tomioka, Vojnovic. QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding.
NeurIPS 2017. https://arxiv.org/abs/1610.02132 (section 3.1)

Kind           channel
Learns         nothing beyond updates
Departs        of updates of many local steps (paper: of gradients); of each tensor (paper's experiments: of buckets of
               512 entries); levels take equally many bits (paper: Elias codes); tensors below 256 entries are sent
               whole; what the server sends is whole
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Channel, Task, Tree, bits, keys, register, tree

_SMALL = 256


@register("qsgd")
@dataclass(frozen=True, kw_only=True)
class QSGD(Channel):
    """Nothing is kept: what arrives is the update in the mean, the less exactly the more entries a tensor has."""

    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"levels": [1, 7, 127]}

    levels: Annotated[int, Interval(ge=1, le=32_767)] = 127
    """Levels s between 0 and the norm of a tensor; an entry takes 1 + ceil(log2(s + 1)) bits, of 127 a byte (paper: 2,
    4 and 8 bits)."""

    @property
    def _width(self) -> int:
        return (2 * self.levels).bit_length()

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        """Send the norm of each tensor, and each entry's sign and level."""
        return tree.map_paths(lambda path, leaf: self._rounded(leaf, keys.fold(key, path)), update), {}

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        """Give each entry the size of its level."""

        def whole(leaf: Tensor, sent: Tree) -> Tensor:
            if "whole" in sent:
                values: Tensor = sent["whole"]
            else:
                level = bits.unpack(sent["levels"], self._width, leaf.numel()) - self.levels
                values = sent["norm"] * level.reshape(leaf.shape) / self.levels
            return values

        return tree.map(whole, like, sent)

    def _rounded(self, leaf: Tensor, key: Tensor) -> Any:
        if leaf.numel() < _SMALL or not leaf.is_floating_point():
            return {"whole": leaf}
        flat = leaf.flatten()
        norm = flat.norm()
        exact = self.levels * flat.abs() / norm.clamp(min=1e-30)
        up = keys.uniform(key, len(flat)) < exact - exact.floor()
        level = (exact.floor() + up).clamp(max=self.levels) * flat.sign()
        return {"norm": norm, "levels": bits.pack(level.to(torch.int32) + self.levels, self._width)}
