"""q-FedAvg: clients count by a power of their loss, so that whoever is served badly pulls more.

Li, Sanjabi, Beirami, Smith. Fair Resource Allocation in Federated Learning. ICLR 2020.
https://arxiv.org/abs/1905.10497 (Algorithm 2)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head, loss (1)
Passes         E + 1/3
Departs        clients are drawn alike and count by the setting's weights (reference: drawn by size, and alike then);
               the Lipschitz constant is 1 / the round's learning rate, whatever momentum does to updates; a loss below
               1e-10 counts as that (reference: 1e-10 is added), and is of the received model in evaluation mode,
               without augmentation; running statistics of batch norm are averaged, and are in no norm
Elsewhere      authors' `norm_grad` is the squared norm. FedLab's loss is the sum over batches of the last epoch, during
               training; that of FedEM's copy is taken after it. MarsFL counts batch norm buffers in the update but
               writes it over parameters only, so offsets shift
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from bench import Algorithm, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Strength

LEAST = 1e-10
"""Of a loss, so that it can be divided by."""


@register("qfedavg")
@dataclass(frozen=True, kw_only=True)
class QFedAvg(Algorithm):
    """What is minimised is the mean of losses to the power q + 1; the server's step is as long as that allows."""

    family: ClassVar[str] = "generic"
    needs: ClassVar[frozenset[str]] = frozenset({"sgd"})
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"q": [0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0]}
    controls: ClassVar[Mapping[str, str]] = {
        "qfedavg(q=0)": "FedAvg bit for bit: what it is worth that clients count by their losses"
    }

    q: Strength = 0.1
    """How much fairer than the mean (paper: 0.001 to 5 by data set, of a grid up to 15, on convex models and small
    networks). The step is that of FedAvg divided by about 1 + q |update|² / (lr · loss), so that large networks stand
    still where q is large."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model, and send the mean loss that the received one has over the client's examples."""
        loss = data.mean(partial(task.loss, shared))
        trained = task.sgd(task.loss, shared, data.batches(task.epochs))
        return {**trained, "loss": loss}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Step by w <- w + sum_k v_k (w_k - w) / sum_k v_k (1 + q |w_k - w|² / (lr F_k)), where v_k = p_k F_k^q."""
        loss, usual = tree.in_float64(uploads.tensor("loss")).clamp(min=LEAST), tree.in_float64(uploads.weights)
        weights = usual * (loss / loss.max()) ** self.q  # their common scale cancels
        old = tree.parameters(server)
        length = torch.stack([tree.norm(tree.sub(old, sent)) for sent in uploads.trees])
        curvature = (weights * (1 + self.q * length.square() / (task.lr * loss))).sum()
        step = weights.sum() / curvature.clamp(min=1e-300)
        statistics, _ = tree.split(uploads.mean(), tree.is_statistic)
        moved = tree.map(lambda a, b: torch.lerp(a, b, step.to(a)), old, uploads.mean(weights=weights))
        return tree.merge(tree.merge(server, statistics), moved)
