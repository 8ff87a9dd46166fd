"""Logit adjustment: logits are shifted by a multiple of log frequencies in training, and not in the test.

Menon, Jayasumana, Rawat, Jain, Veit, Kumar. Long-tail learning via logit adjustment. ICLR 2021.
https://arxiv.org/abs/2007.07314 (eq. 10)

Kind           loss
Learns         nothing beyond updates, by default; with prior 'estimated' each client's class counts, with prior
               'global' the server knows their sum
Departs        by default frequencies are each client's own (paper: of all training data)
Elsewhere      codes differ in a class that a client lacks: FedYoYo's and FedVLS's add 1e-9 to its frequency, a shift of
               about -20.7, GBME's takes a count of 0.1: gradients are small, but not none. LongTailLib has the loss in
               a file that is never imported
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval
from torch import Tensor

from bench import Batch, Loss, Task, UsesPrior, losses, register


@register("logit_adjustment")
@dataclass(frozen=True, kw_only=True)
class LogitAdjustment(UsesPrior, Loss):
    """Cross-entropy of z + tau log pi; balanced softmax at tau = 1, as frequencies and counts differ by a constant."""

    neutral: ClassVar[Mapping[str, object]] = {"tau": 0.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"tau": (0.25, 2.5)}

    tau: Annotated[float, Interval(ge=0, le=100)] = 1.0
    """How far logits are shifted (paper: 1)."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Shift by the frequencies of the chosen prior."""
        shift = self.tau * counts.clamp(min=1e-12).log()
        present = counts > 0 if self.tau else counts >= 0  # 0 log 0 is 0
        return losses.cross_entropy(losses.shifted(logits, shift, present), batch)
