"""FedNCM: the head is made of the mean features of each class, in one exchange with all clients, and maybe tuned.

Legate, Bernier, Caccia, Oyallon, Belilovsky. Guiding The Last Layer in Federated Learning with Pre-Trained Models.
NeurIPS 2023. https://arxiv.org/abs/2306.03937 (Algorithm 1)

Server keeps   body (fixed), head
Client keeps   nothing
Down           body, head
Up             means (C, d), counts (C)
Passes         0; first 1/3
Departs        the body is the setting's: the paper's are pre-trained, which here is a dataset of `features` or a body
               read from a file; on one as it was drawn the head says what random features are worth. A class that
               nobody holds has a row of zeros
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from bench import Algorithm, Exchange, LocalData, Task, Tree, Uploads, register


@register("fedncm")
@dataclass(frozen=True, kw_only=True)
class FedNCM(Algorithm):
    """A row of the head has length one and the bias is zero: the likeliest class has the nearest mean, by cosine."""

    family: ClassVar[str] = "generic"
    tier: ClassVar[str] = "L"
    controls: ClassVar[Mapping[str, str]] = {"fedavg": "what the head is worth as a start, where it is tuned"}

    finetune: bool = False
    """Whether body and head are then trained as FedAvg does, in all rounds (paper: FedNCM+FT)."""

    @property
    def refuses(self) -> Mapping[str, str]:  # type: ignore[override]  # a field decides what is a constant elsewhere
        """Whatever acts on training, where there is none."""
        without = dict.fromkeys(("loss", "channel", "aggregation"), "nothing is trained, means of classes travel")
        return {} if self.finetune else without

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Make the head before the first round; train only if it is to be tuned."""
        first = (Exchange("describe", "settle", everyone=True),) if task.round == 0 else ()
        return (*first, Exchange()) if self.finetune else first

    def describe(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Send the mean features of each class, and how many examples they are of."""
        means = data.class_means(lambda x: task.model.features(shared["body"], x))
        return {"means": means, "counts": data.class_counts.float()}, private

    def settle(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Take the direction of each class's mean over all examples as its row."""
        counts = uploads.tensor("counts")
        means = torch.where(counts.sum(0)[:, None] > 0, uploads.mean("means", counts), 0.0)
        weight = F.normalize(means, dim=1)
        return {**server, "head": {"weight": weight, "bias": torch.zeros_like(server["head"]["bias"])}}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples, as FedAvg does."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private
