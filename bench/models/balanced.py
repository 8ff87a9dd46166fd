"""Running statistics of batch norm without recency bias: what a layer does otherwise, as arithmetic on tensors.

A momentum that is the same in every step forgets the first ones; one that falls keeps them. Over a client's steps of a
round the layer counts them (`steps`), over rounds the server does the same with what it was sent. Where a batch has
many images of one class, the layer may weigh classes (`balance`), and a penalty holds a batch's statistics near the
running ones.

Source: Lyu et al. 2023, https://arxiv.org/abs/2310.08855, whose tasks are the classes of a batch here, and cohorts over
rounds; its code has biased running variances, and lets a class that is not in the batch take its share of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from bench import tree
from bench.losses import one_hot
from bench.tree import STATISTICS, Tree

STEPS = "steps"
"""Under `stats` of a norm layer: () float32, its training steps of this visit; 0 between visits."""
BALANCE = "balance"
"""In a norm layer: (C,) float32, the logarithms of what is added to the number of a batch's images of each class."""
_Number = TypeVar("_Number", float, Tensor)


@dataclass(frozen=True)
class Balanced:
    """What a setting says of it; with these values nothing differs from one momentum for all steps."""

    kappa: float = 1.0
    """How quickly the momentum stops falling: 0 is the plain mean over steps, 1 one momentum for all."""
    server_momentum: float = 1.0
    """Of the statistics that the server takes up in a round; 1 takes up all, unless kappa is 0."""
    balance: bool = False
    """Whether classes of a batch are weighed, by weights that are trained."""
    penalty: float = 0.0
    """Times the distance of a batch's statistics from the running ones is added to every loss."""

    @property
    def counts(self) -> bool:
        """Whether norm layers count steps."""
        return self.kappa < 1

    @property
    def keeps(self) -> bool:
        """Whether the server keeps some of its statistics."""
        return self.server_momentum < 1 or self.kappa == 0

    def rate(self, momentum: float, step: _Number) -> _Number:
        """Give the momentum of a step: how much of the way the running statistics go.

        By η₁ = m^κ and ηₙ = ηₙ₋₁ / (ηₙ₋₁ + (1 − m)^κ), of which 1/η is a geometric sum.

        Args:
            momentum: m, in 0..1.
            step: n, from 1 on; () where a tensor.
        """
        falls: float = (1 - momentum) ** self.kappa
        before = step - 1
        left: _Number = falls**before
        earlier: _Number = before if falls == 1 else (1 - left) / (1 - falls)
        rate: _Number = 1 / (earlier + left * momentum**-self.kappa)
        return rate

    def prepared(self, model: Tree, num_classes: int) -> Tree:
        """Give a model whose layers of batch norm have what they need besides."""

        def within(part: Tree) -> Tree:
            made = {key: within(value) if isinstance(value, dict) else value for key, value in part.items()}
            layer = made.get("norm")
            if isinstance(layer, dict) and STATISTICS in layer:
                device = layer["bias"].device
                if self.balance:
                    layer = {**layer, BALANCE: torch.zeros(num_classes, device=device)}
                if self.counts:
                    layer = {**layer, STATISTICS: {**layer[STATISTICS], STEPS: torch.zeros((), device=device)}}
                made["norm"] = layer
            return made

        return within(model)


def is_count(path: str) -> bool:
    """Tell whether a leaf is a number of steps."""
    return f"/{path}".endswith(f"/norm/{STATISTICS}/{STEPS}")


def class_weights(balance: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Weigh a batch's examples by their classes: (B,) of the sum of `weight`, shared out among the classes that are
    there in the ratio of e^ψ + n, and evenly within a class. Examples without labels are a class with e^ψ = 0.

    Args:
        balance: (C,) ψ.
        y: (B,) int64, -1 without a label.
        weight: (B,) 1 for an example, 0 for padding.
    """
    classes = len(balance)
    member = one_hot(torch.where(y < 0, classes, y), classes + 1) * weight[:, None]
    n = member.sum(0)
    added = torch.cat([balance.float(), balance.new_full((1,), -1e9)])
    share = torch.where(n > 0, torch.logaddexp(added, n.clamp(min=1).log()), -1e9).softmax(0)
    return (member * (share / n.clamp(min=1))).sum(1) * weight.sum()


def at_rest(state: Tree) -> Tree:
    """Give a state in which no steps are counted, as between two visits."""
    return tree.map_paths(lambda path, leaf: torch.zeros_like(leaf) if is_count(path) else leaf, state)


def united(first: Tree, second: Tree, share: Tensor) -> Tree:
    """Give running statistics of two sets of examples together, of those of each.

    Args:
        first: Statistics of norm layers.
        second: Of the same layers.
        share: () of the second among all examples.
    """
    one, other = tree.flatten(first), tree.flatten(second)

    def of(path: str, leaf: Tensor) -> Tensor:
        mixed = torch.lerp(leaf, other[path], share)
        layer, _, name = path.rpartition("/")
        if name != "var":
            return mixed
        apart = other[f"{layer}/mean"] - one[f"{layer}/mean"]
        return mixed + share * (1 - share) * apart.square()

    return tree.map_paths(of, first)
