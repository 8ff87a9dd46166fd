"""BalanceFL: a client trains as if its data were balanced, and inherits what they lack from the received model.

Shuai, Shen, Jiang, Zhao, Yan, Xing. BalanceFL: Addressing Class Imbalance in Long-Tail Federated Learning. IPSN 2022.
https://conferences.computer.org/cpsiot/pdfs/IPSN2022-6R1M30NXCSXmbVKUqzz1Of/962400a259/962400a259.pdf

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Passes         E + 2/3
Departs        classes are missing at a client (reference: in a batch, see `missing`); the received model is in
               evaluation mode when it teaches and when features are measured (reference: training mode, where one
               client after the other moves its statistics); each example has noise of its own (reference: 500 draws a
               round, in turn); model and optimiser are the setting's (reference: a head without bias, logits times
               two, an Adam that goes on from round to round). As in the reference the reward for entropy is a sum
               over the batch, so that it grows with the batch's size, which there is 64
Elsewhere      authors' code reports the best round on the test images, and trains without augmentation. A configuration
               key sets momentum 0.9, but the optimiser is Adam. Its ResNet-8 is another network than CReFF's, with 512
               features
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, evaluating, keys, losses, register, tree
from bench.ranges import Positive, Strength


@register("balancefl")
@dataclass(frozen=True, kw_only=True)
class BalanceFL(Algorithm):
    """Present classes are taught by labels, missing ones by the received model; the two softmaxes share no class."""

    family: ClassVar[str] = "fedlt"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    own_loss: ClassVar[bool] = True
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "inherit": (0.1, 10.0),
        "smooth": (0.0002, 0.02),
        "noise": [0.0, 0.5, 1.0],
    }

    balanced: bool = True
    """Whether each class is drawn equally often (paper), or each example."""
    noise: Strength = 1.0
    """Scale of the noise on features of scarce classes (reference: 1)."""
    inherit: Strength = 1.0
    """Weight of the received model's say on missing classes (reference: lambda = 1)."""
    temperature: Positive = 2.0
    """Divides both models' logits of missing classes (reference: 2)."""
    smooth: Strength = 0.002
    """Reward for the entropy of each example's prediction among present classes (reference: 0.002)."""
    missing: Literal["client", "batch"] = "client"
    """Whose classes are missing ones: those of the client (paper), or of each batch (reference)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Take labels for present classes, the received model for missing ones; reward entropy among the present."""
        counts = data.class_counts.float()
        scarcity = 1 - counts / counts.max().clamp(min=1)
        root = symmetric_root(self._covariance(task, shared["body"], data))

        def noise(batch: Batch) -> Tensor:
            chosen = keys.uniform_rows(keys.fold(batch.keys, "whether"), 1)[:, 0] < scarcity[batch.y]
            return chosen[:, None] * (keys.normal_rows(keys.fold(batch.keys, "noise"), len(root)) @ root)

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x).float()
            logits, noisy = task.model.logits(params["head"], z), z + self.noise * noise(batch)
            with evaluating():
                received = task.logits(shared, batch.x)
            here = counts if self.missing == "client" else losses.one_hot(batch.y, task.num_classes).T @ batch.weight
            present = here > 0

            def among_present(logits: Tensor, batch: Batch) -> Tensor:
                return losses.balanced_softmax(logits, batch, present)  # only classes that count 0 leave it

            entropy = crossed(logits, logits, present)
            inherited = crossed(received / self.temperature, logits / self.temperature, ~present)
            taught = task.criterion(task.model.logits(params["head"], noisy), noisy, batch, among_present)
            return taught + self.inherit * losses.mean(inherited, batch) - self.smooth * (entropy * batch.weight).sum()

        weights = (1 / counts.clamp(min=1))[data.y] if self.balanced else None
        return task.sgd(loss, shared, data.batches(task.epochs, weights=weights)), private

    def _covariance(self, task: Task, body: Tree, data: LocalData) -> Tensor:
        """Average the classes' unbiased covariances of features by class size: (d, d); one example has none."""
        means, counts = data.class_means(lambda x: task.model.features(body, x)), data.class_counts
        share = counts / counts.sum().clamp(min=1) / (counts - 1).clamp(min=1)
        covariance = means.new_zeros(means.shape[1], means.shape[1])
        for batch in data.plain_batches():
            apart = task.model.features(body, batch.x).float() - means[batch.y]
            covariance = covariance + apart.T @ (apart * (share[batch.y] * batch.weight)[:, None])
        return covariance


def symmetric_root(covariance: Tensor) -> Tensor:
    """Give the one symmetric root of a (d, d) covariance: rows of standard normal noise times it have that one."""
    values, vectors = torch.linalg.eigh(tree.in_float64(covariance))
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root.to(covariance.device, torch.float32)


def crossed(teacher: Tensor, logits: Tensor, among: Tensor) -> Tensor:
    """Give each row's cross-entropy with a teacher's softmax among some classes: (B, C), (B, C), (C,) bool -> (B,)."""
    target, log = (torch.where(among, z.float(), -1e4).log_softmax(1) for z in (teacher, logits))
    return -(target.exp() * log).sum(1)
