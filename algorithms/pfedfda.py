"""pFedFDA: features of a class are normal, and a client's head follows from their means, its own and everybody's.

McLaughlin, Su. Personalized Federated Learning via Feature Distribution Adaptation. NeurIPS 2024.
https://arxiv.org/abs/2411.00329 (Algorithm 1)

Server keeps   body, means, covariance
Client keeps   nothing
Down           body, means (C, d), covariance (d, d)
Up             body, means (C, d), covariance (d, d)
Passes         E + 1/3; before the test 1/3
Newcomers      find their head like everybody, from the newest body and statistics; nothing is tuned
Departs        at first means are the rows of the common initial head and the covariance is the unit matrix (reference:
               random means): the first head has those weights. `blend` is the best of 11 values in two-fold validation
               (paper: sought by L-BFGS), whose halves are drawn example by example. Statistics are those of the trained
               body, of every example (reference: of features met on the way). A class that a client lacks has the
               received mean, and a share of 1e-4 in its priors (paper: 0). The reference's covariance has 1 added to
               its diagonal, and 1e-4 to all entries
Elsewhere      authors' test for tiny classes takes an array's length, so they are never skipped (FL-bench counts).
               Their statistics at the test come from a shuffled loader without its last batch: they are random, and a
               client with fewer than 50 examples has none. CUDA is hard-coded
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, keys, losses, register
from bench.ranges import Positive, Share

BLENDS = 11
"""How many mixtures a client chooses among, from 0 to 1; of equals the first one."""
RARE = 1e-4
"""Share of a class that a client lacks."""


@register("pfedfda")
@dataclass(frozen=True, kw_only=True)
class PFedFDA(Algorithm):
    """Only bodies are trained: heads are linear discriminants of Gaussians with one covariance."""

    family: ClassVar[str] = "pfl"
    tier: ClassVar[str] = "L"
    needs: ClassVar[frozenset[str]] = frozenset({"body"})
    paper: ClassVar[Mapping[str, object]] = {"ridge": 1e-4}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {"ridge": (0.01, 10.0)}
    controls: ClassVar[Mapping[str, str]] = {
        "pfedfda(blend=0)": "whether own statistics do anything: of one's own are class frequencies alone",
        "pfedfda(blend=1)": "whether everybody's do",
    }

    blend: Share | None = None
    """Weight of own statistics beside the received ones; None: as validation has it (paper: beta)."""
    ridge: Positive = 1.0
    """Added to the diagonal of a covariance before it is inverted (reference: 1; paper: 1e-4)."""

    def init_server(self, task: Task) -> Tree:
        """Start with means (C, d) and a covariance (d, d) whose discriminant has the initial head's weights."""
        model, unit = task.init(), torch.eye(task.model.feature_size, device=task.key.device)
        return {"body": model["body"], "means": (1 + self.ridge) * model["head"]["weight"], "covariance": unit}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the body under the head that is everybody's but for class frequencies; take its statistics."""
        head = self.head(shared, data)
        body = task.sgd(
            lambda body, batch: task.loss({"body": body, "head": head}, batch),
            shared["body"],
            data.batches(task.epochs),
        )
        return {"body": body, **self.adapted(task, body, shared, data)}, private

    def head(self, gaussian: Tree, data: LocalData) -> Tree:
        """Give the discriminant of a Gaussian for the client's classes: log p(z, c) up to what classes share."""
        counts = data.class_counts.float()
        shares = torch.where(data.n > 0, counts / counts.sum().clamp(min=1), 1 / len(counts))
        return discriminant(gaussian, self.ridge, shares)

    def adapted(self, task: Task, body: Tree, shared: Tree, data: LocalData) -> Tree:
        """Mix the statistics of the client's features with the received ones, as one half of its examples tells of
        the other: means (C, d) and covariance (d, d).
        """
        z, y, weight = features(task, body, data)
        received: Tree = {"means": shared["means"], "covariance": shared["covariance"]}
        own = statistics(z, y, weight, received)
        if self.blend is not None:
            return mixed(own, received, self.blend)
        first = weight * (keys.uniform(keys.fold(data.key, "half"), len(y)) < 0.5)
        blends = torch.linspace(0, 1, BLENDS, device=z.device)[:, None, None]
        errors = []
        for half in (first, weight - first):
            learnt = statistics(z, y, half, received)
            errors.append(entropies(self.head(mixed(learnt, received, blends), data), z, y, weight - half))
        return mixed(own, received, (errors[0] + errors[1]).argmin() / (BLENDS - 1))

    def global_model(self, task: Task, server: Tree) -> Tree | None:
        """There is none: each head is of a client's class frequencies."""
        return None

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give the received body under the head of statistics that are adapted to the client's examples."""
        return {"body": shared["body"], "head": self.head(self.adapted(task, shared["body"], shared, data), data)}

    def newcomer_adaptation(self, task: Task) -> None:
        """Take no step: a client that never trained finds its head as all others do."""
        return None


def features(task: Task, body: Tree, data: LocalData) -> tuple[Tensor, Tensor, Tensor]:
    """Give features of all examples, (L, d), with labels and weights, (L,); without a label an example has none."""
    none = task.key.new_zeros(0, task.model.feature_size, dtype=torch.float32)
    z = torch.cat([none, *(task.model.features(body, batch.x).float() for batch in data.plain_batches())])
    return z, data.y, data.mask * (data.y >= 0)


def statistics(z: Tensor, y: Tensor, weight: Tensor, received: Tree) -> Tree:
    """Take means of classes and the covariance around them; where there are no examples, those received."""
    members = losses.one_hot(y, len(received["means"])) * weight[:, None]
    counts = members.sum(0)[:, None]
    means = torch.where(counts > 0, members.T @ z / counts.clamp(min=1), received["means"])
    apart = (z - means[y]) * weight[:, None]
    number = weight.sum()
    covariance = torch.where(number > 0, apart.T @ apart / number.clamp(min=1), received["covariance"])
    return {"means": means, "covariance": covariance}


def entropies(heads: Tree, z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Add up the cross-entropy of features under each of K heads, each example by its weight: (K,)."""
    scores = torch.log_softmax(z @ heads["weight"].mT + heads["bias"][:, None], 2)
    return -(scores * losses.one_hot(y, scores.shape[2])).sum(2) @ weight


def mixed(own: Tree, received: Tree, blend: Tensor | float) -> Tree:
    """Give blend * own + (1 - blend) * received."""
    return {key: blend * own[key] + (1 - blend) * received[key] for key in own}


def discriminant(gaussian: Tree, ridge: float, shares: Tensor) -> Tree:
    """Give weights S^-1 mu_c and biases -mu_c^T S^-1 mu_c / 2 + log share_c: (C, d) and (C,); of K Gaussians K such.

    Args:
        gaussian: means (C, d) and covariance (d, d); or (K, C, d) and (K, d, d).
        ridge: Added to the diagonal.
        shares: (C,) of each class; they count as at least 1e-4.
    """
    means, covariance = gaussian["means"], gaussian["covariance"]
    unit = torch.eye(means.shape[-1], device=covariance.device)
    root = torch.linalg.cholesky_ex(covariance + ridge * unit)[0]
    weight = torch.cholesky_solve(means.mT, root).mT
    return {"weight": weight, "bias": shares.clamp(min=RARE).log() - (weight * means).sum(-1) / 2}
