"""Top-k: of each tensor of an update only the largest entries are sent; the rest waits at the client.

Stich, Cordonnier, Jaggi. Sparsified SGD with Memory. NeurIPS 2018. https://arxiv.org/abs/1809.07599 (Algorithm 1); in a
federation Sattler, Wiedemann, Müller, Samek. 2019. https://arxiv.org/abs/1903.02891

Kind           channel
Learns         which entries moved most, within updates
Departs        of each tensor, not of the whole model; tensors below 256 entries are sent whole; indices are int32, not
               compressed further; what the server sends is whole
Elsewhere      FedLab stores indices as int64, twice the bytes of int32, and has no residual: what is not sent is lost
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Compression, Tree, register
from bench.ranges import SomeShare


@register("topk")
@dataclass(frozen=True, kw_only=True)
class TopK(Compression):
    """A client keeps what it has not sent, and adds it to the next update: in the end everything arrives."""

    remembers: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, object]] = {"share": 1.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"share": (0.001, 0.5)}

    share: SomeShare = 0.1
    """Of the entries of a tensor: ceil(share n) are sent, 8 bytes each."""

    def encode(self, path: str, entries: Tensor, key: Tensor) -> Tree:
        """Send the largest entries, of equals those that come first."""
        count = math.ceil(self.share * len(entries) - 1e-9)  # 0.07 · 100 is above 7 in floating point
        index = entries.abs().argsort(descending=True, stable=True)[:count]
        return {"index": index.to(torch.int32), "value": entries[index]}

    def decode(self, sent: Tree, like: Tensor) -> Tensor:
        """Put the entries into zeros."""
        return torch.zeros_like(like).scatter(0, sent["index"].long(), sent["value"])
