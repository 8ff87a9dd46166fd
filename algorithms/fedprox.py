"""FedProx: local training is pulled towards the broadcast model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated Optimization in Heterogeneous Networks. MLSys 2020.
https://arxiv.org/abs/1812.06127 (Algorithm 2)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        every client does the full local work (no simulated stragglers)
Elsewhere      authors' FedAvg drops the stragglers that their FedProx aggregates. In the `FedProx` optimiser of
               FedNova's and FedRep's code the pull lands in the momentum buffer, so with momentum it adds up again in
               each step. PFLlib's logged loss has the unsquared norm
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register
from bench.losses import proximal
from bench.ranges import Strength


@register("fedprox")
@dataclass(frozen=True, kw_only=True)
class FedProx(Algorithm):
    """The pull is part of the loss, hence of the gradient before momentum."""

    family: ClassVar[str] = "generic"

    mu: Strength = 0.01
    """Strength of the pull (paper: tuned in 0.001 ... 1 for each data set)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise cross-entropy + mu/2 · squared distance to the broadcast model."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, batch) + self.mu * proximal(params, shared)

        return task.sgd(loss, shared, data.batches(task.epochs)), private
