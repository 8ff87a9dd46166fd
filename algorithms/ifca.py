"""IFCA: several models, of which each client trains the one that has the least loss on its examples.

Ghosh, Chung, Yin, Ramchandran. An Efficient Framework for Clustered Federated Learning. NeurIPS 2020.
https://arxiv.org/abs/2006.04088 (Algorithm 1, model averaging)

Server keeps   body, head
Client keeps   nothing
Down           body (clusters × body), head (clusters × head)
Up             body (clusters × body), head (clusters × head), chosen (clusters)
Passes         E + clusters / 3; before the test clusters / 3
Newcomers      never drawn or held out, the model with the least loss on their training data, like everybody; nothing is
               tuned. Without labels the first one
Departs        a cluster's models are averaged by the setting's weights (paper: all alike). The choice is by
               cross-entropy of images as they are, not augmented. Models are drawn once, the first as everybody's
               (reference: anew until each attracts a fair share of the first cohort). For the test too a client chooses
               by training data (reference: by test data). Models that a client has not trained come back as they went
               in what is averaged, and are not counted as sent
Elsewhere      FedLab takes uploads by an empty slice (`payload[1:0]`): all choose cluster 0, then an index error ends
               the run. Authors' code refuses any number of clusters but 2 and 4 on CIFAR-10
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, Uploads, keys, losses, register, tree


@register("ifca")
@dataclass(frozen=True, kw_only=True)
class IFCA(Algorithm):
    """In `body` and `head` the parts of cluster k lie under its name."""

    family: ClassVar[str] = "pfl"
    refuses: ClassVar[Mapping[str, str]] = {"channel": "it would carry, and count, models that a client did not choose"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"clusters": [2, 3, 4, 6]}
    controls: ClassVar[Mapping[str, str]] = {
        "ifca(clusters=1)": "whether clusters do anything: one of them is FedAvg bit for bit",
    }

    clusters: Annotated[int, Interval(ge=1, le=100)] = 2
    """How many models (paper: K = 2 for rotated CIFAR-10, 4 for rotated MNIST)."""

    @property
    def names(self) -> list[str]:
        """Give the clusters' names, in their order."""
        return [f"cluster{k}" for k in range(self.clusters)]

    def init_server(self, task: Task) -> Tree:
        """Start the first cluster from the initial model that all algorithms share, the others each from its own."""
        seeds = [task.key, *(keys.fold(task.key, "cluster", k) for k in range(1, self.clusters))]
        drawn = {name: replace(task, key=key).init() for name, key in zip(self.names, seeds, strict=True)}
        return {part: {name: model[part] for name, model in drawn.items()} for part in ("body", "head")}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Choose a model and train it; the others stay."""
        chosen = self.choice(task, shared, data)
        model = task.sgd(task.loss, self.picked(shared, chosen), data.batches(task.epochs))
        sent = {
            part: {
                name: tree.where(mine > 0, model[part], shared[part][name])
                for name, mine in zip(self.names, chosen, strict=True)
            }
            for part in ("body", "head")
        }
        return {**sent, "chosen": chosen}, private

    def choice(self, task: Task, shared: Tree, data: LocalData) -> Tensor:
        """Mark the model of least loss on all of the client's examples, the first of equals: (K,) float32, one 1."""

        def cost(name: str) -> Tensor:
            model = cluster(shared, name)
            return data.mean(lambda batch: losses.cross_entropy(task.logits(model, batch.x), batch))

        least = torch.stack([cost(name) for name in self.names]).argsort(stable=True)[:1]
        return (torch.arange(self.clusters, device=least.device) == least).float()

    def picked(self, shared: Tree, chosen: Tensor) -> Tree:
        """Give the model that is marked."""
        first, *others = self.names
        model = cluster(shared, first)
        for k, name in enumerate(others, 1):
            model = tree.where(chosen[k] > 0, cluster(shared, name), model)
        return model

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average each cluster over those that chose it; one that nobody chose stays."""
        chosen = tree.in_float64(uploads.tensor("chosen"))
        following = server
        for k, name in enumerate(self.names):
            weights = uploads.weights * chosen[:, k].to(uploads.weights)
            taken = weights.sum() > 0
            for part in ("body", "head"):
                mean = tree.where(taken, uploads.mean(part, weights)[name], server[part][name])
                following = tree.merge(following, {part: {name: mean}})
        return following

    def payload_bytes(self, task: Task, payload: Tree) -> int:
        """Count all models on their way down, and up the one that was chosen."""
        if "chosen" not in payload:
            return tree.nbytes(payload)
        return tree.nbytes({**cluster(payload, "cluster0"), "chosen": payload["chosen"]})

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none."""
        return None

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Give each cluster's model."""
        return {name: cluster(server, name) for name in self.names}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Choose among the newest models, by training data."""
        return self.picked(shared, self.choice(task, shared, data))

    def newcomer_adaptation(self, task: Task) -> None:
        """Take no step: to choose is all that the paper has newcomers do."""
        return None


def cluster(models: Tree, name: str) -> Tree:
    """Give the model of a cluster."""
    return {part: models[part][name] for part in ("body", "head")}
