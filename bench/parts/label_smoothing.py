"""Label smoothing: a part of each label is shared out among all classes alike.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna. Rethinking the Inception Architecture for Computer Vision. CVPR 2016.
https://arxiv.org/abs/1512.00567 (section 7)

Kind           loss
Learns         nothing beyond updates
Departs        nowhere
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Loss, Task, register
from bench.losses import mean
from bench.ranges import Share


@register("label_smoothing")
@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Loss):
    """Cross-entropy with (1 - smoothing) of the label and smoothing / C of every class, the label's among them."""

    neutral: ClassVar[Mapping[str, object]] = {"smoothing": 0.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"smoothing": (0.01, 0.3)}

    smoothing: Share = 0.1
    """Of the label, what all classes have alike (paper: 0.1)."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Give the mean cross-entropy with smoothed labels."""
        apart = F.cross_entropy(logits.float(), batch.y, reduction="none", label_smoothing=self.smoothing)
        return mean(apart, batch)
