"""Vision transformers of two tokens as pure functions of a tree: one token for labels, one for what a teacher says.

Source: Touvron et al. 2021, https://arxiv.org/abs/2012.12877; blocks as in Dosovitskiy et al. 2021,
https://arxiv.org/abs/2010.11929.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.models.layers import apply_linear, linear, norm_layer
from bench.models.networks import Block, Network
from bench.tree import Tree

_PATCH = 4
"""Pixels that a patch is wide and high; what is left of an image at its right and below is not seen."""
_WIDER = 4
"""How many times as wide as a token what lies between the two layers of a block is."""
_STD = 0.02
"""Standard deviation with which matrices of blocks, tokens and positions start."""


class VisionTransformer(Network):
    """Patches and two tokens of their own, CLS and DIST, that attend to each other; features are (CLS | DIST)."""

    width: ClassVar[int]
    """Numbers of a token; d is twice as many."""
    depth: ClassVar[int]
    heads: ClassVar[int] = 3
    smallest: ClassVar[int] = 8
    norms: ClassVar[tuple[str, ...]] = ("layer",)
    tokens: ClassVar[int] = 2

    @property
    def feature_size(self) -> int:
        """d."""
        return self.tokens * self.width

    @property
    def _patches(self) -> int:
        return math.prod(side // _PATCH for side in self.shape[1:])

    def init_body(self, key: Tensor) -> Tree:
        """Draw the patches' layer, both tokens, positions and blocks."""
        width, device = self.width, key.device
        body: Tree = {
            "embed": {
                "patch": linear(keys.fold(key, "patch"), width, self.shape[0] * _PATCH**2),
                "tokens": _normal(keys.fold(key, "tokens"), self.tokens, width),
                "positions": _normal(keys.fold(key, "positions"), self.tokens + self._patches, width),
            }
        }
        for number in range(1, self.depth + 1):
            layer = partial(_layer, keys.fold(key, "block", number))
            body[f"block{number}"] = {
                "attention": {
                    "norm": norm_layer("layer", width, device),
                    "inputs": layer("inputs", 3 * width, width),
                    "output": layer("output", width, width),
                },
                "dense": {
                    "norm": norm_layer("layer", width, device),
                    "hidden": layer("hidden", _WIDER * width, width),
                    "output": layer("dense", width, _WIDER * width),
                },
            }
        return {**body, "last": {"norm": norm_layer("layer", width, device)}}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Patches to (B, tokens, width), the blocks, and both tokens side by side."""
        embed, last = Block("embed", ("embed",), _embedded), Block("last", ("last",), partial(_last, self.tokens))
        names = [f"block{number}" for number in range(1, self.depth + 1)]
        return embed, *(Block(name, (name,), partial(_attended, name, self.heads)) for name in names), last


class ViTTiny(VisionTransformer):
    """A vision transformer of two tokens: 12 blocks of width 192 with 3 heads; d = 384, CLS and DIST side by side.

    For images of 32 pixels 5,361,216 parameters and 0.74 GFLOP apart from the head: DeiT-Ti, with patches of 4 pixels.
    A linear head on both tokens is the mean of a head on each, of twice its weight there and the same bias. Norm layers
    are layer norm of each token, with 1e-6 added to variances; weight and bias are of a unit.

    Departs: patches of 4 pixels (paper: 16 of 224); no branch is left out at random; where weights alone decay, tokens
    and positions do, which are matrices. That these and all matrices start with a deviation of 0.02 is recalled.
    Source: Touvron et al. 2021, https://arxiv.org/abs/2012.12877, table 1.
    """

    width: ClassVar[int] = 192
    depth: ClassVar[int] = 12


class ViTMini(VisionTransformer):
    """A vision transformer of two tokens, for a CPU: 6 blocks of width 96 with 3 heads; d = 192, CLS and DIST in a row.

    For images of 32 pixels 682,464 parameters and 0.098 GFLOP apart from the head, a quarter of ResNet-8's. All else is
    as in `vit_tiny`. The size is ours.
    """

    width: ClassVar[int] = 96
    depth: ClassVar[int] = 6


def _normal(key: Tensor, *shape: int) -> Tensor:
    drawn: Tensor = keys.normal(key, *shape).mul_(_STD)  # in place: meta, see `keys`
    return drawn


def _layer(key: Tensor, name: str, outputs: int, inputs: int) -> Tree:
    weight = _normal(keys.fold(key, name), outputs, inputs)
    return {"weight": weight, "bias": torch.zeros(outputs, device=key.device)}


# What a stage does --------------------------------------------------------------------------------


def _embedded(body: Tree, x: Tensor) -> Tensor:
    """(B, channels, height, width) -> (B, tokens + patches, width)."""
    layer = body["embed"]
    count, channels, *sides = x.shape
    rows, columns = (side // _PATCH for side in sides)
    x = x[:, :, : rows * _PATCH, : columns * _PATCH]
    x = x.reshape(count, channels, rows, _PATCH, columns, _PATCH).permute(0, 2, 4, 1, 3, 5)
    patches = apply_linear(layer["patch"], x.reshape(count, rows * columns, channels * _PATCH**2))
    tokens = layer["tokens"].expand(count, *layer["tokens"].shape)
    seen: Tensor = torch.cat([tokens.to(patches.dtype), patches], 1) + layer["positions"]
    return seen


def _attended(name: str, heads: int, body: Tree, x: Tensor) -> Tensor:
    """(B, t, width) -> (B, t, width)."""
    attention, dense = body[name]["attention"], body[name]["dense"]
    x = x + _attention(attention, heads, _normed(attention, x))
    return x + apply_linear(dense["output"], F.gelu(apply_linear(dense["hidden"], _normed(dense, x))))


def _attention(layer: Tree, heads: int, x: Tensor) -> Tensor:
    """Let each token take up what others hold, by how well its query fits their keys, in each head by itself."""
    count, long, width = x.shape
    each = apply_linear(layer["inputs"], x).reshape(count, long, 3, heads, width // heads)
    query, key, value = each.permute(2, 0, 3, 1, 4)
    fits = (query @ key.transpose(2, 3)) / math.sqrt(width // heads)
    return apply_linear(layer["output"], (fits.softmax(3) @ value).transpose(1, 2).reshape(count, long, width))


def _last(tokens: int, body: Tree, x: Tensor) -> Tensor:
    """Normalise the tokens and put them side by side: (B, t, width) -> (B, tokens · width)."""
    return _normed(body["last"], x[:, :tokens]).flatten(1)


def _normed(layer: Tree, x: Tensor) -> Tensor:
    """Normalise each token: (B, t, width) -> (B, t, width)."""
    own = layer["norm"]
    return F.layer_norm(x, x.shape[-1:], own["weight"], own["bias"], 1e-6)
