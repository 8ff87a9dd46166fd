"""LDAM-DRW: labels of scarce classes must win by a larger margin; late in training their examples weigh more, too.

Cao, Wei, Gaidon, Arechiga, Ma. Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss. NeurIPS 2019.
https://arxiv.org/abs/1906.07413 (algorithm 1)

Kind           loss
Learns         nothing beyond updates, by default; with prior 'estimated' each client's class counts, with prior
               'global' the server knows their sum
Departs        by default counts are each client's own (paper: of all training data); the head is the model's (paper: a
               cosine of features and rows, for which `scale` is 30); weights are of effective numbers, as in the
               released code (paper: inverse frequencies); the learning rate stays the setting's
Elsewhere      GBME's port subtracts s times the margin from logits that are scaled by s only if the head does so. It
               takes a count of 0 as 0.1, so that a class that the client lacks sets the largest margin, and those of
               real ones shrink
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from bench import Batch, Loss, Task, UsesPrior, losses, register
from bench.losses import mean
from bench.ranges import Positive, Share, Strength


@register("ldam")
@dataclass(frozen=True, kw_only=True)
class LDAM(UsesPrior, Loss):
    """Cross-entropy of s (z - m), m a margin at the label only, in proportion to n^(-1/4)."""

    neutral: ClassVar[Mapping[str, object]] = {"margin": 0.0, "scale": 1.0, "defer": 1.0}
    paper: ClassVar[Mapping[str, object]] = {"scale": 30.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {
        "margin": (0.1, 5.0),
        "defer": [0.6, 0.8, 1.0],
    }

    margin: Strength = 0.5
    """Of the scarcest class that there is (paper: 0.5)."""
    scale: Positive = 1.0
    """Times logits and margins (paper: 30)."""
    defer: Share = 0.8
    """Share of the rounds after which classes are weighted (paper: 160 of 200 epochs); 1: never."""
    beta: Annotated[float, Interval(ge=0, lt=1)] = 0.9999
    """Of the weights, as in `class_balanced` (released code: 0.9999)."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Take off the label's margin; late, average by weights, which sum to one in each batch."""
        margin = torch.where(counts > 0, counts.clamp(min=1e-12) ** -0.25, 0.0)
        margin = self.margin * margin / margin.max().clamp(min=1e-12)
        z = self.scale * (logits.float() - margin * losses.one_hot(batch.y, task.num_classes))
        apart = F.cross_entropy(z, batch.y, reduction="none")
        if task.round < self.defer * task.rounds - 1e-9:  # 0.07 · 100 is above 7 in floating point
            return mean(apart, batch)
        weight = losses.class_weights(counts, self.beta)[batch.y]
        return mean(weight * apart, batch) / mean(weight, batch).clamp(min=1e-12)
