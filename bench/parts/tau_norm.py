"""Tau-normalisation: rows of a trained head are divided by a power of their norm, which is larger for frequent classes.

Kang, Xie, Rohrbach, Yan, Gordo, Feng, Kalantidis. Decoupling Representation and Classifier for Long-Tailed Recognition.
ICLR 2020. https://arxiv.org/abs/1910.09217 (eq. 3)

Kind           correction
Learns         nothing beyond updates
Departs        nowhere; tau is an argument (paper: chosen on validation data)
Elsewhere      RedGrape's port brings each row to the root-mean-square norm of all, which is tau = 1 times a constant,
               and keeps the bias; its call in the aggregation is commented out. In the CReFF line it is FedAvg's head,
               normalised for the test of each round
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Correction, Task, Tree, register
from bench.ranges import Share


@register("tau_norm")
@dataclass(frozen=True, kw_only=True)
class TauNorm(Correction):
    """The bias is dropped, so that even tau = 0 changes something."""

    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"tau": (0.0, 1.0)}

    tau: Share = 1.0
    """Power of the norm; at 1 all rows have norm 1."""

    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        """Rescale the rows; one of zeros stays."""
        weight, bias = model["head"]["weight"], model["head"]["bias"]
        norm = weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return {"head": {"weight": weight / norm**self.tau, "bias": torch.zeros_like(bias)}}
