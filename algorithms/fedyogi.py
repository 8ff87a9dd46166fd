"""FedYogi: the mean update of a round is a gradient, which the server follows by Yogi.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. Adaptive Federated Optimization. ICLR 2021.
https://arxiv.org/abs/2003.00295 (Algorithm 2)

Server keeps   body, head, moments
Client keeps   nothing
Down           body, head
Up             body, head
Departs        clients are averaged with the setting's weights; running statistics of batch norm are averaged (the
               paper's networks have none); as in the paper no moment is corrected for its start (Keras and torch do so)
Elsewhere      TensorFlow Federated's Yogi corrects its moments for their start, has beta_2 = 0.999 by default (paper:
               0.99) and starts the second moment at 0 (paper: tau squared), as FL-bench does
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, Uploads, register, tree
from bench.optim import Adaptive
from bench.ranges import Momentum, Positive


@register("fedyogi")
@dataclass(frozen=True, kw_only=True)
class FedYogi(Algorithm):
    """FedAvg's clients; only the server's step is its own."""

    family: ClassVar[str] = "generic"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "server_lr": (0.001, 10.0),
        "eps": [1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
    }

    server_lr: Positive = 0.01
    """Learning rate of the server (paper: eta, tuned from 0.001 to 10)."""
    server_momentum: Momentum = 0.9
    """Share of the mean update that the next one keeps (paper: beta_1 = 0.9)."""
    square_momentum: Momentum = 0.99
    """One less the share of the newest square that is added or taken away (paper: beta_2 = 0.99)."""
    eps: Positive = 0.001
    """Added to the root of squares; the smaller, the more steps are alike (paper: tau = 0.001, of 0.00001 to 0.1)."""

    def init_server(self, task: Task) -> Tree:
        """Start at rest, and with squares of eps²."""
        model = task.init()
        return {**model, "moments": self._rule.start(tree.parameters(model))}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model; the moments stay."""
        return {"body": server["body"], "head": server["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Follow the gradient (old - mean) by Yogi."""
        mean = uploads.mean()
        old = tree.parameters(self.broadcast(task, server))
        moved, moments = self._rule.step(old, tree.sub(old, mean), server["moments"])
        return {**tree.merge(tree.merge(server, mean), moved), "moments": moments}

    @property
    def _rule(self) -> Adaptive:
        def squares(second: Tensor, square: Tensor) -> Tensor:
            return second - (1 - self.square_momentum) * square * (second - square).sign()

        return Adaptive(self.server_lr, self.server_momentum, self.eps, squares)
