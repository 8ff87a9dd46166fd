"""FedCM: every step of a client is drawn along the mean gradient of the last round.

Xu, Wang, Wang, Yao. FedCM: Federated Learning with Client-level Momentum. 2021. https://arxiv.org/abs/2106.10874
(Algorithm 2)

Server keeps   body, head, momentum
Client keeps   nothing
Down           body, head, momentum (model)
Up             body, head
Departs        each client's update is divided by its own number of steps (reference: one number for all); with the
               setting's momentum rho that is the sum of the weights that K steps give their gradients,
               (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho), so that the momentum stays a mean of gradients, which
               weight decay and clipping enter; models are averaged with the setting's weights (paper: all alike, which
               is `client_weights = uniform`); running statistics are averaged, whatever the step of the server
Elsewhere      GHBM's copy builds the momentum by a dict comprehension with one constant key, so only its last tensor is
               sent, and gradients are paired with the entries of that tensor (read, not run). FedWMSAM, of the same
               family, shifts each tensor by one scalar, as it indexes a flat vector by the tensor's number
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import SomeShare, Strength


@register("fedcm")
@dataclass(frozen=True, kw_only=True)
class FedCM(Algorithm):
    """The momentum is a linear term of the loss: its gradient is (1 - alpha) · momentum."""

    family: ClassVar[str] = "generic"
    needs: ClassVar[frozenset[str]] = frozenset({"sgd"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"alpha": [0.05, 0.1, 0.3, 0.5, 1.0]}

    alpha: SomeShare = 0.1
    """Share of a client's own gradient in a step (reference: 0.1); 1 is FedAvg. The first round has no other share."""
    server_lr: Strength = 1.0
    """Step of the server along the mean update (reference: 1)."""

    def init_server(self, task: Task) -> Tree:
        """Start with a momentum of zero."""
        model = task.init()
        return {**model, "momentum": tree.zeros_like(tree.parameters(model))}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train with gradients alpha · g + (1 - alpha) · momentum."""
        start: Tree = {"body": shared["body"], "head": shared["head"]}

        def loss(params: Tree, batch: Batch) -> Tensor:
            along = tree.dot(tree.parameters(params), shared["momentum"])
            return self.alpha * task.loss(params, batch) + (1 - self.alpha) * along

        return task.sgd(loss, start, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Step towards the mean model, and take the mean gradient of all clients' steps as the next momentum."""
        steps, rho = task.epochs * torch.ceil(tree.in_float64(uploads.sizes) / task.batch_size), task.momentum
        gradients = ((steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)).clamp(min=1)  # in a displacement
        usual = tree.in_float64(uploads.weights)
        old = tree.parameters({"body": server["body"], "head": server["head"]})
        each = tree.sub(tree.parameters(uploads.mean(weights=usual / gradients)), old)
        rate = (usual / gradients).sum() / usual.sum().clamp(min=1) / task.lr
        momentum = tree.map(lambda moved: moved * -rate.to(moved), each)
        mean = uploads.mean()
        moved = tree.map(lambda a, b: torch.lerp(a, b, self.server_lr), old, tree.parameters(mean))
        return {**tree.merge(tree.merge(server, mean), moved), "momentum": momentum}
