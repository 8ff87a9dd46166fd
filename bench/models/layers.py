"""Layers as pure functions of a tree: norm layers with explicit statistics, and how weights start.

Convolutions start He normal over the fan-out (He et al. 2015, https://arxiv.org/abs/1502.01852); linear layers uniform
in ±1/sqrt(inputs), torch's default; norm layers 1 and 0.

The running statistics of batch norm are tensors of the tree, under `stats`: a training step returns their next values,
so they can be sent, kept, averaged and stacked like anything else. A model is in training mode exactly within a
training step, and in evaluation mode elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys, tree
from bench.models.balanced import BALANCE, STEPS, Balanced, class_weights
from bench.tree import STATISTICS, Tree

NORMS = ("group", "layer", "batch")
"""Each image over groups of its channels; over all of it, which is one group; or channels over the batch."""
STATISTICS_POLICIES = ("shared", "personal", "frozen", "balanced")
"""Running statistics of norm layers are averaged with the model, stay at each client, keep their first values, or are
averaged and forget less of earlier steps and rounds (`bench.models.balanced`)."""


def is_norm(path: str) -> bool:
    """Tell whether a leaf lies in a norm layer, weight, bias and running statistics alike.

    Norm layers are the sub-trees called `norm`, wherever a model stands in a tree: a promise of every network.
    """
    return "norm" in path.split("/")[:-1]


def is_norm_statistic(path: str) -> bool:
    """Tell whether a leaf is a running statistic of a norm layer: what a policy is about.

    What else lies below `stats` is state that is not differentiated, and travels whatever the policy.
    """
    return f"/norm/{STATISTICS}/" in f"/{path}"


# Training mode and running statistics -------------------------------------------------------------


@dataclass
class Recorder:
    """Collects the next running statistics during one forward pass in training mode."""

    weight: Tensor
    """(B,) 1 for an example, 0 for padding."""
    padded: bool
    """Whether some weights may be 0."""
    frozen: bool
    """Whether statistics keep their values, and are used instead of the batch's."""
    moving: frozenset[int] | None = None
    """Identities of the leaves of statistics that may move, the others being as if frozen; None: all."""
    alone: bool = False
    """Whether the next statistics are those of the batch alone, and not a moving mean."""
    balanced: Balanced | None = None
    """How running statistics move; None: by one momentum."""
    y: Tensor | None = None
    """(B,) int64, labels of the examples, where classes are weighed."""
    penalty: Tensor | float = 0.0
    """(), how far the batch's statistics lie from the next running ones, over all layers: mean squares of both."""
    seen: dict[int, Tensor] = field(default_factory=dict)
    """Next value, by the identity of the leaf it replaces."""

    def keeps(self, leaf: Tensor) -> bool:
        """Tell whether a running statistic keeps its value."""
        return self.frozen or (self.moving is not None and id(leaf) not in self.moving)

    def rate(self, statistics: Tree, momentum: float) -> Tensor | float:
        """Give how much of the way a layer's running statistics go in this step: () where steps are counted."""
        if self.alone:
            return 1.0
        if self.balanced is None or STEPS not in statistics:
            return momentum
        steps: Tensor = statistics[STEPS]
        return self.balanced.rate(momentum, steps + 1)

    def penalises(self) -> bool:
        """Tell whether a batch's statistics are held near the running ones."""
        return self.balanced is not None and self.balanced.penalty > 0

    def weights(self, x: Tensor, layer: Tree) -> tuple[Tensor, Tensor]:
        """Give (B,) which of a layer's inputs are examples, and (B,) how much each counts, of the same sum."""
        if len(self.weight) != len(x):  # other images than the batch's: nobody knows of which classes
            ones = x.new_ones(len(x))
            return ones, ones
        if self.y is None or BALANCE not in layer:
            return self.weight, self.weight
        return self.weight, class_weights(layer[BALANCE], self.y, self.weight)

    def following(self, statistics: Tree) -> Tree:
        """Give the next value of all statistics; those that were not used keep theirs."""

        def next_of(leaf: Tensor) -> Tensor:
            return self.seen.get(id(leaf), leaf)

        return tree.map(next_of, statistics)


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def training(recorder: Recorder) -> Iterator[Recorder]:
    """Put models into training mode: batch norm uses the batch's statistics and records the running ones."""
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


