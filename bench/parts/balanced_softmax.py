"""Balanced softmax: logits are shifted by the logarithm of class counts in training, and not in the test.

Ren, Yu, Sheng, Ma, Zhao, Yi, Li. Balanced Meta-Softmax for Long-Tailed Visual Recognition. NeurIPS 2020.
https://arxiv.org/abs/2007.10740 (eq. 4); up to a constant the logit-adjusted loss of https://arxiv.org/abs/2007.07314

Kind           loss
Learns         nothing beyond updates, by default; with prior 'estimated' each client's class counts, with prior
               'global' the server knows their sum
Departs        by default counts are each client's own (paper: of all training data); the meta sampler is left out
Elsewhere      codes differ in a class that a client lacks: FedETF's keeps log 0, which takes it out of the softmax,
               GBME's counts it as 0.1, so that it keeps a small gradient. LongTailLib has the loss in a file that is
               never imported
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Batch, Loss, Task, UsesPrior, losses, register


@register("balanced_softmax")
@dataclass(frozen=True, kw_only=True)
class BalancedSoftmax(UsesPrior, Loss):
    """Cross-entropy of z + log n."""

    neutral: ClassVar[Mapping[str, object]] = {"prior": "uniform"}

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Shift by the counts of the chosen prior."""
        return losses.balanced_softmax(logits, batch, counts)
