"""FedCP: a policy parts each example's features between the client's own head and everybody's.

Zhang, Hua, Wang, Song, Xue, Ma, Guan. FedCP: Separating Feature Information for Personalized Federated Learning via
Conditional Policy. KDD 2023. https://arxiv.org/abs/2307.01217 (Algorithm 1)

Server keeps   body, head, policy
Client keeps   head
Down           body, head, policy
Up             body, head, policy
Newcomers      never drawn, the newest body, head and policy beside the initial head of one's own; held out, that with
               five epochs of the own head
Departs        at the test masks are without noise (reference: drawn anew, so that accuracies are random). The received
               body, which features are held to, is in evaluation mode. The last, smaller batch of an epoch counts
               (reference: dropped)
Elsewhere      authors' code starts the context as a random vector, sends the newest head and policy network only to the
               cohort (the body to all), and drops the last, smaller batch at the test too
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, evaluating, keys, register, tree
from bench.models.layers import apply_linear, layer_norm, linear, norm_layer
from bench.ranges import Strength

WIDTHS = (10.0, 15.0, 20.0, 50.0)
"""Of the discrepancy's kernels, as squared distances (reference)."""


@register("fedcp")
@dataclass(frozen=True, kw_only=True)
class FedCP(Algorithm):
    """A personal model is a body, the client's `head`, the `received` one, and a policy."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    paper: ClassVar[Mapping[str, object]] = {"pull": 5.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"pull": (0.01, 10.0)}
    controls: ClassVar[Mapping[str, str]] = {
        "fedcp(pull=0)": "whether holding features to those of the received body does anything",
        "fedper": "what an own head is worth without a policy and everybody's head beside it",
    }

    pull: Strength = 1.0
    """Weight of the discrepancy between features of the trained and of the received body (paper: lambda = 5, at a
    learning rate of 0.005; at ten times that one features then leap away from where the discrepancy has a slope)."""

    def init_server(self, task: Task) -> Tree:
        """Draw a policy: a linear layer with two outputs for each feature, and a layer norm."""
        d = task.model.feature_size
        layer = linear(keys.fold(task.server_key("policy"), "linear"), 2 * d, d)
        return {**task.init(), "policy": {"linear": layer, "norm": norm_layer("layer", 2 * d, task.key.device)}}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial head."""
        return {"head": task.init()["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train body, policy and own head; send half of that and of the received head in the place of a head."""

        def loss(w: Tree, batch: Batch) -> Tensor:
            z = task.model.features(w["body"], batch.x)
            noise = torch.logit(keys.uniform_rows(keys.fold(batch.keys, "mask"), z.shape[1]), 1e-6)
            model = {**w, "received": shared["head"]}
            logits = parted(task, model, z, mask(w["policy"], z, private["head"], noise))
            with evaluating():
                still = task.model.features(shared["body"], batch.x)
            return task.criterion(logits, z, batch) + self.pull * discrepancy(z.float(), still.float(), batch.weight)

        start = {"body": shared["body"], "head": private["head"], "policy": shared["policy"]}
        w = task.sgd(loss, start, data.batches(task.epochs))
        between = tree.map(lambda own, received: (own + received) / 2, w["head"], shared["head"])
        return {"body": w["body"], "head": between, "policy": w["policy"]}, {"head": w["head"]}

    def after_training(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Give the trained body and policy beside the received head: the one that is sent is no client's."""
        upload, private = self.local_update(task, shared, private, data)
        return {**upload, "head": shared["head"]}, private

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: a head of one's own belongs to it."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give all that was received, with the own head in its place."""
        return {**shared, "head": private["head"], "received": shared["head"]}

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score by both heads, under masks without noise."""
        z = task.model.features(model["body"], x)
        return parted(task, model, z, mask(model["policy"], z, model["head"], 0.0))


def mask(policy: Tree, z: Tensor, own: Tree, noise: Tensor | float) -> Tensor:
    """Give the own head's share of each feature, (B, d) in [0, 1]: a softmax over two outputs of the policy.

    Args:
        policy: The network, which sees features times the direction of the sum of an own head's rows. Cross-entropy
            does not move that sum: its gradients over classes add up to zero.
        z: (B, d).
        own: That head, as it was before it is trained.
        noise: Logistic, which is the difference of two outputs' Gumbel noise; 0 for none.
    """
    context = F.normalize(own["weight"].detach().sum(0), dim=0)
    out = apply_linear(policy["linear"], z * context).float()
    personal, general = layer_norm(policy["norm"], out).relu().chunk(2, 1)
    return torch.sigmoid(personal - general + noise)


def parted(task: Task, model: Tree, z: Tensor, share: Tensor) -> Tensor:
    """Score features by two heads, each of which sees its share: (B, C)."""
    return task.model.logits(model["head"], z * share) + task.model.logits(model["received"], z * (1 - share))


def discrepancy(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Give the squared maximum mean discrepancy of two batches of features, (B, d), whose real examples have weight 1:
    the mean over pairs of k(a, a') + k(b, b') - 2 k(a, b'), k a sum of Gaussian kernels.
    """
    share = weight / weight.sum().clamp(min=1)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        apart = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)
        return torch.stack([torch.exp(-0.5 * apart / width) for width in WIDTHS]).sum(0)

    with torch.autocast(a.device.type, enabled=False):  # of products in half precision no difference would be left
        return share @ (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)) @ share
