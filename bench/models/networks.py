"""What a network is, and the plain ones: a body that makes features and a linear head that makes logits.

A model is `{"body": ..., "head": {"weight": (C, d), "bias": (C,)}}`. Initial weights are a function of a key. Features
are non-negative (the body ends in a ReLU and, for residual networks, average pooling), except for `linear` and
`frozen`, which pass on what they are given. Normalisation is GroupNorm unless batch norm is asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.models.layers import apply_linear, convolution, convolve, linear
from bench.tree import Tree


class Model(Protocol):
    """What the rest of the suite knows of a network."""

    @property
    def name(self) -> str:
        """Key in `MODELS`."""

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def feature_size(self) -> int:
        """d."""

    def init(self, key: Tensor) -> Tree:
        """Draw initial weights: {"body": ..., "head": {"weight": (C, d), "bias": (C,)}}, float32."""

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, d)."""

    def logits(self, head: Tree, z: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""


@dataclass(frozen=True)
class Network(ABC):
    """What all networks share: a linear head."""

    name: str
    num_classes: int
    shape: tuple[int, int, int]
    """Channels, height, width of an image."""
    norm: str = "group"

    @property
    @abstractmethod
    def feature_size(self) -> int:
        """d."""

    @abstractmethod
    def init_body(self, key: Tensor) -> Tree:
        """Draw the body's initial weights."""

    @abstractmethod
    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, d)."""

    def init(self, key: Tensor) -> Tree:
        """Draw initial weights of body and head."""
        head = linear(keys.fold(key, "head"), self.num_classes, self.feature_size)
        return {"body": self.init_body(keys.fold(key, "body")), "head": head}

    def logits(self, head: Tree, z: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""
        return apply_linear(head, z)


class Linear(Network):
    """Softmax regression on pixels: no body; d = channels · height · width."""

    @property
    def feature_size(self) -> int:
        """d."""
        return math.prod(self.shape)

    def init_body(self, key: Tensor) -> Tree:
        """Nothing to draw."""
        return {}

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """Flatten: (B, d)."""
        return x.flatten(1)


class Frozen(Network):
    """The head alone, on features made beforehand (`bench data embed`): d = channels · height · width.

    The body is empty and counts as one that nobody trains: classifier-level methods run as they are, and methods that
    differ only in how they train the body coincide. FedBABU, whose head is fixed, learns in its fine-tuning only.
    """

    @property
    def feature_size(self) -> int:
        """d."""
        return math.prod(self.shape)

    def init_body(self, key: Tensor) -> Tree:
        """Nothing to draw."""
        return {}

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """Flatten: (B, d)."""
        return x.flatten(1)


class MLP(Network):
    """One hidden layer of 64 ReLU units; d = 64."""

    @property
    def feature_size(self) -> int:
        """d."""
        return 64

    def init_body(self, key: Tensor) -> Tree:
        """Draw the hidden layer."""
        return {"hidden": linear(key, 64, math.prod(self.shape))}

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, 64)."""
        return F.relu(apply_linear(body["hidden"], x.flatten(1)))


class SmallCNN(Network):
    """Two 3×3 convolutions of 16 and 32 channels, each with ReLU and 2×2 max pooling, then 64 ReLU units; d =
    64.

    For 8×8 and 28×28 images.
    """

    @property
    def feature_size(self) -> int:
        """d."""
        return 64

    def init_body(self, key: Tensor) -> Tree:
        """Draw two convolutions and the hidden layer."""
        channels, height, width = self.shape
        return {
            "conv1": convolution(keys.fold(key, 1), 16, channels, 3, bias=True),
            "conv2": convolution(keys.fold(key, 2), 32, 16, 3, bias=True),
            "hidden": linear(keys.fold(key, 3), 64, 32 * (height // 4) * (width // 4)),
        }

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, 64)."""
        x = F.max_pool2d(F.relu(convolve(body["conv1"], x, padding=1)), 2)
        x = F.max_pool2d(F.relu(convolve(body["conv2"], x, padding=1)), 2)
        return F.relu(apply_linear(body["hidden"], x.flatten(1)))


class FedAvgCNN(Network):
    """The network of the FedAvg paper in its common form: 5×5 convolutions of 32 and 64 channels without
    padding, each with ReLU and 2×2 max pooling, then 512 ReLU units; d = 512; 878,538 parameters at 3×32×32
    and 10 classes.

    Source: McMahan et al. 2017, https://arxiv.org/abs/1602.05629, section 3.
    """

    @property
    def feature_size(self) -> int:
        """d."""
        return 512

    def init_body(self, key: Tensor) -> Tree:
        """Draw two convolutions and the hidden layer."""
        channels, height, width = self.shape
        inputs = 64 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
        return {
            "conv1": convolution(keys.fold(key, 1), 32, channels, 5, bias=True),
            "conv2": convolution(keys.fold(key, 2), 64, 32, 5, bias=True),
            "hidden": linear(keys.fold(key, 3), 512, inputs),
        }

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, 512)."""
        x = F.max_pool2d(F.relu(convolve(body["conv1"], x)), 2)
        x = F.max_pool2d(F.relu(convolve(body["conv2"], x)), 2)
        return F.relu(apply_linear(body["hidden"], x.flatten(1)))
