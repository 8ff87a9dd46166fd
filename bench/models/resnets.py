"""Residual networks as pure functions of a tree.

Source: He et al. 2016, https://arxiv.org/abs/1512.03385.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.models.layers import convolution, convolve, norm, norm_layer
from bench.models.networks import Network
from bench.tree import Tree


class _Convolution(NamedTuple):
    """A convolution of a residual block, with its norm layer."""

    name: str
    inputs: int
    outputs: int
    size: int
    stride: int


@dataclass(frozen=True)
class ResNet(Network):
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

    def _stem(self) -> _Convolution:
        return _Convolution("stem", self.shape[0], self.widths[0], 3, 1)

    def _pool(self, x: Tensor) -> Tensor:
        """Follow the stem."""
        return x

    def _block(self, inputs: int, width: int, stride: int) -> list[_Convolution]:
        return [_Convolution("first", inputs, width, 3, stride), _Convolution("second", width, width, 3, 1)]

    def _plan(self) -> Iterator[tuple[str, list[_Convolution], _Convolution | None]]:
        """Name, convolutions and shortcut of each block; no shortcut where the shape stays."""
        inputs = self.widths[0]
        for stage, (count, width) in enumerate(zip(self.blocks, self.widths, strict=True)):
            for block in range(count):
                stride = 2 if stage and not block else 1
                convolutions = self._block(inputs, width, stride)
                outputs = convolutions[-1].outputs
                changes = stride != 1 or inputs != outputs
                shortcut = _Convolution("shortcut", inputs, outputs, 1, stride) if changes else None
                yield f"stage{stage + 1}_{block + 1}", convolutions, shortcut
                inputs = outputs

    def init_body(self, key: Tensor) -> Tree:
        """Draw stem and blocks."""

        def unit(block: str, made: _Convolution) -> Tree:
            conv = convolution(keys.fold(key, block + made.name), made.outputs, made.inputs, made.size)
            return {"conv": conv, "norm": norm_layer(self.norm, made.outputs, key.device)}

        body: Tree = {"stem": unit("", self._stem())}
        for name, convolutions, shortcut in self._plan():
            made = convolutions if shortcut is None else [*convolutions, shortcut]
            body[name] = {each.name: unit(name, each) for each in made}
        return body

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, d)."""

        def unit(part: Tree, made: _Convolution, x: Tensor) -> Tensor:
            layer = part[made.name]
            return norm(layer["norm"], convolve(layer["conv"], x, made.stride, made.size // 2))

        x = self._pool(F.relu(unit(body, self._stem(), x)))
        for name, (*inner, last), shortcut in self._plan():
            y = x
            for made in inner:
                y = F.relu(unit(body[name], made, y))
            y = unit(body[name], last, y)
            x = F.relu(y + (x if shortcut is None else unit(body[name], shortcut, x)))
        return x.mean((2, 3))


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
    blocks. The 3×3 convolution of a block has the stride, as in torchvision, whose weights fit with norm=batch. At 224
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

    def _block(self, inputs: int, width: int, stride: int) -> list[_Convolution]:
        return [
            _Convolution("first", inputs, width, 1, 1),
            _Convolution("second", width, width, 3, stride),
            _Convolution("third", width, 4 * width, 1, 1),
        ]
