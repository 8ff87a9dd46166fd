"""Ditto: each client keeps a model of its own, pulled towards the global one.

Li, Hu, Beirami, Smith. Ditto: Fair and Robust Federated Learning Through Personalization. ICML 2021.
https://arxiv.org/abs/2012.04221 (Algorithm 1)

Server keeps   body, head
Client keeps   body, head
Down           body, head
Up             body, head
Passes         2 × E
Newcomers      the received model after one local update of the personal solver, of which nothing is kept, never drawn
               or held out; when it is first drawn its personal model starts from the initial one, as in the paper
               (reference, of those never drawn: the initial model)
Departs        clients are drawn uniformly and averaged with the setting's weights, as for every algorithm here
               (reference: drawn by size, averaged uniformly); the two models of a client train one after the other on
               the same batches, which changes nothing: they meet only in the anchor, the received model
Elsewhere      FedNH's copy anchors to the global model as the client has just trained it. FedBABU's copy aggregates the
               personal models and overwrites them in every round. FedETF's copy has lambda = 0.001 and a personal model
               from a draw of its own; that in FedRep's code crashes
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register
from bench.losses import proximal
from bench.ranges import Strength


@register("ditto")
@dataclass(frozen=True, kw_only=True)
class Ditto(Algorithm):
    """FedAvg for the global model; the personal model never leaves the client."""

    family: ClassVar[str] = "pfl"
    version: ClassVar[int] = 2

    pull: Strength = 1.0
    """Strength of the pull towards the received model (paper: lambda, tuned in 0.1, 1, 2)."""

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the global model, and the personal one with the pull."""
        trained = task.sgd(task.loss, shared, data.batches(task.epochs))
        return trained, self._solved(task, shared, private, data)

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model."""
        return private

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Start from the received model, and solve as long as in a round."""
        return self._solved(task, shared, shared, data)

    def newcomer_adaptation(self, task: Task) -> None:
        """Tune nothing more: the solver has seen the client's data."""
        return None

    def _solved(self, task: Task, anchor: Tree, start: Tree, data: LocalData) -> Tree:
        """Train a personal model with the pull."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, batch) + self.pull * proximal(params, anchor)

        return task.sgd(loss, start, data.batches(task.epochs))
