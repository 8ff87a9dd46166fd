"""Log-determinant of SCoRe: the volume that the examples of a class span is driven down, that of all is driven up.

Majee, Kothawade, Killamsetty, Iyer. SCoRe: Submodular Combinatorial Representation Learning. ICML 2024.
https://arxiv.org/abs/2310.00165 (log-determinant)

Kind           loss
Learns         nothing beyond updates
Departs        a term beside cross-entropy (paper: alone, and the head afterwards), divided by the batch's examples as
               that is (paper: the sum, which grows with them and with classes), of the features that the head reads
               (paper: of a projection) and of one view unless `views` is 2, as in the paper; by the paper's formulas
               (code: no division by a class's size, and information with the opposite sign); a ridge below 0.5 is
               refused: there are more examples than features, and float32 has few digits
Elsewhere      authors' code declares lambda = 0.1 and uses 0.5. The class's default metric is a Euclidean one, scaled
               to the minimum and maximum of each batch, while their training uses cosines
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from bench import Batch, Loss, Task, losses, register
from bench.ranges import Strength


@register("log_determinant")
@dataclass(frozen=True, kw_only=True)
class LogDeterminant(Loss):
    """Information: sum over classes A of 1/|A| log det(cosines within A + ridge I); correlation: this less the same of
    the whole batch, undivided.
    """

    version: ClassVar[int] = 2
    later: ClassVar[Mapping[str, object]] = {"views": 1}
    paper: ClassVar[Mapping[str, object]] = {"views": 2}
    neutral: ClassVar[Mapping[str, object]] = {"weight": 0.0, "views": 1}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {
        "weight": (0.05, 2.0),
        "form": ["information", "correlation"],
    }
    aliases: ClassVar[Mapping[str, str]] = {"score(kind='logdet')": "fedavg+log_determinant"}

    weight: Strength = 0.5
    """Of the term's share of an example, beside cross-entropy (paper: of the batch's sum, which stands alone)."""
    views: Literal[1, 2] = 1
    """How often a batch has an example (paper: 2), augmented anew each time; alike where the setting augments nothing.
    Each is one of its class, and is paid for."""
    form: Literal["information", "correlation"] = "correlation"
    """Total information, of each class, or total correlation, of the classes less that of the whole batch."""
    ridge: Annotated[float, Interval(ge=0.5, le=1_000_000)] = 1.0
    """The function's lambda (paper: 1; code: 0.5)."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Add the term."""
        similar, (alike, unlike) = losses.cosines(features), losses.pairs(batch)
        term = self._shares(similar, alike) / alike.sum(1).clamp(min=1.0)
        if self.form == "correlation":
            term = term - self._shares(similar, alike + unlike)
        return losses.cross_entropy(logits, batch) + self.weight * losses.mean(term, batch)

    def _shares(self, similar: Tensor, pairs: Tensor) -> Tensor:
        """Give what each example adds to the log-determinant of those that it makes pairs with: (B,), 0 for padding.

        One factorisation does for all classes: between examples that make no pair the factor stays 0.
        """
        real = pairs.diagonal()
        matrix = similar * pairs + torch.diag_embed(self.ridge * real + (1.0 - real))
        factor: Tensor = torch.linalg.cholesky_ex(matrix).L  # unlike `cholesky` it does not ask whether there is one
        return 2.0 * factor.diagonal().log()
