"""Trimmed mean: in each coordinate the largest and the smallest updates are left out.

Yin, Chen, Kannan, Bartlett. Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. ICML 2018.
https://arxiv.org/abs/1803.01498 (definition 2)

Kind           aggregation
Learns         nothing beyond updates
Departs        running statistics are averaged as ever
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Aggregation, Task, Tree, register, tree


@register("trimmed_mean")
@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Aggregation):
    """What is left is averaged without weights: a size is a client's own claim. So even share = 0 is no FedAvg."""

    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"share": (0.05, 0.45)}

    share: Annotated[float, Interval(ge=0, lt=0.5)] = 0.2
    """Of K updates floor(share K) are left out at each end (paper: beta, at least the attackers)."""

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        """Sort each coordinate, and average the middle."""
        out = int(self.share * len(updates) + 1e-9)  # 0.29 · 100 is below 29 in floating point

        def middle(*leaves: Tensor) -> Tensor:
            kept = torch.stack(leaves).sort(0).values[out : len(leaves) - out]
            return tree.in_float64(kept).mean(0).to(kept)

        return tree.map(middle, *updates)
