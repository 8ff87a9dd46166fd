"""AFL: clients count by weights that rise with their losses, so that the model is good for the worst mixture of them.

Mohri, Sivek, Suresh. Agnostic Federated Learning. ICML 2019. https://arxiv.org/abs/1902.00146 (Algorithm 1)

Server keeps   body, head, weights, mean
Client keeps   nothing
Down           body, head
Up             body, head, loss (1)
Passes         E + 1/3
Departs        clients take the setting's epochs (paper: one step, whose gradients are averaged instead), all of them in
               each round, and count by the weights alone, which start alike; losses are of all examples (reference: of
               a batch), of the received model in evaluation mode. Tested is what is sent; the mean of all rounds'
               models, which the paper's bounds are for, stands beside. Weights of clients whose loss is lost move as
               if it were the mean; one without examples has none
Elsewhere      MarsFL feeds test losses into the weights and sets these back to uniform in every round, so that they
               have no memory and there is no minimax. Authors' code builds Adagrad but steps by plain SGD
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Exchange, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Strength

OUT = -2.0
"""Too far below any other entry to have a weight."""


@register("afl")
@dataclass(frozen=True, kw_only=True)
class AFL(Algorithm):
    """`weights`, (N,), are a point of the simplex, `mean` is the mean of the models of all rounds."""

    family: ClassVar[str] = "generic"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"dual_lr": [0.001, 0.01, 0.1, 1.0]}
    controls: ClassVar[Mapping[str, str]] = {
        "afl(dual_lr=0)": "what it is worth that weights follow losses: FedAvg of all clients, all alike"
    }

    dual_lr: Strength = 0.1
    """Step of the weights along the losses (reference: gamma_lambda = 0.1)."""

    def init_server(self, task: Task) -> Tree:
        """Start with clients that count alike."""
        weights = task.key.new_ones(task.num_clients, dtype=torch.float32) / task.num_clients
        return {**task.init(), "weights": weights, "mean": task.init()}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Have all clients take part."""
        return (Exchange(everyone=True),)

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model; nobody else knows who counts how much."""
        return {"body": server["body"], "head": server["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model, and send the mean loss that the received one has over the client's examples."""
        loss = data.mean(partial(task.loss, shared))
        trained = task.sgd(task.loss, shared, data.batches(task.epochs))
        return {**trained, "loss": loss}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average models by the weights so far, then move the weights along the losses, both of the received model."""
        weights, loss = server["weights"], uploads.tensor("loss")
        full = uploads.weights.to(weights) > 0
        before = weights[uploads.clients] * full
        sent = self.broadcast(task, server)
        model = tree.where(before.sum() == 0, sent, uploads.mean(weights=before))
        above = loss - (loss * full).sum() / full.sum().clamp(min=1)  # a common shift changes no projection
        moved = torch.where(full, before + self.dual_lr * above, OUT)
        mean = tree.map(lambda a, b: torch.lerp(a, b, 1 / (task.round + 1)), server["mean"], model)
        return {**model, "weights": on_simplex(weights.index_copy(0, uploads.clients, moved)), "mean": mean}

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Give the mean of all rounds' models."""
        return {"mean": server["mean"]}


def on_simplex(point: Tensor) -> Tensor:
    """Give the nearest point whose entries are at least 0 and add up to 1: (N,) -> (N,).

    Source: Duchi et al. 2008, Efficient Projections onto the l1-Ball for Learning in High Dimensions, figure 1.
    """
    largest = tree.in_float64(point).sort(descending=True).values
    over = (largest.cumsum(0) - 1) / torch.arange(1, len(point) + 1, device=largest.device)
    return (tree.in_float64(point) - over.max()).clamp(min=0).to(point)
