"""FedDyn: each client remembers how far its models went, and its loss is tilted so that all want to end in one place.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama. Federated Learning Based on Dynamic Regularization. ICLR 2021.
https://arxiv.org/abs/2111.04263 (Algorithm 1)

Server keeps   body, head, drift, weights
Client keeps   drift
Down           body, head
Up             body, head
Newcomers      the model that is sent; held out, with five epochs of the head
Departs        gradients are remembered as the moves that they are -alpha times the sum of, the drift. Models
               and drifts are averaged with the setting's weights (paper: all alike, which is `client_weights =
               uniform`; reference: alpha divided by a client's share instead, which comes to rest at the same model); a
               client not yet drawn is taken to weigh what the others do on average. Running statistics are averaged.
               Tested is what is sent, as in the paper; the mean of the last cohort stands beside (reference: tests
               these two, and plots the mean of all clients' last models)
Elsewhere      PFLlib and FedETF's copy penalise the norm itself, not its square, and divide by zero at alpha = 0.
               FL-bench omits the quadratic part of the penalty. Authors' cohorts are independent coin flips, and at
               alpha = 0 the server's step is still doubled, so that is not FedAvg
Reproduced     by alpemreacar/FedDyn@48a19fa (as published, clients of 26 or 27 images): models 7e-04 apart
               (results/studies/agreement.md)
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


@register("feddyn")
@dataclass(frozen=True, kw_only=True)
class FedDyn(Algorithm):
    """At alpha = 0 clients do what FedAvg's do, and the server still goes further than their mean."""

    family: ClassVar[str] = "generic"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"alpha": [0.001, 0.01, 0.1]}

    alpha: Strength = 0.01
    """Strength of the pull to the received model, and of the tilt (paper: of 0.1, 0.01, 0.001; reference: 0.01)."""

    def init_server(self, task: Task) -> Tree:
        """Start without drift: of all clients the sum, each by its weight, (N,)."""
        model = task.init()
        weights = torch.full_like(task.key, UNKNOWN, dtype=torch.float32).expand(task.num_clients).clone()
        return {**model, "drift": tree.zeros_like(tree.parameters(model)), "weights": weights}

    def init_client(self, task: Task) -> Tree:
        """Start without drift."""
        return {"drift": tree.zeros_like(tree.parameters(task.init()))}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model, in which the drift is already."""
        return {"body": server["body"], "head": server["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise the loss + alpha (|w - received|² / 2 + <w, drift>), and add the move to the drift."""
        received: Tree = {"body": shared["body"], "head": shared["head"]}

        def loss(params: Tree, batch: Batch) -> Tensor:
            tilt = tree.dot(tree.parameters(params), private["drift"])
            return task.loss(params, batch) + self.alpha * (losses.proximal(params, received) + tilt)

        trained = task.sgd(loss, received, data.batches(task.epochs))
        return trained, {"drift": tree.add(private["drift"], tree.parameters(tree.sub(trained, received)))}

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Add the moves to the drift; the next model is the cohort's mean and the mean drift of all clients."""
        mean = uploads.mean()
        moved = tree.parameters(tree.sub(mean, server))
        drift = tree.map(lambda d, m: d + uploads.weights.sum().to(d) * m, server["drift"], moved)
        weights = server["weights"].index_copy(0, uploads.clients, uploads.weights.to(server["weights"]))
        after = {**server, **mean, "drift": drift, "weights": weights}
        return tree.merge(after, tree.add(tree.parameters(mean), mean_drift(after)))

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Give the mean of the last cohort."""
        sent = self.broadcast(task, server)
        return {"cohort": tree.merge(sent, tree.sub(tree.parameters(sent), mean_drift(server)))}


def mean_drift(server: Tree) -> Tree:
    """Give the mean drift of all clients, by their weights."""
    weights: Tensor = server["weights"]
    known = weights != UNKNOWN
    total = (weights * known).sum() * len(weights) / known.sum().clamp(min=1)
    return tree.scale(server["drift"], torch.where(total > 0, 1 / total, 0.0))
