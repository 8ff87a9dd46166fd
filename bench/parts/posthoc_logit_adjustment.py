"""Post-hoc logit adjustment: after training, the logarithm of how frequent a class was is taken off its logit.

Menon, Jayasumana, Rawat, Jain, Veit, Kumar. Long-Tail Learning via Logit Adjustment. ICLR 2021.
https://arxiv.org/abs/2007.07314 (section 4)

Kind           correction
Learns         nothing beyond updates, by default; with prior 'estimated' each client's class counts, with prior
               'global' the server knows their sum
Departs        by default counts are each client's own (paper: of all training data), so that only personal models are
               corrected; an absent class, whose adjusted logit would be infinite, leaves the prediction instead;
               where no example is known at all nothing is corrected
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Correction, Task, Tree, UsesPrior, register
from bench.ranges import Strength

_FAR = 1e9  # no logit gets there, and unlike infinity it stays a number


@register("posthoc_logit_adjustment")
@dataclass(frozen=True, kw_only=True)
class PosthocLogitAdjustment(UsesPrior, Correction):
    """Of z, what a loss trained, z - tau log(prior) is tested; it is the head's bias that changes."""

    neutral: ClassVar[Mapping[str, object]] = {"tau": 0.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"tau": (0.1, 2.0)}

    tau: Strength = 1.0
    """How much of it is taken off (paper: 1, at which all classes are equally frequent to the model)."""

    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        """Shift by the counts of the chosen prior."""
        if counts is None:
            return None
        log_prior = counts.clamp(min=1e-12).log() - counts.sum().clamp(min=1e-12).log()
        shift = self.tau * torch.where(counts > 0, log_prior, _FAR) * (counts.sum() > 0)
        return {"head": {**model["head"], "bias": model["head"]["bias"] - shift}}
