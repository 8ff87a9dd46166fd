"""CLIP2FL: CReFF whose clients learn from CLIP besides, and whose federated features are drawn to its texts.

Shi, Zheng, Yin, Lu, Xie, Qu. CLIP-Guided Federated Learning on Heterogeneous and Long-Tailed Data. AAAI 2024.
https://arxiv.org/abs/2312.08648

Server keeps   body, head, retrained, features
Client keeps   nothing
Down           body (body + d × T + T), head (C × T + C), retrained (C × T + C)
Up             body (body + d × T + T), head (C × T + C), gradient (C × (C × T + C)), seen (C)
Passes         E + 1/3
Departs        the teacher is whatever made the file that is named with --teacher: every client is taken to have it,
               and nothing of it is sent or counted; a class's gradient is that of all the client's images of it,
               without augmentation, as in our CReFF; all copies of a class's text are positives of a feature
               (reference: all but one, the copy at its own place)
Elsewhere      authors' code leaves federated features unnormalised beside texts of unit norm, shows CLIP the plain
               image and the student an augmented one, and enlarges CIFAR images to 224 pixels for CLIP, its dominant
               cost. Paths are hard-coded, and the `small_*` flags unused
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, keys, register, tree
from bench.federated_features import class_gradients, matched, retrained
from bench.losses import mean
from bench.models.layers import apply_linear, linear
from bench.ranges import Count, Epochs, Positive, Steps, Strength


@register("clip2fl")
@dataclass(frozen=True, kw_only=True)
class CLIP2FL(Algorithm):
    """`body` ends in a linear `projection` to the teacher's width d; heads are (C, d). As in CReFF `head` trains the
    body, and `retrained` is what is tested.
    """

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "V"
    needs: ClassVar[frozenset[str]] = frozenset({"body", "teacher"})
    controls: ClassVar[Mapping[str, str]] = {
        "clip2fl(distil=0, contrast=0)": "what the teacher is worth: CReFF with a projection, and without a teacher",
        "clip2fl(match_steps=0)": "whether matching matters: a head re-trained on features that stay noise",
    }

    distil: Strength = 1.0
    """Weight of the teacher in a client's loss (paper: 1)."""
    temperature: Positive = 3.0
    """Divides the logits of teacher and student (reference: T = 3)."""
    contrast: Strength = 0.001
    """Weight of the texts in what the features descend (reference: 0.001)."""
    contrast_temperature: Positive = 0.1
    """Divides the products of features and texts (reference: 0.1)."""
    features_per_class: Count = 100
    """Federated features of each class (reference: m = 100)."""
    match_steps: Steps = 100
    """SGD steps on the features in each round (reference: 100)."""
    match_lr: Strength = 0.1
    """Their learning rate."""
    head_epochs: Epochs = 300
    """Epochs of re-training on the features in each round (reference: 300)."""
    head_lr: Strength = 0.01
    """Its learning rate; batches of 32, no momentum."""

    def init_server(self, task: Task) -> Tree:
        """Draw projection and head, and start with features of standard normal noise."""
        width, head = _texts(task).shape[1], _fresh_head(task, keys.fold(task.key, "model"))
        projection = linear(keys.fold(task.key, "projection"), width, task.model.feature_size)
        noise = keys.normal(task.server_key("features"), task.num_classes, self.features_per_class, width)
        body = {**task.init()["body"], "projection": projection}
        return {"body": body, "head": head, "retrained": head, "features": noise}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send both heads; features stay at the server."""
        return {key: server[key] for key in ("body", "head", "retrained")}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Take each class's mean gradient at the re-trained head, then train by labels and the teacher's logits."""
        gradient = class_gradients(shared["retrained"], lambda x: projected(task, shared["body"], x), data)
        assert data.teacher is not None
        taught = (teacher_logits(data.teacher, _texts(task)) / self.temperature).log_softmax(1)  # of each example

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = projected(task, params["body"], batch.x)
            logits = apply_linear(params["head"], z)
            apart = divergence(taught[batch.example], (logits.float() / self.temperature).log_softmax(1))
            return task.criterion(logits, z, batch) + self.distil * self.temperature**2 * mean(apart, batch)

        model = task.sgd(loss, {"body": shared["body"], "head": shared["head"]}, data.batches(task.epochs))
        return {**model, "gradient": gradient, "seen": (data.class_counts > 0).float()}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average the model as FedAvg does; match the features to the gradients, near the texts of their classes; train
        a fresh head on them.
        """
        seen, key = uploads.tensor("seen"), task.server_key("retrain")
        features = matched(
            server["features"],
            server["retrained"],
            uploads.mean("gradient", seen),  # per class, over clients that hold it
            seen.sum(0) > 0,
            self.match_steps,
            self.match_lr,
            anchors=_texts(task) / self.contrast_temperature if self.contrast else None,
            pull=self.contrast,
        )
        return {
            **tree.merge(server, {"body": uploads.mean("body"), "head": uploads.mean("head")}),
            "features": features,
            "retrained": retrained(_fresh_head(task, key), features, self.head_epochs, self.head_lr, key),
        }

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the averaged body under the re-trained head."""
        return {"body": server["body"], "head": server["retrained"]}

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Give the averaged model too: that of FedAvg with distillation alone."""
        return {"averaged": {"body": server["body"], "head": server["head"]}}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the generic model."""
        return {"body": shared["body"], "head": shared["retrained"]}

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score projected features."""
        return apply_linear(model["head"], projected(task, model["body"], x))


def projected(task: Task, body: Tree, x: Tensor) -> Tensor:
    """Give the student's features, as wide as the teacher's: (B, channels, height, width) -> (B, d)."""
    return apply_linear(body["projection"], task.model.features(body, x))


def teacher_logits(images: Tensor, texts: Tensor) -> Tensor:
    """Give 100 times the cosines of images and texts, as CLIP does: (L, d), (C, d) of length one -> (L, C)."""
    return 100 * F.normalize(images, dim=1) @ texts.T


def divergence(wanted: Tensor, said: Tensor) -> Tensor:
    """Give the Kullback-Leibler divergence of what is wanted from what is said, (B, C) logarithms each: (B,)."""
    return torch.sum(wanted.exp() * (wanted - said), 1)


def _texts(task: Task) -> Tensor:
    """Give what the teacher makes of the classes, of length one: (C, d)."""
    assert task.teacher is not None
    return F.normalize(task.teacher, dim=1)


def _fresh_head(task: Task, key: Tensor) -> Tree:
    """Draw a head as networks do, as wide as the teacher's space."""
    assert task.teacher is not None
    return linear(keys.fold(key, "head"), *task.teacher.shape)
