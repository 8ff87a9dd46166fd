"""FedGELA: all share a fixed equiangular head, whose directions each client stretches by the classes that it has.

Fan, Zhang, Yao, Han, Zhang, Wang. Federated Learning with Bilateral Curation for Partially Class-Disjoint Data. NeurIPS
2023. https://arxiv.org/abs/2405.18972

Server keeps   body, etf (fixed)
Client keeps   nothing
Down           body, etf (C, d)
Up             body
Newcomers      the body under the frame as they stretch it, by their own classes, as everybody's is
Departs        features are scaled to length one, as in the paper (reference: by batch norm, which leaves them longer,
               and so the softmax of one temperature sharper); where they are fewer than classes directions are random;
               bodies are averaged with the setting's weights (reference: by numbers of batches); the temperature is
               the code's (its README: 1e-5)
Elsewhere      authors' log has the best personal accuracy over local epochs, of participants only. Absent classes keep
               a logit of 0 there and can win where the others are negative. The published CIFAR-10 path builds an ETF
               of 84 rows for 512 features (read, not run)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, register
from bench.models.layers import simplex
from bench.ranges import Positive


@register("fedgela")
@dataclass(frozen=True, kw_only=True)
class FedGELA(Algorithm):
    """`etf` is (C, d), rows of length one; a client's row c is C · pi_c as long, pi_c its share of class c."""

    family: ClassVar[str] = "pfl"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    constant: ClassVar[frozenset[str]] = frozenset({"etf"})
    refuses: ClassVar[Mapping[str, str]] = {"correction": "its head is fixed, and scores directions of features"}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"temperature": (0.02, 2.0)}

    temperature: Positive = 0.2
    """Divides cosines (reference: 0.2)."""

    def init_server(self, task: Task) -> Tree:
        """Draw the frame."""
        frame = simplex(task.server_key("frame"), task.num_classes, task.model.feature_size)
        return {"body": task.init()["body"], "etf": frame.float().to(task.key.device)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the body under the frame as this client stretches it."""
        etf = stretched(shared["etf"], data)

        def loss(body: Tree, batch: Batch) -> Tensor:
            z = F.normalize(task.model.features(body, batch.x).float(), dim=1)
            return task.criterion(z @ etf.T / self.temperature, z, batch)

        return {"body": task.sgd(loss, shared["body"], data.batches(task.epochs))}, private

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """Give the body under the frame itself."""
        return {"body": server["body"], "etf": server["etf"]}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the body under the frame as this client stretches it."""
        return {"body": shared["body"], "etf": stretched(shared["etf"], data)}

    def newcomer_adaptation(self, task: Task) -> None:
        """Tune nothing: the head is fixed."""
        return None

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        """Score directions of features by the frame."""
        z = F.normalize(task.model.features(model["body"], x).float(), dim=1)
        scores: Tensor = z @ model["etf"].T / self.temperature
        return scores


def stretched(etf: Tensor, data: LocalData) -> Tensor:
    """Give each class's direction a length of C times the client's share of it: (C, d)."""
    share = data.class_counts / data.n.clamp(min=1)
    return etf * (len(etf) * share)[:, None]
