"""FedASAM: FedSAM whose worst point lies farther off in large weights than in small ones, so that scale matters less.

Caldarola, Caputo, Ciccone. Improving Generalization in Federated Learning by Seeking Flat Minima. ECCV 2022.
https://arxiv.org/abs/2203.11834

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        no averaging over late rounds (SWA), which the paper adds to it in some rows; running statistics of batch
               norm move in the first of the two passes only (the reference's loop would move them in both)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, Batch, LocalData, Task, Tree, register
from bench.optim import worst_nearby
from bench.ranges import Strength


@register("fedasam")
@dataclass(frozen=True, kw_only=True)
class FedASAM(Algorithm):
    """FedAvg but for the gradient of a step, for which an epoch costs two."""

    family: ClassVar[str] = "generic"
    controls: ClassVar[Mapping[str, str]] = {
        "fedasam(rho=0)": "whether the worst point matters: FedAvg, bit for bit",
        "fedsam": "whether sizes matter: distances as they are",
    }

    rho: Strength = 0.7
    """How far the worst point lies, relative to sizes (paper, on CIFAR-10: 0.7)."""
    eta: Strength = 0.2
    """Added to a weight's size, so that one of zero may move too (paper: 0.2)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model, each step along the gradient at the worst point nearby."""

        def at_the_worst(gradient: Tree, params: Tree, batch: Batch) -> Tree:
            return task.gradient(task.loss, worst_nearby(params, gradient, self.rho, self.eta), batch)[1]

        return task.sgd(task.loss, shared, data.batches(task.epochs), edit=at_the_worst), private
