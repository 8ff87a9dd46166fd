"""Krum: of all updates those that are nearest to the others are averaged, one or several.

Blanchard, El Mhamdi, Guerraoui, Stainer. Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent.
NeurIPS 2017. https://arxiv.org/abs/1703.02757 (section 4; Multi-Krum in section 5)

Kind           aggregation
Learns         nothing beyond updates
Departs        running statistics are averaged as ever; of fewer than 2 f + 3 updates, of which nothing is proved, it
               takes as many neighbours as there are, and one at least
Elsewhere      FederatedScope sums distances that are not squared, tensor by tensor. Flower's Multi-Krum averages the
               kept ones by size, so that a large attacker counts more. MarsFL takes half of the clients for attackers,
               adds a momentum of 0.9, and calls Multi-Krum with f - k
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Aggregation, Task, Tree, register, tree
from bench.ranges import Count


@register("krum")
@dataclass(frozen=True, kw_only=True)
class Krum(Aggregation):
    """Who is unlike the rest is left out, an attacker or a client of rare classes. Nobody weighs more."""

    paper: ClassVar[Mapping[str, object]] = {"keep": 1}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"keep": [1, 3, 5]}

    share: Annotated[float, Interval(ge=0, lt=0.5)] = 0.2
    """Of K updates f = floor(share K) are taken for attacks (paper: f, at least the attackers)."""
    keep: Count = 5
    """How many of the nearest are averaged: more than one is Multi-Krum (paper: 1, and up to K - f - 2). One alone is
    no model of clients that differ in their classes."""

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        """Score each by squared distances to its K - f - 2 nearest neighbours; of equals the first counts."""
        near = max(len(updates) - int(self.share * len(updates) + 1e-9) - 2, 1)  # 0.29 · 100 is below 29 in floats

        def apart(*leaves: Tensor) -> Tensor:
            rows = tree.in_float64(torch.stack(leaves)).flatten(1)
            return torch.stack([(rows - row).square().sum(1) for row in rows])

        distances = torch.stack(list(tree.flatten(tree.map(apart, *updates)).values())).sum(0)
        scores = distances.sort(1).values[:, 1 : 1 + near].sum(1)  # the first is its distance to itself
        best = scores.argsort(stable=True)[: self.keep]  # a NaN is last
        return tree.map(lambda *leaves: tree.in_float64(torch.stack(leaves))[best].mean(0).to(leaves[0]), *updates)
