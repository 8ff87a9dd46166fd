"""RUCR: features are drawn to the mean features of all clients' classes, and heads are tuned on mixtures with these.

Huang, Liu, Ye, Chen, Du. Federated Learning with Long-Tailed Data via Representation Unification and Classifier
Rectification. IEEE TIFS 2024. https://github.com/liuyuxia211/RUCR

Server keeps   body, head, rectified, means, share, directions
Client keeps   nothing
Down           body, head, rectified (head), means (C, d), share (C), directions (C, d)
Up             body, head, rectified (head), means (C, d), counts (C)
Passes         E + 1
Departs        class means are measured in evaluation mode (reference: training mode); mixtures are drawn with
               replacement (reference: without, so that a client with fewer examples fails), and none of a class that
               nobody has. With no last rounds heads are never rectified (reference: still in the last one)
Elsewhere      with authors' default flags (weight 0, no last rounds) the method is FedAvg; `run.sh` has others. Only
               CIFAR-10 is coded. Mixtures have norm 1 at most, while features in the test are not normalised: a bias
               learnt at that scale hardly counts there. The maximum over rounds is reported
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, Uploads, keys, losses, register, tree
from bench.ranges import Count, Epochs, Positive, Steps, Strength


@register("rucr")
@dataclass(frozen=True, kw_only=True)
class RUCR(Algorithm):
    """`head` trains the body throughout; in the last rounds `rectified` is tested in its place."""

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})

    unify: Strength = 0.15
    """Weight of the pull to class means (reference: lambda = 0.15); at 0, and without last rounds, it is FedAvg."""
    temperature: Positive = 0.9
    """Divides cosines (reference: t = 0.9)."""
    last_rounds: Steps = 20
    """Rounds at the end in which heads are rectified (reference: 20)."""
    mixtures: Count = 100
    """Mixed features of each class at each client (reference: 100)."""
    head_epochs: Epochs = 50
    """Passes over them (reference: 50), in batches of 256."""
    head_lr: Strength = 0.01
    """Their learning rate, without momentum (reference: 0.01)."""

    def init_server(self, task: Task) -> Tree:
        """Know no class yet: means (C, d), their directions (C, d), and shares of the cohort's examples (C,)."""
        model = task.init()
        zeros = torch.zeros_like(model["head"]["weight"])
        return {**model, "rectified": model["head"], "means": zeros, "share": zeros[:, 0], "directions": zeros}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Let the cohort measure its classes, in the last rounds all clients, and then train."""
        everyone = (Exchange("measure", "direct", everyone=True),) if self._late(task) else ()
        return (Exchange("measure", "unite"), *everyone, Exchange())

    def measure(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Send each class's mean feature under the received model, and how many examples it has."""
        means = data.class_means(lambda x: task.model.features(shared["body"], x))
        return {"means": means, "counts": data.class_counts.float()}, private

    def unite(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average the cohort's means by examples, zero of a class that it lacks, and take its classes' shares."""
        counts = uploads.tensor("counts").sum(0)
        means = uploads.mean("means", uploads.tensor("counts"))  # those of a lacking class are zero
        return {**server, "means": means, "share": counts / counts.sum().clamp(min=1)}

    def direct(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average all clients' means, each of length one, by examples."""
        counts, directions = uploads.tensor("counts"), F.normalize(uploads.tensor("means"), dim=2)
        share = counts / counts.sum(0).clamp(min=1)
        return {**server, "directions": (share[:, :, None] * directions).sum(0)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train with the pull to the united means; in the last rounds tune a copy of the head besides."""
        there, centres = data.class_counts > 0, F.normalize(shared["means"], dim=1)
        prior = shared["share"].clamp(min=1e-12).log()

        def loss(params: Tree, batch: Batch) -> Tensor:
            z = task.model.features(params["body"], batch.x)
            cosine = torch.where(there, F.normalize(z.float(), dim=1) @ centres.T / self.temperature, 0.0)
            pulled = losses.cross_entropy(cosine + prior * losses.one_hot(batch.y, task.num_classes), batch)
            return task.criterion(task.model.logits(params["head"], z), z, batch) + self.unify * pulled

        model = task.sgd(loss, {"body": shared["body"], "head": shared["head"]}, data.batches(task.epochs))
        if not self._late(task):
            return model, private
        rectified = self._rectified(task, shared, model["head"], data) if len(data.index) else model["head"]
        return {**model, "rectified": rectified}, private

    def _rectified(self, task: Task, shared: Tree, head: Tree, data: LocalData) -> Tree:
        """Tune a head on mixtures of each class's direction with the client's features, of whatever class."""
        features = [F.normalize(task.model.features(shared["body"], b.x).float(), dim=1) for b in data.plain_batches()]
        classes, directions, size = task.num_classes, shared["directions"], task.num_classes * self.mixtures
        which = (keys.uniform(keys.fold(data.key, "which"), size) * data.n).long().clamp(max=len(data.index) - 1)
        share = 0.35 + 0.6 * keys.uniform(keys.fold(data.key, "share"), size, 1)
        y = torch.arange(classes, device=share.device).repeat_interleave(self.mixtures, output_size=size)
        x, known = share * directions[y] + (1 - share) * torch.cat(features)[which], directions.any(1)[y] * (data.n > 0)
        for epoch in range(self.head_epochs):
            for rows in keys.permutation(keys.fold(data.key, "mixtures", epoch), size).split(256):
                slope = task.model.logits(head, x[rows]).softmax(1) - losses.one_hot(y[rows], classes)
                slope = slope * (known[rows] / known[rows].sum().clamp(min=1))[:, None]
                head = tree.add(head, {"weight": slope.T @ x[rows], "bias": slope.sum(0)}, -self.head_lr)
        return head

    def _late(self, task: Task) -> bool:
        return task.round >= task.rounds - self.last_rounds

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the model, in the last rounds under the rectified head."""
        return {"body": server["body"], "head": server["rectified" if self._late(task) else "head"]}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the generic model."""
        return self.global_model(task, shared)
