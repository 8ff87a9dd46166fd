"""FedSAM: clients take the gradient where the loss is worst nearby, and so look for flat minima.

Qu, Li, Duan, Liu, Tang, Lu. Generalized Federated Learning via Sharpness Aware Minimization. ICML 2022.
https://arxiv.org/abs/2206.02618 (Algorithm 1); Caldarola, Caputo, Ciccone. Improving Generalization in Federated
Learning by Seeking Flat Minima. ECCV 2022. https://arxiv.org/abs/2203.11834 (FedSAM, FedASAM)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        no averaging over late rounds (SWA, Caldarola et al.) and no momentum from the server (MoFedSAM, Qu et
               al.); running statistics of batch norm move in the first of the two passes only (the reference's
               loop would move them in both)
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, Batch, LocalData, Task, Tree, register
from bench.optim import worst_nearby
from bench.ranges import Strength


@register("fedsam")
@dataclass(frozen=True, kw_only=True)
class FedSAM(Algorithm):
    """FedAvg but for the gradient of a step, for which an epoch costs two."""

    family: ClassVar[str] = "generic"

    rho: Strength = 0.1
    """How far the worst point lies (paper, on CIFAR-10: 0.1; 0.7 for ASAM)."""
    eta: Strength | None = None
    """Makes it ASAM, where distances are relative to a weight's size plus eta (paper: 0.2); None: SAM."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model, each step along the gradient at the worst point nearby."""

        def at_the_worst(gradient: Tree, params: Tree, batch: Batch) -> Tree:
            return task.gradient(task.loss, worst_nearby(params, gradient, self.rho, self.eta), batch)[1]

        return task.sgd(task.loss, shared, data.batches(task.epochs), edit=at_the_worst), private
