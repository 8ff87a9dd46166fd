"""FedRep: one representation for all, one head for each; the head first, then the body.

Collins, Hassani, Mokhtari, Shakkottai. Exploiting Shared Representations for Personalized Federated Learning.
ICML 2021. https://arxiv.org/abs/2102.07078 (Algorithm 1)

Server keeps   body
Client keeps   head
Down           body
Up             body
Departs        bodies are averaged by client size (paper: uniformly); each stage has an optimiser of its own,
               so that nothing moves the frozen part
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, LocalData, Task, Tree, register


@register("fedrep")
@dataclass(frozen=True, kw_only=True)
class FedRep(Algorithm):
    """Only the body travels."""

    needs: ClassVar[frozenset[str]] = frozenset({"body"})

    head_epochs: int = 10
    """Epochs on the personal head, before the body moves (paper: tau = 10)."""
    body_epochs: int = 1
    """Epochs on the shared body, with the new head fixed."""

    def init_server(self, task: Task) -> Tree:
        """Keep the body only."""
        return {"body": task.init()["body"]}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial head that all algorithms share."""
        return {"head": task.init()["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the head under the received body, then the body under the new head."""
        body, head = shared["body"], private["head"]
        head = task.sgd(
            lambda h, batch: task.loss({"body": body, "head": h}, batch), head, data.batches(self.head_epochs)
        )
        body = task.sgd(
            lambda b, batch: task.loss({"body": b, "head": head}, batch), body, data.batches(self.body_epochs)
        )
        return {"body": body}, {"head": head}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no head is shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest body under the client's head."""
        return {"body": shared["body"], "head": private["head"]}
