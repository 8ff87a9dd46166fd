"""MobileNetV2 as pure functions of a tree.

Source: Sandler et al. 2018, https://arxiv.org/abs/1801.04381.
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

_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Of each stage: how many times wider its units are inside, channels, units, stride of the first: the paper's table 2.
"""


class _Unit(NamedTuple):
    """An inverted residual: wider, filtered channel by channel, narrower; and the input added where the shape stays."""

    key: str
    """Of the body."""
    convolutions: tuple[NormedConvolution, ...]
    added: bool
    """Whether the input is added."""


class MobileNetV2(Network):
    """MobileNetV2 of width 1; d = 1280; 2,236,682 parameters with 10 classes, 2,223,872 of them in the body.

    From 64 pixels on as in torchvision, whose weights fit with norm=batch; on smaller images stem and second stage have
    stride 1 instead of 2, as codes for CIFAR have it: 4×4 values a channel are left of 32 pixels. No dropout before the
    head. 0.18 billion operations forward at 32 pixels, 0.6 billion at 224 (a multiplication and an addition are two).
    Source: Sandler et al. 2018, https://arxiv.org/abs/1801.04381, table 2.
    """

    smallest: ClassVar[int] = 8

    @property
    def feature_size(self) -> int:
        """d."""
        return 1280

    @property
    def _small(self) -> bool:
        """Whether images are smaller than the paper's network was made for."""
        return min(self.shape[1:]) < 64

    def _stem(self) -> NormedConvolution:
        return NormedConvolution("stem", self.norm, self.shape[0], 32, 3, 1 if self._small else 2)

    def _last(self) -> NormedConvolution:
        return NormedConvolution("last", self.norm, _STAGES[-1][1], self.feature_size, 1)

    def _stages(self) -> Iterator[tuple[str, list[_Unit]]]:
        """Give each stage's name and units."""
        inputs = self._stem().outputs
        for stage, (wider, outputs, depth, stride) in enumerate(_STAGES, 1):
            units = []
            for unit in range(1, depth + 1):
                step = 1 if unit > 1 or (stage == 2 and self._small) else stride
                inside = wider * inputs
                expand = NormedConvolution("expand", self.norm, inputs, inside, 1)
                filtered = NormedConvolution("depthwise", self.norm, inside, inside, 3, step, groups=inside)
                project = NormedConvolution("project", self.norm, inside, outputs, 1)
                convolutions = (filtered, project) if wider == 1 else (expand, filtered, project)
                units.append(_Unit(f"stage{stage}_{unit}", convolutions, step == 1 and inputs == outputs))
                inputs = outputs
            yield f"stage{stage}", units

    def init_body(self, key: Tensor) -> Tree:
        """Draw stem, units and the last convolution."""
        body: Tree = {"stem": self._stem().init(keys.fold(key, "stem"))}
        for _, units in self._stages():
            for unit in units:
                body[unit.key] = {
                    made.name: made.init(keys.fold(key, unit.key + made.name)) for made in unit.convolutions
                }
        return {**body, "last": self._last().init(keys.fold(key, "last"))}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The stem, the stages, and the last convolution with average pooling."""
        stages = [
            Block(name, tuple(unit.key for unit in units), partial(_run_stage, units)) for name, units in self._stages()
        ]
        return Block("stem", ("stem",), self._run_stem), *stages, Block("last", ("last",), self._run_last)

    def _run_stem(self, body: Tree, x: Tensor) -> Tensor:
        return F.relu6(self._stem()(body, x))

    def _run_last(self, body: Tree, x: Tensor) -> Tensor:
        return F.relu6(self._last()(body, x)).mean((2, 3))

    def torchvision(self, place: str) -> str:
        """Name a leaf of the body: `features.2.conv.1.0.weight` for `stage2_1/depthwise/conv/weight`."""
        match = re.fullmatch(r"(?:(stage\d+_\d+)/)?(\w+)/(conv|norm)/(.+)", place)
        assert match is not None
        key, name, kind, leaf = match.groups()
        leaf = {"stats/mean": "running_mean", "stats/var": "running_var"}.get(leaf, leaf)
        units = [unit for _, units in self._stages() for unit in units]
        if key is None:
            number = 0 if name == "stem" else len(units) + 1
            return f"features.{number}.{int(kind == 'norm')}.{leaf}"
        number, unit = next((number, unit) for number, unit in enumerate(units, 1) if unit.key == key)
        layer = [made.name for made in unit.convolutions].index(name)
        within = f"{layer + (kind == 'norm')}" if name == "project" else f"{layer}.{int(kind == 'norm')}"
        return f"features.{number}.conv.{within}.{leaf}"


def _run_stage(units: list[_Unit], body: Tree, x: Tensor) -> Tensor:
    for unit in units:
        *inner, project = unit.convolutions
        y = x
        for made in inner:
            y = F.relu6(made(body[unit.key], y))
        y = project(body[unit.key], y)
        x = x + y if unit.added else y
    return x
