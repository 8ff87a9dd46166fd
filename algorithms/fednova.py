"""FedNova: a client that takes more steps does not pull the average further, for updates are averaged step by step.

Wang, Liu, Liang, Joshi, Poor. Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization.
NeurIPS 2020. https://arxiv.org/abs/2007.07481 (equation 8)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head, gradients (1)
Departs        all clients do the setting's epochs, so that steps differ as sizes do (reference: random epochs, as an
               option); the server has no momentum (reference: an option); weight decay and clipping do not enter the
               number of gradients, as in the reference; running statistics of batch norm are averaged as ever
Elsewhere      authors' optimiser adds both recursions for the number of gradients when momentum and mu are set, and its
               proximal pull lands in the momentum buffer. NIID-Bench keeps its default momentum in that number.
               FedNTD's copy adds a SCAFFOLD-like correction by default (`nova_ccvr`)
Reproduced     by JYWa/FedNova@47b4e09 (as published, momentum 0.0): models 5e-07 apart (results/studies/agreement.md)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from bench import Algorithm, LocalData, Task, Tree, Uploads, register, tree


@register("fednova")
@dataclass(frozen=True, kw_only=True)
class FedNova(Algorithm):
    """Where all clients take as many steps it is FedAvg."""

    family: ClassVar[str] = "generic"
    needs: ClassVar[frozenset[str]] = frozenset({"sgd"})
    controls: ClassVar[Mapping[str, str]] = {"fedavg": "what it is worth that clients take different numbers of steps"}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model, and tell how many gradients there are in the update: each counts as often as momentum rho
        repeats it, and K of them (K - rho (1 - rho^K) / (1 - rho)) / (1 - rho) times.
        """
        steps, rho = data.steps(task.epochs), task.momentum
        gradients = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
        return {**task.sgd(task.loss, shared, data.batches(task.epochs)), "gradients": gradients}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Take as many mean gradients as there are in a mean update: w <- w + tau sum_k p_k (w_k - w) / a_k, where
        tau = sum_k p_k a_k.
        """
        gradients = tree.in_float64(uploads.tensor("gradients")).clamp(min=1)  # of an empty client, which stood still
        usual = tree.in_float64(uploads.weights)
        shares = usual / usual.sum().clamp(min=1e-300)
        longer = (shares * gradients).sum() * (shares / gradients).sum()  # 1 where all are alike
        statistics, _ = tree.split(uploads.mean(), tree.is_statistic)
        each = tree.parameters(uploads.mean(weights=shares / gradients))
        moved = tree.map(lambda old, new: torch.lerp(old, new, longer.to(old)), tree.parameters(server), each)
        return tree.merge(tree.merge(server, statistics), moved)
