"""Unfreeze: layers join the training one after the other, from the head down, and those alone are sent that train.

Isong. Building Efficient Lightweight CNN Models. 2025. https://arxiv.org/abs/2501.15547

Server keeps   body (later), head
Client keeps   nothing
Down           body, head
Up             body (later), head
Departs        a schedule of rounds (paper: of epochs, in one place), by the setting's SGD (paper: Adam, then SGD); how
               long stages last there is not known. Where a network has no branches that score images by themselves,
               the first stage is not there. A layer that stands still normalises by its running statistics. Down goes
               the whole model in each round, for clients keep nothing: what has not moved since one was there last
               need not be sent again, and is counted here
Elsewhere      notebooks that reproduce it have another network under the published size, or give both branches images
               of one augmenting generator
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, register, tree
from bench.models import block_of
from bench.ranges import Share


@register("unfreeze")
@dataclass(frozen=True, kw_only=True)
class Unfreeze(Algorithm):
    """At first the branches by themselves, where there are such; then the head, and below it ever more of the body.

    What does not train is in no optimiser: neither momentum nor weight decay moves it, and no byte of it is sent up.
    """

    family: ClassVar[str] = "generic"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "every": [1, 2, 5, 10],
        "branch_rounds": (0.0, 0.5),
    }
    controls: ClassVar[Mapping[str, str]] = {
        "unfreeze(every=0)": "whether it does anything that layers join one after the other",
        "unfreeze(branch_rounds=0)": "whether branches that have learnt by themselves do; without such it is the same",
        "unfreeze(order='first_last')": "whether it matters from which end layers join",
    }

    every: Annotated[int, Interval(ge=0, le=10_000)] = 5
    """Rounds after which one more block of the body trains (ours; the paper's is not known). 0: all do, and without
    branches, or with `branch_rounds = 0`, it is FedAvg."""
    branch_rounds: Share = 0.3
    """Share of the rounds in which branches train, each by itself, where the network has such: the first on images as
    they are, the others on augmented ones (ours; the paper's is not known)."""
    order: Literal["last_first", "first_last"] = "last_first"
    """From which end layers join: from the head (paper), or from the images, under a head that stays as it was drawn
    until the end."""

    def begins(self, task: Task) -> int:
        """Give the round in which the head begins to train: the first one that is none of branches."""
        return math.ceil(self.branch_rounds * task.rounds - 1e-9) if task.model.branches else 0

    def layers(self, task: Task) -> list[str]:
        """Name what trains in this round: blocks of the body, and `head`."""
        since = task.round - self.begins(task)
        if since < 0:
            apart = {key for branch in task.model.branches for key in branch.keys}
            return [block.name for block in task.model.blocks if apart.intersection(block.keys)]
        layers = [*(block.name for block in task.model.blocks if block.keys), "head"]
        if self.order == "last_first":
            layers.reverse()
        return layers[: 1 + since // self.every] if self.every else layers

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Name the phase by what trains in it: a client computes more from one to the next."""
        return (Exchange(phase=" ".join(self.layers(task))),)

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train some layers above, below or beside the others, and send those."""
        layers, apart = self.layers(task), task.round < self.begins(task)
        moving, still = tree.split(shared, lambda path: block_of(task.model, path) in layers)

        def loss(w: Tree, batch: Batch) -> Tensor:
            model = tree.merge(still, w)
            return scored_apart(task, model["body"], batch, data.plain(batch)) if apart else task.loss(model, batch)

        trained = replace(task, still=True).sgd(loss, moving, data.batches(task.epochs))
        return {"body": {}, "head": {}, **trained}, private


def scored_apart(task: Task, body: Tree, batch: Batch, plain: Tensor) -> Tensor:
    """Add up the losses of branches that score images by themselves: () of a batch of augmented images.

    Args:
        task: Its network has branches.
        body: The branches of it.
        batch: What all branches but the first look at.
        plain: (B, channels, height, width), the same images as they are, for the first.
    """
    first, *others = task.model.branches
    scores = [first.run(body, plain), *(branch.run(body, batch.x) for branch in others)]
    return torch.stack([task.criterion(logits, None, batch) for logits in scores]).sum()
