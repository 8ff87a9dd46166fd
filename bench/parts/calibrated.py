"""Logits calibration (FedLC): each class has a margin of its own, larger the fewer examples the client has of it.

Zhang, Li, Li, Xu, Wu, Ding, Wu. Federated Learning with Label Distribution Skew via Logits Calibration. ICML 2022.
https://arxiv.org/abs/2209.00189

Kind           loss
Learns         nothing beyond updates, by default; with prior 'estimated' each client's class counts, with prior
               'global' the server knows their sum
Departs        the label itself stays in the softmax (paper: `denominator='others'`, which has no lower bound); a class
               that a client lacks, of infinite margin, leaves it, unless `absent` is a count
Elsewhere      the repository hwang52/FedLC belongs to another paper of that short name (ISPA 2022), and its main file
               is byte-identical to FEDIC's. Ports clamp the count of a class that a client lacks at 1e-8, a margin of
               100 tau, or skip it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval
from torch import Tensor

from bench import Batch, Loss, Task, UsesPrior, losses, register


@register("calibrated")
@dataclass(frozen=True, kw_only=True)
class Calibrated(UsesPrior, Loss):
    """Cross-entropy of z - tau n^(-1/4), for all classes and not the label's only."""

    neutral: ClassVar[Mapping[str, object]] = {"tau": 0.0, "denominator": "all"}
    paper: ClassVar[Mapping[str, object]] = {"denominator": "others"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"tau": (0.1, 10.0)}
    aliases: ClassVar[Mapping[str, str]] = {"fedlc": "fedavg+calibrated"}

    tau: Annotated[float, Interval(ge=0, le=100)] = 1.0
    """How large margins are; from 0.5 to 1 is common."""
    denominator: Literal["all", "others"] = "all"
    """Which classes the label is compared with."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Take off the margins."""
        margin = self.tau * counts.clamp(min=1e-12) ** -0.25
        present = counts > 0 if self.tau else counts >= 0  # without margins none is infinite
        z = losses.shifted(logits, -margin, present)
        if self.denominator == "all":
            return losses.cross_entropy(z, batch)
        label = losses.one_hot(batch.y, task.num_classes)  # which must lie below even classes that are out
        return losses.mean((z - 1e5 * label).logsumexp(1) - (z * label).sum(1), batch)
