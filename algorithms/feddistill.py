"""FedDistill: clients tell each other what logits a class gets from them, and no weights.

Jeong, Oh, Kim, Park, Bennis, Kim. Communication-Efficient On-Device Machine Learning: Federated Distillation and
Augmentation under Non-IID Private Data. 2018. https://arxiv.org/abs/1811.11479 (Algorithm 1)

Server keeps   logits, known
Client keeps   body, head
Down           logits (C, C), known (C)
Up             logits (C, C), known (C)
Passes         E + 1/3
Newcomers      never drawn, the initial model; held out, that after five epochs with distillation
Departs        all clients have one architecture, and start from one model; logits are averaged and then become
               probabilities, as in FedGen's version (paper: the other way round), equally over all clients that
               hold the class (paper: over the others); they are those of the trained model, without augmentation
               (paper: as they were met in training); a class keeps them in rounds in which nobody holds it.
               Examples that a generator adds (the paper's federated augmentation) are another method
Elsewhere      HtFLlib passes raw logits as class probabilities to cross-entropy, so targets may be negative. FedGen's
               code never resets its logit tracker, whose counts start at 1, so that it sends a biased running mean over
               all rounds
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Adaptation, Algorithm, Batch, LocalData, Task, Tree, Uploads, register
from bench.losses import mean
from bench.ranges import Strength


@register("feddistill")
@dataclass(frozen=True, kw_only=True)
class FedDistill(Algorithm):
    """`logits` is (C, C), a row for each class, of which those count where `known`, (C,), is 1."""

    family: ClassVar[str] = "pfl"
    tier: ClassVar[str] = "L"
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(("channel", "aggregation"), "no weights travel, logits do")
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"distil": (0.01, 10.0)}
    controls: ClassVar[Mapping[str, str]] = {
        "feddistill(distil=0)": "Local, in its matched budget: what the logits of others are worth"
    }

    distil: Strength = 1.0
    """Weight of the distillation (paper: gamma; FedGen's version: 1)."""

    def init_server(self, task: Task) -> Tree:
        """Know no class yet."""
        zeros = task.key.new_zeros(task.num_classes, task.num_classes, dtype=torch.float32)
        return {"logits": zeros, "known": zeros[:, 0]}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the client's own model with distillation, then send its mean logits of each class."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            return self.taught(task, {**shared, **params}, data, batch)

        model = task.sgd(loss, private, data.batches(task.epochs))
        logits = data.class_means(lambda x: task.logits(model, x))
        return {"logits": logits, "known": (data.class_counts > 0).float()}, model

    def taught(self, task: Task, model: Tree, data: LocalData, batch: Batch) -> Tensor:
        """Cross-entropy, and the divergence from what the class of an example gets from all, if that is known."""
        z = task.model.features(model["body"], batch.x)
        logits = task.model.logits(model["head"], z)
        wanted, said = (each.float().log_softmax(1) for each in (model["logits"][batch.y], logits))
        apart = (wanted.exp() * (wanted - said)).sum(1) * model["known"][batch.y]
        return task.criterion(logits, z, batch) + self.distil * mean(apart, batch)

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average each class over the clients that hold it."""
        holds = uploads.tensor("known")
        known = holds.amax(0)
        return {
            "logits": torch.where(known[:, None] > 0, uploads.mean("logits", holds), server["logits"]),
            "known": torch.maximum(known, server["known"]),
        }

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no weights are shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model, and beside it what `taught` reads where a newcomer is tuned."""
        return {**private, **shared}

    def newcomer_adaptation(self, task: Task) -> Adaptation:
        """Train the initial model as others train theirs, as long as other methods tune a head."""
        return Adaptation(epochs=5, curve=(), loss="taught")
