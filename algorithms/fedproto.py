"""FedProto: clients share the mean features of each class, and no weights.

Tan, Long, Liu, Zhou, Lu, Jiang, Zhang. FedProto: Federated Prototype Learning across Heterogeneous Clients. AAAI 2022.
https://arxiv.org/abs/2105.00243 (Algorithm 1)

Server keeps   prototypes, known
Client keeps   body, head
Down           prototypes (C, d), known (C)
Up             prototypes (C, d), known (C)
Passes         E + 1/3
Newcomers      never drawn, the initial model; held out, that after five epochs with the pull
Departs        all clients have one architecture, and start from one model; each image is pulled to its class (as the
               reference does; paper: the client's class means are); a class is averaged over the clients that hold
               it, equally (reference; paper: by their counts of it), and keeps its prototype in rounds in which none
               does (reference: all clients take part); features are those of the trained model, without
               augmentation (reference: as they were met in the last epoch of training); the nearest prototype is
               sought among all that are known (reference: among the classes that the client has, as our masked
               accuracy does for the headline, which goes through the head)
Elsewhere      authors' test never resets its counts between clients, nor between its two predictors, so its mean
               accuracy is one of running totals. PFLlib gathers prototypes over all epochs, tests by distance only, and
               its first test gives 0. FL-bench adds a ReLU to features and tests by the head only
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Adaptation, Algorithm, Batch, LocalData, Task, Tree, Uploads, register
from bench.losses import mean
from bench.ranges import Strength


@register("fedproto")
@dataclass(frozen=True, kw_only=True)
class FedProto(Algorithm):
    """`prototypes` is (C, d), of which the rows count where `known`, (C,), is 1."""

    family: ClassVar[str] = "pfl"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    predictors: ClassVar[Mapping[str, str]] = {"nearest": "nearest"}
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(("channel", "aggregation"), "no weights travel, prototypes do")
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"pull": (0.01, 10.0)}

    pull: Strength = 1.0
    """Strength of the pull to the prototypes (paper: lambda = 1; reference: 0.1 on CIFAR-10). The squared distance
    is a mean over features, so it means less the more there are."""

    def init_server(self, task: Task) -> Tree:
        """Know no prototype yet."""
        zeros = task.key.new_zeros(task.num_classes, task.model.feature_size, dtype=torch.float32)
        return {"prototypes": zeros, "known": zeros[:, 0]}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the client's own model with the pull, then send its mean features of each class."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            return self.pulled(task, {**shared, **params}, data, batch)

        model = task.sgd(loss, private, data.batches(task.epochs))
        prototypes = data.class_means(lambda x: task.model.features(model["body"], x))
        return {"prototypes": prototypes, "known": (data.class_counts > 0).float()}, model

    def pulled(self, task: Task, model: Tree, data: LocalData, batch: Batch) -> Tensor:
        """Cross-entropy, and the distance of features to the prototype of their class, if there is one."""
        z = task.model.features(model["body"], batch.x)
        apart = (z.float() - model["prototypes"][batch.y]).square().mean(1) * model["known"][batch.y]
        entropy = task.criterion(task.model.logits(model["head"], z), z, batch)
        return entropy + self.pull * mean(apart, batch)

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average each class over the clients that hold it."""
        holds = uploads.tensor("known")
        known = holds.amax(0)
        averaged = uploads.mean("prototypes", holds)
        return {
            "prototypes": torch.where(known[:, None] > 0, averaged, server["prototypes"]),
            "known": torch.maximum(known, server["known"]),
        }

    def payload_bytes(self, task: Task, payload: Tree) -> int:
        """Count the prototypes that there are, each with the number of its class."""
        return int(payload["known"].sum()) * 4 * (task.model.feature_size + 1)

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no weights are shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model, and beside it what `pulled` reads where a newcomer is tuned."""
        return {**private, **shared}

    def personal_variants(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> dict[str, Tree]:
        """Give the same, scored by distance."""
        return {"nearest": {"body": private["body"], **shared}}

    def newcomer_adaptation(self, task: Task) -> Adaptation:
        """Train the initial model as others train theirs, as long as other methods tune a head."""
        return Adaptation(epochs=5, curve=(), loss="pulled")

    def nearest(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score by closeness to the prototypes; a class without one is infinitely far."""
        z = task.model.features(model["body"], x).float()
        return -torch.cdist(z, model["prototypes"]).masked_fill(model["known"] == 0, torch.inf)
