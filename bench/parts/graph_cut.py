"""Graph cut of SCoRe: an example is driven from all examples of other classes, and drawn to those of its own.

Majee, Kothawade, Killamsetty, Iyer. SCoRe: Submodular Combinatorial Representation Learning. ICML 2024.
https://arxiv.org/abs/2310.00165 (graph cut)

Kind           loss
Learns         nothing beyond updates
Departs        a term beside cross-entropy (paper: alone, and the head afterwards), divided by the batch's examples as
               that is (paper: the sum, which grows with them and with classes), of the features that the head reads
               (paper: of a projection) and of one view unless `views` is 2, as in the paper; by the paper's formulas
               (code: information is the logarithm of a ratio, and no number where a sum of cosines is negative;
               correlation divides by the other examples of a class, of which there may be none)
Elsewhere      in authors' code `gc_rbf` passes a metric that the kernel function does not know, and raises. Graph cut
               in their GLMC variant raises for a variable that does not exist, so that it cannot have been run. The
               class's default temperature of 0.7 scales the loss by 10, their script's 0.07 by 1
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from bench import Batch, Loss, Task, losses, register
from bench.ranges import Strength


@register("graph_cut")
@dataclass(frozen=True, kw_only=True)
class GraphCut(Loss):
    """Sum over classes A of 1/|A| times, for information, cosines from A outwards less diversity · those within A, of
    each example with itself too; for correlation, diversity · cosines from A outwards.
    """

    version: ClassVar[int] = 2
    later: ClassVar[Mapping[str, object]] = {"views": 1}
    paper: ClassVar[Mapping[str, object]] = {"views": 2}
    neutral: ClassVar[Mapping[str, object]] = {"weight": 0.0, "views": 1}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {
        "weight": (0.05, 2.0),
        "form": ["information", "correlation"],
    }
    aliases: ClassVar[Mapping[str, str]] = {"score(kind='gc')": "fedavg+graph_cut"}

    weight: Strength = 0.5
    """Of the term's share of an example, beside cross-entropy (paper: of the batch's sum, which stands alone)."""
    views: Literal[1, 2] = 1
    """How often a batch has an example (paper: 2), augmented anew each time; alike where the setting augments nothing.
    Each is one of its class, and is paid for."""
    form: Literal["information", "correlation"] = "correlation"
    """Total information, of each class, or total correlation, of the classes less that of the whole batch."""
    diversity: Strength = 1.0
    """The function's lambda (paper: 1)."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Add the term."""
        similar, (alike, unlike) = losses.cosines(features), losses.pairs(batch)
        size = alike.sum(1).clamp(min=1.0)
        across, within = (similar * unlike).sum(1), (similar * alike).sum(1)
        inward = across - self.diversity * within
        term = (inward if self.form == "information" else self.diversity * across) / size
        return losses.cross_entropy(logits, batch) + self.weight * losses.mean(term, batch)
