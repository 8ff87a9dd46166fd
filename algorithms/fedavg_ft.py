"""FedAvg-FT: FedAvg, and each client fine-tunes the result before it is tested.

Not one paper's; the strong baseline of FedRep, FedBABU and others. See for example Cheng, Chadha, Duchi.
Fine-tuning is Fine in Federated Learning. 2021. https://arxiv.org/abs/2108.07313

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        the fine-tuning rate is the round's learning rate; published recipes vary (1e-3, or head only)
"""

from dataclasses import dataclass

from bench import Adaptation, Algorithm, LocalData, Task, Tree, register


@register("fedavg_ft")
@dataclass(frozen=True, kw_only=True)
class FedAvgFT(Algorithm):
    """FedAvg's training; the personal model is a fine-tuned copy, thrown away after the test."""

    finetune_epochs: int = 5
    """Epochs of the full model on the client's data; accuracy after 0, 1, 5 and 10, as far as below, is
    reported too.
    """

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def adaptation(self, task: Task) -> Adaptation | None:
        """Fine-tune body and head."""
        return Adaptation(epochs=self.finetune_epochs) if self.finetune_epochs else None
