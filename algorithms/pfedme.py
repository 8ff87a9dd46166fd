"""pFedMe: a client's model is near the global one by a Moreau envelope, along which the global one moves.

Dinh, Tran, Nguyen. Personalized Federated Learning with Moreau Envelopes. NeurIPS 2020.
https://arxiv.org/abs/2006.08848 (Algorithm 1)

Server keeps   body, head
Client keeps   body, head
Down           body, head
Up             body, head
Passes         inner_steps × E
Newcomers      what the solver of a round makes of the received model; nothing of it is kept
Departs        only the cohort works in a round (paper: all clients, of whom some are averaged); the outer steps are
               the setting's epochs of batches (paper: R = 20 batches); the solver's learning rate, momentum, decay and
               clipping are the setting's, its momentum from zero for each batch (reference: no momentum, a decay of
               0.001); tested is theta, the personal model of the paper (reference: by an alias, the client's w);
               models are averaged with the setting's weights (paper: uniformly); running statistics are those that
               theta saw, and are averaged, whatever the step of the server
Elsewhere      PFLlib has the authors' alias and tests after the broadcast: the personal model of trained clients is the
               global one, that of others the initial one, from which their next training starts. FL-bench never stores
               theta, so it tests initial weights. FedRepo puts a free step for eta lambda
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, Uploads, register, tree
from bench.losses import proximal
from bench.ranges import Steps, Strength


@register("pfedme")
@dataclass(frozen=True, kw_only=True)
class PFedMe(Algorithm):
    """Two models a client: theta solves a problem around w for each batch, and w follows it."""

    family: ClassVar[str] = "pfl"
    paper: ClassVar[Mapping[str, object]] = {"outer_lr": 0.005}
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "pull": (1.0, 30.0),
        "inner_steps": [1, 3, 5, 7],
        "outer_lr": (0.001, 0.1),
        "server_lr": [1.0, 2.0],
    }

    pull: Strength = 15.0
    """Strength of the pull of theta to w (paper: lambda = 15, of 15 to 30)."""
    inner_steps: Steps = 5
    """Steps of the solver for each batch (paper: K = 5)."""
    outer_lr: Strength | None = None
    """Learning rate of w; None: the setting's, which is the solver's (paper: eta = 0.005, for 800 rounds, and in 30 of
    these w goes nowhere; reference, on CIFAR-10: 0.01 for both).
    """
    server_lr: Strength = 1.0
    """Step of the server along the mean update (paper: beta = 1; 2 where it was tuned)."""

    def init_client(self, task: Task) -> Tree:
        """Start from the initial model that all algorithms share."""
        return task.init()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """For each batch solve for theta from where it was, and move w towards it."""
        w = theta = shared
        rate = task.lr if self.outer_lr is None else self.outer_lr

        def envelope(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, batch) + self.pull * proximal(params, w)

        streams = (data.batches(task.epochs) for _ in range(self.inner_steps))  # so that each step is counted
        for steps in zip(*streams, strict=True):
            theta = task.sgd(envelope, theta, steps)
            away = tree.sub(tree.parameters(w), tree.parameters(theta))
            moved = tree.add(tree.parameters(w), away, -rate * self.pull)
            w = tree.merge(theta, tree.where(steps[0].real, moved, tree.parameters(w)))
        return w, tree.where(data.n > 0, theta, private)

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Step towards the mean of w; take the mean of statistics."""
        statistics, mean = tree.split(uploads.mean(), tree.is_statistic)
        moved = tree.map(lambda new, old: torch.lerp(old, new, self.server_lr), mean, server)
        return tree.merge(server, tree.merge(moved, statistics))

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree | None:
        """Give theta, as the client's last round left it."""
        return private

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        """Solve for theta from the received model, as in a round."""
        return self.local_update(task, shared, shared, data)[1]

    def newcomer_adaptation(self, task: Task) -> None:
        """Tune nothing more: the solver has seen the client's data."""
        return None
