"""Geometric median: the point whose distances to all updates add up to the least, nearly.

Pillutla, Kakade, Harchaoui. Robust Aggregation for Federated Learning. IEEE Transactions on Signal Processing 2022.
https://arxiv.org/abs/1912.13445 (algorithm 2, the smoothed Weiszfeld algorithm)

Kind           aggregation
Learns         nothing beyond updates
Departs        running statistics are averaged as ever; a fixed number of steps (authors' code: until they change
               little); the server knows each update (paper: sums alone, by secure aggregation)
Elsewhere      authors' library takes up to 100 steps with a least distance of 1e-6, MarsFL 3 with 1e-5: after few steps
               the point is still far from the limit, so that they differ
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Aggregation, Task, Tree, Uploads, register, tree
from bench.ranges import Positive, Steps


@register("geometric_median")
@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Aggregation):
    """A mean in which who is far away counts little. Clients of less than half of the weight cannot drag it along."""

    neutral: ClassVar[Mapping[str, object]] = {"steps": 0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"steps": [1, 3, 10, 30]}

    steps: Steps = 3
    """How often weights follow distances (paper: 3); 0 leaves the mean."""
    smoothing: Positive = 1e-6
    """Distance below which nobody counts more for being nearer (paper: 1e-6)."""

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        """Start at the mean, and average again with weights divided by distances from there."""
        centre: Tree = Uploads(updates, weights).mean()
        for _ in range(self.steps):
            far = torch.stack([tree.norm(tree.sub(update, centre)) for update in updates])
            centre = Uploads(updates, weights / far.clamp(min=self.smoothing)).mean()
        return centre