@contextmanager
def evaluating() -> Iterator[None]:
    """Put models into evaluation mode within a training step, for a teacher, a prototype or a part that stands still:
    batch norm uses its running statistics and moves none. Gradients pass.
    """
    token = _recorder.set(None)
    try:
        yield
    finally:
        _recorder.reset(token)


def batch_norm(layer: Tree, x: Tensor, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """Normalise (B, c, h, w) over batch and space; padding counts for nothing. A layer without `weight` has 1 there.

    Source: Ioffe, Szegedy 2015, https://arxiv.org/abs/1502.03167; running variance unbiased, as torch has it.
    """
    weight, bias = layer.get("weight"), layer["bias"]
    stats = layer[STATISTICS]
    mode = _recorder.get()
    if mode is None or mode.keeps(stats["mean"]):
        return F.batch_norm(x, stats["mean"], stats["var"], weight, bias, False, 0.0, eps)
    rate = mode.rate(stats, momentum)
    usable: Tensor | None = None
    if not (mode.padded or BALANCE in layer or mode.penalises()):
        mean, var = stats["mean"].detach().clone(), stats["var"].detach().clone()
        if x.shape[0] * x.shape[2] * x.shape[3] == 1:  # one value a channel has no variance
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        y = F.batch_norm(x, mean, var, weight, bias, True, rate if isinstance(rate, float) else 1.0, eps)
        if not isinstance(rate, float):
            mean, var = torch.lerp(stats["mean"], mean, rate), torch.lerp(stats["var"], var, rate)
    else:
        example, counted = mode.weights(x, layer)
        w = counted[:, None, None, None]
        count = example.sum() * x.shape[2] * x.shape[3]
        batch_mean = (x * w).sum((0, 2, 3)) / count.clamp(min=1)
        centred = x - batch_mean[:, None, None]
        batch_var = (centred.square() * w).sum((0, 2, 3)) / count.clamp(min=1)
        usable = count > 1
        batch_mean, batch_var = (
            torch.where(usable, batch_mean, stats["mean"]),
            torch.where(usable, batch_var, stats["var"]),
        )
        y = (x - batch_mean[:, None, None]) * torch.rsqrt(batch_var + eps)[:, None, None]
        y = (y if weight is None else y * weight[:, None, None]) + bias[:, None, None]
        unbiased = batch_var * count / (count - 1).clamp(min=1)
        mean = torch.where(usable, torch.lerp(stats["mean"], batch_mean.detach(), rate), stats["mean"])
        var = torch.where(usable, torch.lerp(stats["var"], unbiased.detach(), rate), stats["var"])
        if mode.penalises():
            apart = (batch_mean - mean).square().mean() + (unbiased - var).square().mean()
            mode.penalty = mode.penalty + torch.where(usable, apart, 0.0)
    mode.seen[id(stats["mean"])], mode.seen[id(stats["var"])] = mean, var
    if STEPS in stats:
        steps = stats[STEPS] + 1
        mode.seen[id(stats[STEPS])] = steps if usable is None else torch.where(usable, steps, stats[STEPS])
    return y


def group_norm(layer: Tree, x: Tensor, groups: int | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise each image, (B, c, ...), over groups of channels: 8 by default, or 2 where channels are few.

    Source: Wu, He 2018, https://arxiv.org/abs/1803.08494.
    """
    usual = 8 if x.shape[1] % 8 == 0 and x.shape[1] > 16 else 2
    return F.group_norm(x, usual if groups is None else groups, layer["weight"], layer["bias"], eps)


def layer_norm(layer: Tree, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise each image, (B, c, ...), over all of it: group norm of one group.

    Weight and bias are of a channel; the paper has some for each unit, whose number would grow with the image.
    Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450.
    """
    return group_norm(layer, x, groups=1, eps=eps)


def norm(kind: str, layer: Tree, x: Tensor) -> Tensor:
    """Apply a norm layer of a kind, one of `NORMS`: (B, c, h, w) -> (B, c, h, w).

    Its tree does not tell: that of layer norm is that of group norm.
    """
    kinds: Mapping[str, Callable[[Tree, Tensor], Tensor]]
    kinds = {"group": group_norm, "layer": layer_norm, "batch": batch_norm}
    return kinds[kind](layer, x)


# Layers' initial weights --------------------------------------------------------------------------


def linear(key: Tensor, outputs: int, inputs: int) -> Tree:
    """Draw a linear layer, uniform in ±1/sqrt(inputs): torch's default."""
    bound = 1.0 / math.sqrt(inputs)
    draw = keys.uniform(key, outputs * inputs + outputs).mul_(2 * bound).sub_(bound)  # in place: meta, see `keys`
    return {"weight": draw[: outputs * inputs].reshape(outputs, inputs), "bias": draw[outputs * inputs :]}


def convolution(key: Tensor, outputs: int, inputs: int, size: int, bias: bool = False, groups: int = 1) -> Tree:
    """Draw a convolution, He normal over the fan-out within its group of channels; a bias starts at zero."""
    std = math.sqrt(2.0 / (outputs // groups * size * size))
    layer: Tree = {"weight": keys.normal(key, outputs, inputs // groups, size, size).mul_(std)}
    if bias:
        layer["bias"] = torch.zeros(outputs, device=key.device)
    return layer


def simplex(key: Tensor, outputs: int, inputs: int) -> Tensor:
    """Draw rows of norm 1 that stand at equal angles, each two at a cosine of -1/(outputs - 1), the least for so many:
    a simplex equiangular tight frame, (outputs, inputs) float64 on the host; outputs ≥ 2.

    It is made of as many inputs as outputs, or more; with fewer, directions are random.

    Source: Papyan, Han, Donoho 2020, https://arxiv.org/abs/2008.08186, theorem 5.
    """
    draw = keys.uniform(key.cpu(), inputs, outputs).double()
    if inputs < outputs:
        return F.normalize(draw.T - 0.5, dim=1)
    basis = torch.linalg.qr(draw).Q
    centre = torch.eye(outputs, dtype=torch.float64) - 1 / outputs
    rows: Tensor = (outputs / (outputs - 1)) ** 0.5 * (basis @ centre).T
    return rows


def norm_layer(kind: str, channels: int, device: torch.device) -> Tree:
    """Make a norm layer of a kind, one of `NORMS`: weight 1, bias 0; for batch norm running mean 0 and variance 1."""
    layer: Tree = {
        "weight": torch.ones(channels, device=device),
        "bias": torch.zeros(channels, device=device),
    }
    if kind == "batch":
        layer[STATISTICS] = {
            "mean": torch.zeros(channels, device=device),
            "var": torch.ones(channels, device=device),
        }
    return layer


def convolve(layer: Tree, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """(B, c, h, w) -> (B, c', h', w'); each of the groups of channels is convolved by itself."""
    return F.conv2d(x, layer["weight"], layer.get("bias"), stride, padding, groups=groups)


def apply_linear(layer: Tree, x: Tensor) -> Tensor:
    """(B, inputs) -> (B, outputs)."""
    return F.linear(x, layer["weight"], layer["bias"])


class NormedConvolution(NamedTuple):
    """A convolution without bias, padded so that stride 1 keeps the size, and the norm layer behind it."""

    name: str
    """Of its sub-tree, {"conv": ..., "norm": ...}."""
    norm: str
    """Kind of the norm layer, one of `NORMS`: the network's."""
    inputs: int
    outputs: int
    size: int
    stride: int = 1
    groups: int = 1

    def init(self, key: Tensor) -> Tree:
        """Draw the sub-tree."""
        conv = convolution(key, self.outputs, self.inputs, self.size, groups=self.groups)
        return {"conv": conv, "norm": norm_layer(self.norm, self.outputs, key.device)}

    def __call__(self, layers: Tree, x: Tensor) -> Tensor:
        """Convolve and normalise by the sub-tree of that name: (B, inputs, h, w) -> (B, outputs, h', w')."""
        layer = layers[self.name]
        return norm(self.norm, layer["norm"], convolve(layer["conv"], x, self.stride, self.size // 2, self.groups))
