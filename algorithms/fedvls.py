"""FedVLS: the received model keeps teaching the classes that a client lacks, and logits of other labels are held down.

Guo, Ding, Liang, He, Wang, Tan. Exploring Vacant Classes in Label-Skewed Federated Learning. AAAI 2025.
https://arxiv.org/abs/2401.02329

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        of logits to be held down an example's own does not count (reference: it counts as 0, beside logits that
               are shifted by the class frequencies); a vacant class leaves the calibrated softmax (reference: its
               frequency is 1e-9); the received model is in evaluation mode when it teaches; weight decay is the
               setting's (reference: none)
Elsewhere      in authors' code the third term has a hidden factor of 0.005, and the softmax over vacant classes is NaN
               for a client that lacks none. The paper's appendix prints the distillation loss with the opposite sign.
               Published numbers are of balanced data with AutoAugment, and the maximum over rounds
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, evaluating, losses, register
from bench.ranges import Strength

OUT = -1e4
"""Logit of what leaves a sum of exponentials."""


@register("fedvls")
@dataclass(frozen=True, kw_only=True)
class FedVLS(Algorithm):
    """With neither of its terms it is FedAvg with balanced softmax."""

    family: ClassVar[str] = "fedlt"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    own_loss: ClassVar[bool] = True
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "distil": (0.01, 10.0),
        "suppress": (0.0005, 1.0),
    }

    distil: Strength = 0.1
    """Weight of the received model's say on vacant classes (paper: lambda = 0.1 on MNIST and CIFAR-10, 0.5 on CIFAR-100
    and Tiny-ImageNet)."""
    suppress: Strength = 0.005
    """Weight of the logits of other labels (reference: 0.005; the paper's formula has 1)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise calibrated cross-entropy + distil · divergence on vacant classes + suppress · other logits."""
        counts = data.class_counts
        frequency = counts / counts.sum().clamp(min=1)

        def calibrated(logits: Tensor, batch: Batch) -> Tensor:
            return losses.balanced_softmax(logits, batch, counts)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            logits = task.model.logits(params["head"], z)
            with evaluating():
                received = task.logits(shared, batch.x)
            apart = losses.mean(divergence(received, logits, counts == 0), batch)
            taught = task.criterion(logits, z, batch, calibrated)
            return taught + self.distil * apart + self.suppress * of_others(logits, batch, frequency)

        return task.sgd(loss, shared, data.batches(task.epochs)), private


def divergence(teacher: Tensor, logits: Tensor, among: Tensor) -> Tensor:
    """Give each row's KL divergence from a teacher's softmax among some classes: (B, C), (B, C), (C,) bool -> (B,); 0
    where there are none.
    """
    wanted, said = (torch.where(among, z.float(), OUT).log_softmax(1) for z in (teacher, logits))
    return (wanted.exp() * (wanted - said)).sum(1)


def of_others(logits: Tensor, batch: Batch, frequency: Tensor) -> Tensor:
    """Give the log of the batch's mean exponential of each class's logit where the label is another one, averaged over
    classes by their frequency, (C,): (). A class that all examples have counts 0.
    """
    other = (losses.one_hot(batch.y, logits.shape[1]) == 0) & (batch.weight[:, None] > 0)
    mean = torch.where(other, logits.float(), OUT).logsumexp(0) - batch.weight.sum().clamp(min=1).log()
    return (frequency * torch.where(other.any(0), mean, 0.0)).sum()
