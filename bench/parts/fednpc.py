"""FedNPC: a trained head is tuned on pure noise for a few steps, which says that no class is likelier than another.

Gao, Zhao, Yang, Guo. FedNPC: Stochastic Noise-driven Post-hoc Classifier Calibration Method for Federated Long-tailed
Learning. CVPR Findings 2026. https://github.com/JintongGao/FedNPC

Kind           correction
Learns         nothing beyond updates
Departs        the noise is drawn once for all steps, and stands for each class alike (reference: noise and a label for
               each are drawn anew at each step); there are fewer steps (reference: as many as tested best on the test
               images), for momentum carries a head of short rows beyond nothing, and turns it round
Elsewhere      authors' code runs one step fewer than its number of steps says. The state that it calls best is
               undefined where no step improves anything
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import Correction, Task, Tree, keys, register
from bench.ranges import Count, Steps, Strength


@register("fednpc")
@dataclass(frozen=True, kw_only=True)
class FedNPC(Correction):
    """Rows and differences of biases shrink: without an end the head would say the same of all images."""

    neutral: ClassVar[Mapping[str, object]] = {"steps": 0}
    paper: ClassVar[Mapping[str, object]] = {"steps": 27}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"steps": [2, 5, 10, 15, 20, 27, 49]}

    steps: Steps = 10
    """Steps of gradient descent (reference: 27 for 10 classes, 49 for 100: of 28 and 50 it leaves out one)."""
    samples: Count = 10_000
    """Rows of standard normal noise in place of features (reference: M = 10,000)."""
    lr: Strength = 0.1
    """Learning rate (reference: 0.1), with a momentum of 0.9."""

    def correct(self, task: Task, model: Tree, counts: torch.Tensor | None) -> Tree | None:
        """Descend cross-entropy with the uniform distribution; the noise is the same for all clients."""
        weight, bias = model["head"]["weight"], model["head"]["bias"]
        noise = keys.normal(task.server_key("fednpc"), self.samples, weight.shape[1])
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for _ in range(self.steps):
            slope = ((noise @ weight.T + bias).softmax(1) - 1 / len(bias)) / self.samples
            by_weight, by_bias = 0.9 * by_weight + slope.T @ noise, 0.9 * by_bias + slope.sum(0)
            weight, bias = weight - self.lr * by_weight, bias - self.lr * by_bias
        return {"head": {"weight": weight, "bias": bias}}
