"""FedALA: before it trains, a client mixes the received head with its last one, by weights that it learns.

Zhang, Hua, Wang, Song, Xue, Ma, Guan. FedALA: Adaptive Local Aggregation for Personalized Federated Learning. AAAI
2023. https://arxiv.org/abs/2212.01197 (Algorithm 1)

Server keeps   body, head
Client keeps   own, weights
Down           body, head
Up             body, head
Passes         E + merge_epochs; before the test merge_epochs
Newcomers      mix the received layers with the initial ones, by weights that start at 1: what was received
Departs        weights take `merge_epochs` passes in each round (paper: the first time until losses stand still, then
               one): how many a client needs is not known before. Each example is drawn for them by itself (paper: so
               many in a row). What stands still is in evaluation mode. A client that was not drawn mixes for its test,
               and keeps nothing of it (reference: all mix in each round, and keep it)
Elsewhere      in FL-bench all clients share one worker: its weights and start flag are common, and a client's local
               model is what the previous client left. Authors' loaders drop the last batch at the test too. Their
               stopping rule reads each epoch's last batch only (threshold 0.1, paper: 0.01), and may never end if small
Reproduced     by TsingZ0/FedALA@a7a9b21 (our batches; weights learnt on all images, in one pass): models 6e-07 apart
               (results/studies/agreement.md)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, evaluating, keys, register, tree
from bench.ranges import Epochs, SomeShare, Strength


@register("fedala")
@dataclass(frozen=True, kw_only=True)
class FedALA(Algorithm):
    """FedAvg, but for where clients start."""

    family: ClassVar[str] = "pfl"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"merge_lr": (0.1, 10.0), "layers": [1, 2, 3]}
    controls: ClassVar[Mapping[str, str]] = {
        "fedala(merge_lr=0)": "whether mixing does anything: weights stay at 1, and it is FedAvg bit for bit",
    }

    merge_lr: Strength = 1.0
    """Step of the weights along their gradient (paper: eta = 1)."""
    share: SomeShare = 0.8
    """Share of the client's examples that weights are learnt on (paper: s = 80 %)."""
    merge_epochs: Epochs = 1
    """Passes over them (paper: 1, and more the first time)."""
    layers: Annotated[int, Interval(ge=1, le=100)] = 1
    """How many of the last layers are mixed: the head, and the last blocks of the body (paper: p = 1)."""

    def upper(self, task: Task, model: Tree) -> Tree:
        """Give what is mixed of a model: its last layers, without running statistics."""
        blocks = task.model.blocks[::-1][: self.layers - 1]
        names = {key for block in blocks for key in block.keys}
        body = {key: layer for key, layer in model["body"].items() if key in names}
        return tree.parameters({"body": body, "head": model["head"]})

    def init_client(self, task: Task) -> Tree:
        """Start from the initial layers, and weights of 1."""
        own = self.upper(task, task.init())
        return {"own": own, "weights": tree.map(torch.ones_like, own)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Mix, then train the whole model."""
        weights = self.learnt(task, shared, private, data)
        model = task.sgd(task.loss, self.mixed(task, shared, private, weights), data.batches(task.epochs))
        return model, tree.where(data.n > 0, {"own": self.upper(task, model), "weights": weights}, private)

    def learnt(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        """Step against the gradient of the mixture's loss, and stay in [0, 1]."""

        def loss(weights: Tree, batch: Batch) -> Tensor:
            with evaluating():
                return task.loss(self.mixed(task, shared, private, weights), batch)

        chosen = keys.uniform(keys.fold(data.key, "merge"), len(data.index)) < self.share
        batches = data.batches(self.merge_epochs, "merge")
        some = (replace(batch, weight=batch.weight * chosen[batch.example]) for batch in batches)
        return task.train(Clipped(self.merge_lr), loss, private["weights"], some)[0]

    def mixed(self, task: Task, shared: Tree, private: Tree, weights: Tree) -> Tree:
        """Give own + (received - own) * weights in the last layers, and all else as it was received."""
        model: Tree = {"body": shared["body"], "head": shared["head"]}
        return tree.merge(model, tree.map(torch.lerp, private["own"], self.upper(task, model), weights))

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give what the client would start from."""
        return self.mixed(task, shared, private, self.learnt(task, shared, private, data))


@dataclass(frozen=True)
class Clipped:
    """A step of plain gradient descent that ends in [0, 1]."""

    lr: float

    def start(self, params: Tree) -> Tree:
        """Keep nothing."""
        return {}

    def step(self, params: Tree, gradient: Tree, kept: Tree) -> tuple[Tree, Tree]:
        """Take a step."""
        return tree.map(lambda w, g: (w - self.lr * g).clamp(0, 1), params, gradient), kept
