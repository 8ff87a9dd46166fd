"""Residual networks as pure functions of a tree.

Source: He et al. 2016, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.models.layers import NormedConvolution
from bench.models.networks import Block, Network
from bench.tree import Tree


class _Unit(NamedTuple):
    """A residual unit: convolutions one after the other, and the input added to what they give."""

    key: str
    """Of the body."""
    convolutions: list[NormedConvolution]
    shortcut: NormedConvolution | None
    """None where the shape stays."""


class ResNet(Network):
    """Residual network of basic units with the CIFAR stem (3×3, stride 1, no pooling) and global average
    pooling.

    The shortcut of a unit that changes shape is a 1×1 convolution with a norm layer. d is the width of the
    last stage.
    Source: He et al. 2016, https://arxiv.org/abs/1512.03385.
    """

    depths: ClassVar[tuple[int, ...]]
    """Residual units of each stage."""
    widths: ClassVar[tuple[int, ...]]
    """Channels of each stage."""

    @property
    def feature_size(self) -> int:
        """d."""
        return self.widths[-1]

    def _stem(self) -> NormedConvolution:
        return NormedConvolution("stem", self.norm, self.shape[0], self.widths[0], 3, 1)

    def _pool(self, x: Tensor) -> Tensor:
        """Follow the stem."""
        return x

    def _convolutions(self, inputs: int, width: int, stride: int) -> list[NormedConvolution]:
        return [
            NormedConvolution("first", self.norm, inputs, width, 3, stride),
            NormedConvolution("second", self.norm, width, width, 3, 1),
        ]

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
                shortcut = NormedConvolution("shortcut", self.norm, inputs, outputs, 1, stride) if changes else None
                units.append(_Unit(f"stage{stage}_{unit}", convolutions, shortcut))
                inputs = outputs
            yield f"stage{stage}", units

    def init_body(self, key: Tensor) -> Tree:
        """Draw stem and units."""

        body: Tree = {"stem": self._stem().init(keys.fold(key, "stem"))}
        for _, units in self._stages():
            for unit in units:
                made = unit.convolutions if unit.shortcut is None else [*unit.convolutions, unit.shortcut]
                drawn = [each.init(keys.fold(key, unit.key + each.name)) for each in made]
                body[unit.key] = {each.name: layer for each, layer in zip(made, drawn, strict=True)}
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
        return self._pool(F.relu(self._stem()(body, x)))

    def torchvision(self, place: str) -> str:
        """Name a leaf of the body: `layer2.0.conv1.weight` for `stage2_1/first/conv/weight`."""
        match = re.fullmatch(r"(?:stage(\d+)_(\d+)/)?(stem|first|second|third|shortcut)/(conv|norm)/(.+)", place)
        assert match is not None
        stage, block, part, kind, leaf = match.groups()
        of_shortcut = {"conv": "downsample.0", "norm": "downsample.1"}
        layer = of_shortcut if part == "shortcut" else {"conv": "conv", "norm": "bn"}
        number = {"stem": "1", "first": "1", "second": "2", "third": "3", "shortcut": ""}[part]
        leaf = {"stats/mean": "running_mean", "stats/var": "running_var"}.get(leaf, leaf)
        return (f"layer{stage}.{int(block) - 1}." if stage else "") + f"{layer[kind]}{number}.{leaf}"


def _run_stage(units: list[_Unit], last: bool, body: Tree, x: Tensor) -> Tensor:
    for unit in units:
        layers, y = body[unit.key], x
        *inner, outer = unit.convolutions
        for made in inner:
            y = F.relu(made(layers, y))
        y = outer(layers, y)
        x = F.relu(y + (x if unit.shortcut is None else unit.shortcut(layers, x)))
    return x.mean((2, 3)) if last else x


class ResNet8(ResNet):
    """ResNet-8 of the CReFF line, with a stage less than ResNet-10; d = 256; 1,227,594 parameters."""

    depths = (1, 1, 1)
    widths = (64, 128, 256)


class ResNet10(ResNet):
    """ResNet-10 for small images; d = 512; 4,903,242 parameters."""

    smallest = 8
    depths = (1, 1, 1, 1)
    widths = (64, 128, 256, 512)


class ResNet18(ResNet):
    """ResNet-18 for small images; d = 512; 11,173,962 parameters."""

    smallest = 8
    depths = (2, 2, 2, 2)
    widths = (64, 128, 256, 512)


class ResNet20(ResNet):
    """ResNet-20 of the paper's CIFAR section, in 0.27 million parameters; d = 64.

    With 1×1 convolutions for shortcuts 272,474; the paper pads with zeros there, and has 269,722.
    """

    depths = (3, 3, 3)
    widths = (16, 32, 64)


class ResNet32(ResNet):
    """ResNet-32 of the paper's CIFAR section; d = 64; 466,906 parameters."""

    depths = (5, 5, 5)
    widths = (16, 32, 64)


class ResNet34(ResNet):
    """ResNet-34 for small images; d = 512; 21,282,122 parameters."""

    smallest = 8
    depths = (3, 4, 6, 3)
    widths = (64, 128, 256, 512)


class ResNet56(ResNet):
    """ResNet-56 of the paper's CIFAR section; d = 64; 855,770 parameters."""

    depths = (9, 9, 9)
    widths = (16, 32, 64)


class ResNet18For64(ResNet18):
    """ResNet-18 for images of about 64 pixels; d = 512; 11,168,832 parameters in the body.

    The stem is a 3×3 convolution of stride 2, without pooling: at 64 pixels it costs what `resnet18` costs at 32, 1.11
    billion operations forward (a multiplication and an addition are two).
    """

    smallest = 16

    def _stem(self) -> NormedConvolution:
        return super()._stem()._replace(stride=2)


class ResNet50(ResNet):
    """ResNet-50 for photographs; d = 2048; 23,508,032 parameters in the body.

    The stem is a 7×7 convolution of stride 2 and 3×3 max pooling of stride 2, then follow 3, 4, 6 and 3 bottleneck
    units. The 3×3 convolution of a unit has the stride, as in torchvision, whose weights fit with norm=batch. At 224
    pixels 8.2 billion operations forward (a multiplication and an addition are two), at 64 pixels 0.7 billion.
    Source: He et al. 2016, https://arxiv.org/abs/1512.03385, table 1.
    """

    smallest = 32
    depths = (3, 4, 6, 3)
    widths = (64, 128, 256, 512)

    @property
    def feature_size(self) -> int:
        """d."""
        return 4 * self.widths[-1]

    def _stem(self) -> NormedConvolution:
        return NormedConvolution("stem", self.norm, self.shape[0], self.widths[0], 7, 2)

    def _pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, 1)

    def _convolutions(self, inputs: int, width: int, stride: int) -> list[NormedConvolution]:
        return [
            NormedConvolution("first", self.norm, inputs, width, 1, 1),
            NormedConvolution("second", self.norm, width, width, 3, stride),
            NormedConvolution("third", self.norm, width, 4 * width, 1, 1),
        ]
