"""FedETF: one fixed equiangular head for all clients, read by a projection; each then tunes a head of its own.

Li, Shang, He, Lin, Wu. No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with Synthetic and
Fixed Classifier. ICCV 2023. https://arxiv.org/abs/2303.10058

Server keeps   body, projection, scale, etf (fixed)
Client keeps   nothing
Down           body, projection (C × (d + 1)), scale (1), etf (C, C)
Up             body, projection (C × (d + 1)), scale (1)
Passes         E; before the test E + 2 × alternations × finetune_epochs
Newcomers      the received model, tuned on their own examples as everybody's is
Departs        a class that a client has not leaves its softmax, as in the paper (reference: counts as one example);
               personal models are tuned in one alternation by default (reference: 20, 120 epochs), all with the
               setting's momentum and weight decay (reference: none on the head), and on all examples (reference: on 70
               %); of a projection to less than the number of classes directions are random
Elsewhere      rivals in the authors' code are not those of their papers: Ditto has lambda = 0.001 and a personal model
               from a draw of its own, FedDyn an unsquared norm, FedProto zeros as prototypes of unseen classes, FedNH
               client means without counts, CCVR standard deviations as variances
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bench import Adaptation, Algorithm, Batch, LocalData, Task, Tree, keys, register
from bench.losses import balanced_softmax
from bench.models.layers import apply_linear, linear, simplex
from bench.ranges import Count, Epochs, Positive


@register("fedetf")
@dataclass(frozen=True, kw_only=True)
class FedETF(Algorithm):
    """`etf` is (C, p), rows of length one; `scale`, (), multiplies their cosines with projected features."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    constant: ClassVar[frozenset[str]] = frozenset({"etf"})
    own_loss: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {"correction": "its head is fixed, and scores projections of features"}
    paper: ClassVar[Mapping[str, object]] = {"alternations": 20}
    controls: ClassVar[Mapping[str, str]] = {
        "fedetf+cross_entropy": "whether the balanced loss matters: the same frame by plain cross-entropy",
        "fedetf(alternations=0)": "whether tuning the head matters: one local update, and the frame as it is",
    }

    projection: Count | None = None
    """Length of projected features; None: the number of classes (reference: that for ResNets, 64 for its CNN)."""
    scale: Positive = 10.0
    """What multiplies cosines at first, before it is trained (reference: 10 for its CNN, 1 for ResNets)."""
    alternations: Epochs = 1
    """How often a client tunes its own copy of the head, and then the projection, before it is tested (reference: 20).
    """
    finetune_epochs: Epochs = 3
    """Epochs of each of the two (reference: 3)."""
    head_lr: Positive = 0.1
    """Learning rate of a client's head there (reference: 0.1)."""
    projection_lr: Positive = 0.05
    """That of the projection (reference: 0.05)."""

    def init_server(self, task: Task) -> Tree:
        """Draw projection and frame."""
        key, size = task.server_key("frame"), self.projection or task.num_classes
        etf = simplex(keys.fold(key, "etf"), task.num_classes, size).float().to(key.device)
        projection = linear(keys.fold(key, "projection"), size, task.model.feature_size)
        return {"body": task.init()["body"], "projection": projection, "scale": etf.new_tensor(self.scale), "etf": etf}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train all but the frame."""
        etf = shared["etf"]

        def loss(w: Tree, batch: Batch) -> Tensor:
            return self.balanced(task, {**w, "etf": etf}, data, batch)

        start = {key: shared[key] for key in ("body", "projection", "scale")}
        return task.sgd(loss, start, data.batches(task.epochs)), private

    def balanced(self, task: Task, model: Tree, data: LocalData, batch: Batch) -> Tensor:
        """Cross-entropy of logits that the logarithm of the client's class counts shifts."""

        def usual(logits: Tensor, batch: Batch) -> Tensor:
            return balanced_softmax(logits, batch, data.class_counts)

        u = projected(task, model, batch.x)
        return task.criterion(model["scale"] * (u @ model["etf"].T), u, batch, usual)

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the whole model."""
        return server

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the whole model, to be tuned."""
        return shared

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give what was trained, projection and scale included."""
        upload, private = self.local_update(task, shared, private, data)
        return {**shared, **upload}, private

    def adaptation(self, task: Task) -> tuple[Adaptation, ...]:
        """Do one more local update; then tune the head, a copy of the frame, and the projection in turn."""
        update = Adaptation(epochs=task.epochs, parts=("body", "projection", "scale"), loss="balanced", curve=())
        head = Adaptation(epochs=self.finetune_epochs, parts=("etf",), lr=self.head_lr)
        projection = Adaptation(epochs=self.finetune_epochs, parts=("projection",), lr=self.projection_lr)
        return (update, *(head, projection) * self.alternations)

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score projected features by the frame, or what a client made of it."""
        scores: Tensor = model["scale"] * (projected(task, model, x) @ model["etf"].T)
        return scores


def projected(task: Task, model: Tree, x: Tensor) -> Tensor:
    """Give directions of projected features: (B, p), rows of length one."""
    return F.normalize(apply_linear(model["projection"], task.model.features(model["body"], x)).float(), dim=1)
