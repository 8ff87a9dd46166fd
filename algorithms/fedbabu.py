"""FedBABU: the body is trained under a fixed random head; each client fine-tunes the whole before it is
tested.

Oh, Kim, Yun. FedBABU: Towards Enhanced Representation for Federated Image Classification. ICLR 2022.
https://arxiv.org/abs/2106.06042 (Algorithm 1)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body
Departs        bodies are averaged by client size (reference: uniformly); the fixed head, a function of the
               seed, is sent along with the body; fine-tuning uses the round's learning rate (reference: 1e-3)
               and the last round's body
"""

from dataclasses import dataclass
from typing import ClassVar

from bench import Adaptation, Algorithm, LocalData, Task, Tree, register


@register("fedbabu")
@dataclass(frozen=True, kw_only=True)
class FedBABU(Algorithm):
    """The head is in no optimiser: nothing can move it, momentum and weight decay included."""

    needs: ClassVar[frozenset[str]] = frozenset({"body"})

    finetune_epochs: int = 5
    """Epochs of the full model on the client's data before the test (paper: 5)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the body under the fixed head."""
        head = shared["head"]
        body = task.sgd(
            lambda b, batch: task.loss({"body": b, "head": head}, batch),
            shared["body"],
            data.batches(task.epochs),
        )
        return {"body": body}, private

    def adaptation(self, task: Task) -> Adaptation | None:
        """Fine-tune body and head."""
        return Adaptation(epochs=self.finetune_epochs) if self.finetune_epochs else None
