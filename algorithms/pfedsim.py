"""pFedSim: after a warm-up each client's body is mixed of those of clients whose heads are like its own.

Tan, Zhou, Liu, Wang, Yu. pFedSim: Similarity-Aware Model Aggregation Towards Personalized Federated Learning. 2023.
https://arxiv.org/abs/2305.15706

Server keeps   body, head, models, similarity
Client keeps   nothing
Down           body, head
Up             body, head
Newcomers      never drawn since the warm-up, the model with which that ended; held out, that with five epochs of
               the head
Departs        a client's own head comes back with the body, from the server, which has it (paper: it stays at the
               client). Clients are tested with the mixed body (reference: with what they last trained). Those without
               examples are like nobody. Bias does not count in how alike heads are, as in the reference
Elsewhere      in FL-bench, by the paper's author, similarities start as the identity and are renewed for pairs within a
               cohort only, so clients that never met are strangers; one without a similar client keeps its own body
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Share

ITSELF = 0.9999
"""How alike a client is to itself, and any other at most; 1 would weigh infinitely."""


@register("pfedsim")
@dataclass(frozen=True, kw_only=True)
class PFedSim(Algorithm):
    """FedAvg for some rounds; then a body and a head for each."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    refuses: ClassVar[Mapping[str, str]] = {
        "aggregation": "after the warm-up each client's model stays apart, and no mean is taken"
    }
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"warm_up": (0.1, 0.9)}
    controls: ClassVar[Mapping[str, str]] = {
        "pfedsim(warm_up=1)": "whether mixing does anything: with nothing but a warm-up it is FedAvg bit for bit",
    }

    warm_up: Share = 0.5
    """Share of the rounds that are FedAvg's (paper: half of them)."""

    def init_server(self, task: Task) -> Tree:
        """Start with the initial model for each client, (N, ...), who are all strangers: (N, N)."""
        model = task.init()
        strangers = torch.eye(task.num_clients, device=task.key.device)
        return {**model, "models": everybody(task, model), "similarity": strangers}

    def is_warm_up(self, task: Task) -> bool:
        """Tell whether this round is FedAvg's."""
        return task.round < self.warm_up * task.rounds

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send nothing to all alike."""
        return {}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Send the model of all, and after the warm-up a mixed body under the client's own head."""
        if client is None or self.is_warm_up(task):
            return {"body": server["body"], "head": server["head"]}
        weights, models = shares(server["similarity"], client), server["models"]
        body = tree.map(lambda leaf: torch.tensordot(weights, leaf, 1), models["body"])
        return {"body": body, "head": tree.pick(models["head"], client)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train body and head."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average, and let all have the mean; later put models in their clients' places and see how alike heads are."""
        if self.is_warm_up(task):
            mean = uploads.mean()
            return {**server, **mean, "models": everybody(task, mean)}
        full, clients = uploads.sizes > 0, uploads.clients
        alike = likeness(uploads["head"]["weight"]) * (full[:, None] & full)
        return {
            **server,
            "models": tree.put(server["models"], clients, tree.stack(uploads.trees)),
            "similarity": server["similarity"].index_put((clients[:, None], clients), alike),
        }

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: that of the warm-up goes stale."""
        return None


def everybody(task: Task, model: Tree) -> Tree:
    """Give each client the same model: leaves (N, ...)."""
    return tree.stack([model] * task.num_clients)


def likeness(heads: Tensor) -> Tensor:
    """Average over classes the cosine of two clients' rows, 0 where that is negative: (K, K) of (K, C, d)."""
    rows = F.normalize(heads, dim=2)
    return torch.einsum("icd,jcd->ij", rows, rows).div(heads.shape[1]).clamp(min=0)


def shares(similarity: Tensor, client: int) -> Tensor:
    """Weigh all clients for one, in proportion to -log(1 - similarity): (N,) of (N, N)."""
    row = similarity[client].clamp(max=ITSELF)
    itself = torch.arange(len(row), device=row.device) == client
    weights = -torch.log1p(-torch.where(itself, ITSELF, row))
    return weights / weights.sum()
