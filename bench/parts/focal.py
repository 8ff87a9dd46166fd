"""Focal loss: examples that the model is sure of weigh less.

Lin, Goyal, Girshick, He, Dollár. Focal Loss for Dense Object Detection. ICCV 2017. https://arxiv.org/abs/1708.02002
(eq. 4); in a federation Sarkar, Narang, Rai. Fed-Focal Loss. FL-IJCAI 2020. https://arxiv.org/abs/2011.06283

Kind           loss
Learns         nothing beyond updates
Departs        no weights of classes (paper: alpha-balanced); clients are drawn uniformly (Fed-Focal: those that help
               the tail more often)
Elsewhere      GBME's code detaches the factor (1 - p)^gamma: its gradient lacks the factor 1 + gamma p (-log p) / (1 -
               p); its gamma is 0.5. RedGrape's port takes log(p + 1e-6). All public ports of Fed-Focal keep the loss
               alone. LongTailLib has it in a file that is never imported
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Loss, Task, register
from bench.losses import mean
from bench.ranges import Strength


@register("focal")
@dataclass(frozen=True, kw_only=True)
class Focal(Loss):
    """(1 - p)^gamma times cross-entropy, p the probability of the label."""

    neutral: ClassVar[Mapping[str, object]] = {"gamma": 0.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"gamma": (0.1, 5.0)}

    gamma: Strength = 2.0
    """How little sure examples weigh (paper: 2)."""
    detach: bool = False
    """Whether the weight is a constant to the gradient (some codes; paper: no)."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Weigh each example's cross-entropy."""
        apart = F.cross_entropy(logits.float(), batch.y, reduction="none")
        missing = (-(-apart).expm1()).clamp(min=1e-12)  # 1 - p; a power has no slope at exactly 0
        weight = missing**self.gamma
        return mean((weight.detach() if self.detach else weight) * apart, batch)
