"""FedLF: logits are scaled by class frequency, features are drawn to the centre of their class and decorrelated.

Lu, Li, Jiang. FedLF: Adaptive Logit Adjustment and Feature Optimization in Federated Long-Tailed Learning. ACML 2024.
https://proceedings.mlr.press/v260/lu25a.html

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Passes         E + 1/3
Departs        the head's bias starts at zero and stays there (reference: it is left out in training, and used as it was
               drawn in tests); centres are those of the received model in evaluation mode, without augmentation
               (reference: in training mode, which moves its statistics, with it); a class that the client lacks has
               its centre at zero (reference: at 1e-8), and a feature at a centre has no gradient towards it
               (reference: NaN)
Elsewhere      in the authors' older `our.py` all of the loss towards centres is detached, so that it has no gradient;
               the proper file comes with a later version. The README's command names an algorithm that its version does
               not offer. Code and README differ: 40 clients, 5 epochs, factor 50; 20, 10 and 100
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, losses, register
from bench.ranges import SomeShare, Strength


@register("fedlf")
@dataclass(frozen=True, kw_only=True)
class FedLF(Algorithm):
    """With `floor` 1 and neither of the two terms on features it is FedAvg of a head without a bias."""

    family: ClassVar[str] = "fedlt"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    own_loss: ClassVar[bool] = True
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "floor": [0.1, 0.25, 0.5, 0.75, 1.0],
        "centre": (0.001, 0.1),
        "decorrelate": (0.001, 0.1),
    }

    floor: SomeShare = 0.25
    """Factor on the logits of a class that the client lacks; 1 is the most frequent one's (reference: r = 0.25)."""
    centre: Strength = 0.01
    """Weight of the pull to the centre of the class (reference: 0.01)."""
    decorrelate: Strength = 0.01
    """Weight of the correlation of features, which grows with the batch (reference: 0.01, batches of 32)."""
    margin: Strength = 100.0
    """Most by which a feature is to be closer to its own centre; less where the farthest centres are less apart
    (reference: 100)."""

    def init_server(self, task: Task) -> Tree:
        """Start without a bias of the head."""
        model = task.init()
        return {**model, "head": biasless(model["head"])}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise cross-entropy of scaled logits + centre · distance loss + decorrelate · correlation."""
        factor = factors(data.class_counts.float(), self.floor)
        centres = data.class_means(lambda x: task.model.features(shared["body"], x))
        margin = distances(centres, centres).max().clamp(max=self.margin)

        def scaled(logits: Tensor, batch: Batch) -> Tensor:
            return losses.cross_entropy(factor * logits.float(), batch)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            taught = task.criterion(task.model.logits(biasless(params["head"]), z), z, batch, scaled)
            z = z.float()
            apart = distances(z, centres) + margin * losses.one_hot(batch.y, task.num_classes)
            pulled = losses.cross_entropy(-apart, batch)
            return taught + self.centre * pulled + self.decorrelate * losses.correlation(z, batch.weight)

        return task.sgd(loss, shared, data.batches(task.epochs)), private


def factors(counts: Tensor, floor: float) -> Tensor:
    """Give the factor of each class, from `floor` where there is no example to 1 where there are most: (C,) -> (C,)."""
    return floor + (1 - floor) * counts / counts.max().clamp(min=1)


def biasless(head: Tree) -> Tree:
    """Give a head with a bias of zero."""
    return {**head, "bias": torch.zeros_like(head["bias"])}


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Give Euclidean distances: (B, d), (C, d) -> (B, C). One of zero has no gradient."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # a product would round them
