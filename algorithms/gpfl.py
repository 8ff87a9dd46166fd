"""GPFL: a conditional valve parts features in two, for what all clients know of a class and for what one of them needs.

Zhang, Hua, Wang, Song, Xue, Ma, Cao, Guan. GPFL: Simultaneously Learning Global and Personalized Feature Information
for Personalized Federated Learning. ICCV 2023. https://arxiv.org/abs/2308.10279 (Algorithm 1)

Server keeps   body, valve, embeddings
Client keeps   head
Down           body, valve, embeddings (C, d)
Up             body, valve, embeddings (C, d)
Newcomers      never drawn, the common initial head on features at the condition of their own classes; held out, that
               with five epochs of the head
Departs        conditions are of the received embeddings (reference: of those that the client had before, and of zeros
               in its first round); the decay of embeddings and valve adds to the setting's, and is a part of what the
               setting clips, each of the two by itself (reference: no clipping)
Elsewhere      the third term of authors' code is a Frobenius norm over the batch, so it grows with the square root of
               the batch size. PFLlib's defaults are lambda = 1 and mu = 0 (authors: 0.01 and 0.1 for the CNN)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, keys, losses, register, tree
from bench.models.layers import apply_linear, linear, norm_layer
from bench.ranges import Strength


@register("gpfl")
@dataclass(frozen=True, kw_only=True)
class GPFL(Algorithm):
    """`embeddings` is (C, d); `valve` has two layers, each a linear map of a condition, (d,), rectified, normalised."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    controls: ClassVar[Mapping[str, str]] = {
        "gpfl(magnitude=0)": "whether lengths of generic features matter: they learn from angles alone",
        "fedper": "what a personal head gives without valve and embeddings",
    }

    magnitude: Strength = 0.01
    """Weight of the distance of a batch's generic features to the received embeddings of their classes, the root of the
    sum over the batch (paper: lambda = 0.01 for its CNN, 1e-4 for ResNet-18)."""
    decay: Strength = 0.1
    """Weight decay of embeddings and valve (paper: mu = 0.1 for its CNN, 0 for ResNet-18)."""

    def init_server(self, task: Task) -> Tree:
        """Draw the valve, and an embedding of each class."""
        key, d = task.server_key("valve"), task.model.feature_size

        def layer(name: str) -> Tree:
            return {"linear": linear(keys.fold(key, name), d, d), "norm": norm_layer("layer", d, key.device)}

        embeddings = keys.normal(keys.fold(key, "embeddings"), task.num_classes, d)
        valve = {"gamma": layer("gamma"), "beta": layer("beta")}
        return {"body": task.init()["body"], "valve": valve, "embeddings": embeddings}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial head that all algorithms share."""
        return {"head": task.init()["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train all parts: personal features by the client's head, generic ones by angle and distance to embeddings."""
        received = shared["embeddings"]
        generic, personal = received.mean(0), condition(received, data)

        def loss(w: Tree, batch: Batch) -> Tensor:
            z = task.model.features(w["body"], batch.x).float()
            ours, mine = opened(w["valve"], z, generic), opened(w["valve"], z, personal)
            angles = F.normalize(ours, dim=1) @ F.normalize(w["embeddings"], dim=1).T
            apart: Tensor = ((ours - received[batch.y]).square().sum(1) * batch.weight).sum().clamp(min=1e-12).sqrt()
            guided = losses.cross_entropy(angles, batch) + self.magnitude * apart
            decayed = {key: w[key] for key in ("valve", "embeddings")}
            small = 0.5 * self.decay * tree.dot(decayed, decayed)
            return task.criterion(task.model.logits(w["head"], mine), mine, batch) + guided + small

        start = {**shared, "head": private["head"]}
        model = task.sgd(loss, start, data.batches(task.epochs), clip_apart=("valve", "embeddings"))
        return {key: model[key] for key in ("body", "valve", "embeddings")}, {"head": model["head"]}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no head is shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest body and valve, at the condition of the client's classes, under its head."""
        known = {"valve": shared["valve"], "condition": condition(shared["embeddings"], data)}
        return {"body": shared["body"], "head": private["head"], **known}

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give what was trained, valve and embeddings included."""
        upload, private = self.local_update(task, shared, private, data)
        return {**shared, **upload}, private

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score personal features."""
        z = task.model.features(model["body"], x).float()
        return task.model.logits(model["head"], opened(model["valve"], z, model["condition"]))


def condition(embeddings: Tensor, data: LocalData) -> Tensor:
    """Average the embeddings by the client's classes: (d,)."""
    share: Tensor = data.class_counts / data.n.clamp(min=1)
    return share @ embeddings


def opened(valve: Tree, z: Tensor, condition: Tensor) -> Tensor:
    """Scale and shift features as a condition has it: (B, d), (d,) -> (B, d)."""

    def layer(name: str) -> Tensor:
        hidden, norm = F.relu(apply_linear(valve[name]["linear"], condition)).float(), valve[name]["norm"]
        away = hidden - hidden.mean()  # layer norm, whose own operation has a gradient that cannot be replayed
        scaled: Tensor = norm["weight"] * away * (away.square().mean() + 1e-5).rsqrt() + norm["bias"]
        return scaled

    return F.relu((1 + layer("gamma")) * z + layer("beta"))
