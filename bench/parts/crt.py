"""Classifier re-training: a fresh head learns the classes, drawn equally often, through a body that stands still.

Kang, Xie, Rohrbach, Yan, Gordo, Feng, Kalantidis. Decoupling Representation and Classifier for Long-Tailed Recognition.
ICLR 2020. https://arxiv.org/abs/1910.09217 (section 4.1, cRT)

Kind           correction
Learns         nothing beyond updates: of each client the head that it re-trained
Departs        in a federation: each client re-trains the head on its own examples, all from one draw, and the heads of
               one exchange are averaged; classes are drawn among the client's own; the rate is the setting's first one
               (paper: a cosine from 0.2 to 0), and so are momentum and weight decay
Elsewhere      RedGrape's port re-trains at the server, on 32 images of each class, for 5 epochs after every round, and
               sends the head on: a method with data at the server
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Batch, LearnedCorrection, LocalData, Task, Tree, evaluating, keys, losses, register
from bench.ranges import Epochs


@register("crt")
@dataclass(frozen=True, kw_only=True)
class CRT(LearnedCorrection):
    """With no epochs the head is a random one, and not the old one."""

    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"epochs": [1, 3, 10, 30]}

    epochs: Epochs = 10
    """As many draws as a client has examples, so many times (paper: 10 on ImageNet-LT, 30 on iNaturalist)."""

    def learn(self, task: Task, model: Tree, data: LocalData) -> Tree:
        """Re-train a head that is drawn alike for all."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            with evaluating():
                z = task.model.features(model["body"], batch.x)
            return losses.cross_entropy(task.model.logits(params["head"], z), batch)

        fresh = task.model.init(keys.fold(task.key, "crt"))["head"]
        weights = (1 / data.class_counts.clamp(min=1))[data.y]
        draws = data.batches(self.epochs, "crt", weights=weights)
        return task.sgd(loss, {"head": fresh}, draws, task.initial_lr or task.lr)

    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        """Take the head that was re-trained."""
        return {"head": model["learnt"]["head"]}
