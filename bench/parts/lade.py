"""LADE: balanced softmax, and logits are held to be log ratios of densities, p(x | y) over p(x) if classes were equal.

Hong, Han, Choi, Seo, Kim, Chang. Disentangling Label Distribution for Long-tailed Visual Recognition. CVPR 2021.
https://arxiv.org/abs/2012.00321

Kind           loss
Learns         nothing beyond updates, by default; with prior 'estimated' each client's class counts, with prior
               'global' the server knows their sum
Departs        by default frequencies are each client's own (paper: of all training data); both expectations are those
               of a batch, over the classes that it has; an example weighs by its own label's frequency (released code:
               a class's logits by that of the class); the distribution of the test is uniform
Elsewhere      GBME's port has the regulariser's squared term hard-coded at 0.01 and its weight at 0.1 (CIFAR-10: 0.01),
               takes a count of 0 as 0.1, and adds log(1 / C) to logits in the test, a constant without effect
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Batch, Loss, Task, UsesPrior, losses, register
from bench.ranges import Strength


@register("lade")
@dataclass(frozen=True, kw_only=True)
class LADE(UsesPrior, Loss):
    """The bound of Donsker and Varadhan, E[z_c | c] - log E[exp z_c], is largest for the ratio; it is rewarded."""

    neutral: ClassVar[Mapping[str, object]] = {"strength": 0.0, "prior": "uniform"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"strength": (0.001, 1.0)}

    strength: Strength = 0.1
    """Of the reward, beside balanced softmax (paper: alpha, 0.1 on CIFAR-100-LT)."""
    penalty: Strength = 0.01
    """On the square of log E[exp z_c], which is 0 for the ratio (paper: lambda, 0.01 there)."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Take off the bounds of the batch's classes, by their frequencies."""
        z, share = logits.float(), counts / counts.sum().clamp(min=1e-12)
        label = losses.one_hot(batch.y, task.num_classes) * batch.weight[:, None]
        here = label.sum(0)
        frequency = share[batch.y] * batch.weight
        # As if classes were equal; a finite floor, as exp(-1e4) is exactly 0.
        weight = torch.where(frequency > 0, -(task.num_classes * frequency.clamp(min=1e-12)).log(), -1e4)
        partition = (z + weight[:, None]).logsumexp(0) - batch.weight.sum().clamp(min=1).log()
        bound = (label * z).sum(0) / here.clamp(min=1) - partition - self.penalty * partition**2
        return losses.balanced_softmax(z, batch, counts) - self.strength * (share * (here > 0) * bound).sum()
