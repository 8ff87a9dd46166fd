"""The network of airbench as pure functions of a tree: small, quick to learn, its first layer fixed by what it is told
of the training images.

Source: Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys, tree
from bench.models.layers import batch_norm, convolve, norm, norm_layer
from bench.models.networks import Block, Network
from bench.tree import STATISTICS, Tree

_GROUPS = (("group1", 64), ("group2", 256), ("group3", 256))
"""Of each group of two convolutions: its key in the body, and its channels."""
_PATCH = 2
_LEAST = 5e-4
"""Added to a variance before it is divided by."""


class Airbench94(Network):
    """The network of airbench94; d = 256; with batch norm, colour images and 10 classes 1,971,650 parameters, of which
    288 are fixed, and 118,147,360 multiplications and additions for an image of 32 pixels.

    A 2×2 convolution whitens patches, three groups of two 3×3 convolutions follow, with max pooling and norm layers,
    everywhere with GELU; features are the largest values of each channel, over nine. Filters of the first layer are
    eigenvectors of the second moments of patches over all training images, and their negatives: fixed, they lie under
    `stats`. The 3×3 convolutions start by passing their input on, as far as that has channels. Batch norm has a bias
    and no weight, adds 1e-12 to variances, and moves its running statistics by 0.4 of the way a step; group and
    layer norm are the usual ones.

    Departs: the head has a bias, which starts at zero; patches are of all training images (the code: of 5,000), and the
    bias of the first layer is trained to the end (the code: for three epochs).
    Source: Jordan 2024, https://arxiv.org/abs/2404.00498, section 3 and its code, github.com/KellerJordan/
    cifar10-airbench (airbench94).
    """

    smallest: ClassVar[int] = 25
    learns: ClassVar[str | None] = (
        "sums over each client's training images, not augmented, of the products of each two values in a 2×2 patch of "
        "normalised pixels, and the number of patches: of colour images 79 numbers a client, once, before the first "
        "round"
    )

    @property
    def feature_size(self) -> int:
        """d."""
        return _GROUPS[-1][1]

    @property
    def _inputs(self) -> int:
        """Values in a patch."""
        return self.shape[0] * _PATCH**2

    def init(self, key: Tensor) -> Tree:
        """Draw initial weights of body and head; the head's bias is zero."""
        drawn = super().init(key)
        zeros = torch.zeros(self.num_classes, device=key.device)
        return {**drawn, "head": {**drawn["head"], "bias": zeros}}

    def init_body(self, key: Tensor) -> Tree:
        """Draw the bias of the first layer, whose filters are those of white pixels, and the convolutions."""
        white = torch.zeros(2 * self._inputs, self._inputs, device=key.device)
        for half, sign in zip(white.split(self._inputs), (1, -1), strict=True):  # in place: meta, see `keys`
            half.diagonal().fill_(sign / math.sqrt(1 + _LEAST))
        bias = _uniform(keys.fold(key, "whiten"), self._inputs, 2 * self._inputs)
        body: Tree = {"whiten": {"bias": bias, STATISTICS: {"weight": self._shaped(white)}}}
        inputs = 2 * self._inputs
        for name, width in _GROUPS:
            body[name] = {
                layer: {
                    "conv": {"weight": _passing(keys.fold(key, name + layer), width, channels)},
                    "norm": _norm_layer(self.norm, width, key.device),
                }
                for layer, channels in (("first", inputs), ("second", width))
            }
            inputs = width
        return body

    def summary(self, x: Tensor) -> Tensor:
        """Sum up products of values in a patch, each two once, and count patches: (s,) float64; 79 of colour images."""
        patches = tree.in_float64(F.unfold(x, _PATCH)).movedim(1, 2).flatten(0, 1)
        first, second = torch.triu_indices(self._inputs, self._inputs, device=patches.device)
        count = patches.new_full((1,), float(len(patches)))
        return torch.cat([(patches.T @ patches)[first, second], count])

    def started(self, total: Tensor) -> Tree:
        """Make the filters of what was summed up: eigenvectors by falling eigenvalue, each over the root of its
        eigenvalue and 5e-4, the largest entry positive.
        """
        moments = total.new_zeros(self._inputs, self._inputs)
        first, second = torch.triu_indices(self._inputs, self._inputs, device=total.device)
        moments[first, second] = moments[second, first] = total[:-1] / total[-1].clamp(min=1)
        values, vectors = torch.linalg.eigh(moments)
        rows: Tensor = vectors.T.flip(0) / (values.flip(0).clamp(min=0) + _LEAST).sqrt()[:, None]
        rows = (rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()).float()
        return {"whiten": {STATISTICS: {"weight": self._shaped(torch.cat([rows, -rows]))}}}

    def _shaped(self, rows: Tensor) -> Tensor:
        """Make filters, (2n, channels, 2, 2), of (2n, n) rows."""
        return rows.reshape(-1, self.shape[0], _PATCH, _PATCH)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The first layer and the groups; what is largest in a channel, over nine, is the last group's."""
        run = partial(_run_group, self.norm)
        groups = [Block(name, (name,), partial(run, name, name == _GROUPS[-1][0])) for name, _ in _GROUPS]
        return Block("whiten", ("whiten",), _whiten), *groups


def _uniform(key: Tensor, inputs: int, *shape: int) -> Tensor:
    """Draw weights uniform in ±1/sqrt(inputs): torch's default."""
    bound = 1 / math.sqrt(inputs)
    return keys.uniform(key, *shape).mul_(2 * bound).sub_(bound)


def _passing(key: Tensor, outputs: int, inputs: int) -> Tensor:
    """Draw a 3×3 convolution whose first outputs are its inputs: (outputs, inputs, 3, 3)."""
    weight = _uniform(key, 9 * inputs, outputs, inputs, 3, 3)
    weight[:inputs] = 0
    weight[:inputs, :, 1, 1].diagonal().fill_(1)
    return weight


def _norm_layer(kind: str, channels: int, device: torch.device) -> Tree:
    """Make a norm layer; batch norm has no weight."""
    layer = norm_layer(kind, channels, device)
    return {name: leaf for name, leaf in layer.items() if kind != "batch" or name != "weight"}


def _norm(kind: str, layer: Tree, x: Tensor) -> Tensor:
    return batch_norm(layer, x, momentum=0.4, eps=1e-12) if kind == "batch" else norm(kind, layer, x)


def _whiten(body: Tree, x: Tensor) -> Tensor:
    layer = body["whiten"]
    return F.gelu(F.conv2d(x, layer[STATISTICS]["weight"], layer["bias"]))


def _run_group(kind: str, name: str, last: bool, body: Tree, x: Tensor) -> Tensor:
    first, second = body[name]["first"], body[name]["second"]
    x = F.gelu(_norm(kind, first["norm"], F.max_pool2d(convolve(first["conv"], x, padding=1), 2)))
    x = F.gelu(_norm(kind, second["norm"], convolve(second["conv"], x, padding=1)))
    return x.amax((2, 3)) / 9 if last else x
