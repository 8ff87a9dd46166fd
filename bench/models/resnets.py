"""Residual networks as pure functions of a tree.

Source: He et al. 2016, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.models.layers import convolution, convolve, norm, norm_layer
from bench.models.networks import Block, Network
from bench.tree import Tree


class _Convolution(NamedTuple):
    """A convolution of a residual unit, with its norm layer."""

    name: str
    inputs: int
    outputs: int
    size: int
    stride: int


class _Unit(NamedTuple):
    """A residual unit: convolutions one after the other, and the input added to what they give."""

    key: str
    """Of the body."""
    convolutions: list[_Convolution]
    shortcut: _Convolution | None
    """None where the shape stays."""


@dataclass(frozen=True)
class ResNet(Network):
    """Residual network of basic units with the CIFAR stem (3×3, stride 1, no pooling) and global average
    pooling.

    The shortcut of a unit that changes shape is a 1×1 convolution with a norm layer. d is the width of the
    last stage.
    Source: He et al. 2016, https://arxiv.org/abs/1512.03385.
    """

    depths: tuple[int, ...] = ()
    """Residual units of each stage."""
    widths: tuple[int, ...] = ()
    """Channels of each stage."""

    @property
    def feature_size(self) -> int:
        """d."""
        return self.widths[-1]

    def _stem(self) -> _Convolution:
        return _Convolution("stem", self.shape[0], self.widths[0], 3, 1)

    def _pool(self, x: Tensor) -> Tensor:
        """Follow the stem."""
        return x

    def _convolutions(self, inputs: int, width: int, stride: int) -> list[_Convolution]:
        return [_Convolution("first", inputs, width, 3, stride), _Convolution("second", width, width, 3, 1)]

    def _stages(self) -> Iterator[tuple[str, list[_Unit]]]:
        """Give each stage's name and units."""
        inputs = self.widths[0]
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), 1):
            units = []
            for unit in range(1, depth + 1):
                stride = 2 if stage > 1 and unit == 1 else 1
                convolutions = self._convolutions(inputs, width, stride)
                outputs = convolutions[-1].outputs
                changes = stride != 1 or inputs != outputs
                shortcut = _Convolution("shortcut", inputs, outputs, 1, stride) if changes else None
                units.append(_Unit(f"stage{stage}_{unit}", convolutions, shortcut))
                inputs = outputs
            yield f"stage{stage}", units

    def init_body(self, key: Tensor) -> Tree:
        """Draw stem and units."""

        def layer(unit: str, made: _Convolution) -> Tree:
            conv = convolution(keys.fold(key, unit + made.name), made.outputs, made.inputs, made.size)
            return {"conv": conv, "norm": norm_layer(self.norm, made.outputs, key.device)}

        body: Tree = {"stem": layer("", self._stem())}
        for _, units in self._stages():
            for unit in units:
                made = unit.convolutions if unit.shortcut is None else [*unit.convolutions, unit.shortcut]
                body[unit.key] = {each.name: layer(unit.key, each) for each in made}
        return body

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The stem and the stages; average pooling is the last stage's."""
        stem = Block("stem", ("stem",), self._run_stem)
        stages = [
            Block(name, tuple(unit.key for unit in units), partial(_run_stage, units, number == len(self.depths)))
            for number, (name, units) in enumerate(self._stages(), 1)
        ]
        return stem, *stages

    def _run_stem(self, body: Tree, x: Tensor) -> Tensor:
        return self._pool(F.relu(_apply(body, self._stem(), x)))


def _run_stage(units: list[_Unit], last: bool, body: Tree, x: Tensor) -> Tensor:
    for unit in units:
        layers, y = body[unit.key], x
        *inner, outer = unit.convolutions
        for made in inner:
            y = F.relu(_apply(layers, made, y))
        y = _apply(layers, outer, y)
        x = F.relu(y + (x if unit.shortcut is None else _apply(layers, unit.shortcut, x)))
    return x.mean((2, 3)) if last else x


def _apply(layers: Tree, made: _Convolution, x: Tensor) -> Tensor:
    """Convolve and normalise."""
    layer = layers[made.name]
    return norm(layer["norm"], convolve(layer["conv"], x, made.stride, made.size // 2))


class ResNet18For64(ResNet):
    """ResNet-18 for images of about 64 pixels; d = 512; 11,168,832 parameters in the body.

    The stem is a 3×3 convolution of stride 2, without pooling: at 64 pixels it costs what `resnet18` costs at 32, 1.11
    billion operations forward (a multiplication and an addition are two).
    """

    def _stem(self) -> _Convolution:
        return super()._stem()._replace(stride=2)


class BottleneckResNet(ResNet):
    """ResNet-50 for photographs; d = 2048; 23,508,032 parameters in the body.

    The stem is a 7×7 convolution of stride 2 and 3×3 max pooling of stride 2, then follow 3, 4, 6 and 3 bottleneck
    units. The 3×3 convolution of a unit has the stride, as in torchvision, whose weights fit with norm=batch. At 224
    pixels 8.2 billion operations forward (a multiplication and an addition are two), at 64 pixels 0.7 billion.
    Source: He et al. 2016, https://arxiv.org/abs/1512.03385, table 1.
    """

    @property
    def feature_size(self) -> int:
        """d."""
        return 4 * self.widths[-1]

    def _stem(self) -> _Convolution:
        return _Convolution("stem", self.shape[0], self.widths[0], 7, 2)

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, 1)

    def _convolutions(self, inputs: int, width: int, stride: int) -> list[_Convolution]:
        return [
            _Convolution("first", inputs, width, 1, 1),
            _Convolution("second", width, width, 3, stride),
            _Convolution("third", width, 4 * width, 1, 1),
        ]
