"""FedBABU: the body is trained under a fixed random head; each client fine-tunes the whole before it is
tested.

Oh, Kim, Yun. FedBABU: Towards Enhanced Representation for Federated Image Classification. ICLR 2022.
https://arxiv.org/abs/2106.06042 (Algorithm 1)

Server keeps   body, head (fixed)
Client keeps   nothing
Down           body, head
Up             body
Passes         E; before the test finetune_epochs
Departs        bodies are averaged with the setting's weights (reference: uniformly, client_weights =
               uniform); the fixed head, a function of the seed, is sent once, with the first body; the reference's
               learning rate of a tenth from half of the rounds on, and of a hundredth from three quarters, is the
               setting's lr_steps = {0.5: 0.1, 0.75: 0.1}; fine-tuned is the last round's body (reference: the one that
               is best on test data), by default at the setting's learning rate (reference: 1e-3, a hundredth of it)
Elsewhere      PFLlib fine-tunes without sending the last average, so clients start from their own last bodies, and adds
               the result after the best accuracy is printed. FL-bench zeroes only the head's gradient, so weight decay
               or momentum would still move it. Baselines in the authors' code deviate (Ditto, Per-FedAvg)
Reproduced     by jhoon-oh/FedBABU@e34c15b (as published): models 6e-07 apart (results/studies/agreement.md)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bench import Adaptation, Algorithm, LocalData, Task, Tree, register
from bench.ranges import Epochs, Positive


@register("fedbabu")
@dataclass(frozen=True, kw_only=True)
class FedBABU(Algorithm):
    """The head is in no optimiser: nothing can move it, momentum and weight decay included."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    constant: ClassVar[frozenset[str]] = frozenset({"head"})
    paper: ClassVar[Mapping[str, object]] = {"finetune_rate": 0.01}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "finetune_epochs": (1, 10),
        "finetune_rate": (0.003, 1.0),
    }

    finetune_epochs: Epochs = 5
    """Epochs of the full model on the client's data before the test (paper: 5)."""
    finetune_rate: Positive = 1.0
    """Learning rate there, as a multiple of the setting's, which no schedule lowers (reference: 0.01, which is
    1e-3 against 0.1).
    """

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
        if not self.finetune_epochs:
            return None
        return Adaptation(epochs=self.finetune_epochs, lr_factor=self.finetune_rate)
