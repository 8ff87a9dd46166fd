"""MOON: a client's features are drawn to those of the received model, and away from those of its own last one.

Li, He, Song. Model-Contrastive Federated Learning. CVPR 2021. https://arxiv.org/abs/2103.16257 (Algorithm 1)

Server keeps   body, head
Client keeps   body, trained
Down           body, head
Up             body, head
Newcomers      the generic model; held out, with five epochs of the head
Departs        features are the body's own, those that the head reads: the projection (two layers, 256) that lies
               between the two in every method of the paper's comparison would be the setting's model; our bodies
               end in a ReLU, so that no cosine is negative; a client has no contrast when it first takes part
               (reference: none in the first round, later against a random model of the client)
Elsewhere      PFLlib and FL-bench have no projection head, and PFLlib's temperature is 1 by default (authors: 0.5).
               FL-bench's teachers stay in training mode for batch norm
Reproduced     by QinbinLi/MOON@8fcba3c (newcomers without a contrast, 40 %): models 9e-07 apart
               (results/studies/agreement.md)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, evaluating, register, tree
from bench.losses import mean
from bench.ranges import Positive, Strength


@register("moon")
@dataclass(frozen=True, kw_only=True)
class Moon(Algorithm):
    """The contrast is part of the loss; its two references stand still and are in evaluation mode."""

    family: ClassVar[str] = "generic"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "mu": (0.1, 10.0),
        "temperature": [0.1, 0.5, 1.0],
    }

    mu: Strength = 1.0
    """Weight of the contrast (paper: 5 on CIFAR-10, 1 on CIFAR-100 and Tiny-ImageNet, of 0.1, 1, 5, 10)."""
    temperature: Positive = 0.5
    """Divides the cosines (paper: tau = 0.5, of 0.1, 0.5, 1)."""

    def init_client(self, task: Task) -> Tree:
        """Have no last model yet: its place is taken, and `trained` is 0."""
        return {"body": task.init()["body"], "trained": task.key.new_zeros((), dtype=torch.float32)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise cross-entropy + mu · contrast, then keep the trained body for the next time."""
        features = task.model.features
        mu: Tensor = self.mu * private["trained"]

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = features(params["body"], batch.x)
            with evaluating():
                received, last = features(shared["body"], batch.x), features(private["body"], batch.x)
            # -log(e^a / (e^a + e^b)) = log(1 + e^(b - a))
            contrast = F.softplus((cosine(z, last) - cosine(z, received)) / self.temperature)
            entropy = task.criterion(task.model.logits(params["head"], z), z, batch)
            return entropy + mu * mean(contrast, batch)

        model = task.sgd(loss, shared, data.batches(task.epochs))
        following = {"body": model["body"], "trained": torch.ones_like(private["trained"])}
        return model, tree.where(data.n > 0, following, private)  # an empty client keeps what it has


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Give the cosine of each row's angle in float32: (B, d), (B, d) -> (B,)."""
    similarity: Tensor = F.cosine_similarity(a.float(), b.float(), dim=1)
    return similarity
