"""FedNH: the head is a prototype of each class on the sphere, which no gradient moves; clients' class means do, slowly.

Dai, Chen, Li, Heinecke, Sun, Xu. Tackling Data Heterogeneity in Federated Learning with Class Prototypes. AAAI 2023.
https://arxiv.org/abs/2212.02758 (Algorithm 1)

Server keeps   body, head
Client keeps   nothing
Down           body, head (C × d + 1)
Up             body, head (1), means (C, d), counts (C)
Passes         E + 1/3
Departs        bodies and scales are averaged with the setting's weights (reference: uniformly); with more classes
               than features, which cannot all stand at right angles, prototypes start evenly spread, of length one
               (reference: shorter, until the first round ends)
Elsewhere      authors' code tests this round's clients only, on the global test set, weighted by each client's label
               frequencies (three ways), and averages batch norm's batch counter. FedETF's copy averages client means
               without counts and fixes the feature size at 64
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, keys, register
from bench.ranges import Positive, Share


@register("fednh")
@dataclass(frozen=True, kw_only=True)
class FedNH(Algorithm):
    """`head` holds the prototypes, `weight` (C, d), and the () `scale` of cosines, which alone of it is trained."""

    family: ClassVar[str] = "generic"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    refuses: ClassVar[Mapping[str, str]] = {"correction": "its head scores directions of features, and has no bias"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "smoothing": [0.1, 0.3, 0.5, 0.7, 0.9],
        "scale": (1.0, 100.0),
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fednh(smoothing=1)": "whether prototypes that follow the classes matter: they stay where they were drawn",
    }

    smoothing: Share = 0.9
    """Share of a prototype that a round leaves (paper: rho = 0.9); at 1 all stay."""
    scale: Positive = 20.0
    """What multiplies cosines at first, before it is trained (reference: 1 for its CNN, 20 for ResNet-18)."""

    def init_server(self, task: Task) -> Tree:
        """Draw prototypes at right angles."""
        prototypes = orthogonal(task.server_key("prototypes"), task.num_classes, task.model.feature_size)
        return {"body": task.init()["body"], "head": {"weight": prototypes, "scale": prototypes.new_tensor(self.scale)}}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train body and scale; send the mean direction of each class under the trained body."""
        prototypes = shared["head"]["weight"]

        def loss(w: Tree, batch: Batch) -> Tensor:
            z = F.normalize(task.model.features(w["body"], batch.x).float(), dim=1)
            return task.criterion(w["head"]["scale"] * (z @ prototypes.T), z, batch)

        start = {"body": shared["body"], "head": {"scale": shared["head"]["scale"]}}
        trained = task.sgd(loss, start, data.batches(task.epochs))
        means = data.class_means(lambda x: F.normalize(task.model.features(trained["body"], x).float(), dim=1))
        return {**trained, "means": F.normalize(means, dim=1), "counts": data.class_counts.float()}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average body and scale; lead prototypes towards the mean of the clients' means, by their counts."""
        counts, prototypes = uploads.tensor("counts"), server["head"]["weight"]
        towards = F.normalize(uploads.mean("means", counts), dim=1)
        moved = F.normalize(self.smoothing * prototypes + (1 - self.smoothing) * towards, dim=1)
        prototypes = torch.where(counts.sum(0)[:, None] > 0, moved, prototypes)
        return {"body": uploads.mean("body"), "head": {"weight": prototypes, **uploads.mean("head")}}

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score by cosines with the prototypes."""
        z = F.normalize(task.model.features(model["body"], x).float(), dim=1)
        scores: Tensor = model["head"]["scale"] * (z @ F.normalize(model["head"]["weight"], dim=1).T)
        return scores


def orthogonal(key: Tensor, classes: int, d: int) -> Tensor:
    """Draw directions at right angles, as far as there are so many: (C, d) float32, rows of length one."""
    draw = keys.normal(key.cpu(), max(classes, d), min(classes, d)).double()
    basis = torch.linalg.qr(draw).Q
    return F.normalize(basis if d < classes else basis.T, dim=1).float().to(key.device)
