"""FedNTD: the received model teaches what it thinks of the classes that are not an example's own.

Lee, Jeong, Shin, Bae, Yun. Preservation of the Global Knowledge by Not-True Distillation in Federated Learning. NeurIPS
2022. https://arxiv.org/abs/2106.03097 (equations 4 to 6)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        the received model is in evaluation mode when it teaches (reference: in training mode)
Elsewhere      PFLlib averages uniformly, and turns the server's live model itself into the frozen teacher (evaluation
               mode, no gradients)
Reproduced     by Lee-Gihun/FedNTD@be00ee5 (as published): models 6e-07 apart (results/studies/agreement.md)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, evaluating, losses, register
from bench.ranges import Positive, Strength

OUT = -1e4
"""Logit of what leaves a softmax: its exponential is 0 in float32."""


@register("fedntd")
@dataclass(frozen=True, kw_only=True)
class FedNTD(Algorithm):
    """Without distillation it is FedAvg."""

    family: ClassVar[str] = "generic"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "distil": [0.1, 0.3, 0.5, 1.0, 3.0],
        "temperature": [0.5, 1.0, 3.0],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fedntd(distil=0)": "FedAvg on the same batches: what distillation is worth"
    }

    distil: Strength = 1.0
    """Weight of the distillation (paper: beta = 1)."""
    temperature: Positive = 1.0
    """Divides the logits; its square multiplies the divergence (paper: tau = 1)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise cross-entropy + distil · temperature² · divergence of the other classes."""
        weight = self.distil * self.temperature**2

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            logits = task.model.logits(params["head"], z)
            with evaluating():
                received = task.logits(shared, batch.x)
            apart = divergence(received / self.temperature, logits / self.temperature, batch.y)
            return task.criterion(logits, z, batch) + weight * losses.mean(apart, batch)

        return task.sgd(loss, shared, data.batches(task.epochs)), private


def divergence(teacher: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Give each row's KL divergence from a teacher's softmax among the classes that are not its label: (B, C), (B, C),
    (B,) -> (B,). The label's own logit has no gradient.
    """
    own = losses.one_hot(y, logits.shape[1]) > 0
    wanted, said = (torch.where(own, OUT, each.float()).log_softmax(1) for each in (teacher, logits))
    return (wanted.exp() * (wanted - said)).sum(1)
