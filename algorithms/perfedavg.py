"""Per-FedAvg: the global model is trained to be a good start, from which each client takes one step of its own.

Fallah, Mokhtari, Ozdaglar. Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning
Approach. NeurIPS 2020. https://arxiv.org/abs/2002.07948 (Algorithm 1, with its two approximations)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Passes         (steps + 1) × E; before the test steps × b
Newcomers      the received model after the same step as everybody's
Departs        the steps of a round are the setting's epochs (paper: tau = 4 or 10), and rate, momentum, decay and
               clipping the setting's (paper: beta = 0.001, and none of the others); decay and clipping are those of the
               step before the test too, and not of the inner one of training; models are averaged with the setting's
               weights (paper: uniformly); running statistics are those of the pass that makes the inner step
Elsewhere      pFedMe's code adapts on test batches before it tests on them, by two steps. FedBABU's adapts on the test
               data of a wrong client and shares momentum between inner and outer step. PFLlib trains twice a round,
               ignores `beta`, and never trains clients smaller than two batches
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from bench import Adaptation, Algorithm, Batch, LocalData, Task, Tree, register, tree
from bench.ranges import Count, Positive, Strength


@register("perfedavg")
@dataclass(frozen=True, kw_only=True)
class PerFedAvg(Algorithm):
    """FedAvg but for the gradient of a step, which is taken where a step of the client's own would lead."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"sgd"})
    paper: ClassVar[Mapping[str, object]] = {"inner_rate": 10.0}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "inner_rate": (0.1, 10.0),
        "order": ["fo", "hf"],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "perfedavg(inner_rate=0)": "whether training for the step after it does anything, for this is FedAvg",
        "fedavg_ft": "whether it is the training or the step after it that does",
    }

    order: Literal["fo", "hf"] = "fo"
    """What becomes of second derivatives: "fo" leaves them out, "hf" takes their product with the gradient as a
    difference of two gradients (paper: both)."""
    inner_rate: Strength = 1.0
    """Rate of a client's own step, as a multiple of the setting's, which no schedule lowers (paper: alpha = 0.01, ten
    times its beta; ten times a usual rate of 0.05 or 0.1 is too far to learn from).
    """
    delta: Positive = 0.001
    """Half the distance of the two gradients of "hf", along the first (paper: 0.001)."""
    steps: Count = 1
    """Steps before the test, each on a batch of the client's training examples (paper: 1)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train along gradients at u = w - alpha · gradient, each of a batch that has nothing to do with the others."""
        outer, curved = data.batches(task.epochs), data.batches(task.epochs, "curvature")
        alpha = self.inner_rate * (task.initial_lr or task.lr)

        def gradient(w: Tree, batch: Batch) -> Tree:
            return task.gradient(task.loss, w, batch)[1]

        def after_a_step(along: Tree, w: Tree, batch: Batch) -> Tree:
            g = gradient(moved(w, along, -alpha), next(outer))
            if self.order == "fo":
                return g
            third = next(curved)
            ahead, behind = (gradient(moved(w, g, by), third) for by in (self.delta, -self.delta))
            return tree.add(g, tree.sub(ahead, behind), -alpha / (2 * self.delta))  # (I - alpha H) g

        inner = data.batches(task.epochs, "inner")
        return task.sgd(task.loss, shared, inner, edit=after_a_step), private

    def adaptation(self, task: Task) -> Adaptation | None:
        """Take the step for which it was trained."""
        return Adaptation(steps=self.steps, lr_factor=self.inner_rate) if self.inner_rate else None


def moved(params: Tree, along: Tree, by: float) -> Tree:
    """Move the parameters of a model along a tree without running statistics."""
    return tree.merge(params, tree.add(tree.parameters(params), along, by))
