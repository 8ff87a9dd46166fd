"""FedDecorr: features of a batch are kept from being correlated, which under uneven labels they become.

Shi, Liang, Zhang, Tan, Bai. Towards Understanding and Mitigating Dimensional Collapse in Heterogeneous Federated
Learning. ICLR 2023. https://arxiv.org/abs/2210.00226

Kind           loss
Learns         nothing beyond updates
Departs        of the paper's two scales the code's is the default, by which the term grows with the batch; correlations
               of a feature with itself, which are 1, are left out, as in the code; a batch of one example has none
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Batch, Loss, Task, losses, register
from bench.ranges import Strength


@register("feddecorr")
@dataclass(frozen=True, kw_only=True)
class FedDecorr(Loss):
    """Beside cross-entropy the mean squared correlation of two different features, in either of two scales."""

    neutral: ClassVar[Mapping[str, object]] = {"weight": 0.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"weight": (0.001, 1.0)}

    weight: Strength = 0.1
    """Of the term beside cross-entropy (paper: beta = 0.1, in the code's scale)."""
    by_batch: bool = True
    """Whether correlations of B examples count (B - 1)² / B, as in the code; else 1, as in the paper."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Add the term."""
        z = losses.required(features)
        with torch.autocast(z.device.type, enabled=False):
            term = losses.correlation(z.float(), batch.weight)
        if not self.by_batch:
            n = batch.weight.sum()
            term = term * n / (n - 1).clamp(min=1).square()
        return losses.cross_entropy(logits, batch) + self.weight * term
