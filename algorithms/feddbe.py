"""FedDBE: what is particular in a client's features becomes a bias of its own; their mean is drawn to a common one.

Zhang, Hua, Cao, Wang, Song, Xue, Ma, Guan. Eliminating Domain Bias for Federated Learning in Representation Space.
NeurIPS 2023. https://arxiv.org/abs/2311.14975 (FedAvg+DBE)

Server keeps   body, head, consensus
Client keeps   bias
Down           body, head, consensus (d)
Up             mean (d), body, head
Passes         E; first 2 × E
Newcomers      never drawn, a bias of zero; held out, that with five epochs of the head
Departs        `mean` is sent once, by all clients before the first round, `body` and `head` in each round; the bias
               has the setting's momentum and decay, and is clipped by itself (reference: plain SGD); the last,
               smaller batch of an epoch counts (reference: dropped), also as the newest one of the running mean
Elsewhere      authors' code sets the running mean to 0 in each round, so with a momentum below 1 (PFLlib: 0.1, authors:
               1) it is biased towards 0. Its prologue trains all clients for one round, under sampling too, and then
               overwrites what they trained
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, Uploads, register
from bench.losses import mean
from bench.ranges import SomeShare, Strength


@register("feddbe")
@dataclass(frozen=True, kw_only=True)
class FedDBE(Algorithm):
    """The running mean of features is carried from step to step, and starts at zero in each round."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "pull": (0.5, 500.0),
        "feature_momentum": (0.1, 1.0),
    }

    pull: Strength = 50.0
    """Strength of the pull towards the consensus (paper: kappa; reference: 50)."""
    feature_momentum: SomeShare = 1.0
    """Share of the newest batch in the running mean (paper: mu; reference: 1)."""
    personal_bias: bool = True
    """Whether there is a bias; without it only the pull is left (paper: its ablation)."""

    def init_server(self, task: Task) -> Tree:
        """Have no consensus yet."""
        return {**task.init(), "consensus": self._zeros(task)}

    def init_client(self, task: Task) -> Tree:
        """Start with a bias of zero."""
        return {"bias": self._zeros(task)}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Let all clients find the consensus before the first round."""
        prologue = Exchange("measure", "agree", everyone=True)
        return (prologue, Exchange()) if task.round == 0 else (Exchange(),)

    def measure(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train as FedAvg does, and send nothing but the mean of the features that were met."""

        def loss(w: Tree, batch: Batch) -> tuple[Tensor, Tree]:
            z, met = self._features(task, w, batch)
            return task.criterion(task.model.logits(w["head"], z), z, batch), {"stats": {"mean": met}}

        w = {"body": shared["body"], "head": shared["head"], "stats": {"mean": self._zeros(task)}}
        return {"mean": task.sgd(loss, w, data.batches(task.epochs))["stats"]["mean"]}, private

    def agree(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average the means, with the weights of models, for good."""
        return {**server, "consensus": uploads.mean("mean")}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model and the bias, which is added to features, with the pull on their mean."""

        def loss(w: Tree, batch: Batch) -> tuple[Tensor, Tree]:
            z, met = self._features(task, w, batch)
            own = z + (w["bias"] if self.personal_bias else private["bias"])
            entropy = task.criterion(task.model.logits(w["head"], own), own, batch)
            apart = 0.5 * (met - shared["consensus"]).square().mean()
            return entropy + self.pull * apart, {"stats": {"mean": met}}

        w = {"body": shared["body"], "head": shared["head"], "stats": {"mean": self._zeros(task)}}
        w |= private if self.personal_bias else {}
        w = task.sgd(loss, w, data.batches(task.epochs), clip_apart=("bias",))
        return {"body": w["body"], "head": w["head"]}, {"bias": w.get("bias", private["bias"])}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Fold the bias into the head's: W (z + b) + c = W z + (W b + c)."""
        weight, bias = shared["head"]["weight"], shared["head"]["bias"]
        return {"body": shared["body"], "head": {"weight": weight, "bias": bias + weight @ private["bias"]}}

    def _features(self, task: Task, w: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """Give a batch's features, (B, d), and the running mean that includes them, (d,)."""
        z = task.model.features(w["body"], batch.x).float()
        return z, torch.lerp(w["stats"]["mean"], mean(z, batch), self.feature_momentum)

    def _zeros(self, task: Task) -> Tensor:
        return task.key.new_zeros(task.model.feature_size, dtype=torch.float32)
