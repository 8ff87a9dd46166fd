"""A network of two small CNNs side by side, the smallest of those for real images."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.models.layers import apply_linear, convolution, convolve, linear
from bench.models.networks import Block, Network
from bench.tree import Tree

_BRANCHES = ("raw", "augmented")


class LightCNN(Network):
    """Two small CNNs side by side, one meant for images as they are and one for augmented ones, joined by 32 ReLU
    units; d = 32.

    With 10 classes 14,862 parameters at 1×28×28 and 19,622 at 3×32×32, 330 of them in the head. A branch has 3×3
    convolutions of 10 and 20 channels without padding, each with ReLU and 2×2 max pooling, and a dense layer that
    scores the C classes; the scores of both go into the joint layer as they are. Both branches are given the same
    image, unless an algorithm trains each by itself (`branches`).

    No table of layers is at hand. It is known that there are two branches of 10 and 20 filters, and with these layers
    the sizes are those that are published: 14,862, "under 20,000", and 0.17 MB with Adam's two moments. Whether a
    branch ends in a softmax is not known; here none does.
    Source: Isong 2025, https://arxiv.org/abs/2501.15547.
    """

    smallest: ClassVar[int] = 10

    @property
    def feature_size(self) -> int:
        """d."""
        return 32

    def init_body(self, key: Tensor) -> Tree:
        """Draw two branches, each by itself, and the layer that joins them."""
        branches = {name: self._branch(keys.fold(key, name)) for name in _BRANCHES}
        return {**branches, "fusion": linear(keys.fold(key, "fusion"), 32, len(_BRANCHES) * self.num_classes)}

    def _branch(self, key: Tensor) -> Tree:
        height, width = (((side - 2) // 2 - 2) // 2 for side in self.shape[1:])
        return {
            "conv1": convolution(keys.fold(key, 1), 10, self.shape[0], 3, bias=True),
            "conv2": convolution(keys.fold(key, 2), 20, 10, 3, bias=True),
            "scores": linear(keys.fold(key, 3), self.num_classes, 20 * height * width),
        }

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Both branches, (B, 2 C), and the layer that joins them."""
        return Block("branches", _BRANCHES, _side_by_side), Block("fusion", ("fusion",), _joined)

    @property
    def branches(self) -> tuple[Block, ...]:
        """The one for images as they are, and the one for augmented ones."""
        return tuple(Block(name, (name,), partial(_scored, name)) for name in _BRANCHES)


def _scored(name: str, body: Tree, x: Tensor) -> Tensor:
    branch = body[name]
    for layer in ("conv1", "conv2"):  # pooled first, as in `bench.models.networks`
        x = F.relu(F.max_pool2d(convolve(branch[layer], x), 2))
    return apply_linear(branch["scores"], x.flatten(1))


def _side_by_side(body: Tree, x: Tensor) -> Tensor:
    return torch.cat([_scored(name, body, x) for name in _BRANCHES], 1)


def _joined(body: Tree, x: Tensor) -> Tensor:
    return F.relu(apply_linear(body["fusion"], x))
