"""RedGrape: while a second head takes up the imbalance, the first is re-balanced by gradients of all clients' classes.

Yang, Chen, Zhou, Sun. Decentralized Decoupled Training for Federated Long-Tailed Learning. Preprint, 2023.
https://openreview.net/forum?id=hw7inQwRxB

Server keeps   body, head, attractor, prototypes, known
Client keeps   nothing
Down           body, head, attractor (head), prototypes (C × head), known (C)
Up             body, head, attractor (head), prototypes (C × head), seen (C)
Passes         2 × E + 1/3
Departs        the second head starts at zero and is averaged like the first (reference: an option, on in its script).
               Balanced examples are met in evaluation mode (reference: training mode, where they move statistics a
               second time). A class without examples and without a prototype is left out of the mean; with neither for
               any class nothing is re-balanced (reference: fails). Gradients start at zero at each step (reference:
               they pile up as long as nothing is re-balanced). Clipping is the setting's (reference: at norm 1)
Elsewhere      authors' code finds the head by its name, reseeds the draw of clients with the round number, and changes
               the received prototypes in place. Its baselines are others than their names say: CReFF never zeroes
               gradients, CLIMB is FedAvg, and tau-norm keeps the bias and is commented out
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, losses, register, tree
from bench.ranges import Count, Strength


@register("redgrape")
@dataclass(frozen=True, kw_only=True)
class RedGrape(Algorithm):
    """Trained are body, head and `attractor` as one model, whose logits are the two heads' sum; tested is `head`."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body", "sgd"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "balance": (0.01, 1.0),
        "per_class": [1, 2, 4, 8, 16],
    }

    balance: Strength = 0.1
    """Length of a balanced step, as a multiple of the learning rate times the usual gradient's norm (reference: lambda
    = 0.1)."""
    per_class: Count = 8
    """Balanced examples of each class that has so many at the client (reference: T = 8, or 2)."""
    attract: bool = True
    """Whether there is a second head; without it, and with balance = 0, it is FedAvg."""

    def init_server(self, task: Task) -> Tree:
        """Know no class's gradient yet: (C, C, d) and (C, C), of which rows count where `known`, (C,), is 1."""
        model = task.init()
        prototypes = tree.stack([tree.zeros_like(model["head"])] * task.num_classes)
        known = torch.zeros_like(model["head"]["bias"])
        return {**model, "attractor": tree.zeros_like(model["head"]), "prototypes": prototypes, "known": known}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Take each class's gradient at the received head; then let each step be followed by a balanced one."""
        prototypes, counts = tree.zeros_like(shared["prototypes"]), data.class_counts
        for residual, z, own in residuals(task, shared, data):
            weight, bias = torch.einsum("bc,bk,bd->ckd", own, residual, z), own.T @ residual
            prototypes = tree.add(prototypes, {"weight": weight, "bias": bias})
        size = counts.clamp(min=1)
        prototypes = tree.map(lambda leaf: leaf / size.reshape(-1, *[1] * (leaf.ndim - 1)), prototypes)

        def loss(w: Tree, batch: Batch) -> Tensor:
            z = task.model.features(w["body"], batch.x)
            head = tree.add(w["head"], w["attractor"]) if self.attract else w["head"]
            return task.criterion(task.model.logits(head, z), z, batch)

        balanced = data.of_each_class(self.per_class)
        w, kept, rule = {key: shared[key] for key in ("body", "head", "attractor")}, None, task.optimiser()
        for batch in data.batches(task.epochs):
            _, gradient, following = task.gradient(loss, w, batch)
            pull = self.balanced_gradient(task, w, balanced, shared)
            pull = tree.map(lambda b, g: b * (g.norm() / b.norm().clamp(min=1e-12)), pull, gradient["head"])
            moved, kept = task.step(rule, following, gradient, kept, batch)
            head = tree.add(moved["head"], pull, -task.lr * self.balance)  # beside momentum and clipping
            w = {**moved, "head": tree.where(batch.real, head, moved["head"])}
        return {**w, "prototypes": prototypes, "seen": (counts > 0).float()}, private

    def balanced_gradient(self, task: Task, model: Tree, balanced: LocalData, shared: Tree) -> Tree:
        """Average the gradients of classes: at this model of those with balanced examples, as received of others."""
        total, here = tree.zeros_like(model["head"]), (balanced.class_counts > 0).float()
        for residual, z, _ in residuals(task, model, balanced):
            mine = {"weight": residual.T @ z, "bias": residual.sum(0)}
            total = tree.add(total, mine, 1 / self.per_class)
        others = shared["known"] * (1 - here)
        total = tree.map(lambda sum, each: sum + torch.tensordot(others, each, 1), total, shared["prototypes"])
        begun = shared["known"].amax()  # not before prototypes are there
        return tree.scale(total, begun / (here + others).sum().clamp(min=1))

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average the model; average each class's gradient over the clients that hold it, or keep it."""
        seen = uploads.tensor("seen")
        there, arrived = seen.amax(0), uploads.mean("prototypes", seen)

        def put(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(there.reshape(-1, *[1] * (new.ndim - 1)) > 0, new, old)

        model = {key: uploads.mean(key) for key in ("body", "head", "attractor")}
        prototypes = tree.map(put, arrived, server["prototypes"])
        return {**model, "prototypes": prototypes, "known": torch.maximum(there, server["known"])}


def residuals(task: Task, model: Tree, data: LocalData) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give of each batch: the slopes of cross-entropy by logits, (B, C), zero for padding; features, (B, d); labels as
    rows, (B, C).
    """
    for batch in data.plain_batches():
        z, own = task.model.features(model["body"], batch.x).float(), losses.one_hot(batch.y, task.num_classes)
        slope = task.model.logits(model["head"], z).softmax(1) - own
        yield slope * batch.weight[:, None], z, own
