"""FedAMP: each client has a model of its own, drawn towards those of other clients that are like it.

Huang, Chu, Zhou, Wang, Liu, Pei, Zhang. Personalized Cross-Silo Federated Learning on Non-IID Data. AAAI 2021.
https://arxiv.org/abs/2007.03797 (Algorithm 1, with A(x) = 1 - exp(-x / sigma))

Server keeps   models
Client keeps   body, head, trained
Down           body, head
Up             body, head
Newcomers      never trained, the model that it is sent; held out, the mean of all models with five epochs of the head
Departs        alpha_k is given by what it makes of equal models: `attention` is (N - 1) alpha_k / sigma, so that
               weights stay in [0, 1] for any number of clients, and `pull` is lambda / alpha_k; neither changes from
               round to round (paper: alpha_k falls). `sigma` is a multiple of the mean squared distance of all pairs of
               models (paper: a constant): that differs by orders of magnitude between networks and rounds. Not all
               clients take part in a round (paper: all); for the others stands what they sent last, or the initial
               model. The proximal step is the setting's epochs of SGD from u_i
Elsewhere      PFLlib's FedAMP is local training, bit for bit and for any lambda: its penalty is built from `.data`, so
               it has no gradient, and clients never load the model that the server mixes for them
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, register, tree
from bench.losses import proximal
from bench.ranges import Positive, Share, Strength


@register("fedamp")
@dataclass(frozen=True, kw_only=True)
class FedAMP(Algorithm):
    """The server passes messages between the models w_i, and sends each client the u_i that comes of it."""

    family: ClassVar[str] = "pfl"
    refuses: ClassVar[Mapping[str, str]] = {"aggregation": "each client's model stays apart, and no mean is taken"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "attention": (0.1, 1.0),
        "sigma": (0.3, 30.0),
        "pull": (0.001, 10.0),
    }

    attention: Share = 0.5
    """Weight that all other models have together in u_i where all are equal (paper: (N - 1) alpha_k / sigma, tuned)."""
    sigma: Positive = 3.0
    """Squared distance over which attention falls to 1/e; 1 is that of two models on average (paper: tuned)."""
    pull: Strength = 0.1
    """Strength of the pull of w_i towards u_i (paper: lambda / alpha_k, lambda = 1)."""

    def init_server(self, task: Task) -> Tree:
        """Keep each client's newest model: leaves (N, ...)."""
        return {"models": tree.stack([task.init()] * task.num_clients)}

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share, not yet trained."""
        return {**task.init(), "trained": torch.zeros((), device=task.key.device)}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send nothing to all alike."""
        return {}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        """Step from w_i against the gradient of attention: u_i = w_i + sum_j xi_ij (w_j - w_i)."""
        models = server["models"]
        if client is None:
            return tree.map(lambda leaf: leaf.mean(0), models)
        own = tree.pick(models, client)
        apart = tree.map(torch.sub, models, own)
        weights = self.weights(tree.parameters(apart))
        return tree.map(lambda w, difference: w + torch.tensordot(weights, difference, 1), own, apart)

    def weights(self, apart: Tree) -> Tensor:
        """Give xi_ij = alpha_k A'(|w_j - w_i|^2) of the differences w_j - w_i: (N,), of which that of j = i is idle."""
        x = torch.cat([leaf.flatten(1) for leaf in tree.flatten(apart).values()], 1)
        others = max(len(x) - 1, 1)
        of_a_pair = 2 * (x - x.mean(0)).square().sum() / others
        nearness = torch.exp(-x.square().sum(1) / (self.sigma * of_a_pair).clamp(min=1e-30))
        return self.attention / others * nearness

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise F_i(w) + pull / 2 |w - u_i|^2."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, batch) + self.pull * proximal(params, shared)

        model = task.sgd(loss, shared, data.batches(task.epochs))
        return model, {**model, "trained": torch.where(data.n > 0, 1.0, private["trained"])}

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Put the models that arrived in their clients' places."""
        return {"models": tree.put(server["models"], uploads.clients, tree.stack(uploads.trees))}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give w_i, or before there is one u_i."""
        own: Tree = {"body": private["body"], "head": private["head"]}
        return tree.where(private["trained"] > 0, own, shared)
