"""FedProc: features are drawn to the prototype of their class among all, at first most, and in the end not at all.

Mu, Shen, Cheng, Geng, Fu, Zhang, Zhang. FedProc: Prototypical Contrastive Federated Learning on Non-IID Data. Future
Generation Computer Systems 2023. https://arxiv.org/abs/2109.12273

Server keeps   body, head, prototypes
Client keeps   nothing
Down           body, head, prototypes (C, d)
Up             body, head, prototypes (C, d), counts (C)
Passes         E + 1/3
Departs        features are the body's own, those that the head reads: the projection (two layers, 256) that lies
               between the two in every method of the paper's comparison would be the setting's model; features of
               which a class is averaged are not augmented, and the trained body is in evaluation mode (reference:
               augmented, in training mode). Where a client's classes have no prototype yet cross-entropy has the
               contrast's share (reference: in the first round only; later such a class has its prototype at zero)
Elsewhere      MarsFL gives cross-entropy a weight of 0 in the first round, in which there are no prototypes yet, so
               nothing is learnt in it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, register, tree
from bench.losses import mean
from bench.ranges import Share

OUT = -1e4
"""Score of a class without prototype: its exponential is 0 in float32."""


@register("fedproc")
@dataclass(frozen=True, kw_only=True)
class FedProc(Algorithm):
    """`prototypes` is (C, d); a row of zeros stands for none."""

    family: ClassVar[str] = "generic"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"contrast": [0.25, 0.5, 0.75, 1.0]}
    controls: ClassVar[Mapping[str, str]] = {"fedproc(contrast=0)": "FedAvg on the same batches"}

    contrast: Share = 1.0
    """Share of the contrast in the first round's loss, which falls by equal steps to 0 after the last; the rest is
    cross-entropy's (paper: 1 - t / T)."""

    def init_server(self, task: Task) -> Tree:
        """Know no prototype yet."""
        model = task.init()
        return {**model, "prototypes": torch.zeros_like(model["head"]["weight"])}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise contrast and cross-entropy, then send the mean features of each class."""
        prototypes, counts = shared["prototypes"], data.class_counts.float()
        known = prototypes.any(1)
        weight = self.contrast * (1 - task.round / task.rounds)
        met: Tensor = weight * (counts * known).sum() / counts.sum().clamp(min=1)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            entropy = task.criterion(task.model.logits(params["head"], z), z, batch)
            return weight * mean(contrast(z.float(), prototypes, batch.y), batch) + (1 - met) * entropy

        start = {"body": shared["body"], "head": shared["head"]}
        model = task.sgd(loss, start, data.batches(task.epochs))
        means = data.class_means(lambda x: task.model.features(model["body"], x))
        return {**model, "prototypes": means, "counts": counts}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average models, and prototypes over all examples of a class."""
        counts = uploads.tensor("counts")
        known, prototypes = counts.sum(0)[:, None] > 0, uploads.mean("prototypes", counts)
        prototypes = torch.where(known, prototypes, server["prototypes"])
        model = {"body": uploads.mean("body"), "head": uploads.mean("head")}
        return tree.merge(server, {**model, "prototypes": prototypes})


def contrast(z: Tensor, prototypes: Tensor, y: Tensor) -> Tensor:
    """Give -log of the own class's share in the softmax of inner products with prototypes of length one: (B, d),
    (C, d), (B,) -> (B,); 0 where the class has none.
    """
    known = prototypes.any(1)
    unit = prototypes / prototypes.norm(dim=1, keepdim=True).clamp(min=1e-12)
    scores = torch.where(known, z @ unit.T, OUT)
    missed: Tensor = -scores.log_softmax(1).gather(1, y[:, None])[:, 0]
    return missed * known[y]
