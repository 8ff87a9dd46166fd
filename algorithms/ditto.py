"""Ditto: each client keeps a model of its own, pulled towards the global one.

Li, Hu, Beirami, Smith. Ditto: Fair and Robust Federated Learning Through Personalization. ICML 2021.
https://arxiv.org/abs/2012.04221 (Algorithm 1)

Server keeps   body, head
Client keeps   body, head
Down           body, head
Up             body, head
Departs        clients are drawn uniformly and averaged by size, as for every algorithm here (reference: drawn
               by size, averaged uniformly); the two models of a client train one after the other on the same
               batches, which changes nothing: they meet only in the anchor, the received model
"""

from dataclasses import dataclass

from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register
from bench.losses import proximal


@register("ditto")
@dataclass(frozen=True, kw_only=True)
class Ditto(Algorithm):
    """FedAvg for the global model; the personal model never leaves the client."""

    pull: float = 1.0
    """Strength of the pull towards the received model (paper: lambda, tuned in 0.1, 1, 2)."""

    def __post_init__(self) -> None:
        if self.pull < 0:
            raise ValueError(f"pull = {self.pull}: must be at least 0")

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the global model, and the personal one with the pull."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, batch) + self.pull * proximal(params, shared)

        trained = task.sgd(task.loss, shared, data.batches(task.epochs))
        return trained, task.sgd(loss, private, data.batches(task.epochs))

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model."""
        return private
