"""Restricted softmax (FedRS): logits of classes that a client lacks are scaled down, so that it moves them less.

Li, Zhan. FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data. KDD 2021.
https://doi.org/10.1145/3447548.3467254

Kind           loss
Learns         nothing beyond updates
Departs        the head has a bias, which is scaled with its logit (paper: none); all classes that a client has count
               alike (released code: `graded`)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Batch, Loss, Task, losses, register
from bench.ranges import Share


@register("restricted_softmax")
@dataclass(frozen=True, kw_only=True)
class RestrictedSoftmax(Loss):
    """Cross-entropy of alpha z for classes that the client lacks, and z for the others."""

    neutral: ClassVar[Mapping[str, object]] = {"alpha": 1.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"alpha": [0.1, 0.5, 0.9]}
    aliases: ClassVar[Mapping[str, str]] = {"fedrs": "fedavg+restricted_softmax"}

    alpha: Literal["out"] | Share = 0.5
    """Times the logit of a class that the client lacks (paper: 0.1, 0.5, 0.9); or "out": it leaves the softmax."""
    graded: bool = False
    """Whether the factor grows with a class's count, up to 1 for the largest (released code)."""

    def __post_init__(self) -> None:
        """See that what is graded is a number."""
        if self.graded and self.alpha == "out":
            what = "alpha = 'out' and graded = True: nothing is graded there"
            raise ValueError(f"{what}; give alpha a number, or leave graded out")

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Scale the logits."""
        if self.alpha == "out":
            return losses.cross_entropy(losses.shifted(logits, torch.zeros_like(counts), counts > 0), batch)
        here = counts / counts.max().clamp(min=1e-12) if self.graded else (counts > 0).float()
        return losses.cross_entropy(logits.float() * (1 - (1 - self.alpha) * (1 - here)), batch)
