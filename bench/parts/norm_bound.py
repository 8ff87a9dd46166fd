"""Norm bound: an update that is longer than a bound is shortened to it, and then all are averaged.

Sun, Kairouz, Suresh, McMahan. Can You Really Backdoor Federated Learning? 2019. https://arxiv.org/abs/1911.07963
(section 4.2)

Kind           aggregation
Learns         nothing beyond updates
Departs        means are weighted as the run says (paper: of equal weights); no noise, which `dp` adds; running
               statistics are averaged as ever
Elsewhere      Plato's rule never divides by the number of updates, so that it gives their sum
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Aggregation, Task, Tree, Uploads, register, tree
from bench.ranges import Positive


@register("norm_bound")
@dataclass(frozen=True, kw_only=True)
class NormBound(Aggregation):
    """A client moves the model by no more than the bound times its weight, whatever it sends."""

    neutral: ClassVar[Mapping[str, object]] = {"bound": None}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]] | None] = {"bound": (0.1, 10.0)}

    bound: Positive | None = 1.0
    """Largest norm of an update, body and head together (paper: as long as honest ones are); None: there is none."""

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        """Shorten and average."""
        if self.bound is not None:
            updates = [tree.shortened(update, self.bound) for update in updates]
        mean: Tree = Uploads(updates, weights).mean()
        return mean
