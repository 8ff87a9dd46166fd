"""FedIIC: features contrast within a client and with anchors of all classes; logits shift by frequency and difficulty.

Wu, Yu, Yang, Cheng, Yan. FedIIC: Towards Robust Federated Learning for Class-Imbalanced Medical Image Classification.
MICCAI 2023. https://github.com/wnn2000/FedIIC

Server keeps   body, head, projector, anchors, difficulty
Client keeps   nothing
Down           body, head, projector, anchors (C, projection), difficulty (C)
Up             body, head, projector, losses (C), counts (C)
Passes         2 × E + 1/3
Departs        optimiser and model are the setting's (reference: Adam at 0.0003, a pre-trained EfficientNet). Losses are
               those of the round's clients (reference: all take part); a class that they lack stays as difficult as it
               was. Anchors are driven apart beyond right angles too (reference: down to a cosine of 0)
Elsewhere      authors' code joins the clients' Dirichlet draws and cuts the whole again into equal parts: all clients
               have one size, which hides errors in the weights of the average, and labels are more even than alpha says
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, Uploads, keys, losses, register
from bench.models.layers import apply_linear, linear
from bench.ranges import Count, Steps, Strength


@register("fediic")
@dataclass(frozen=True, kw_only=True)
class FedIIC(Algorithm):
    """Without contrasts and difficulty it is FedAvg with balanced softmax, up to rounding."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    own_loss: ClassVar[bool] = True
    paper: ClassVar[Mapping[str, object]] = {"projection": 1024}

    within: Strength = 2.0
    """Weight of the contrast within a batch (paper: k1 = 2)."""
    between: Strength = 2.0
    """Weight of the contrast with anchors (paper: k2 = 2)."""
    difficult: Strength = 0.25
    """Power of a class's loss, by which its frequency is divided (paper: d = 0.25)."""
    projection: Count = 128
    """Length of what contrasts are of: two linear layers make it of features (reference: 1024)."""
    spread_steps: Steps = 1000
    """Steps at a rate of 0.1 that drive anchors apart in each round (reference: 1000)."""

    def init_server(self, task: Task) -> Tree:
        """Draw the projector; all classes are as difficult at first."""
        model, key, d = task.init(), task.server_key("projector"), task.model.feature_size
        projector = {"first": linear(keys.fold(key, 1), d, d), "second": linear(keys.fold(key, 2), self.projection, d)}
        anchors = projected(projector, model["head"]["weight"])
        return {**model, "projector": projector, "anchors": anchors, "difficulty": anchors.new_ones(task.num_classes)}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Ask how difficult classes are, then train."""
        return (Exchange("examine", "prepare"), Exchange())

    def examine(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Add up the received model's losses of each class."""
        entropies = data.class_means(lambda x: -task.logits(shared, x).float().log_softmax(1))
        return {"losses": entropies.diagonal() * data.class_counts, "counts": data.class_counts.float()}, private

    def prepare(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average losses by class; drive the projected rows of the head apart, for they are the anchors."""
        lost, counts = (uploads.tensor(key).sum(0) for key in ("losses", "counts"))
        anchors = projected(server["projector"], server["head"]["weight"])
        slope = torch.func.grad(closeness)
        for _ in range(self.spread_steps):
            anchors = anchors - 0.1 * slope(anchors)
        difficulty = torch.where(counts > 0, lost / (counts + 1e-5), server["difficulty"])
        return {**server, "anchors": anchors, "difficulty": difficulty}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train on two views of each example: labels are asked for the first, contrasts are of both."""
        counts, anchors = data.class_counts.float(), F.normalize(shared["anchors"], dim=1)
        expected, share = counts / (shared["difficulty"] ** self.difficult + 1e-5), counts / data.n.clamp(min=1)

        def adjusted(logits: Tensor, batch: Batch) -> Tensor:
            return losses.balanced_softmax(logits, batch, expected)

        def loss(w: Tree, batch: Batch) -> Tensor:
            z, n = task.model.features(w["body"], batch.x), len(batch.y) // 2
            first = Batch(batch.x[:n], batch.y[:n], batch.weight[:n], batch.example[:n], batch.key, batch.first)
            entropy = task.criterion(task.model.logits(w["head"], z[:n]), z[:n], first, adjusted)
            v = F.normalize(projected(w["projector"], z.float()), dim=1)
            within = losses.mean(contrast(v, batch, share), batch)
            between = losses.cross_entropy(v @ anchors.T / 0.1, batch)
            return entropy + self.within * within + self.between * between

        start = {key: shared[key] for key in ("body", "head", "projector")}
        return task.sgd(loss, start, data.batches(task.epochs, views=2)), private


def projected(projector: Tree, z: Tensor) -> Tensor:
    """Apply both layers: (B, d) -> (B, p)."""
    return apply_linear(projector["second"], apply_linear(projector["first"], z))


def closeness(anchors: Tensor) -> Tensor:
    """Add up each anchor's largest cosine with another: (C, p) -> ()."""
    cosines = F.normalize(anchors, dim=1) @ F.normalize(anchors, dim=1).T
    return (cosines - 3 * torch.eye(len(anchors), device=anchors.device)).amax(1).sum()


def contrast(v: Tensor, batch: Batch, share: Tensor) -> Tensor:
    """Give what each example pays for being far from its class in the batch: (B, p) of length one -> (B,).

    The temperature of a pair is the root of the product of both classes' shares at the client, at least 0.07.
    """
    real, other = batch.weight > 0, ~torch.eye(len(v), dtype=torch.bool, device=v.device)
    pi = share[batch.y.clamp(min=0)].clamp(min=1e-12).sqrt()
    near = v @ v.T / (pi[:, None] * pi).clamp(min=0.07)
    log = near - torch.where(other & real, near, -1e4).logsumexp(1, keepdim=True)
    same = ((batch.y[:, None] == batch.y) & other & real).float()
    return -(same * log).sum(1) / same.sum(1).clamp(min=1)
