"""Top-k: of each tensor of an update only the largest entries are sent; the rest waits at the client.

Stich, Cordonnier, Jaggi. Sparsified SGD with Memory. NeurIPS 2018. https://arxiv.org/abs/1809.07599 (Algorithm 1); in a
federation Sattler, Wiedemann, Müller, Samek. 2019. https://arxiv.org/abs/1903.02891

Kind           channel
Learns         which entries moved most, within updates
Departs        of each tensor, not of the whole model; tensors below 256 entries are sent whole; indices are int32, not
               compressed further; what the server sends is whole
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import Channel, Task, Tree, register, tree
from bench.ranges import SomeShare

_SMALL = 256


@register("topk")
@dataclass(frozen=True, kw_only=True)
class TopK(Channel):
    """A client keeps what it has not sent, and adds it to the next update: in the end everything arrives."""

    neutral: ClassVar[Mapping[str, object]] = {"share": 1.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"share": (0.001, 0.5)}

    share: SomeShare = 0.1
    """Of the entries of a tensor: ceil(share n) are sent, 8 bytes each."""

    def init(self, task: Task, update: Tree) -> Tree:
        """Start with nothing left over."""
        return tree.zeros_like(update)

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        """Send the largest entries of update and remainder, of equals those that come first."""
        due = tree.map(torch.add, update, kept)
        sent = tree.map(self._largest, due)
        return sent, tree.sub(due, self.receive(task, sent, due))

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        """Put the entries into zeros."""

        def whole(leaf: Tensor, sent: Tree) -> Tensor:
            if "whole" not in sent:
                flat = leaf.new_zeros(leaf.numel())
                return flat.scatter(0, sent["index"].long(), sent["value"]).reshape(leaf.shape)
            every: Tensor = sent["whole"]
            return every

        return tree.map(whole, like, sent)

    def _largest(self, leaf: Tensor) -> Any:
        if leaf.numel() < _SMALL or not leaf.is_floating_point():
            return {"whole": leaf}
        flat = leaf.flatten()
        entries = math.ceil(self.share * len(flat) - 1e-9)  # 0.07 · 100 is above 7 in floating point
        index = flat.abs().argsort(descending=True, stable=True)[:entries]
        return {"index": index.to(torch.int32), "value": flat[index]}
