"""FedPer: a shared body, and a head that stays at the client; both train together.

Arivazhagan, Aggarwal, Singh, Choudhary. Federated Learning with Personalization Layers. 2019.
https://arxiv.org/abs/1912.00818 (Algorithm 1)

Server keeps   body
Client keeps   head
Down           body
Up             body
Newcomers      never drawn, the common initial head on the server's body (FedRep's code, by aliasing: a running average
               of the heads); held out, that with five epochs of the head
Departs        the personal part is the last linear layer (paper: that and up to four residual blocks)
Elsewhere      in FedRep's code stored models are references to the global one, so a client not yet drawn has the
               running average of others' heads as its own, not the initial head
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, LocalData, Task, Tree, register


@register("fedper")
@dataclass(frozen=True, kw_only=True)
class FedPer(Algorithm):
    """Only the body travels."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})

    def init_server(self, task: Task) -> Tree:
        """Keep the body only."""
        return {"body": task.init()["body"]}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial head that all algorithms share."""
        return {"head": task.init()["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train body and head jointly."""
        model = task.sgd(task.loss, {"body": shared["body"], "head": private["head"]}, data.batches(task.epochs))
        return {"body": model["body"]}, {"head": model["head"]}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no head is shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest body under the client's head."""
        return {"body": shared["body"], "head": private["head"]}
