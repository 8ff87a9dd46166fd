"""Cross-entropy: plain, also for a method whose paper has another loss there. The control of such methods.

Not one paper's.

Kind           loss
Learns         nothing beyond updates
Departs        nowhere
"""

from dataclasses import dataclass

from torch import Tensor

from bench import Batch, Loss, Task, losses, register


@register("cross_entropy")
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Where a method has cross-entropy anyway, another row with the same states."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Give the mean cross-entropy."""
        return losses.cross_entropy(logits, batch)
