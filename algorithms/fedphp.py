"""FedPHP: each client keeps a running mean of its models, which teaches the next one and is what it uses.

Li, Zhan, Shao, Li, Song. FedPHP: Federated Personalization with Inherited Private Models. ECML PKDD 2021.
https://doi.org/10.1007/978-3-030-86486-6_36 (Algorithm 1)

Server keeps   body, head, visits
Client keeps   body, head, visited
Down           body, head, visits (1)
Up             body, head
Newcomers      the received model after one local update, which is what they would inherit; nothing of it is kept
Departs        how often a client is drawn in a whole run, `visits`, the server reckons from the uploads so far
               (reference: from the share of clients, which no method is told); a client is taught nothing on its first
               visit (reference: by the initial model); the inherited model is in evaluation mode when it teaches
               (reference: in training mode)
Elsewhere      PFLlib tests the plain model after training, never the inherited one, so clients not drawn score as the
               global model. Its mu grows with the round, not with the client's visits, and its MMD bandwidths are fixed
               at 10, 15, 20 and 50
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, evaluating, losses, register, tree
from bench.ranges import Momentum, Positive, Share

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the kernels that are added up, as multiples of the mean squared distance (reference)."""


@register("fedphp")
@dataclass(frozen=True, kw_only=True)
class FedPHP(Algorithm):
    """FedAvg with a teacher of the client's own; the mean model never leaves the client."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "weight": (0.005, 0.5),
        "transfer": ["mmd", "kd"],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fedphp(weight=0)": "whether the inherited model teaches anything, or it is the mean alone",
        "fedphp(inherit=0)": "whether a mean of a client's models is better than its last one",
    }

    transfer: Literal["mmd", "kd"] = "mmd"
    """What is taught: "mmd" how features are distributed, "kd" the teacher's soft labels (paper: both)."""
    weight: Share = 0.05
    """Weight of what is taught, the rest being the loss's (paper: 0.05 or 0.1)."""
    temperature: Positive = 4.0
    """Of the teacher's softmax, and not the learner's (reference: 4)."""
    inherit: Momentum = 0.9
    """Share of the old mean in the new one where a client has had all its visits; it grows with them (paper: 0.9)."""

    def init_server(self, task: Task) -> Tree:
        """Start with the initial model; how often clients are drawn is not known yet: 0."""
        return {**task.init(), "visits": task.key.new_zeros((), dtype=torch.float32)}

    def init_client(self, task: Task) -> Tree:
        """Have inherited nothing yet: its place is taken, and `visited` is 0."""
        return {**task.init(), "visited": task.key.new_zeros((), dtype=torch.float32)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise (1 - weight) · loss + weight · what the inherited model teaches, then mix the model into it."""
        inherited, visited = {"body": private["body"], "head": private["head"]}, private["visited"]
        weight: Tensor = self.weight * (visited > 0).float()

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            logits = task.model.logits(params["head"], z)
            with evaluating():
                z_h = task.model.features(inherited["body"], batch.x)
                logits_h = task.model.logits(inherited["head"], z_h)
            taught = discrepancy(z, z_h, batch) if self.transfer == "mmd" else self._distilled(logits, logits_h, batch)
            return (1 - weight) * task.criterion(logits, z, batch) + weight * taught

        start: Tree = {"body": shared["body"], "head": shared["head"]}
        model = task.sgd(loss, start, data.batches(task.epochs))
        mu = (self.inherit * visited / shared["visits"].clamp(min=1.0)).clamp(max=self.inherit)
        mean = tree.map(lambda old, new: mu * old + (1 - mu) * new, inherited, model)
        return model, tree.where(data.n > 0, {**mean, "visited": visited + 1}, private)

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average models, and how many visits a client may expect of rounds like those so far."""
        expected = task.rounds * len(uploads) / task.num_clients
        visits = server["visits"] + (expected - server["visits"]) / (task.round + 1)
        return {**tree.merge(server, uploads.mean()), "visits": visits}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the inherited model."""
        return {"body": private["body"], "head": private["head"]}

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Inherit what a first visit would leave."""
        return self.local_update(task, shared, self.init_client(task), data)[1]

    def newcomer_adaptation(self, task: Task) -> None:
        """Tune nothing more: the model has seen the client's data."""
        return None

    def _distilled(self, logits: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Give the mean cross-entropy with the teacher's soft labels: ()."""
        soft = (teacher.float() / self.temperature).softmax(1)
        return losses.mean(-(soft * logits.float().log_softmax(1)).sum(1), batch)


def discrepancy(a: Tensor, b: Tensor, batch: Batch) -> Tensor:
    """Give the squared maximum mean discrepancy of features, (B, d) each, by a sum of Gaussian kernels: ()."""
    x, real = torch.cat([a, b]).float(), batch.weight.repeat(2)
    sign = torch.cat([batch.weight, -batch.weight]) / batch.weight.sum().clamp(min=1.0)
    squared = (x[:, None] - x).square().sum(2)
    pairs = (real.sum() * (real.sum() - 1)).clamp(min=1.0)
    width = ((squared * real[:, None] * real).sum() / pairs).detach().clamp(min=1e-6)
    kernels = torch.stack([(-squared / (width * factor)).exp() for factor in WIDTHS]).sum(0)
    return sign @ kernels @ sign
