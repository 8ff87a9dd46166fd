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

from collections.abc import Mapping
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
    version: ClassVar[int] = 2
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    controls: ClassVar[Mapping[str, str]] = {
        "creff(match_steps=0)": "whether matching matters: a head re-trained on features that stay noise",
        "fedavg+crt": "what a head gains that is re-trained where the images are",
    }

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
        """Descend the mismatch of gradients; classes that nobody holds keep their features.

        A step adds rows of features, targets and head. Where these are few, each class is computed in the
        coordinates of what they span: the same descent, of shorter vectors.
        """
        features: Tensor = server["features"]
        head, classes = server["retrained"], task.num_classes
        rows = torch.cat([features, target["weight"], head["weight"].expand_as(target["weight"])], 1)
        basis = None
        if 2 * rows.shape[1] <= rows.shape[2]:
            basis, triangle = torch.linalg.qr(rows.mT)
            rows = triangle.mT
        start, wanted, weight = (part.contiguous() for part in rows.split([features.shape[1], classes, classes], 1))
        one_hot = torch.eye(classes, device=features.device)[:, None]
        x = start.clone()
        for _ in range(self.match_steps):
            share = (x @ weight.mT + head["bias"]).softmax(2)
            residual = (share - one_hot) / x.shape[1]
            by_weight = mismatch_slope(residual.mT @ x, wanted)
            by_bias = mismatch_slope(residual.sum(1), target["bias"])
            by_share = (x @ by_weight.mT + by_bias[:, None]) / x.shape[1]
            by_logit = share * (by_share - (share * by_share).sum(2, keepdim=True))
            x.baddbmm_(residual, by_weight, alpha=-self.match_lr).baddbmm_(by_logit, weight, alpha=-self.match_lr)
        moved = x - start if basis is None else (x - start) @ basis.mT
        return torch.where(present[:, None, None], features + moved, features)

    def _retrain(self, task: Task, features: Tensor) -> Tree:
        """Train a fresh head by softmax regression; its gradient in closed form, for it takes thousands of
        tiny steps.
        """
        key = task.server_key("retrain")
        head = task.model.init(key)["head"]
        x = features.flatten(0, 1)
        one_hot = torch.eye(task.num_classes, device=x.device).repeat_interleave(features.shape[1], 0)
        x, weights = F.pad(x, (0, 1), value=1.0), torch.cat([head["weight"], head["bias"][:, None]], 1)
        shuffled, labels = torch.empty_like(x), torch.empty_like(one_hot)  # memory that is new each time is slow
        for epoch in range(self.head_epochs):
            order = keys.permutation(keys.fold(key, epoch), len(x))
            torch.index_select(x, 0, order, out=shuffled)
            torch.index_select(one_hot, 0, order, out=labels)
            for batch, y in zip(shuffled.split(32), labels.split(32), strict=True):
                residual = torch.softmax(batch @ weights.T, 1).sub_(y)
                weights.addmm_(residual.T, batch, alpha=-self.head_lr / len(batch))
        return {"weight": weights[:, :-1].clone(), "bias": weights[:, -1].clone()}


def mismatch_slope(a: Tensor, b: Tensor) -> Tensor:
    """Give the gradient, by `a`, of 1 - cosine over the last axis; 1e-6 keeps zero rows finite."""
    length, other = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    product = length * other + 1e-6
    cosine = (a * b).sum(-1, keepdim=True) / product
    along: Tensor = a * (cosine * other / (product * length.clamp(min=1e-30)))
    return along.addcmul_(b, 1 / product, value=-1)
