"""Networks as pure functions of a tree: a body that makes features and a linear head that makes logits.

A model is `{"body": ..., "head": {"weight": (C, d), "bias": (C,)}}`. Initial weights are a function of a key. Features
are non-negative (the body ends in a ReLU and, for residual networks, average pooling), except for `linear`, which has
no body. Normalisation is GroupNorm unless batch norm is asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.layers import apply_linear, convolution, convolve, linear, norm, norm_layer
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
class _Network(ABC):
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


class Linear(_Network):
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


class MLP(_Network):
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


class SmallCNN(_Network):
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


class FedAvgCNN(_Network):
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


@dataclass(frozen=True)
class ResNet(_Network):
    """Residual network of basic blocks with the CIFAR stem (3×3, stride 1, no pooling) and global average
    pooling.

    The shortcut of a block that changes shape is a 1×1 convolution with a norm layer. d is the width of the
    last stage.
    Source: He et al. 2016, https://arxiv.org/abs/1512.03385.
    """

    blocks: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()

    @property
    def feature_size(self) -> int:
        """d."""
        return self.widths[-1]

    def _plan(self) -> Iterator[tuple[str, int, int, int]]:
        """Name, input channels, output channels and stride of each block."""
        inputs = self.widths[0]
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for block in range(count):
                yield f"stage{stage + 1}_{block + 1}", inputs, width, 2 if stage and not block else 1
                inputs = width

    def init_body(self, key: Tensor) -> Tree:
        """Draw stem and blocks."""

        def unit(name: str, inputs: int, outputs: int, size: int) -> Tree:
            conv = convolution(keys.fold(key, name), outputs, inputs, size)
            return {"conv": conv, "norm": norm_layer(self.norm, outputs, key.device)}

        body: Tree = {"stem": unit("stem", self.shape[0], self.widths[0], 3)}
        for name, inputs, outputs, stride in self._plan():
            body[name] = block = {
                "first": unit(name + "first", inputs, outputs, 3),
                "second": unit(name + "second", outputs, outputs, 3),
            }
            if stride != 1 or inputs != outputs:
                block["shortcut"] = unit(name + "shortcut", inputs, outputs, 1)
        return body

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, d)."""

        def unit(layer: Tree, x: Tensor, stride: int, padding: int) -> Tensor:
            return norm(layer["norm"], convolve(layer["conv"], x, stride, padding))

        x = F.relu(unit(body["stem"], x, 1, 1))
        for name, _, _, stride in self._plan():
            block = body[name]
            y = F.relu(unit(block["first"], x, stride, 1))
            y = unit(block["second"], y, 1, 1)
            x = F.relu(y + (unit(block["shortcut"], x, stride, 0) if "shortcut" in block else x))
        return x.mean((2, 3))


class BadModel(ValueError):
    """No such model, or not for images of this size."""


MODELS: dict[str, Callable[[int, tuple[int, int, int], str], Model]] = {
    "linear": lambda c, s, n: Linear("linear", c, s, n),
    "mlp": lambda c, s, n: MLP("mlp", c, s, n),
    "small_cnn": lambda c, s, n: SmallCNN("small_cnn", c, s, n),
    "fedavg_cnn": lambda c, s, n: FedAvgCNN("fedavg_cnn", c, s, n),
    "resnet8": lambda c, s, n: ResNet("resnet8", c, s, n, (1, 1, 1), (64, 128, 256)),
    "resnet18": lambda c, s, n: ResNet("resnet18", c, s, n, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet32": lambda c, s, n: ResNet("resnet32", c, s, n, (5, 5, 5), (16, 32, 64)),
    "resnet34": lambda c, s, n: ResNet("resnet34", c, s, n, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet56": lambda c, s, n: ResNet("resnet56", c, s, n, (9, 9, 9), (16, 32, 64)),
}
"""Name to builder: (classes, image shape, norm) -> model."""

_SMALLEST = {"fedavg_cnn": 16, "small_cnn": 8, "resnet18": 8, "resnet34": 8}


def build(name: str, num_classes: int, shape: tuple[int, int, int], norm: str = "group") -> Model:
    """Build a model for images of a shape.

    Raises:
        BadModel: No such name, or images too small for it.
    """
    if name not in MODELS:
        raise BadModel(f"no model is called {name!r}; there are {', '.join(MODELS)}")
    if min(shape[1:]) < _SMALLEST.get(name, 1):
        raise BadModel(f"{name} needs images of at least {_SMALLEST[name]} pixels, these have {shape[1]}×{shape[2]}")
    return MODELS[name](num_classes, shape, norm)


def is_convolutional(model: Model) -> bool:
    """Tell whether most of a model's work is convolutions: then stacking clients does not pay on a CPU."""
    return isinstance(model, SmallCNN | FedAvgCNN | ResNet)


def has_body(model: Model) -> bool:
    """Tell whether a model has a body of its own, apart from the head."""
    return not isinstance(model, Linear)
