"""LG-FedAvg: each client has a representation of its own below one predictor for all; both train together.

Liang, Liu, Ziyin, Allen, Auerbach, Brent, Salakhutdinov, Morency. Think Locally, Act Globally: Federated Learning with
Local and Global Representations. 2020. https://arxiv.org/abs/2001.01523 (Algorithm 1)

Server keeps   head
Client keeps   body
Down           head
Up             head
Newcomers      the received layers on the initial ones after one local update of these (paper: what the models of all
               clients say together); nothing of it is kept
Departs        training starts from the common initial model (reference: from FedAvg's, 400 to 1,200 rounds old); shared
               layers are averaged with the setting's weights (reference: uniformly), and are the upper ones (reference,
               on CIFAR-10: by the order of its keys the convolutions); tested is a client's last model (reference: the
               one that was best on its test data)
Elsewhere      FL-bench shares the first layers (one by default) and personalises the rest, the reverse of the name.
               PFLlib shares the last linear layer only. The MNIST network of authors' code applies softmax before
               cross-entropy
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval

from bench import Algorithm, LocalData, Task, Tree, register, tree
from bench.models.networks import block_of


@register("lg_fedavg")
@dataclass(frozen=True, kw_only=True)
class LGFedAvg(Algorithm):
    """FedPer upside down: only what lies on top travels."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    paper: ClassVar[Mapping[str, object]] = {"shared_layers": 3}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"shared_layers": [1, 2, 3]}
    controls: ClassVar[Mapping[str, str]] = {
        "lg_fedavg(shared_layers=0)": "whether sharing the layers on top does anything for clients that train alone",
        "fedper": "whether it is better to share what lies on top than what lies below",
    }

    shared_layers: Annotated[int, Interval(ge=0, le=100)] = 1
    """Layers from the top that are shared: the head, then blocks of the body (reference: 3 of five; here 1, as there
    may be but two). With all of them it is FedAvg, with none Local.
    """

    def init_server(self, task: Task) -> Tree:
        """Keep the upper layers only."""
        return self._parted(task)[0]

    def init_client(self, task: Task) -> Tree:
        """Start from the initial lower layers that all algorithms share."""
        return self._parted(task)[1]

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train all layers jointly."""
        model = task.sgd(task.loss, tree.merge(private, shared), data.batches(task.epochs))
        return self._parted(task, model)

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: no representation is shared."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the client's own layers under the newest shared ones."""
        return tree.merge(private, shared)

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Train lower layers as in a first round."""
        return self.local_update(task, shared, self.init_client(task), data)[1]

    def newcomer_adaptation(self, task: Task) -> None:
        """Tune nothing more: the lower layers have seen the client's data."""
        return None

    def _parted(self, task: Task, model: Tree | None = None) -> tuple[Tree, Tree]:
        """Part a model, by default the initial one, into layers that are shared and those that are not."""
        layers = [*(block.name for block in task.model.blocks), "head"]
        upper = layers[max(len(layers) - self.shared_layers, 0) :]
        return tree.split(task.init() if model is None else model, lambda path: block_of(task.model, path) in upper)
