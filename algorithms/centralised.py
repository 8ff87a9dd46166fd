"""Centralised: one model trained on the union of all clients' training data. The upper reference of generic
learning.

Not one paper's; the budget is matched: in each round as many examples are visited as the round's cohort
holds.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        from federated learning: the data are pooled, nothing is sent, and bytes are not counted
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, LocalData, Task, Tree, register


@register("centralised")
@dataclass(frozen=True, kw_only=True)
class Centralised(Algorithm):
    """FedAvg with a single client that holds everything."""

    family: ClassVar[str] = "references"
    tier: ClassVar[str] = "A"
    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the pooled examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private
