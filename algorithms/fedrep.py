"""FedRep: one representation for all, one head for each; the head first, then the body.

Collins, Hassani, Mokhtari, Shakkottai. Exploiting Shared Representations for Personalized Federated Learning.
ICML 2021. https://arxiv.org/abs/2102.07078 (Algorithm 1)

Server keeps   body
Client keeps   head
Down           body
Up             body
Passes         E + head_epochs
Newcomers      never drawn, the common initial head on the server's body (reference, by aliasing: the running average of
               the heads); held out, that with five epochs of the head
Departs        bodies are averaged with the setting's weights (paper: uniformly, client_weights = uniform); each stage
               has an optimiser of its own, so that nothing moves the frozen part. The reference's last round of all
               heads is the setting's final_visit, its weight decay the setting's decayed = weights
Elsewhere      authors' stored models are references to the global one, so a client not yet drawn has the average of
               others' heads. FedBABU's copy freezes by a rate of 0 in one optimiser, whose momentum (0.9) makes the
               first body step after five frozen ones about 4.7 times too long. Authors' Ditto does not run
Reproduced     by lgcollins/FedRep@d82e629 (as published, all clients): models 4e-07 apart
               (results/studies/agreement.md)
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, LocalData, Task, Tree, register
from bench.ranges import Epochs


@register("fedrep")
@dataclass(frozen=True, kw_only=True)
class FedRep(Algorithm):
    """Only the body travels."""

    family: ClassVar[str] = "pfl"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"body"})

    head_epochs: Epochs = 10
    """Epochs on the personal head, before the body moves (paper: tau = 10)."""
    body_epochs: Epochs | None = None
    """Epochs on the shared body under the new head; None: the setting's, 0: it stays (authors: 1 for CIFAR-10 with two
    classes a client; 5 with five, for CIFAR-100 and FEMNIST).
    """

    def init_server(self, task: Task) -> Tree:
        """Keep the body only."""
        return {"body": task.init()["body"]}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial head that all algorithms share."""
        return {"head": task.init()["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the head under the received body, then the body under the new head."""
        body, head = shared["body"], private["head"]
        epochs = task.epochs if self.body_epochs is None else self.body_epochs
        head = task.sgd(lambda h, b: task.loss({"body": body, "head": h}, b), head, data.batches(self.head_epochs))
        body = task.sgd(lambda w, b: task.loss({"body": w, "head": head}, b), body, data.batches(epochs))
        return {"body": body}, {"head": head}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no head is shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest body under the client's head."""
        return {"body": shared["body"], "head": private["head"]}
