"""Median: of each coordinate the update in the middle.

Yin, Chen, Kannan, Bartlett. Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. ICML 2018.
https://arxiv.org/abs/1803.01498 (definition 1)

Kind           aggregation
Learns         nothing beyond updates
Departs        running statistics are averaged as ever
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import Aggregation, Task, Tree, register, tree


@register("median")
@dataclass(frozen=True, kw_only=True)
class Median(Aggregation):
    """Less than half of the clients can move no coordinate beyond what the others sent. Nobody weighs more."""

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        """Sort each coordinate, and take the middle; of an even number the mean of both."""

        def middle(*leaves: Tensor) -> Tensor:
            both = torch.stack(leaves).sort(0).values[(len(leaves) - 1) // 2 : len(leaves) // 2 + 1]
            return tree.in_float64(both).mean(0).to(both)

        return tree.map(middle, *updates)
