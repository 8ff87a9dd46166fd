"""FedMTL: clients learn related tasks, a model for each; how they are related is learnt with them (MOCHA's objective).

Smith, Chiang, Sanjabi, Talwalkar. Federated Multi-Task Learning. NeurIPS 2017.
https://arxiv.org/abs/1705.10467

Server keeps   models, relations
Client keeps   body, head
Down           pull (model), own (1)
Up             body, head
Newcomers      never drawn, the model to which the others would draw it, where the penalty is least; held out, the mean
               of all, with five epochs of the head
Departs        tasks are networks, trained by the setting's SGD (paper: convex ones, by local dual solvers). For clients
               that are not drawn stands what they sent last, or the initial model. Relations are between what clients
               have beyond the mean of all, which is not penalised, and they add up as those of unrelated tasks do: at
               first they are `mean`'s, and `pull` means the same in both. The penalty of large weights is the setting's
               weight decay. Running statistics stay at the client
Elsewhere      PFLlib reads weights through `state_dict()`, which is detached, so its regulariser has no gradient and
               its FedMTL is local training. Its identity matrix is one of ones, so the relation of tasks is a constant
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Strength

FLOOR = 0.1
"""Least length along which clients differ, as a share of the mean one: who was never drawn equals others like it."""


@register("fedmtl")
@dataclass(frozen=True, kw_only=True)
class FedMTL(Algorithm):
    """Client i minimises F_i(w) + pull (Omega_ii |w|^2 / 2 + <w, sum over the others of Omega_ij w_j>)."""

    family: ClassVar[str] = "pfl"
    refuses: ClassVar[Mapping[str, str]] = {
        "channel": "what comes down is no model, of which an upload could be an update",
        "aggregation": "each client's model stays apart, and no mean is taken",
    }
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"pull": (0.01, 10.0)}
    controls: ClassVar[Mapping[str, str]] = {
        "fedmtl(pull=0)": "whether the others do anything: without a pull clients train as those of local, bit for bit",
        "fedmtl(relations='mean')": "whether it is worth anything to learn relations",
        "mr_mtl": "what is left of it then, with the mean of a round's clients in the place of all",
    }

    pull: Strength = 1.0
    """Strength of the penalty tr(W Omega W^T) / 2 (paper: lambda, tuned for each problem)."""
    relations: Literal["learned", "mean"] = "learned"
    """Omega: the inverse root of how models differ, after each round (paper), or I - 1 1^T / N for good."""

    def init_server(self, task: Task) -> Tree:
        """Keep each client's newest model, parameters (N, ...), and Omega: (N, N)."""
        models = tree.stack([tree.parameters(task.init())] * task.num_clients)
        return {"models": models, "relations": unrelated(task.num_clients, task.key.device)}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send nothing to all alike."""
        return {}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Send what the others come to, and how much the client's own counts."""
        relations, count = server["relations"], len(server["relations"])
        row = torch.full_like(relations[0], -1 / count) if client is None else relations[client]
        others = row if client is None else torch.where(torch.arange(count, device=row.device) == client, 0.0, row)
        pull = tree.map(lambda leaf: torch.tensordot(others, leaf, 1), server["models"])
        return {"pull": pull, "own": torch.ones_like(row[0]) if client is None else row[client]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise the client's part of the objective, from where its model was."""
        others: Tree = shared["pull"]
        own: Tensor = shared["own"]

        def loss(params: Tree, batch: Batch) -> Tensor:
            w = tree.parameters(params)
            penalty = 0.5 * own * tree.dot(w, w) + tree.dot(w, others)
            return task.loss(params, batch) + self.pull * penalty

        model = task.sgd(loss, private, data.batches(task.epochs))
        return model, model

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Put the models that arrived in their clients' places, and learn how all are related."""
        sent = tree.stack([tree.parameters(upload) for upload in uploads.trees])
        models = tree.put(server["models"], uploads.clients, sent)
        relations = related(models) if self.relations == "learned" else server["relations"]
        return {"models": models, "relations": relations}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model."""
        return private

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Go where the penalty alone is least: w = -pull / own."""
        return tree.merge(task.init(), tree.map(lambda leaf: -leaf / shared["own"].clamp(min=1e-12), shared["pull"]))


def unrelated(count: int, device: torch.device) -> Tensor:
    """Give I - 1 1^T / N, with which tr(W Omega W^T) is the sum of |w_i - mean|^2: (N, N) float32."""
    return torch.eye(count, device=device) - 1 / count


def related(models: Tree) -> Tensor:
    """Give Omega in proportion to the inverse root of W^T W, of models less their mean: (N, N) float32.

    Directions of clients in which models differ by little cost most. That of all alike costs nothing, and the others'
    costs add up to N - 1.
    """
    leaves = list(tree.flatten(models).values())
    apart = torch.stack([products(leaf - leaf.mean(0)) for leaf in leaves]).sum(0)
    count = len(apart)
    # One number more in all entries makes the direction of all alike the longest, hence the last.
    squares, directions = torch.linalg.eigh(apart + 2 * apart.trace().clamp(min=1e-6) / count)
    lengths = squares[:-1].clamp(min=0).sqrt()
    costs = 1 / lengths.maximum(FLOOR * lengths.mean()).clamp(min=1e-8)
    costs = costs * ((count - 1) / costs.sum())
    omega: Tensor = (directions[:, :-1] * costs) @ directions[:, :-1].T
    return omega.to(leaves[0])


def products(rows: Tensor) -> Tensor:
    """Give the inner products of all rows, (N, ...), in float64: (N, N)."""
    flat = tree.in_float64(rows).flatten(1)
    return flat @ flat.T
