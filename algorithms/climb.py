"""CLIMB: clients whose loss lies above the mean count more, by the multiplier of a constraint that says it may not.

Shen, Cervino, Hassani, Ribeiro. An Agnostic Approach to Federated Learning with Class Imbalance. ICLR 2022.
https://openreview.net/forum?id=Xo0lbDt975

Server keeps   body, head, multipliers, weights (later)
Client keeps   nothing
Down           body, head
Up             loss (1), body, head
Passes         E; first E + 1/3
Departs        all training clients send `loss` before each block of rounds, the cohort `body` and `head` in each round;
               a client's update counts by its weight times the setting's, which the sum of weights does not divide
               (paper: all alike, which is `client_weights = uniform`); a weight below zero counts as zero
               (reference: it is taken as it is); the primal solver is FedAvg (paper: any; its code has FedPD besides);
               losses are those of the model in evaluation mode, without augmentation; running statistics are averaged,
               whatever the step
Elsewhere      RedGrape's port adds up the mean loss once per parameter tensor: no constraint is ever violated,
               multipliers stay 0, and its CLIMB is FedAvg. Authors' code trains by FedPD unless a flag asks for FedAvg,
               and ends each local epoch after 5 steps at most
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from bench import Algorithm, Exchange, LocalData, Task, Tree, Uploads, register, tree
from bench.ranges import Count, Positive, Strength


@register("climb")
@dataclass(frozen=True, kw_only=True)
class Climb(Algorithm):
    """`multipliers` and `weights`, (N,), are those of the constraints f_i - mean f <= tolerance, and what they say."""

    family: ClassVar[str] = "fedlt"
    space: ClassVar[Mapping[str, tuple[float, float] | list[object]]] = {
        "dual_lr": (0.1, 10.0),
        "tolerance": (0.001, 1.0),
    }

    dual_lr: Strength = 2.0
    """Step of the multipliers, divided by the number of clients (paper's script: 2); 0 is FedAvg."""
    tolerance: Strength = 0.01
    """How far a loss may lie above the mean (paper's script, on MNIST: epsilon = 0.01; its code's own default is 1);
    above every gap it is FedAvg."""
    block: Count = 5
    """Rounds between two steps of the multipliers (reference: 5)."""
    largest: Positive = 100.0
    """Bound of a multiplier (reference: 100)."""

    def init_server(self, task: Task) -> Tree:
        """Start with constraints that do not matter."""
        zeros = task.key.new_zeros(task.num_clients, dtype=torch.float32)
        return {**task.init(), "multipliers": zeros, "weights": zeros + 1}

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        """Ask all clients for their loss before a block of rounds."""
        ask = Exchange("measure", "judge", everyone=True)
        return (ask, Exchange()) if task.round % self.block == 0 else (Exchange(),)

    def broadcast(self, task: Task, server: Tree) -> Tree:
        """Send the model; nobody else knows who counts how much."""
        return {"body": server["body"], "head": server["head"]}

    def measure(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Send the mean loss of the received model over the client's examples."""
        return {"loss": data.mean(partial(task.loss, shared))}, private

    def judge(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Weigh clients by the multipliers so far, for this block, and move the multipliers, for the next one."""
        multipliers = server["multipliers"]
        there, loss = (uploads.sizes > 0).to(multipliers), uploads.tensor("loss")
        violated = loss - (loss * there).sum() / there.sum().clamp(min=1) - self.tolerance
        moved = multipliers[uploads.clients] + self.dual_lr / task.num_clients * violated * there
        following = multipliers.index_copy(0, uploads.clients, moved.clamp(0, self.largest))
        weights = 1 + multipliers - multipliers.mean()  # what the Lagrangian weighs each loss by: N in all
        return {**server, "weights": weights, "multipliers": following}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the model on the client's examples."""
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        """Step by the sum of weighted updates, which is the mean's direction at a length of its own."""
        usual = tree.in_float64(uploads.weights)
        weights = usual * server["weights"][uploads.clients].clamp(min=0).to(usual)
        mean, step = uploads.mean(weights=weights), weights.sum() / usual.sum().clamp(min=1)
        old = self.broadcast(task, server)
        moved = tree.map(lambda a, b: torch.lerp(a, b, step.to(a)), *map(tree.parameters, (old, mean)))
        return tree.merge(tree.merge(server, mean), moved)
