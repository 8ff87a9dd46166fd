"""Facility location of SCoRe: an example is driven from the nearest example of each other class of the batch.

Majee, Kothawade, Killamsetty, Iyer. SCoRe: Submodular Combinatorial Representation Learning. ICML 2024.
https://arxiv.org/abs/2310.00165 (facility location; its total information and total correlation differ by a constant)

Kind           loss
Learns         nothing beyond updates
Departs        a term beside cross-entropy (paper: alone, and the head afterwards), divided by the batch's examples as
               that is (paper: the sum, which grows with them and with classes), of the features that the head reads
               (paper: of a projection) and of one view unless `views` is 2, as in the paper; by the paper's formula
               (code: a logarithm of sums over all columns, not 0 for a batch of one class, and no division by a class's
               size)
Elsewhere      authors' class has a temperature of 0.7, which scales the loss by 10; their script passes 0.07, factor 1.
               Its default metric is a Euclidean one, scaled to each batch, while training uses cosines. In their GLMC
               variant pairs of one class keep weight 1 - w in the repulsion, and the sum is divided by the batch size
               twice
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Batch, Loss, Task, losses, register
from bench.ranges import Strength


@register("facility_location")
@dataclass(frozen=True, kw_only=True)
class FacilityLocation(Loss):
    """Sum over classes A of 1/|A| sum over examples i outside A of the largest cosine of i with an example of A."""

    version: ClassVar[int] = 2
    later: ClassVar[Mapping[str, object]] = {"views": 1}
    paper: ClassVar[Mapping[str, object]] = {"views": 2}
    neutral: ClassVar[Mapping[str, object]] = {"weight": 0.0, "views": 1}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"weight": (0.05, 2.0)}
    aliases: ClassVar[Mapping[str, str]] = {
        "score": "fedavg+facility_location",
        "score(kind='fl')": "fedavg+facility_location",
    }
    """SCoRe's losses stand beside any method's. An algorithm `score`, FedAvg with one of them, would be a second place
    for the same arithmetic, and the same bits under another identity: so it is a name for rows, the other two losses'
    too."""

    weight: Strength = 0.5
    """Of the term's share of an example, beside cross-entropy (paper: of the batch's sum, which stands alone)."""
    views: Literal[1, 2] = 1
    """How often a batch has an example (paper: 2), augmented anew each time; alike where the setting augments nothing.
    Each is one of its class, and is paid for."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Add the term; it is 0 where the batch has one class."""
        similar = losses.cosines(features)
        member = losses.one_hot(batch.y, task.num_classes) * batch.weight[:, None]
        size = member.sum(0)
        nearest = torch.where(member.T > 0, similar[:, None], -2.0).amax(2)  # (B, C), below any cosine if absent
        outside = member.sum(1, keepdim=True) - member
        term = (outside * torch.where(size > 0, nearest, 0.0) / size.clamp(min=1.0)).sum(1)
        return losses.cross_entropy(logits, batch) + self.weight * losses.mean(term, batch)
