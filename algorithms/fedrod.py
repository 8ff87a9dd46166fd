"""FedRoD: a generic head taught by a balanced loss, and a personal head that adds to it.

Chen, Chao. On Bridging Generic and Personalized Federated Learning for Image Classification. ICLR 2022.
https://arxiv.org/abs/2107.00778 (linear variant)

Server keeps   body, head
Client keeps   head
Down           body, head
Up             body, head
Newcomers      never drawn, a personal head of zero: it predicts as the generic model; held out, that with five epochs
               of the head
Departs        the personal head starts at zero
Elsewhere      FL-bench predicts by the personal head alone, not by the sum, and its one summed loss reaches the body
               through that head too. PFLlib starts the personal head as a copy of the generic one and reports the
               personal view only. FedNH's copy counts absent classes as 1e-12
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register, tree
from bench.losses import balanced_softmax, cross_entropy


@register("fedrod")
@dataclass(frozen=True, kw_only=True)
class FedRoD(Algorithm):
    """The two losses share no trained parameter, so one SGD on their sum, clipped apart, is two optimisers."""

    family: ClassVar[str] = "pfl"
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    own_loss: ClassVar[bool] = True
    controls: ClassVar[Mapping[str, str]] = {
        "fedrod+cross_entropy": "whether the balanced loss matters: the same two heads by plain cross-entropy",
        "fedavg+balanced_softmax": "what the balanced loss does without a personal head",
    }

    def init_client(self, task: Task) -> Tree:
        """Start with a personal head of zero."""
        return {"head": tree.zeros_like(task.init()["head"])}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train body and generic head by balanced softmax, the personal head by the sum of both heads'
        logits.
        """

        def balanced(logits: Tensor, batch: Batch) -> Tensor:
            return balanced_softmax(logits, batch, data.class_counts)

        def loss(w: dict[str, Tree], batch: Batch) -> Tensor:
            z = task.model.features(w["body"], batch.x)
            generic = task.model.logits(w["generic"], z)
            both = generic.detach() + task.model.logits(w["personal"], z.detach())
            return task.criterion(generic, z, batch, balanced) + cross_entropy(both, batch)

        w = {"body": shared["body"], "generic": shared["head"], "personal": private["head"]}
        w = task.sgd(loss, w, data.batches(task.epochs), clip_apart=("personal",))
        return {"body": w["body"], "head": w["generic"]}, {"head": w["personal"]}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the sum of both heads, itself a linear head."""
        return {
            "body": shared["body"],
            "head": tree.add(shared["head"], private["head"]),
        }
