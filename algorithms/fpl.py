"""FPL: features are drawn to clusters of the clients' prototypes of their class, away from others', and to their mean.

Huang, Ye, Shi, Li, Du. Rethinking Federated Learning with Domain Shift: A Prototype View. CVPR 2023.
https://openaccess.thecvf.com/content/CVPR2023/html/Huang_Rethinking_Federated_Learning_With_Domain_Shift_A_Prototype_View_CVPR_2023_paper.html

Server keeps   body, head, clusters
Client keeps   nothing
Down           body, head, clusters (C, most, d)
Up             body, head, prototypes (C, d), held (C)
Passes         E + 1/3
Departs        a class has at most `most` clusters: more are merged further, as FINCH merges them; prototypes are
               those of the trained body in evaluation mode, without augmentation (reference: as they were met in the
               last epoch); a class keeps its clusters in rounds in which no client holds it (reference: all clients
               take part)
Elsewhere      MarsFL, by the same group, has a temperature of 0.2 (paper: 0.02)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, register, tree
from bench.losses import mean
from bench.ranges import Count, Positive, Strength

OUT = -1e4
"""Score of what is no cluster: its exponential is 0 in float32."""
SHORT = 1e-6
"""Length below which a vector has no direction."""


@register("fpl")
@dataclass(frozen=True, kw_only=True)
class FPL(Algorithm):
    """`clusters` is (C, most, d); rows of zeros stand for none. Without both terms it is FedAvg."""

    family: ClassVar[str] = "generic"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "contrast": [0.0, 0.1, 1.0],
        "pull": [0.0, 0.1, 1.0],
        "temperature": [0.02, 0.1, 0.5],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "fpl(contrast=0, pull=0)": "FedAvg on the same batches",
        "fpl(most=1)": "what clusters are worth beside one mean of a class",
    }

    contrast: Strength = 1.0
    """Weight of the contrast with all clusters (paper: 1)."""
    pull: Strength = 1.0
    """Weight of the squared distance, a mean over features, to the mean of the class's clusters (paper: 1)."""
    temperature: Positive = 0.02
    """Divides the cosines (paper: 0.02)."""
    most: Count = 10
    """Clusters of a class (paper: as many as are found, at most half the clients)."""

    def init_server(self, task: Task) -> Tree:
        """Know no cluster yet."""
        model = task.init()
        return {
            **model,
            "clusters": model["head"]["weight"].new_zeros(task.num_classes, self.most, task.model.feature_size),
        }

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise cross-entropy + contrast + pull, then send the mean features of each class."""
        clusters = shared["clusters"]
        there = clusters.any(2)
        known = there.any(1).float()
        centre = clusters.sum(1) / there.sum(1, keepdim=True).clamp(min=1)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            entropy = task.criterion(task.model.logits(params["head"], z), z, batch)
            z = z.float()
            apart = contrast(z, clusters, batch.y, self.temperature)
            away = (z - centre[batch.y]).square().mean(1)
            return entropy + mean((self.contrast * apart + self.pull * away) * known[batch.y], batch)

        start = {"body": shared["body"], "head": shared["head"]}
        model = task.sgd(loss, start, data.batches(task.epochs))
        prototypes = data.class_means(lambda x: task.model.features(model["body"], x))
        return {**model, "prototypes": prototypes, "held": (data.class_counts > 0).float()}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average models; cluster the prototypes of each class."""
        prototypes, held = (uploads.tensor(key).cpu() for key in ("prototypes", "held"))
        clusters = server["clusters"].cpu().clone()
        for c in range(task.num_classes):
            if held[:, c].any():
                found = clustered(prototypes[held[:, c] > 0, c], self.most)
                clusters[c] = F.pad(found, (0, 0, 0, self.most - len(found)))
        model = {"body": uploads.mean("body"), "head": uploads.mean("head")}
        return tree.merge(server, {**model, "clusters": clusters.to(server["clusters"])})

    def payload_bytes(self, task: Task, payload: Tree) -> int:
        """Count the clusters that there are, each with the number of its class; the rest is padding."""
        if "clusters" not in payload:
            return tree.nbytes(payload)
        there = int(payload["clusters"].any(2).sum())
        return tree.nbytes({"body": payload["body"], "head": payload["head"]}) + 4 * there * (
            task.model.feature_size + 1
        )


def contrast(z: Tensor, clusters: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Give -log of the share of the own class's clusters in the softmax of cosines / temperature with all: (B, d),
    (C, Q, d), (B,) -> (B,).
    """
    directions = F.normalize(clusters, dim=2, eps=SHORT).flatten(0, 1)
    scores = (F.normalize(z, dim=1, eps=SHORT) @ directions.T / temperature).unflatten(1, clusters.shape[:2])
    of_class = torch.where(clusters.any(2), scores, OUT).logsumexp(2)
    return -of_class.log_softmax(1).gather(1, y[:, None])[:, 0]


def clustered(points: Tensor, most: int) -> Tensor:
    """Give the means of clusters by FINCH: (n, d) -> (q, d), q <= most.

    Who is another's nearest by cosine, or has the same nearest, is in one cluster with it; so are then the clusters, by
    their means, and so on, as long as more than one is left, or there are too many.

    Source: Sarfraz, Sharma, Stiefelhagen 2019, https://arxiv.org/abs/1902.11266.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = count = len(points)
    label, means, points = torch.arange(n), points.double(), points.double()
    while count > 1:
        nearest = (F.normalize(means, dim=1) @ F.normalize(means, dim=1).T).fill_diagonal_(-2.0).argmax(1)
        links = coo_array(([1] * count, (range(count), nearest.numpy())), shape=(count, count))
        fewer, merged = connected_components(links, connection="weak")
        if fewer == 1 and count < n and count <= most:
            break
        label, count = torch.from_numpy(merged).long()[label], fewer
        member = (label == torch.arange(count)[:, None]).double()
        means = member @ points / member.sum(1, keepdim=True)
    return means.float()
