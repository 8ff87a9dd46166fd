"""APFL: each client uses a mixture of the global model and one of its own, which is trained for its place in it.

Deng, Kamani, Mahdavi. Adaptive Personalized Federated Learning. 2020. https://arxiv.org/abs/2003.13461 (Algorithm 1)

Server keeps   body, head
Client keeps   body, head, alpha (fixed)
Down           body, head
Up             body, head
Newcomers      the received model mixed with what one local update makes of it as a model of its own; nothing of it is
               kept
Departs        weights are mixed, as in the paper (reference: outputs); alpha moves once a round, before the first step
               and by the gradient on its batch (reference: after it, with a decay of 0.02 besides); models are
               averaged with the setting's weights (reference: uniformly); running statistics of a client's own model
               are those of the mixture
Elsewhere      PFLlib trains the own model on its own loss and overwrites it with the mixture after each round, so
               mixtures compound. FL-bench mixes outputs and does not clear gradients between its two steps, so the
               global model takes each gradient twice. FedRep's code mixes alpha v + alpha w while it trains
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register, tree
from bench.ranges import Share


@register("apfl")
@dataclass(frozen=True, kw_only=True)
class APFL(Algorithm):
    """FedAvg for the global model w; the personal model is alpha · v + (1 - alpha) · w."""

    family: ClassVar[str] = "pfl"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"alpha": (0.0, 1.0)}
    controls: ClassVar[Mapping[str, str]] = {
        "apfl(alpha=0)": "whether a client's own model adds anything to FedAvg's",
        "apfl(alpha=1)": "whether the global model adds anything to training alone",
    }

    alpha: Share = 0.5
    """Share of the client's own model, at first (paper: 0.25, 0.5 or 0.75; reference: 0.5)."""
    adapt: bool = False
    """Whether each client's share follows its gradient, once a round (paper: optional)."""

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return self._own(task, task.init())

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train w for itself and v for the mixture, both by each batch from where they were before it."""
        v: Tree = {"body": private["body"], "head": private["head"]}
        alpha = self._moved(task, shared, v, private["alpha"], data)

        def loss(params: Tree, batch: Batch) -> Tensor:
            w, v = params["global"], params["own"]
            still = tree.map(torch.Tensor.detach, w)
            return task.loss(w, batch) + task.loss(mixture(v, still, alpha), batch)

        start = {"global": shared, "own": v}
        trained = task.sgd(loss, start, data.batches(task.epochs), clip_apart=("global", "own"))
        return trained["global"], {**trained["own"], "alpha": alpha}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Mix the client's own model with the newest global one."""
        return mixture({"body": private["body"], "head": private["head"]}, shared, private["alpha"])

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Start from the received model, and train as in a round."""
        return self.local_update(task, shared, self._own(task, shared), data)[1]

    def newcomer_adaptation(self, task: Task) -> None:
        """Tune nothing more: the mixture has seen the client's data."""
        return None

    def _own(self, task: Task, model: Tree) -> Tree:
        """Give what a client keeps: v and alpha."""
        alpha = task.key.new_full((), self.alpha, dtype=torch.float32)
        return {"body": model["body"], "head": model["head"], "alpha": alpha}

    def _moved(self, task: Task, w: Tree, v: Tree, alpha: Tensor, data: LocalData) -> Tensor:
        """Step along the slope of the mixture's loss in alpha, <v - w, gradient>, within [0, 1]: ()."""
        if not self.adapt:
            return alpha
        apart = tree.sub(tree.parameters(v), tree.parameters(w))
        for batch in data.batches(steps=1):
            _, gradient, _ = task.gradient(task.loss, mixture(v, w, alpha), batch)
            alpha = (alpha - task.lr * tree.dot(apart, gradient)).clamp(0.0, 1.0)
        return alpha


def mixture(v: Tree, w: Tree, alpha: Tensor) -> Tree:
    """Give alpha · v + (1 - alpha) · w, with the running statistics of v."""
    statistics, params = tree.split(v, tree.is_statistic)
    mixed = tree.map(lambda a, b: alpha * a + (1 - alpha) * b, params, w)
    return tree.merge(mixed, statistics)
