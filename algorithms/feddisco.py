"""FedDisco: a client counts less, the further its classes are from being equally frequent.

Ye, Xu, Wang, Xu, Chen, Wang. FedDisco: Federated Learning with Discrepancy-Aware Collaboration. ICML 2023.
https://arxiv.org/abs/2305.19229

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head, discrepancy (1)
Departs        the frequencies that clients' are compared with are equal ones (reference: besides, those of its test
               images); a client sends how far its own are from them, in each round, and no counts; where nobody would
               count, all do by the setting's weights (reference: no weight is left), and one without examples never
               does
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import Algorithm, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Strength


@register("feddisco")
@dataclass(frozen=True, kw_only=True)
class FedDisco(Algorithm):
    """FedAvg's clients; only their weights are its own."""

    family: ClassVar[str] = "generic"
    tier: ClassVar[str] = "L"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "penalty": [0.1, 0.3, 0.5, 0.7, 0.9],
        "offset": [0.0, 0.05, 0.1, 0.2],
    }
    controls: ClassVar[Mapping[str, str]] = {
        "feddisco(penalty=0, offset=0)": "FedAvg bit for bit: what other weights are worth"
    }

    penalty: Strength = 0.5
    """Taken off a client's share, times its part in the discrepancy of all (reference: a = 0.5)."""
    offset: Strength = 0.1
    """Added to each share (reference: b = 0.1)."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model, and send the KL divergence of the client's class frequencies from equal ones."""
        frequency = data.class_counts / data.n.clamp(min=1)
        discrepancy = torch.special.xlogy(frequency, frequency * task.num_classes).sum()
        return {**task.sgd(task.loss, shared, data.batches(task.epochs)), "discrepancy": discrepancy}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Average by p_k - a d_k + b, where that is above 0; p_k and d_k add up to 1."""
        usual, apart = tree.in_float64(uploads.weights), tree.in_float64(uploads.tensor("discrepancy"))
        share = apart / apart.sum().clamp(min=1e-300)
        weights = (usual + (self.offset - self.penalty * share) * usual.sum()).clamp(min=0) * (usual > 0)
        mean = uploads.mean(weights=torch.where(weights.sum() > 0, weights, usual))
        return {key: mean[key] for key in server}
