"""Fed3R: the head is a ridge regression on features of all clients, whose sums they send, each once.

Fanì, Camoriano, Caputo, Ciccone. Accelerating Heterogeneous Federated Learning with Closed-form Classifiers. ICML 2024.
https://arxiv.org/abs/2406.01116 (section 4)

Server keeps   body (fixed), head, products, targets, seen
Client keeps   nothing
Down           body, head
Up             products ((d + 1) × (d + 2) // 2), targets (C, d + 1)
Passes         0; first 1/3
Departs        sums are float64, 8 bytes each, so that the head is the same whoever adds up what (reference: float32);
               the server asks those of a round's cohort of whom it has nothing yet (reference: all clients, one after
               the other). The body is the setting's: the paper's are pre-trained, which here is a dataset of
               `features` or a body read from a file; on one as it was drawn the head says what random features are
               worth
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Exchange, LocalData, Task, Tree, Uploads, losses, register, tree
from bench.ranges import Positive


@register("fed3r")
@dataclass(frozen=True, kw_only=True)
class Fed3R(Algorithm):
    """Of features z with a 1 behind them, `products` is the sum of z zᵀ, on and above the diagonal, and `targets`,
    (C, d + 1), that over each class; `seen`, (N,), tells whose are in them.
    """

    family: ClassVar[str] = "generic"
    tier: ClassVar[str] = "L"
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("loss", "channel", "aggregation"), "nothing is trained, sums over examples travel"
    )
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"ridge": (1e-4, 100.0)}

    ridge: Positive = 0.01
    """What is added to the diagonal, the bias's too (reference: lambda = 0.01)."""

    def init_server(self, task: Task) -> Tree:
        """Have nothing of nobody."""
        size = task.model.feature_size + 1
        zeros = task.key.new_zeros(size * (size + 1) // 2, dtype=tree.counting(task.key.device))
        sums = {"products": zeros, "targets": zeros.new_zeros(task.num_classes, size)}
        return {**task.init(), **sums, "seen": task.key.new_zeros(task.num_clients, dtype=torch.float32)}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Ask whom it has not asked."""
        return (Exchange(cohort="lacking"),)

    def lacking(self, task: Task, server: Tree, drawn: Sequence[int]) -> list[int]:
        """Choose those of the cohort of whom there is nothing yet."""
        seen = server["seen"].tolist()
        return [k for k in drawn if not seen[k]]

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model."""
        return {"body": server["body"], "head": server["head"]}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Add up the products of features, and the features of each class."""
        size, kind = task.model.feature_size + 1, tree.counting(data.key.device)
        square = data.key.new_zeros(size, size, dtype=kind)
        targets = data.key.new_zeros(task.num_classes, size, dtype=kind)
        for batch in data.plain_batches():
            z = F.pad(task.model.features(shared["body"], batch.x).to(kind), (0, 1), value=1.0)
            z = z * batch.weight[:, None]
            square = square + z.T @ z
            targets = targets + losses.one_hot(batch.y, task.num_classes).to(kind).T @ z
        rows, columns = torch.triu_indices(size, size, device=square.device)
        return {"products": square[rows, columns], "targets": targets}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Add what arrived, and solve."""
        products, targets = (server[key] + uploads.sum(key) for key in ("products", "targets"))
        seen = server["seen"].index_fill(0, uploads.clients, 1.0)
        head = tree.map(lambda leaf, old: leaf.to(old), solved(products, targets, self.ridge), server["head"])
        return {**server, "head": head, "products": products, "targets": targets, "seen": seen}


def solved(products: Tensor, targets: Tensor, ridge: float) -> Tree:
    """Give the head of a ridge regression on rows of zeros with a one, each class's weights divided by their length:
    {"weight": (C, d), "bias": (C,)} float64. A class without examples has zeros.

    Args:
        products: ((d + 1) (d + 2) / 2,), a symmetric matrix on and above its diagonal.
        targets: (C, d + 1).
        ridge: > 0.
    """
    products, targets = tree.in_float64(products), tree.in_float64(targets)
    size = targets.shape[1]
    rows, columns = torch.triu_indices(size, size, device=products.device)
    square = products.new_zeros(size, size).index_put((rows, columns), products)
    square = square + square.triu(1).T + ridge * torch.eye(size, dtype=square.dtype, device=square.device)
    weights = torch.cholesky_solve(targets.T, torch.linalg.cholesky_ex(square).L).T
    length = weights[:, :-1].norm(dim=1).clamp(min=1e-12)
    return {"weight": weights[:, :-1] / length[:, None], "bias": weights[:, -1] / length}
