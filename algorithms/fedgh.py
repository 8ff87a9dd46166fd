"""FedGH: bodies stay at the clients, and the server trains a head for all on the mean features of their classes.

Yi, Wang, Liu, Shi, Yu. FedGH: Heterogeneous Federated Learning with Generalized Global Header. ACM Multimedia 2023.
https://arxiv.org/abs/2303.13137 (Algorithm 1)

Server keeps   head
Client keeps   body
Down           head
Up             means (C, d), held (C)
Passes         E + 1/3
Newcomers      never drawn, the initial body under the newest head; held out, that after five epochs of both
Departs        all clients have one architecture, and start from one body; the server takes many passes over the
               means, in the setting's batches (paper: one, a mean a step; in its code the optimiser moves another
               network, and the head never changes); a class that nobody of the round holds stays out of the
               server's softmax, and keeps its row (paper: it is pushed down); means are those of the trained body in
               evaluation mode, without augmentation (reference: means of the means of batches, in training mode)
Elsewhere      HtFLlib's server takes 100 passes over the cohort's means, in batches of the client's size (paper: one
               pass)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Adaptation, Algorithm, Batch, LocalData, Task, Tree, Uploads, keys, losses, register
from bench.optim import Sgd
from bench.ranges import Epochs, Strength

OUT = -1e4
"""Shift of a logit that leaves a softmax: its exponential is 0 in float32."""


@register("fedgh")
@dataclass(frozen=True, kw_only=True)
class FedGH(Algorithm):
    """What a client learns of the head is not kept; its body fits the head that it is sent."""

    family: ClassVar[str] = "pfl"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("channel", "aggregation"), "no trained weights travel, means do"
    )
    paper: ClassVar[Mapping[str, object]] = {"server_epochs": 1}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "server_epochs": [1, 10, 100],
        "server_lr": (0.001, 0.1),
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fedgh(server_epochs=0)": "what the server's training is worth: each body is trained to fit the initial head"
    }

    server_epochs: Epochs = 100
    """Passes over the means of a round's clients (paper: 1; HtFLlib: 100)."""
    server_lr: Strength = 0.01
    """Learning rate of the server's plain SGD (reference: 0.01)."""

    def init_server(self, task: Task) -> Tree:
        """Keep the head only."""
        return {"head": task.init()["head"]}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial body that all algorithms share."""
        return {"body": task.init()["body"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the own body and the received head, then send the mean features of each class."""
        model = task.sgd(task.loss, {**private, "head": shared["head"]}, data.batches(task.epochs))
        means = data.class_means(lambda x: task.model.features(model["body"], x))
        return {"means": means, "held": (data.class_counts > 0).float()}, {"body": model["body"]}

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Train the head on all means, each an example of its class."""
        held = uploads.tensor("held") > 0
        shift, rows = torch.where(held.any(0), 0.0, OUT), torch.nonzero(held.flatten())[:, 0]
        x, y = uploads.tensor("means").flatten(0, 1)[rows], rows % task.num_classes

        def loss(params: Tree, batch: Batch) -> Tensor:
            return losses.cross_entropy(task.model.logits(params["head"], batch.x) + shift, batch)

        key, ones = task.server_key("head"), torch.ones_like(y, dtype=torch.float32)
        orders = (keys.permutation(keys.fold(key, epoch), len(y)) for epoch in range(self.server_epochs))
        batches = (Batch(x[part], y[part], ones[part]) for order in orders for part in order.split(task.batch_size))
        return task.train(Sgd(self.server_lr), loss, server, batches)[0]

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no body is shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's body under the newest head."""
        return {"body": private["body"], "head": shared["head"]}

    def newcomer_adaptation(self, task: Task) -> Adaptation:
        """Train body and head, as long as other methods tune a head: without a body of its own a client has nothing."""
        return Adaptation(epochs=5, curve=())
