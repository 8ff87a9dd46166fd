"""FedBN: FedAvg, except that norm layers stay at the clients.

Li, Jiang, Zhang, Kamp, Dou. FedBN: Federated Learning on Non-IID Features via Local Batch Normalization. ICLR 2021.
https://arxiv.org/abs/2102.07623 (Algorithm 1)

Server keeps   body, head
Client keeps   body
Down           body, head
Up             body, head
Newcomers      never drawn or held out, norm layers of its own, trained under what the server has (paper: the average of
               norm layers with statistics of its own; but the server has none)
Departs        of the body clients keep the norm layers, and the server all else: on a network without norm layers this
               is FedAvg, without its generic model; weights and biases of group and layer norm stay too (paper: batch
               norm only); clients are averaged with the setting's weights (paper: uniformly)
Elsewhere      authors' code, PFLlib and FL-bench find norm layers by their name, so `downsample.1` of torchvision's
               ResNets is missed and shared
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register, tree
from bench.models import is_norm


@register("fedbn")
@dataclass(frozen=True, kw_only=True)
class FedBN(Algorithm):
    """Norm layers are told by their place in the network, those of shortcuts too."""

    family: ClassVar[str] = "pfl"

    def init_server(self, task: Task) -> Tree:
        """Keep all but the norm layers."""
        model = task.init()
        return {"body": tree.split(model["body"], is_norm)[1], "head": model["head"]}

    def init_client(self, task: Task) -> Tree:
        """Start from the norm layers of the initial model that all algorithms share."""
        return {"body": tree.split(task.init()["body"], is_norm)[0]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the received layers and the client's own, jointly."""
        model = task.sgd(task.loss, tree.merge(shared, private), data.batches(task.epochs))
        mine, others = tree.split(model["body"], is_norm)
        return {"body": others, "head": model["head"]}, {"body": mine}

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no norm layers are shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the newest layers with the client's own norm layers."""
        return tree.merge(shared, private)

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Train norm layers for 100 steps: of the initial running statistics 0.9^100, some 0.003 %, is then left."""

        def loss(norms: Tree, batch: Batch) -> Tensor:
            return task.loss(tree.merge(shared, norms), batch)

        norms = self.init_client(task)
        return task.sgd(loss, norms, data.batches(steps=100)) if norms["body"] else norms
