"""Differential privacy of clients: updates are shortened to a bound, and their mean is sent on with Gaussian noise.

McMahan, Ramage, Talwar, Zhang. Learning Differentially Private Recurrent Language Models. ICLR 2018.
https://arxiv.org/abs/1710.06963 (algorithm 1)

Kind           aggregation
Learns         nothing beyond updates: it is trusted, and who sees its model is kept from learning of one client
Departs        clients weigh alike (paper: by size, up to a bound); the sum is divided by how many updates arrived
               (paper: by how many are expected), so that cohorts of a fixed size without losses are what an accountant
               counts on, and a client that is replaced moves the sum by twice the bound; updates are shortened at the
               server, after any channel; a round without uploads adds no noise; nothing counts epsilon
Elsewhere      Flower's clipping divides by a norm of zero for an idle client. FL4Health's weighted path scales to the
               expected total and then divides by the number of clients again; its accountant, which replaces a client,
               gets the noise multiplier unhalved
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Aggregation, Task, Tree, Uploads, keys, register, tree
from bench.ranges import Positive, Strength


@register("dp")
@dataclass(frozen=True, kw_only=True)
class DP(Aggregation):
    """The noise of a sum of K updates has the deviation noise · clip, of their mean noise · clip / K, in each entry."""

    noisy: ClassVar[bool] = True
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"clip": (0.1, 10.0)}

    clip: Positive = 1.0
    """Largest norm of an update, body and head together (paper: 15 and 20, by experiment)."""
    noise: Strength = 1.0
    """Deviation of the noise over the bound (paper: 1, in cohorts of 5,000; small ones drown in it)."""

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        """Shorten, average without weights, and add noise."""
        short = [tree.shortened(update, self.clip) for update in updates]
        mean: Tree = Uploads(short, torch.ones_like(weights)).mean()
        key, deviation = task.server_key("dp"), self.noise * self.clip / len(updates)
        return tree.map_paths(
            lambda path, leaf: leaf + deviation * keys.normal(keys.fold(key, path), *leaf.shape), mean
        )
