"""CFL: clients train one model until it stands still while they still pull; then they part by where they pull to.

Sattler, Müller, Samek. Clustered Federated Learning: Model-Agnostic Distributed Multitask Optimization Under Privacy
Constraints. IEEE Transactions on Neural Networks and Learning Systems 2021. https://arxiv.org/abs/1910.01991

Server keeps   body, head, models, cluster (later), updates
Client keeps   nothing
Down           body, head
Up             body, head
Newcomers      never drawn, the model of the larger part wherever clients part; held out, the model of all as it was
               before they first did, with five epochs of the head (paper: the cluster to which updates lead)
Departs        not all clients take part in a round (paper: all): those that do say whether their cluster parts, and for
               the others stands what they changed when they last did. A mean update is short by what the longest one
               is, 1/4 of which are the reference's two thresholds, lengths that depend on network and learning rate.
               There are so many clusters at most, and clients without examples part from nobody
Elsewhere      authors' notebook, FL-bench and FedEM's code take positions within a cluster for client numbers, so from
               the second split on clusters hold the wrong clients. Authors' code evaluates in training mode and keeps
               momentum from round to round
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Share


@register("cfl")
@dataclass(frozen=True, kw_only=True)
class CFL(Algorithm):
    """FedAvg in each cluster. The server keeps a model for each, clients' places, and what they last changed."""

    family: ClassVar[str] = "pfl"
    refuses: ClassVar[Mapping[str, str]] = {"aggregation": "each cluster's clients start from a model of their own"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"short": (0.05, 0.8), "wait": (0.0, 0.8)}
    controls: ClassVar[Mapping[str, str]] = {
        "cfl(short=0)": "whether parting does anything: without it is FedAvg bit for bit",
    }

    short: Share = 0.25
    """A cluster parts if its mean update is shorter than this share of its longest one (reference: 0.4 / 1.6)."""
    wait: Share = 0.25
    """Share of the rounds in which nobody parts (reference: 20 of 80)."""
    clusters: Annotated[int, Interval(ge=1, le=100)] = 8
    """How many there are at most."""

    def init_server(self, task: Task) -> Tree:
        """Start with one cluster: models (clusters, ...), places (N,), and updates of zero, parameters (N, ...)."""
        model = task.init()
        nothing = tree.map(lambda leaf: leaf.new_zeros(task.num_clients, *leaf.shape), tree.parameters(model))
        models = tree.stack([model] * self.clusters)
        return {**model, "models": models, "cluster": task.key.new_zeros(task.num_clients), "updates": nothing}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send nothing to all alike."""
        return {}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Send the model of the client's cluster; that of all, before they parted, to one held out of training."""
        if client is None:
            return {"body": server["body"], "head": server["head"]}
        return tree.pick(tree.pick(server["models"], server["cluster"][client, None]), 0)

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Part clusters, then average over each."""
        started = tree.pick(server["models"], server["cluster"][uploads.clients])
        changed = tree.map(torch.sub, tree.parameters(tree.stack(uploads.trees)), tree.parameters(started))
        updates = tree.put(server["updates"], uploads.clients, changed)
        place, models = server["cluster"].tolist(), list(tree.unstack(server["models"]))
        drawn = dict(zip(uploads.clients.tolist(), uploads.weights.tolist(), strict=True))
        if task.round >= self.wait * task.rounds:
            products = torch.stack([product(leaf) for leaf in tree.flatten(updates).values()]).sum(0).cpu()
            for parent in range(max(place) + 1):
                new = max(place) + 1
                if new < self.clusters and (leaving := self.leaving(products, place, parent, drawn)):
                    models[new] = models[parent]
                    place = [new if k in leaving else c for k, c in enumerate(place)]
        for c in range(max(place) + 1):
            weights = [weight * (place[k] == c) for k, weight in drawn.items()]
            if any(weights):
                models[c] = uploads.mean(weights=torch.tensor(weights, dtype=torch.float64))
        one = models[0] if max(place) == 0 else {"body": server["body"], "head": server["head"]}
        cluster = tree.bring(torch.tensor(place), server["cluster"].device)
        return {**one, "models": tree.stack(models), "cluster": cluster, "updates": updates}

    def leaving(self, products: Tensor, place: list[int], cluster: int, drawn: dict[int, float]) -> set[int]:
        """Give the clients that leave a cluster: nobody, or the smaller part of those that have ever changed something.

        Args:
            products: (N, N) float64, inner products of updates.
            place: Each client's cluster.
            cluster: Which.
            drawn: Who took part in this round, and how much each counts.
        """
        here = [k for k, weight in drawn.items() if place[k] == cluster and weight > 0]
        if len(here) < 3:
            return set()
        weights = torch.tensor([drawn[k] for k in here], dtype=torch.float64)
        weights = weights / weights.sum()
        longest = products.diagonal()[here].max().sqrt()
        mean = (weights @ products[here][:, here] @ weights).clamp(min=0).sqrt()
        if mean >= self.short * longest:
            return set()
        members = [k for k, c in enumerate(place) if c == cluster and products[k, k] > 0]
        lengths = products.diagonal()[members].sqrt()
        second = halves(1 - products[members][:, members] / (lengths[:, None] * lengths))
        parts = [{k for k, other in zip(members, second, strict=True) if other == which} for which in (True, False)]
        return min(parts, key=len)

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: that of all goes stale when they part."""
        return None


def product(rows: Tensor) -> Tensor:
    """Give the inner products of all rows, (N, ...), in float64: (N, N)."""
    flat = tree.in_float64(rows).flatten(1)
    return flat @ flat.T


def halves(apart: Tensor) -> list[bool]:
    """Part clients in two by complete linkage, of their (K, K) distances: for each whether it is in the second part."""
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    merged = linkage(squareform(apart.clamp(min=0).numpy(), checks=False), "complete")
    return [bool(part) for part in cut_tree(merged, [2])[:, 0]]
