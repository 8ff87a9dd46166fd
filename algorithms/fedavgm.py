"""FedAvgM: the mean update of a round is a gradient, which the server follows with momentum.

Hsu, Qi, Brown. Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification.
2019. https://arxiv.org/abs/1909.06335 (section 4.2)

Server keeps   body, head, momentum
Client keeps   nothing
Down           body, head
Up             body, head
Departs        the momentum is the one of the paper's formula, without Nesterov's look-ahead (Flower's and FL-bench's
               codes have it); running statistics of batch norm are averaged and have no momentum (the paper's
               network has none)
Elsewhere      FL-bench's `diff` is the received model less the trained one, which is the negative of the paper's update
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from bench import Algorithm, LocalData, Task, Tree, Uploads, register, tree
from bench.optim import Sgd
from bench.ranges import Momentum


@register("fedavgm")
@dataclass(frozen=True, kw_only=True)
class FedAvgM(Algorithm):
    """FedAvg's clients; only the server's step is its own."""

    family: ClassVar[str] = "generic"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "server_momentum": [0.0, 0.7, 0.9, 0.97, 0.99, 0.997]
    }

    server_momentum: Momentum = 0.9
    """Share of the last step that the next one keeps (paper: beta, tuned in 0, 0.7, 0.9, 0.97, 0.99,
    0.997); at 0 it is FedAvg.
    """

    def init_server(self, task: Task) -> Tree:
        """Start at rest."""
        model = task.init()
        return {**model, "momentum": self._rule.start(tree.parameters(model))}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model; the momentum stays."""
        return {"body": server["body"], "head": server["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Step along v <- beta v + (old - mean), with a learning rate of 1."""
        mean = uploads.mean()
        old = tree.parameters(self.broadcast(task, server))
        moved, momentum = self._rule.step(old, tree.sub(old, mean), server["momentum"])
        return {**tree.merge(tree.merge(server, mean), moved), "momentum": momentum}

    @property
    def _rule(self) -> Sgd:
        return Sgd(lr=1.0, momentum=self.server_momentum)
