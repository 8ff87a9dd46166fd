"""CReFF: the server re-trains the classifier on features whose gradients match those of the clients.

Shang, Lu, Huang, Wang. Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training
with Federated Features. IJCAI 2022. https://arxiv.org/abs/2204.13399 (Algorithm 1)

Server keeps   body, head, retrained, features
Client keeps   nothing
Down           body, head, retrained (head)
Up             body, head, gradient (C × head), seen (C)
Passes         E + 1/3
Departs        a class's gradient is that of all the client's images of it, without augmentation (reference:
               mean of ten draws of at most 32 images under a random differentiable augmentation, seeded by
               the clock)
Elsewhere      authors' code has heads of 256 x 10 hard-coded in two places, so that CIFAR-100 does not run; flags of
               its README do not exist; crop and flip are drawn once for a whole batch. RedGrape's port never zeroes
               gradients, which pile up, clipped at norm 1. LongTailLib's client is fixed to ResNet-8
Reproduced     by shangxinyi/CReFF-FL@fbec98f (without augmentation): models 4e-05 apart (results/studies/agreement.md)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, LocalData, Task, Tree, Uploads, keys, register, tree
from bench.federated_features import class_gradients, matched, retrained
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
        body = shared["body"]
        gradient = class_gradients(shared["retrained"], lambda x: task.model.features(body, x), data)
        model = task.sgd(task.loss, {"body": body, "head": shared["head"]}, data.batches(task.epochs))
        return {**model, "gradient": gradient, "seen": (data.class_counts > 0).float()}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average the model as FedAvg does; match the features to the gradients; train a fresh head on them."""
        seen = uploads.tensor("seen")
        gradient = uploads.mean("gradient", seen)  # per class, over clients that hold it
        features = matched(
            server["features"], server["retrained"], gradient, seen.sum(0) > 0, self.match_steps, self.match_lr
        )
        key = task.server_key("retrain")
        return {
            **tree.merge(server, {"body": uploads.mean("body"), "head": uploads.mean("head")}),
            "features": features,
            "retrained": retrained(task.model.init(key)["head"], features, self.head_epochs, self.head_lr, key),
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
