"""FedCRAC: classes whose features lie close keep a margin, and the server re-trains the head on features that it draws.

Li, Sun, Liu, Ren, Jiang, He. FedCRAC: Improving Federated Classification Performance on Long-Tailed Data via Classifier
Representation Adjustment and Calibration. IEEE TMC 24(1), 2025. https://doi.org/10.1109/TMC.2024.3466208

Server keeps   body, head, means, variances, known, margins
Client keeps   nothing
Down           body, head, margins (C, C)
Up             body, head, means (C, d), variances (C, d), counts (C)
Passes         E + 1/3
Departs        re-training starts from the averaged head (reference: from the last round's, which loses what clients
               learnt; `start`), draws as many features of each class, weighed by its examples (reference: as many as
               these), and distils by their mean (reference: by that over classes too, next to nothing). Statistics are
               taken in evaluation mode (reference: training mode). The head has a bias, as every model here (reference:
               none); logits are not shifted by their minimum, which no softmax sees. Margins of a class that nobody
               has had yet stay those of the first round
Elsewhere      in authors' code one object serves many clients: momentum and class means carry over, and a class with
               one local example keeps another client's mean at weight 1. Loaders drop the last batch in the test too,
               so that the test set is truncated, and sizes are rounded up to full batches
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, keys, losses, register
from bench.ranges import Count, Positive, Share, Steps, Strength


@register("fedcrac")
@dataclass(frozen=True, kw_only=True)
class FedCRAC(Algorithm):
    """With margin = 0, scale = 1 and no steps it is FedAvg."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    own_loss: ClassVar[bool] = True
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"margin": (0.1, 10.0), "scale": (1.0, 20.0)}

    margin: Strength = 1.0
    """Of two classes of one direction, before scaling (reference: mu = 1)."""
    scale: Positive = 5.0
    """Multiplies logits in training (reference: 5)."""
    steps: Steps = 300
    """Steps of re-training in each round (reference: 300), with Nesterov's momentum of 0.9, at the clients' rate."""
    features_per_class: Count = 100
    """Features that are drawn of each class in each round."""
    distil: Share = 0.5
    """Share of the starting head's say in re-training (reference: 0.5)."""
    temperature: Positive = 0.5
    """Divides both heads' logits there (reference: 0.5)."""
    start: Literal["averaged", "previous"] = "averaged"
    """Where re-training starts: at the averaged head, or at the one that was broadcast (reference)."""

    def init_server(self, task: Task) -> Tree:
        """Know no class's features, and hold all classes apart alike."""
        model, classes = task.init(), task.num_classes
        zeros, margins = torch.zeros_like(model["head"]["weight"]), model["head"]["bias"].new_ones(classes, classes)
        return {**model, "means": zeros, "variances": zeros, "known": zeros[:, 0], "margins": self.margin * margins}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send model and margins."""
        return {key: server[key] for key in ("body", "head", "margins")}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train with margins, then take each class's mean feature and variance."""

        def held_apart(logits: Tensor, batch: Batch) -> Tensor:
            return losses.cross_entropy(self.apart(logits, batch.y, shared["margins"]), batch)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            return task.criterion(task.model.logits(params["head"], z), z, batch, held_apart)

        model = task.sgd(loss, {"body": shared["body"], "head": shared["head"]}, data.batches(task.epochs))

        def moments(x: Tensor) -> Tensor:
            z = task.model.features(model["body"], x).float()
            return torch.cat([z, z.square()], 1)

        means, squares = data.class_means(moments).chunk(2, 1)
        variances = (squares - means.square()).clamp(min=0)
        return {**model, "means": means, "variances": variances, "counts": data.class_counts.float()}, private

    def apart(self, logits: Tensor, y: Tensor, margins: Tensor) -> Tensor:
        """Raise each example's other logits by the margins of its class, and scale all: (B, C)."""
        others = 1 - losses.one_hot(y, logits.shape[1])
        return self.scale * (logits.float() + margins[y.clamp(min=0)] * others)

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average models, and statistics by examples of the class; then re-train the head."""
        counts = uploads.tensor("counts")
        here = counts.sum(0)[:, None] > 0
        found = {key: torch.where(here, uploads.mean(key, counts), server[key]) for key in ("means", "variances")}
        found["known"] = torch.maximum(here[:, 0].float(), server["known"])
        direction, pairs = F.normalize(found["means"], dim=1), found["known"] * found["known"][:, None]
        found["margins"] = self.margin * torch.where(pairs > 0, direction @ direction.T, 1.0)
        model = {"body": uploads.mean("body"), "head": uploads.mean("head")}
        start = model["head"] if self.start == "averaged" else server["head"]
        return {**model, **found, "head": self._retrained(task, start, found, counts.sum(0))}

    def _retrained(self, task: Task, head: Tree, found: Tree, counts: Tensor) -> Tree:
        """Descend both losses on features drawn class by class; the gradient by logits is in closed form."""
        (classes, d), each = found["means"].shape, self.features_per_class
        noise = keys.normal(task.server_key("features"), classes, each, d)
        x = (found["means"][:, None] + found["variances"][:, None].sqrt() * noise).flatten(0, 1)
        x, w = F.pad(x, (0, 1), value=1.0), torch.cat([head["weight"], head["bias"][:, None]], 1)
        y = torch.arange(classes, device=x.device).repeat_interleave(each, output_size=len(x))
        own, share = losses.one_hot(y, classes), (counts / counts.sum().clamp(min=1) / each)[y][:, None]
        taught = (self.apart(x @ w.T, y, found["margins"]) / self.temperature).softmax(1)
        velocity = torch.zeros_like(w)
        for _ in range(self.steps):
            logits = self.apart(x @ w.T, y, found["margins"])
            by_teacher = self.temperature * ((logits / self.temperature).softmax(1) - taught)
            slope = (1 - self.distil) * (logits.softmax(1) - own) + self.distil * by_teacher
            gradient = self.scale * (share * slope).T @ x
            velocity = 0.9 * velocity + gradient
            w = w - task.lr * (gradient + 0.9 * velocity)
        return {"weight": w[:, :-1].clone(), "bias": w[:, -1].clone()}
