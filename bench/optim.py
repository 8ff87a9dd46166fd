"""Optimisers as values: what they keep is a tree, so that it can be state of a server or a client like anything else.

A rule has `start`, what it keeps before the first step, and `step`. Gradients come from anywhere: a batch, or the
difference of two models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bench import tree
from bench.tree import Tree

OPTIMISERS = ("sgd", "adamw")
"""By which a setting lets clients train: `Sgd`, or `Adam` with its decoupled decay."""


class Rule(Protocol):
    """How parameters follow a gradient."""

    def start(self, params: Tree) -> Tree:
        """Give what is kept before the first step."""

    def step(self, params: Tree, gradient: Tree, kept: Tree) -> tuple[Tree, Tree]:
        """Take a step.

        Args:
            params: Without running statistics. Not changed in place.
            gradient: Of the same structure.
            kept: What `start` or the last step gave.

        Returns:
            The next parameters, and what is kept for the next step.
        """


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent as torch has it: clipping, then weight decay, then momentum."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    """Largest Euclidean norm of a gradient, before weight decay; None for no clipping."""
    clip_apart: tuple[str, ...] = ()
    """Keys of the parameters that are clipped each by itself; all others together."""
    decay_vectors: bool = True
    """Whether weight decay pulls at biases and norm layers, which are vectors, as torch has it."""

    def start(self, params: Tree) -> Tree:
        """Start from a momentum of zero; without momentum nothing is kept."""
        return tree.zeros_like(params) if self.momentum else {}

    def step(self, params: Tree, gradient: Tree, kept: Tree) -> tuple[Tree, Tree]:
        """Take a step."""
        if self.clip is not None:
            gradient = clipped(gradient, self.clip, self.clip_apart)
        if self.weight_decay:
            gradient = tree.map(lambda g, w: g + self.weight_decay * w if self.decays(w) else g, gradient, params)
        if self.momentum:
            gradient = kept = tree.add(gradient, kept, self.momentum)
        return tree.add(params, gradient, -self.lr), kept

    def decays(self, leaf: Tensor) -> bool:
        """Tell whether weight decay pulls at a leaf."""
        return self.decay_vectors or leaf.ndim > 1


@dataclass(frozen=True)
class Adam:
    """Adam with decoupled weight decay.

    Source: Kingma, Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1; Loshchilov, Hutter 2019,
    https://arxiv.org/abs/1711.05101, algorithm 2, where the decay is a multiple of the learning rate, as torch has it.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    """Largest Euclidean norm of a gradient, before the moments; None for no clipping."""
    clip_apart: tuple[str, ...] = ()
    """Keys of the parameters that are clipped each by itself; all others together."""
    decay_vectors: bool = True
    """Whether weight decay pulls at biases and norm layers, which are vectors, as torch has it."""

    def start(self, params: Tree) -> Tree:
        """Start from moments of zero: "first" and "second", and the () number of "steps"."""
        leaves = list(tree.flatten(params).values())
        steps = torch.zeros((), device=leaves[0].device if leaves else None)
        return {"first": tree.zeros_like(params), "second": tree.zeros_like(params), "steps": steps}

    def step(self, params: Tree, gradient: Tree, kept: Tree) -> tuple[Tree, Tree]:
        """Take a step."""
        if self.clip is not None:
            gradient = clipped(gradient, self.clip, self.clip_apart)
        one, two = self.betas
        steps = kept["steps"] + 1
        first = tree.map(lambda m, g: torch.lerp(g, m, one), kept["first"], gradient)
        second = tree.map(lambda v, g: torch.lerp(g.square(), v, two), kept["second"], gradient)
        share_one, share_two = (-torch.expm1(steps * math.log(beta)) for beta in self.betas)  # 1 - beta^steps, exactly

        def moved(w: Tensor, m: Tensor, v: Tensor) -> Tensor:
            towards = (m / share_one) / ((v / share_two).sqrt() + self.eps)
            kept = 1 - self.lr * self.weight_decay if self.decays(w) else 1.0
            return w * kept - self.lr * towards

        return tree.map(moved, params, first, second), {"first": first, "second": second, "steps": steps}

    def decays(self, leaf: Tensor) -> bool:
        """Tell whether weight decay pulls at a leaf."""
        return self.decay_vectors or leaf.ndim > 1


@dataclass(frozen=True)
class Adaptive:
    """Adagrad, Adam or Yogi as a server takes them: what differs is how squares are added up. No moment is corrected
    for its start.

    Source: Reddi et al. 2021, https://arxiv.org/abs/2003.00295, algorithm 2.
    """

    lr: float
    momentum: float
    eps: float
    squares: Callable[[Tensor, Tensor], Tensor]
    """The second moment and the square of a gradient, to the next second moment."""

    def start(self, params: Tree) -> Tree:
        """Start from moments of zero and of eps²: "first" and "second"."""
        return {"first": tree.zeros_like(params), "second": tree.map(lambda w: torch.full_like(w, self.eps**2), params)}

    def step(self, params: Tree, gradient: Tree, kept: Tree) -> tuple[Tree, Tree]:
        """Take a step."""
        first = tree.map(lambda m, g: torch.lerp(g, m, self.momentum), kept["first"], gradient)
        second = tree.map(lambda v, g: self.squares(v, g.square()), kept["second"], gradient)
        moved = tree.map(lambda w, m, v: w - self.lr * m / (v.sqrt() + self.eps), params, first, second)
        return moved, {"first": first, "second": second}


def clipped(gradient: Tree, clip: float, apart: tuple[str, ...] = ()) -> Tree:
    """Shorten a gradient to a Euclidean norm of at most `clip`: keys in `apart` each by itself, all others together.

    Returns:
        A tree of the same structure and order.
    """
    together = {key: part for key, part in gradient.items() if key not in apart}
    short: Tree = {}
    for group in (together, *({key: gradient[key]} for key in apart if key in gradient)):
        norm = tree.dot(group, group).sqrt()
        short |= tree.scale(group, (clip / (norm + 1e-6)).clamp(max=1.0))
    return {key: short[key] for key in gradient}


def worst_nearby(params: Tree, gradient: Tree, rho: float, eta: float | None = None) -> Tree:
    """Go to where a loss is worst nearby, as far as its gradient tells: a model `rho` away, running statistics kept.

    Args:
        params: A model.
        gradient: Of its parameters.
        rho: How far: a Euclidean norm, of distances relative to sizes where there is `eta`.
        eta: What is added to a weight's magnitude to be its size; leaves that are not called `weight` have size 1.
            None: distances are what they are.

    Source: Foret et al. 2021, https://arxiv.org/abs/2010.01412, eq. 2; with sizes Kwon et al. 2021,
    https://arxiv.org/abs/2102.11600, eq. 8.
    """

    def size(path: str, w: Tensor) -> Tensor:
        return torch.ones_like(w) if eta is None or not path.endswith("weight") else w.abs() + eta

    here = tree.parameters(params)
    sizes = tree.map_paths(size, here)
    ascent = tree.map(torch.mul, sizes, gradient)
    length = tree.dot(ascent, ascent).sqrt() + 1e-16
    away = tree.scale(tree.map(torch.mul, sizes, ascent), rho / length)
    return tree.merge(params, tree.add(here, away))
