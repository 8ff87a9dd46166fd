"""FedADMM: each client has a dual variable for being where the server is; the server follows what both change by.

Gong, Li, Freris. FedADMM: A Robust Federated Deep Learning Framework with Adaptivity to System Heterogeneity. ICDE
2022. https://arxiv.org/abs/2204.03529 (Algorithm 1)

Server keeps   body, head
Client keeps   dual, model
Down           body, head
Up             body, head
Newcomers      the model that is sent; held out, with five epochs of the head
Departs        what a client adds to the server's model is sent as the model that would make, twice its own less its
               last one. Clients do the setting's epochs (reference: a random number of them, up to 10) and count by the
               setting's weights (paper: all alike); the server's step stays as it is (reference: it is halved late);
               running statistics are averaged. The reference has the received model in the place of the client's last
               one, by which the dual variable is gone from what is sent: that is `previous = server`
Elsewhere      FL-bench copies the authors' upload, which is twice the client's step: the server's step doubles, and the
               model comes to rest drawn towards the initial one. The networks of the authors' code apply softmax before
               cross-entropy
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, losses, register, tree
from bench.ranges import Strength


@register("fedadmm")
@dataclass(frozen=True, kw_only=True)
class FedADMM(Algorithm):
    """Where all clients take part and the server's step is 1 it is FedDyn, whose drift is the dual variable / rho."""

    family: ClassVar[str] = "generic"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "rho": [0.001, 0.01, 0.1],
        "server_lr": [0.1, 0.3, 0.5, 1.0],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fedadmm(rho=0)": "whether the dual variable does anything: clients are FedAvg's",
        "fedadmm(previous='server')": "what the reference does",
    }

    rho: Strength = 0.01
    """Strength of the pull to the received model, and step of the dual variable (reference: rho = 0.01)."""
    server_lr: Strength = 1.0
    """Step of the server along what clients send (reference: eta = 1, and 0.5 late). At the share of clients that
    take part the server has the mean of w + dual / rho of all clients, and comes to rest where the mean loss is least;
    where it is larger, the initial model pushes it away from there."""
    previous: Literal["client", "server"] = "client"
    """What a client's model is compared with: its last one, or the received one."""

    def init_client(self, task: Task) -> Tree:
        """Start at the initial model, and with a dual variable of zero."""
        model = tree.parameters(task.init())
        return {"dual": tree.zeros_like(model), "model": model}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise the loss + <w, dual> + rho |w - received|² / 2, then add rho (w - received) to the dual variable.

        Of w + dual / rho that changes (w - last) + (w - received).
        """

        def loss(params: Tree, batch: Batch) -> Tensor:
            along = tree.dot(tree.parameters(params), private["dual"])
            return task.loss(params, batch) + along + self.rho * losses.proximal(params, shared)

        trained, received = task.sgd(loss, shared, data.batches(task.epochs)), tree.parameters(shared)
        model = tree.parameters(trained)
        last = private["model"] if self.previous == "client" else received
        sent = tree.merge(trained, tree.add(model, tree.sub(model, last)))
        kept = {"dual": tree.add(private["dual"], tree.sub(model, received), self.rho), "model": model}
        return tree.where(data.n > 0, sent, shared), tree.where(data.n > 0, kept, private)

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give the trained model, which what is sent goes beyond."""
        sent, kept = self.local_update(task, shared, private, data)
        return tree.where(data.n > 0, tree.merge(sent, kept["model"]), shared), kept

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Step along the mean of what clients add; statistics are averaged."""
        mean = uploads.mean()
        old, new = tree.parameters(server), tree.parameters(mean)
        return tree.merge(mean, tree.map(lambda a, b: torch.lerp(a, b, self.server_lr), old, new))
