"""Local: every client trains alone. The lower reference of personalised learning.

Not one paper's. Two budgets: matched, where a client trains in exactly the rounds in which the sampler draws it, and
one that is never drawn has the initial model; and converged, where every client trains in every round, rounds x epochs
epochs in all. A client held out of training trains the whole initial model for five epochs, for alone there is no body
to keep.

Server keeps   nothing
Client keeps   body, head
Down           nothing
Up             nothing
Newcomers      never drawn, the initial model; held out, that after five epochs of all of it
Departs        nowhere
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from bench import Adaptation, Algorithm, Exchange, LocalData, Task, Tree, register


@register("local")
@dataclass(frozen=True, kw_only=True)
class Local(Algorithm):
    """Nothing is sent; the model is private state."""

    family: ClassVar[str] = "references"
    version: ClassVar[int] = 2
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(("channel", "aggregation"), "nothing is sent")

    budget: Literal["matched", "converged"] = "matched"
    """Who trains in a round: "matched" those drawn, "converged" everybody."""

    def init_server(self, task: Task) -> Tree:
        """Keep nothing."""
        return {}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Let those train whose turn it is by the budget."""
        return (Exchange(everyone=self.budget == "converged"),)

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the client's own model."""
        return {}, task.sgd(task.loss, private, data.batches(task.epochs))

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model."""
        return private

    def newcomer_adaptation(self, task: Task) -> Adaptation:
        """Train the whole model, as long as other methods tune a head."""
        return Adaptation(epochs=5, curve=())
