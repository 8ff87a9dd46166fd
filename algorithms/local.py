"""Local: every client trains alone. The lower reference of personalised learning.

Not one paper's; the budget is matched: a client trains in exactly the rounds in which the sampler draws it.

Server keeps   nothing
Client keeps   body, head
Down           nothing
Up             nothing
Departs        nowhere
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, LocalData, Task, Tree, register


@register("local")
@dataclass(frozen=True, kw_only=True)
class Local(Algorithm):
    """Nothing is sent; the model is private state."""

    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(("channel", "aggregation"), "nothing is sent")

    def init_server(self, task: Task) -> Tree:
        """Keep nothing."""
        return {}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the client's own model."""
        return {}, task.sgd(task.loss, private, data.batches(task.epochs))

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model."""
        return private
