"""FedDC: each client remembers how far its models drifted, trains around that point, and the server adds it back.

Gao, Fu, Li, Chen, Xu, Xu. FedDC: Federated Learning with Non-IID Data via Local Drift Decoupling and Correction. CVPR
2022. https://arxiv.org/abs/2203.11751

Server keeps   body, head, drift, control, weights
Client keeps   drift, control
Down           body, head, control (model)
Up             body, head, control (model)
Newcomers      the model that is sent; held out, with five epochs of the head
Departs        models, drifts and controls are averaged with the setting's weights (reference: all alike, and alpha and
               controls are divided by a client's share); a client not yet drawn is taken to weigh what the others do on
               average. With momentum rho a control is divided by the sum of the weights that K steps give their
               gradients, (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho). Running statistics are averaged. Tested is what
               is sent; the mean of the last cohort stands beside (reference: tests both)
Elsewhere      MarsFL overwrites the model that is sent by the plain mean, so the drift correction is lost, and divides
               controls by the batch size instead of the number of steps
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, losses, register, tree
from bench.ranges import Strength

UNKNOWN = -1.0
"""Weight of a client that was never drawn."""


@register("feddc")
@dataclass(frozen=True, kw_only=True)
class FedDC(Algorithm):
    """SCAFFOLD's control variates, a pull, and drift, which moves both where clients are pulled and what is sent."""

    family: ClassVar[str] = "generic"
    needs: ClassVar[frozenset[str]] = frozenset({"sgd"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"alpha": [0.001, 0.005, 0.01, 0.1]}
    controls: ClassVar[Mapping[str, str]] = {
        "feddc(drift=False)": "whether drift does anything: left are control variates and a pull to the received model"
    }

    alpha: Strength = 0.01
    """Strength of the pull to the received model less the drift (reference: 0.01 on CIFAR)."""
    drift: bool = True
    """Whether clients remember drift; without it and at alpha = 0 it is SCAFFOLD."""

    def init_server(self, task: Task) -> Tree:
        """Start without drift and control: of all clients the sums, each by its weight, (N,)."""
        model = task.init()
        sums = {key: tree.zeros_like(tree.parameters(model)) for key in ("drift", "control")}
        weights = torch.full_like(task.key, UNKNOWN, dtype=torch.float32).expand(task.num_clients).clone()
        return {**model, **sums, "weights": weights}

    def init_client(self, task: Task) -> Tree:
        """Start without drift and control."""
        return {key: tree.zeros_like(tree.parameters(task.init())) for key in ("drift", "control")}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model, in which the drift is already, and the mean control of all clients."""
        return {"body": server["body"], "head": server["head"], "control": mean_of_all(server, "control")}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise the loss + alpha |w - (received - drift)|² / 2 + <w, c - c_k>; add the move to the drift, and take
        the mean gradient as the next c_k.
        """
        received: Tree = {"body": shared["body"], "head": shared["head"]}
        centre = tree.sub(tree.parameters(received), private["drift"])
        correction = tree.sub(shared["control"], private["control"])

        def loss(params: Tree, batch: Batch) -> Tensor:
            along = tree.dot(tree.parameters(params), correction)
            return task.loss(params, batch) + self.alpha * losses.proximal(params, centre) + along

        trained = task.sgd(loss, received, data.batches(task.epochs))
        moved = tree.parameters(tree.sub(trained, received))
        steps, rho = data.steps(task.epochs), task.momentum
        gradients = ((steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)).clamp(min=1)  # in the move
        change = tree.map(
            lambda c, d: torch.where(steps > 0, -c - d / (gradients * task.lr), 0.0), shared["control"], moved
        )
        drift = tree.add(private["drift"], moved, float(self.drift))
        return {**trained, "control": change}, {"drift": drift, "control": tree.add(private["control"], change)}

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Add moves to the drift and changes to the control; the next model is the cohort's mean and the mean drift of
        all clients.
        """
        arrived, total = uploads.mean(), uploads.weights.sum()
        mean: Tree = {"body": arrived["body"], "head": arrived["head"]}
        moved = tree.scale(tree.parameters(tree.sub(mean, server)), float(self.drift))

        def add(known: Tensor, each: Tensor) -> Tensor:
            return known + total.to(known) * each

        after = {
            **server,
            **mean,
            "drift": tree.map(add, server["drift"], moved),
            "control": tree.map(add, server["control"], arrived["control"]),
            "weights": server["weights"].index_copy(0, uploads.clients, uploads.weights.to(server["weights"])),
        }
        return tree.merge(after, tree.add(tree.parameters(mean), mean_of_all(after, "drift")))

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Give the mean of the last cohort."""
        sent: Tree = {"body": server["body"], "head": server["head"]}
        return {"cohort": tree.merge(sent, tree.sub(tree.parameters(sent), mean_of_all(server, "drift")))}


def mean_of_all(server: Tree, key: str) -> Tree:
    """Give the mean over all clients of what the server has the sum of, by their weights."""
    weights: Tensor = server["weights"]
    known = weights != UNKNOWN
    total = (weights * known).sum() * len(weights) / known.sum().clamp(min=1)
    return tree.scale(server[key], torch.where(total > 0, 1 / total, 0.0))
