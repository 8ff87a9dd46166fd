"""Elastic aggregation: the server steps less where a parameter decides what clients predict, and further elsewhere.

Chen, Hu, Tan, Wei, Wu. Elastic Aggregation for Federated Optimization. CVPR 2023.
https://openaccess.thecvf.com/content/CVPR2023/html/Chen_Elastic_Aggregation_for_Federated_Optimization_CVPR_2023_paper.html

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head, sensitivity (model)
Passes         E + 1
Departs        sensitivity is measured at the received model in evaluation mode, on all of a client's examples
               (FL-bench: of a layer, by labels, on 30 % that are then not trained on), and its moving average is
               corrected for its start, as it would be larger where there are more batches. What no client is sensitive
               to is averaged, and so are running statistics
Elsewhere      in FL-bench all clients share one sensitivity buffer, which is never reset, and gradients add up over
               batches, as they are never cleared
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, evaluating, losses, register, tree
from bench.ranges import Momentum, Strength


@register("elastic")
@dataclass(frozen=True, kw_only=True)
class Elastic(Algorithm):
    """FedAvg's clients, which say besides how sensitive their predictions are to each parameter."""

    family: ClassVar[str] = "generic"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"tau": [0.1, 0.3, 0.5, 0.7, 1.0]}
    controls: ClassVar[Mapping[str, str]] = {
        "fedavg": "what it is worth that parameters take steps of different lengths"
    }

    tau: Strength = 0.5
    """Least step, of a parameter to which all clients are alike sensitive; the largest is 1 more (FL-bench: 0.5)."""
    decay: Momentum = 0.95
    """Share of a client's sensitivity that the next batch leaves (FL-bench: mu = 0.95)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Measure, then train the model."""
        sensitivity = self.sensitivity(task, shared, data)
        return {**task.sgd(task.loss, shared, data.batches(task.epochs)), "sensitivity": sensitivity}, private

    def sensitivity(self, task: Task, model: Tree, data: LocalData) -> Tree:
        """Average over batches the absolute slope of the squared length of predictions, along each parameter."""

        def length(params: Tree, batch: Batch) -> Tensor:
            with evaluating():
                return losses.mean(task.logits(params, batch.x).float().square().sum(1), batch)

        found = tree.zeros_like(tree.parameters(model))
        for batch in data.batches(1, "sensitivity"):
            _, slope, _ = task.gradient(length, model, batch)
            mixed = tree.map(lambda old, new: torch.lerp(new.abs(), old, self.decay), found, slope)
            found = tree.where(batch.real, mixed, found)
        return tree.scale(found, 1 / (1 - self.decay ** data.steps(1).clamp(min=1)))

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Step by 1 + tau less the mean sensitivity over the largest, of each parameter by itself."""
        mean = uploads.mean()
        largest = reduce(partial(tree.map, torch.maximum), (sent["sensitivity"] for sent in uploads.trees))
        step = tree.map(self.step, mean["sensitivity"], largest)
        old, new = tree.parameters(server), tree.parameters({key: mean[key] for key in server})
        moved = tree.map(torch.lerp, old, new, step)
        return tree.merge({key: mean[key] for key in server}, moved)

    def step(self, mean: Tensor, largest: Tensor) -> Tensor:
        """Give the step of each entry of a tensor, from its mean and its largest sensitivity."""
        return torch.where(largest > 0, 1 + self.tau - mean / largest, 1.0)
