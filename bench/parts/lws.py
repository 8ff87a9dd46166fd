"""Learnable weight scaling: one scale for each class's row of the head, learnt on classes that are drawn equally often.

Kang, Xie, Rohrbach, Yan, Gordo, Feng, Kalantidis. Decoupling Representation and Classifier for Long-Tailed Recognition.
ICLR 2020. https://arxiv.org/abs/1910.09217 (section 4.1, eq. 4)

Kind           correction
Learns         nothing beyond updates: of each client a scale for each class
Departs        in a federation: each client learns the scales on its own examples, and those of one exchange are
               averaged; classes are drawn among the client's own; biases are scaled with their rows, as in the authors'
               code; the rate is the setting's first one (paper: a cosine from 0.2 to 0), and so are momentum and decay
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Batch, LearnedCorrection, LocalData, Task, Tree, evaluating, losses, register
from bench.ranges import Epochs


@register("lws")
@dataclass(frozen=True, kw_only=True)
class LWS(LearnedCorrection):
    """The directions of the rows stay; scales begin at 1, where they change nothing."""

    neutral: ClassVar[Mapping[str, object]] = {"epochs": 0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"epochs": [1, 3, 10, 30]}

    epochs: Epochs = 5
    """As many draws as a client has examples, so many times (authors' code: 5 on ImageNet-LT)."""

    def learn(self, task: Task, model: Tree, data: LocalData) -> Tree:
        """Learn the scales; body and head stand still."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            with evaluating():
                logits = task.logits(model, batch.x)
            return losses.cross_entropy(params["scales"] * logits, batch)

        ones = {"scales": torch.ones(task.num_classes, device=task.key.device)}
        weights = (1 / data.class_counts.clamp(min=1))[data.y]
        draws = data.batches(self.epochs, "lws", weights=weights)
        return task.sgd(loss, ones, draws, task.initial_lr or task.lr)

    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        """Scale the rows and their biases."""
        head, scales = model["head"], model["learnt"]["scales"]
        return {"head": {"weight": head["weight"] * scales[:, None], "bias": head["bias"] * scales}}
