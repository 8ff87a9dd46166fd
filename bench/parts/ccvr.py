"""CCVR: the head is calibrated on virtual features, drawn from a Gaussian of each class that clients describe.

Luo, Chen, Hu, Zhang, Liang, Feng. No Fear of Heterogeneity: Classifier Calibration for Federated Learning with Non-IID
Data. NeurIPS 2021. https://arxiv.org/abs/2106.05001 (section 4, eq. 2-4)

Kind           correction
Learns         class counts of each client, and means and covariances of its features of each class
Departs        there is no official code: features of each class and epochs are those of FL-bench, each class is drawn
               equally often, and optimiser and first rate are the setting's; a personal model is calibrated by the
               Gaussians of its own client (paper: the generic model alone)
Elsewhere      LongTailLib's path for CNNs imports a module that is not in the tree, and what it prints is the maximum
               over rounds on a test set whose images are in part among those of training
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Batch, LearnedCorrection, LocalData, Task, Tree, Uploads, keys, losses, register, tree
from bench.ranges import Count, Epochs


@register("ccvr")
@dataclass(frozen=True, kw_only=True)
class CCVR(LearnedCorrection):
    """Covariances are symmetric, and sent as triangles: d (d + 3) / 2 + 1 numbers a class, once."""

    neutral: ClassVar[Mapping[str, object]] = {"epochs": 0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"features": [50, 200, 1000]}

    features: Count = 200
    """Virtual features of each class (FL-bench: 200)."""
    epochs: Epochs = 1
    """Of the head, on all of them (FL-bench: 1)."""

    @property
    def tier(self) -> str:
        """L: the server learns class counts, and more."""
        return "L"

    def learn(self, task: Task, model: Tree, data: LocalData) -> Tree:
        """Describe each class: its number of examples, and mean and unbiased covariance of their features."""

        def features(x: Tensor) -> Tensor:
            return task.model.features(model["body"], x).float()

        counts, mean = data.class_counts, data.class_means(features)
        scatter = mean.new_zeros(*mean.shape, mean.shape[1])
        for batch in data.plain_batches():
            apart = features(batch.x) - mean[batch.y]
            of_class = losses.one_hot(batch.y, task.num_classes) * batch.weight[:, None]
            scatter = scatter + torch.einsum("bc,bd,be->cde", of_class, apart, apart)
        covariance = _triangle(scatter / (counts - 1).clamp(min=1)[:, None, None])  # one example has none
        return {"count": counts.float(), "mean": mean, "covariance": covariance}

    def pool(self, task: Task, uploads: Uploads) -> Tree:
        """Describe each class of all clients as if their features lay in one place (eq. 3 and 4)."""
        counts = tree.in_float64(uploads.tensor("count"))
        mean: Tensor = uploads.mean("mean", counts)
        within: Tensor = uploads.sum("covariance", (counts - 1).clamp(min=0))
        apart = tree.in_float64(uploads.tensor("mean") - mean)
        between = _triangle(torch.einsum("kcd,kce->cde", counts[:, :, None] * apart, apart)).to(within)
        total = counts.sum(0).to(within)
        return {"count": total, "mean": mean, "covariance": (within + between) / (total - 1).clamp(min=1)[:, None]}

    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        """Train the head on virtual features of the classes that are there, which count alike."""
        learnt, key = model["learnt"], keys.fold(task.key, "ccvr")
        classes, d = learnt["mean"].shape
        mean, root, here = learnt["mean"], _root(_square(learnt["covariance"], d)), learnt["count"] > 0
        place = torch.arange(classes, device=mean.device)
        drawn = torch.argsort(~here, stable=True)[place % here.sum().clamp(min=1)]  # absent ones have others' places
        weight = 1 / (drawn[:, None] == drawn).sum(1)
        noise = keys.normal(key, classes, self.features, d)
        x = (mean[drawn][:, None] + noise @ root[drawn]).flatten(0, 1)
        y, weight = (each[place.repeat_interleave(self.features)] for each in (drawn, weight))

        def loss(params: Tree, batch: Batch) -> Tensor:
            return losses.cross_entropy(task.model.logits(params["head"], batch.x), batch)

        orders = (keys.permutation(keys.fold(key, epoch), len(y)) for epoch in range(self.epochs))
        batches = (Batch(x[rows], y[rows], weight[rows]) for order in orders for rows in order.split(task.batch_size))
        return task.sgd(loss, {"head": model["head"]}, batches, task.initial_lr or task.lr)


def _triangle(square: Tensor) -> Tensor:
    """Give the entries on and above the diagonal: (C, d, d) to (C, d (d + 1) / 2)."""
    d = square.shape[-1]
    rows, columns = torch.triu_indices(d, d, device=square.device)
    return square[:, rows, columns]


def _square(triangle: Tensor, d: int) -> Tensor:
    """Undo `_triangle`."""
    rows, columns = torch.triu_indices(d, d, device=triangle.device)
    place = torch.zeros(d, d, dtype=torch.int64, device=triangle.device)
    place = place.index_put((rows, columns), torch.arange(len(rows), device=triangle.device))
    return triangle[:, torch.maximum(place, place.T)]


def _root(covariance: Tensor) -> Tensor:
    """Give the one symmetric root of each covariance, (C, d, d); what is below float32's rounding counts as nothing."""
    values, vectors = torch.linalg.eigh(tree.in_float64(covariance))
    values = torch.where(values > 1e-5 * values[:, -1:], values, 0.0)
    root: Tensor = (vectors * values.sqrt()[:, None]) @ vectors.mT
    return root.to(covariance.device, torch.float32)
