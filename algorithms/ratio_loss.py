"""Ratio Loss: the server trains on images of one class at a time, and clients weigh classes by what that moves.

Wang, Xu, Wang, Zhu. Addressing Class Imbalance in Federated Learning. AAAI 2021. https://arxiv.org/abs/2008.06217

Server keeps   body, head, weights
Client keeps   nothing
Down           body, head, weights (C)
Up             body, head
Departs        weights act in every round after the first, as in the reference (paper: where a monitor of the clients'
               updates says that classes are imbalanced); of the server's images, which no client has (reference: taken
               out of the training images), those of a class are drawn with replacement, as many batches as a pass over
               them has; models are averaged with the setting's weights (reference: all alike). Codes that take one
               gradient of another layer in place of a training are other losses of the same name
Elsewhere      in FedLoGe's code `alpha=None` makes all weights 1: plain cross-entropy, from a converged FedAvg
               checkpoint, and NaN in three of four CIFAR-10 runs. Authors' code finds the winner by signed values and
               the runner-up by absolute ones; its README has a rate of 0.001, its code one that drops to 0.01 after
               round 135
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, losses, register, tree
from bench.ranges import Share, Strength

NOTHING, MOST = 10.0, 5000.0
"""Ratio where the other classes move nothing, and the largest one (reference: 10 and 5000)."""


@register("ratio_loss")
@dataclass(frozen=True, kw_only=True)
class RatioLoss(Algorithm):
    """`weights`, (C,), are 1 + beta · ratio; they do not add up to C, so that the learning rate grows with them."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "A"
    needs: ClassVar[frozenset[str]] = frozenset({"auxiliary", "body"})
    own_loss: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {"loss": "in place of its own there would be nothing left of it but FedAvg"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"beta": (0.01, 1.0)}

    beta: Strength = 0.1
    """What a class's ratio adds to its weight, which is 1 (paper: 0.1); 0 is FedAvg."""
    rivals: Share = 0.8
    """Share of the winner's movement that no other class may exceed for a position to count (reference: 0.8)."""

    def init_server(self, task: Task) -> Tree:
        """Start with equal weights."""
        return {**task.init(), "weights": task.key.new_ones(task.num_classes, dtype=torch.float32)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise the mean cross-entropy, each example's times the weight of its class."""

        def by_ratio(logits: Tensor, batch: Batch) -> Tensor:
            surprise = -(logits.float().log_softmax(1) * losses.one_hot(batch.y, task.num_classes)).sum(1)
            return losses.mean(shared["weights"][batch.y.clamp(min=0)] * surprise, batch)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            return task.criterion(task.model.logits(params["head"], z), z, batch, by_ratio)

        start: Tree = {"body": shared["body"], "head": shared["head"]}
        return task.sgd(loss, start, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average as FedAvg does; find the next round's weights at the model that this round began with."""
        moved = ratios(self._probe(task, server), self.rivals)
        return {**server, **uploads.mean(), "weights": 1 + self.beta * moved}

    def _probe(self, task: Task, server: Tree) -> Tensor:
        """Train the model on one class at a time, and give how the head's weight moves: (C, C, d), class first."""
        data = task.auxiliary
        assert data is not None
        steps = task.epochs * -(-len(data.index) // (task.num_classes * task.batch_size))
        model: Tree = {"body": server["body"], "head": server["head"]}
        heads = [
            task.sgd(task.loss, model, data.batches(steps=steps, salt=f"probe {c}", weights=(data.y == c).float()))
            for c in range(task.num_classes)
        ]
        return torch.stack([head["head"]["weight"] - model["head"]["weight"] for head in heads])


def ratios(moved: Tensor, rivals: float) -> Tensor:
    """Give each class's ratio of its own movement to the others' mean, over the positions that are its own: (C,).

    A position is a class's own where that moves it most upwards, and no other one's movement, up or down, exceeds a
    share of it.

    Args:
        moved: (C, ...), how weights move when each class is trained on alone.
        rivals: That share.
    """
    device, moved = moved.device, tree.in_float64(moved.flatten(1))
    highest, winner = moved.max(0)
    alone = (moved.abs() > rivals * highest.abs()).sum(0) < 2
    own = torch.arange(len(moved), device=moved.device)[:, None] == winner
    own = own & alone & (highest != 0)
    mine = (own * moved).sum(1)
    others = (own * (moved.sum(0) - moved)).sum(1) / max(len(moved) - 1, 1)
    found = torch.where(others != 0, mine.abs() / others.abs().clamp(min=1e-300), NOTHING)
    return found.clamp(max=MOST).to(device, torch.float32)
