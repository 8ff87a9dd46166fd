"""MR-MTL: each client keeps a model of its own, drawn to the mean of all clients' models.

Liu, Hu, Wu, Smith. On Privacy and Personalization in Cross-Silo Federated Learning. NeurIPS 2022.
https://arxiv.org/abs/2206.07902 (mean-regularised multi-task learning, without noise)

Server keeps   body, head
Client keeps   body, head
Down           body, head
Up             body, head
Newcomers      use the mean, to which they would be drawn; held out, that with five epochs of the head. When it is first
               drawn a client's own model starts from the initial one, as in the paper
Departs        not all clients take part in a round (paper: all): the mean is of those that do, by the setting's weights
               (paper: all alike). Noise, for privacy, is a part (`dp`), of what is sent (paper: of each example's
               gradient)
Elsewhere      FL4Health does not synchronise the first round: each client starts from an initial model of its own
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register
from bench.losses import proximal
from bench.ranges import Strength


@register("mr_mtl")
@dataclass(frozen=True, kw_only=True)
class MRMTL(Algorithm):
    """No model is trained but the clients' own; what is common is their mean."""

    family: ClassVar[str] = "pfl"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"pull": (0.01, 10.0)}
    controls: ClassVar[Mapping[str, str]] = {
        "mr_mtl(pull=0)": "whether the mean does anything: without a pull clients train as those of local, bit for bit",
        "ditto": "whether it takes a second model, trained without a pull, to be drawn to",
    }

    pull: Strength = 1.0
    """Strength of the pull towards the mean (paper: lambda, tuned for each problem)."""

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Minimise F_i(v) + pull / 2 |v - mean|^2, from where the client's own model was."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, batch) + self.pull * proximal(params, shared)

        model = task.sgd(loss, private, data.batches(task.epochs))
        return model, model

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own model."""
        return private

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Take the mean."""
        return {"body": shared["body"], "head": shared["head"]}
