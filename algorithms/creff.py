"""CReFF: the server re-trains the classifier on features whose gradients match those of the clients.

Shang, Lu, Huang, Wang. Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training
with Federated Features. IJCAI 2022. https://arxiv.org/abs/2204.13399 (Algorithm 1)

Server keeps   body, head, retrained, features
Client keeps   nothing
Down           body, head, retrained
Up             body, head, gradient, seen
Departs        a class's gradient is that of all the client's images of it, without augmentation (reference:
               mean of ten draws of at most 32 images under a random differentiable augmentation, seeded by
               the clock)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, Uploads, keys, register, tree
from bench.ranges import Count, Epochs, Steps, Strength


@register("creff")
@dataclass(frozen=True, kw_only=True)
class CReFF(Algorithm):
    """`head` goes on being averaged and trains the body; `retrained` is what is tested, and what gradients
    are taken at.
    """

    family: ClassVar[str] = "fedlt"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})

    features_per_class: Count = 100
    """Federated features of each class (paper: m = 100)."""
    match_steps: Steps = 100
    """SGD steps on the features in each round (reference: 100)."""
    match_lr: Strength = 0.1
    """Their learning rate."""
    head_epochs: Epochs = 300
    """Epochs of re-training on the features in each round (reference: 300)."""
    head_lr: Strength = 0.01
    """Its learning rate; batches of 32, no momentum."""

    def init_server(self, task: Task) -> Tree:
        """Start with features of standard normal noise."""
        model, shape = task.init(), (task.num_classes, self.features_per_class, task.model.feature_size)
        noise = keys.normal(task.server_key("features"), *shape)
        return {**model, "retrained": model["head"], "features": noise}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send both heads; features stay at the server."""
        return {key: server[key] for key in ("body", "head", "retrained")}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Take each class's mean gradient at the re-trained head, then train as FedAvg does."""
        body, head = shared["body"], shared["retrained"]
        d, c = task.model.feature_size, task.num_classes
        weight, bias = data.key.new_zeros(c, c, d).float(), data.key.new_zeros(c, c).float()
        for batch in data.plain_batches():
            z = task.model.features(body, batch.x).float()
            of_class = F.one_hot(batch.y, c) * batch.weight[:, None]
            residual = task.model.logits(head, z).softmax(1) - F.one_hot(batch.y, c)  # d CE / d logits
            weight = weight + torch.einsum("bc,bk,bd->ckd", of_class, residual, z)
            bias = bias + torch.einsum("bc,bk->ck", of_class, residual)
        count = data.class_counts.clamp(min=1)
        gradient: Tree = {"weight": weight / count[:, None, None], "bias": bias / count[:, None]}
        model = task.sgd(task.loss, {"body": body, "head": shared["head"]}, data.batches(task.epochs))
        return {**model, "gradient": gradient, "seen": (data.class_counts > 0).float()}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average the model as FedAvg does; match the features to the gradients; train a fresh head on them."""
        seen = uploads.tensor("seen")
        gradient = uploads.mean("gradient", seen)  # per class, over clients that hold it
        features = self._match(task, server, gradient, seen.sum(0) > 0)
        return {
            **tree.merge(server, {"body": uploads.mean("body"), "head": uploads.mean("head")}),
            "features": features,
            "retrained": self._retrain(task, features),
        }

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the averaged body under the re-trained head."""
        return {"body": server["body"], "head": server["retrained"]}

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        """Give the averaged model too: it is FedAvg's, bit for bit."""
        return {"averaged": {"body": server["body"], "head": server["head"]}}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the generic model."""
        return {"body": shared["body"], "head": shared["retrained"]}

    def _match(self, task: Task, server: Tree, target: dict[str, Tensor], present: Tensor) -> Tensor:
        """Descend the mismatch of gradients; classes that nobody holds keep their features."""
        head = server["retrained"]
        features: Tensor = server["features"].clone().requires_grad_()
        one_hot = torch.eye(task.num_classes, device=features.device)[:, None]
        for _ in range(self.match_steps):
            residual = (F.linear(features, head["weight"], head["bias"]).softmax(2) - one_hot) / features.shape[1]
            weight = torch.einsum("cmk,cmd->ckd", residual, features)
            apart = mismatch(weight, target["weight"]).sum(1) + mismatch(residual.sum(1), target["bias"])
            (slope,) = torch.autograd.grad((apart * present).sum(), features)
            with torch.no_grad():
                features -= self.match_lr * slope
        return features.detach()

    def _retrain(self, task: Task, features: Tensor) -> Tree:
        """Train a fresh head by softmax regression; its gradient in closed form, for it takes thousands of
        tiny steps.
        """
        key = task.server_key("retrain")
        head = task.model.init(key)["head"]
        x = features.flatten(0, 1)
        one_hot = torch.eye(task.num_classes, device=x.device).repeat_interleave(features.shape[1], 0)
        x, weights = F.pad(x, (0, 1), value=1.0), torch.cat([head["weight"], head["bias"][:, None]], 1)
        for epoch in range(self.head_epochs):
            order = keys.permutation(keys.fold(key, epoch), len(x))
            for batch, y in zip(x[order].split(32), one_hot[order].split(32), strict=True):
                residual = torch.softmax(batch @ weights.T, 1).sub_(y)
                weights.addmm_(residual.T, batch, alpha=-self.head_lr / len(batch))
        return {"weight": weights[:, :-1].clone(), "bias": weights[:, -1].clone()}


def mismatch(a: Tensor, b: Tensor) -> Tensor:
    """Give 1 - cosine over the last axis; 1e-6 keeps zero rows finite."""
    cosine: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6)
    return 1.0 - cosine
