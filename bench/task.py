"""What is the same for every algorithm of a comparison: the model, the loss, local SGD, and the sizes of
things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench import keys, losses, tree
from bench.data import Batch
from bench.models import Model
from bench.models.layers import Recorder, training
from bench.tree import Tree

Loss = Callable[[Tree, Batch], Tensor]
"""Parameters and a batch to a () loss."""


@dataclass(frozen=True)
class Task:
    """Read-only surroundings of an algorithm."""

    model: Model
    num_classes: int
    num_clients: int
    """Training clients; held-out ones are not counted."""
    rounds: int
    epochs: int
    """Local epochs of a round."""
    batch_size: int
    lr: float
    """Learning rate of this round."""
    key: Tensor
    """() int64, randomness of the run."""
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    """Largest Euclidean norm of a gradient, before weight decay; None for no clipping."""
    round: int = 0
    """Index of the current round, 0..rounds-1."""
    prior: Tensor | None = None
    """(C,) float32 global class frequencies, only for algorithms that declare the need "prior"."""
    frozen_statistics: bool = False
    weights: Tree | None = None
    """Body that every model starts from, trained elsewhere; None: drawn."""
    precision: torch.dtype = torch.float32
    stacked: bool = False
    """Set by the stacked engine: gradients by `torch.func`, batches may be padded."""

    def init(self) -> Tree:
        """Give the initial model, the same for every algorithm of a run."""
        drawn = self.model.init(keys.fold(self.key, "model"))
        return drawn if self.weights is None else {**drawn, "body": tree.clone(self.weights)}

    def server_key(self, purpose: str) -> Tensor:
        """Give randomness for the server's work of this round."""
        return keys.fold(self.key, "server", purpose, self.round)

    def logits(self, params: Tree, x: Tensor) -> Tensor:
        """Score images with a model: (B, C)."""
        return self.model.logits(params["head"], self.model.features(params["body"], x))

    def loss(self, params: Tree, batch: Batch) -> Tensor:
        """Mean cross-entropy of a model on a batch: ()."""
        return losses.cross_entropy(self.logits(params, batch.x), batch)

    def gradient(self, loss: Loss, params: Tree, batch: Batch) -> tuple[Tensor, Tree, Tree]:
        """Differentiate a loss in training mode: for methods that take steps of their own.

        Returns:
            The () loss, its gradient (running statistics left out), and `params` with the next running
            statistics.
        """
        statistics, moving = tree.split(params, tree.is_statistic)

        def recorded(moving: Tree) -> tuple[Tensor, Tree]:
            recorder = Recorder(batch.weight, self.stacked, self.frozen_statistics)
            with training(recorder), torch.autocast(batch.x.device.type, self.precision, self._mixed):
                value = loss(tree.merge(moving, statistics), batch)
            return value, recorder.following(statistics)

        if self.stacked:
            gradient, (value, following) = torch.func.grad_and_value(recorded, has_aux=True)(moving)
            return value, gradient, tree.merge(params, following)
        moving = tree.map(lambda leaf: leaf.detach().requires_grad_(), moving)
        value, following = recorded(moving)
        gradient = iter(tree.flatten(_differentiate(value, tree.flatten(moving))).values())
        return value.detach(), tree.map(lambda _: next(gradient), moving), tree.merge(params, following)

    def sgd(self, loss: Loss, params: Tree, batches: Iterable[Batch], lr: float | None = None) -> Tree:
        """Train by mini-batch SGD with the task's momentum, weight decay and clipping; momentum starts at
        zero.

        Args:
            loss: Mean loss of a batch; may close over fixed trees. Whatever is not in `params` does not move.
            params: Where to start. Not changed in place.
            batches: The stream, usually `data.batches(task.epochs)`. A batch of padding only changes nothing.
            lr: Learning rate; the task's by default.

        Returns:
            The trained parameters, detached.
        """
        return self.resume_sgd(loss, params, batches, None, lr)[0]

    def resume_sgd(
        self,
        loss: Loss,
        params: Tree,
        batches: Iterable[Batch],
        momentum: Tree | None,
        lr: float | None = None,
    ) -> tuple[Tree, Tree]:
        """Train like `sgd` from a given momentum (None: zero), and give the last momentum too."""
        lr = self.lr if lr is None else lr
        if momentum is None:
            momentum = tree.zeros_like(tree.parameters(params))
        run = self._sgd_stacked if self.stacked else self._sgd_serial
        return run(loss, params, batches, momentum, lr)

    @property
    def _mixed(self) -> bool:
        return self.precision != torch.float32

    def _sgd_serial(
        self, loss: Loss, params: Tree, batches: Iterable[Batch], momentum: Tree, lr: float
    ) -> tuple[Tree, Tree]:
        # Copies are updated in place, all leaves in one call; convolutions are faster channels-last.
        leaves = {path: _own(leaf) for path, leaf in tree.flatten(tree.parameters(params)).items()}
        velocity = {path: _own(leaf) for path, leaf in tree.flatten(momentum).items()}
        values, velocities = list(leaves.values()), list(velocity.values())
        for leaf in values:
            leaf.requires_grad_()
        statistics = tree.split(params, tree.is_statistic)[0]
        current = tree.merge(tree.merge(params, tree.unflatten(leaves)), statistics)
        for batch in batches:
            recorder = Recorder(batch.weight, False, self.frozen_statistics)
            with training(recorder), torch.autocast(batch.x.device.type, self.precision, self._mixed):
                value = loss(current, batch)
            gradient = list(tree.flatten(_differentiate(value, leaves)).values())
            if not values:  # frozen features have a body without weights
                continue
            with torch.no_grad():
                if self.clip is not None:
                    total = torch.stack(torch._foreach_norm(gradient)).norm()
                    torch._foreach_mul_(gradient, (self.clip / (total + 1e-6)).clamp(max=1.0))
                if self.weight_decay:
                    torch._foreach_add_(gradient, values, alpha=self.weight_decay)
                if self.momentum:
                    torch._foreach_mul_(velocities, self.momentum)
                    torch._foreach_add_(velocities, gradient)
                    gradient = velocities
                torch._foreach_add_(values, gradient, alpha=-lr)
            if recorder.seen:
                statistics = recorder.following(statistics)
                current = tree.merge(current, statistics)
        return tree.map(torch.Tensor.detach, current), tree.unflatten(velocity)

    def _sgd_stacked(
        self, loss: Loss, params: Tree, batches: Iterable[Batch], momentum: Tree, lr: float
    ) -> tuple[Tree, Tree]:
        current = params
        for batch in batches:
            _, gradient, following = self.gradient(loss, current, batch)
            if self.clip is not None:
                total = tree.dot(gradient, gradient).sqrt()
                gradient = tree.scale(gradient, (self.clip / (total + 1e-6)).clamp(max=1.0))
            moving = tree.parameters(following)
            if self.weight_decay:
                gradient = tree.add(gradient, moving, self.weight_decay)
            if self.momentum:
                gradient = tree.add(gradient, momentum, self.momentum)
            real = batch.weight.sum() > 0  # a client that has run out of batches stays where it is
            step = lambda old, new: torch.where(real, new, old)  # noqa: B023, E731
            if self.momentum:
                momentum = tree.map(step, momentum, gradient)
            following = tree.merge(following, tree.add(moving, gradient, -lr))
            current = tree.map(step, current, following)
        return current, momentum

    def at(self, round: int, lr: float) -> Task:
        """Give the task of a round."""
        return replace(self, round=round, lr=lr)


def _own(leaf: Tensor) -> Tensor:
    """Copy a leaf, convolution weights channels-last."""
    layout = torch.channels_last if leaf.ndim == 4 else torch.contiguous_format
    return leaf.detach().clone(memory_format=layout)


def _differentiate(value: Tensor, leaves: dict[str, Tensor]) -> Tree:
    """Give the gradient of a () value; zero for a leaf it does not depend on."""
    if not value.requires_grad:
        return tree.unflatten({path: torch.zeros_like(leaf) for path, leaf in leaves.items()})
    gradient = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return tree.unflatten(
        {
            path: torch.zeros_like(leaf) if part is None else part
            for (path, leaf), part in zip(leaves.items(), gradient, strict=True)
        }
    )
