"""FedAvg-FT: FedAvg, and each client fine-tunes the result before it is tested.

Not one paper's; the strong baseline of FedRep, FedBABU and others. See for example Cheng, Chadha, Duchi.
Fine-tuning is Fine in Federated Learning. 2021. https://arxiv.org/abs/2108.07313

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Passes         E; before the test finetune_epochs
Departs        body and head are fine-tuned, and at the setting's learning rate by default; published recipes vary (a
               rate of 1e-3, or the head only)
Elsewhere      PFLlib has no fine-tuned view of clients that train. FedBABU's code fine-tunes the checkpoint that was
               best on test data. FedRep's code tunes the head only, for 10 epochs in one extra round with all clients;
               pFedFDA's the whole model for 5
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bench import Adaptation, Algorithm, LocalData, Task, Tree, register
from bench.ranges import Epochs, Positive


@register("fedavg_ft")
@dataclass(frozen=True, kw_only=True)
class FedAvgFT(Algorithm):
    """FedAvg's training; the personal model is a fine-tuned copy, thrown away after the test."""

    family: ClassVar[str] = "pfl"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "finetune_epochs": (1, 10),
        "finetune_rate": (0.003, 1.0),
    }

    finetune_epochs: Epochs = 5
    """Epochs of the full model on the client's data; accuracy after 0, 1, 5 and 10, as far as below, is
    reported too.
    """
    finetune_rate: Positive = 1.0
    """Learning rate there, as a multiple of the setting's, which no schedule lowers."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def adaptation(self, task: Task) -> Adaptation | None:
        """Fine-tune body and head."""
        if not self.finetune_epochs:
            return None
        return Adaptation(epochs=self.finetune_epochs, lr_factor=self.finetune_rate)
