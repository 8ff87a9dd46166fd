"""Class-balanced loss: an example weighs less the more its class has, as later ones of a class say little new.

Cui, Jia, Lin, Song, Belongie. Class-Balanced Loss Based on Effective Number of Samples. CVPR 2019.
https://arxiv.org/abs/1901.05555 (softmax form)

Kind           loss
Learns         nothing beyond updates, by default; with prior 'estimated' each client's class counts, with prior
               'global' the server knows their sum
Departs        by default counts are each client's own (paper: of all training data), other priors are scaled to the
               client's size; of the paper's three forms the softmax one
Elsewhere      GBME's `cbloss` is the sigmoid focal form, summed over classes, with another beta and gamma for each data
               set (0.999999 and 1; 0.99 and 0.8). Ports leave out the initial bias of -log(C - 1). LongTailLib has the
               loss in a file that is never imported
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from bench import Batch, Loss, Task, UsesPrior, losses, register


@register("class_balanced")
@dataclass(frozen=True, kw_only=True)
class ClassBalanced(UsesPrior, Loss):
    """Cross-entropy over the effective number of examples of the label's class, (1 - beta^n) / (1 - beta)."""

    neutral: ClassVar[Mapping[str, object]] = {"beta": 0.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"beta": [0.9, 0.99, 0.999, 0.9999]}

    beta: Annotated[float, Interval(ge=0, lt=1)] = 0.9999
    """How much an example overlaps with those before it (paper: chosen of 0.9, 0.99, 0.999, 0.9999); near 1 weights
    are inverse frequencies."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Weigh each example's cross-entropy; weights of the classes that there are have a mean of one."""
        apart = F.cross_entropy(logits.float(), batch.y, reduction="none")
        return losses.mean(losses.class_weights(counts, self.beta)[batch.y] * apart, batch)
