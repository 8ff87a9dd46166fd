"""What a network is, and the plain ones: a body that makes features and a linear head that makes logits.

A model is `{"body": ..., "head": {"weight": (C, d), "bias": (C,)}}`. Initial weights are a function of a key. Features
are non-negative (the body ends in a ReLU and, for residual networks, average pooling), except for `linear` and
`frozen`, which pass on what they are given, and networks of tokens, which end in a norm layer. None of the plain ones
here has norm layers; where there are some, they are GroupNorm unless layer or batch norm is asked for. Features of a
network of two tokens are both side by side, so that one linear head on them is the mean of a head on either: d is
`tokens` times what one has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor

from bench import keys
from bench.models.balanced import Balanced
from bench.models.layers import NORMS, apply_linear, convolution, convolve, linear
from bench.tree import Tree


@dataclass(frozen=True)
class Block:
    """A stage of a body; all stages one after the other make features of images."""

    name: str
    keys: tuple[str, ...]
    """Of the body: the sub-trees that it reads, and no other block does."""
    run: Callable[[Tree, Tensor], Tensor]
    """(body, (B, ...)) -> (B, ...): the body may lack the keys of other blocks. The first block is given images, the
    last gives (B, d)."""


class Model(Protocol):
    """What the rest of the suite knows of a network."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """Key in `MODELS`."""

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height, width of an image; or the shape of another example."""

    @property
    def norm(self) -> str:
        """One of `bench.models.layers.NORMS`; of a network without norm layers it says nothing."""

    @property
    def balanced(self) -> Balanced | None:
        """As `Network` has it."""

    @property
    def feature_size(self) -> int:
        """d."""

    @property
    def tokens(self) -> int:
        """As `Network` has it."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Stages of the body, from the images on, at least one."""

    @property
    def branches(self) -> tuple[Block, ...]:
        """As `Network` has them; mostly none."""

    @property
    def learns(self) -> str | None:
        """What clients tell of their training images before the first round, in words; None: nothing."""

    def summary(self, x: Tensor) -> Tensor:
        """What of it is said of some images: (s,) float64, added up over all."""

    def started(self, total: Tensor) -> Tree:
        """Leaves of the body that follow from what all clients say together, (s,) float64 on the host."""

    def init(self, key: Tensor) -> Tree:
        """Draw initial weights: {"body": ..., "head": {"weight": (C, d), "bias": (C,)}}, float32."""

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, d)."""

    def logits(self, head: Tree, z: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""

    def torchvision(self, place: str) -> str:
        """Name what torchvision calls a leaf of the body: `conv1.weight` for `stem/conv/weight`."""


@dataclass(frozen=True)
class Network(ABC):
    """What all networks share: a linear head."""

    version: ClassVar[int] = 1
    """Of a plug-in: raised when the same key gives other weights, or the same weights other features."""
    smallest: ClassVar[int] = 1
    """Pixels that images have at least."""
    learns: ClassVar[str | None] = None
    """Where weights start from a sum over training images: what that tells the server, in words. Each training client
    sends its `summary` once, before the first round, and whatever a method begins with has what `started` makes of the
    sum. None: nothing is asked."""
    any_shape: ClassVar[bool] = False
    """Whether it flattens what it is given, and takes other examples than images."""
    norms: ClassVar[tuple[str, ...]] = NORMS
    """Kinds of norm layers that it can have, or would if it had some; the first where nothing is said."""
    tokens: ClassVar[int] = 1
    """Parts of the features, of equal size and side by side, that a head of its own may be on: mostly one, all of them.
    """

    name: str
    num_classes: int
    shape: tuple[int, ...]
    """Channels, height, width of an image; `linear`, `mlp` and `frozen` take examples of any shape."""
    norm: str = "group"
    balanced: Balanced | None = None
    """How running statistics of batch norm move; None: by one momentum."""

    @property
    @abstractmethod
    def feature_size(self) -> int:
        """d."""

    @abstractmethod
    def init_body(self, key: Tensor) -> Tree:
        """Draw the body's initial weights."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """Stages of the body, made anew whenever they are asked for: pickles of a network stay small."""

    @property
    def branches(self) -> tuple[Block, ...]:
        """Parts of the body side by side that score images by themselves, (B, C) each: the first is meant for images as
        they are, the second for augmented ones. By default there are none.
        """
        return ()

    def features(self, body: Tree, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, d)."""
        for block in self.blocks:
            x = block.run(body, x)
        return x

    def init(self, key: Tensor) -> Tree:
        """Draw initial weights of body and head."""
        head = linear(keys.fold(key, "head"), self.num_classes, self.feature_size)
        drawn = {"body": self.init_body(keys.fold(key, "body")), "head": head}
        return drawn if self.balanced is None else self.balanced.prepared(drawn, self.num_classes)

    def summary(self, x: Tensor) -> Tensor:
        """Give what is added up over training images, of some of them, in `tree.in_float64`: (B, ...) -> (s,)."""
        raise NotImplementedError(f"{self.name} asks nothing of images")

    def started(self, total: Tensor) -> Tree:
        """Give the leaves of the body, float32, that follow from the sum over all training images, (s,) float64 on the
        host.
        """
        raise NotImplementedError(f"{self.name} asks nothing of images")

    def logits(self, head: Tree, z: Tensor) -> Tensor:
        """(B, d) -> (B, C)."""
        return apply_linear(head, z)

    def torchvision(self, place: str) -> str:
        """Name a leaf of the body as flattened trees do: torchvision has no such network."""
        return f"body/{place}"


def block_of(model: Model, path: str) -> str:
    """Name the block that a leaf belongs to, or "head".

    Args:
        model: Whose leaf it is.
        path: As `tree.flatten` gives it, from the model's `body` or `head` on or from further out
            ("body/stage1_1/first/conv/weight", "teacher/head/bias").

    Raises:
        LookupError: The model has no such leaf.
    """
    *inside, _ = path.split("/")
    if "body" in inside[:-1]:
        key = inside[inside.index("body") + 1]
        for block in model.blocks:
            if key in block.keys:
                return block.name
    elif "head" in inside:
        return "head"
    known = [f"body/{key}" for block in model.blocks for key in block.keys]
    raise LookupError(f"{path} is no leaf of {model.name}; its leaves lie below {', '.join([*known, 'head'])}")


class Linear(Network):
    """Softmax regression on pixels: no body; d = channels · height · width."""

    any_shape: ClassVar[bool] = True

    @property
    def feature_size(self) -> int:
        """d."""
        return math.prod(self.shape)

    def init_body(self, key: Tensor) -> Tree:
        """Nothing to draw."""
        return {}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One, without weights."""
        return (Block("flat", (), _flat),)


class Frozen(Network):
    """The head alone, on features made beforehand (`bench data embed`): d = channels · height · width.

    The body is empty and counts as one that nobody trains: classifier-level methods run as they are, and methods that
    differ only in how they train the body coincide. FedBABU, whose head is fixed, learns in its fine-tuning only.
    """

    any_shape: ClassVar[bool] = True

    @property
    def feature_size(self) -> int:
        """d."""
        return math.prod(self.shape)

    def init_body(self, key: Tensor) -> Tree:
        """Nothing to draw."""
        return {}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One, without weights."""
        return (Block("flat", (), _flat),)


class MLP(Network):
    """One hidden layer of 64 ReLU units; d = 64."""

    any_shape: ClassVar[bool] = True
    width: ClassVar[int] = 64

    @property
    def feature_size(self) -> int:
        """d."""
        return self.width

    def init_body(self, key: Tensor) -> Tree:
        """Draw the hidden layer."""
        return {"hidden": linear(key, self.width, math.prod(self.shape))}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One."""
        return (_dense("hidden"),)


class Adapter(MLP):
    """One hidden layer of 256 ReLU units, on features made beforehand (`bench data embed`); d = 256.

    Of 1,280 features and 100 classes 353,636 parameters.
    """

    width: ClassVar[int] = 256


class SmallCNN(Network):
    """Two 3×3 convolutions of 16 and 32 channels, each with ReLU and 2×2 max pooling, then 64 ReLU units; d =
    64.

    For 8×8 and 28×28 images.
    """

    smallest: ClassVar[int] = 8

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

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Two convolutions and the hidden layer."""
        return _pooled("conv1", padding=1), _pooled("conv2", padding=1), _dense("hidden")


class FedAvgCNN(Network):
    """The network of the FedAvg paper in its common form: 5×5 convolutions of 32 and 64 channels without
    padding, each with ReLU and 2×2 max pooling, then 512 ReLU units; d = 512; 878,538 parameters at 3×32×32
    and 10 classes.

    Source: McMahan et al. 2017, https://arxiv.org/abs/1602.05629, section 3.
    """

    smallest: ClassVar[int] = 16

    @property
    def feature_size(self) -> int:
        """d."""
        return 512

    def init_body(self, key: Tensor) -> Tree:
        """Draw two convolutions and the hidden layer."""
        return {
            "conv1": convolution(keys.fold(key, 1), 32, self.shape[0], 5, bias=True),
            "conv2": convolution(keys.fold(key, 2), 64, 32, 5, bias=True),
            "hidden": linear(keys.fold(key, 3), 512, 64 * _left(self.shape)),
        }

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Two convolutions and the hidden layer."""
        return _pooled("conv1", padding=0), _pooled("conv2", padding=0), _dense("hidden")


class LeNet5(Network):
    """LeNet-5 as federated papers have it: 5×5 convolutions of 6 and 16 channels without padding, each with ReLU and
    2×2 max pooling, then 120 and 84 ReLU units; d = 84.

    With 10 classes 62,006 parameters at 3×32×32, 61,706 at 1×32×32 and 44,426 at 1×28×28. The original has sigmoids,
    trained subsampling, a sparse second convolution and a head of radial basis functions.
    Source: LeCun et al. 1998, https://doi.org/10.1109/5.726791, section II B.
    """

    smallest: ClassVar[int] = 16

    @property
    def feature_size(self) -> int:
        """d."""
        return 84

    def init_body(self, key: Tensor) -> Tree:
        """Draw two convolutions and two hidden layers."""
        return {
            "conv1": convolution(keys.fold(key, 1), 6, self.shape[0], 5, bias=True),
            "conv2": convolution(keys.fold(key, 2), 16, 6, 5, bias=True),
            "hidden1": linear(keys.fold(key, 3), 120, 16 * _left(self.shape)),
            "hidden2": linear(keys.fold(key, 4), 84, 120),
        }

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Two convolutions and two hidden layers."""
        convolutions = _pooled("conv1", padding=0), _pooled("conv2", padding=0)
        return *convolutions, _dense("hidden1"), _dense("hidden2")


def _left(shape: tuple[int, ...]) -> int:
    """Count the pixels that two 5×5 convolutions without padding, each with 2×2 pooling, leave of an image."""
    height, width = (((side - 4) // 2 - 4) // 2 for side in shape[1:])
    return height * width


# What a stage does --------------------------------------------------------------------------------


def _dense(key: str) -> Block:
    return Block(key, (key,), partial(_run_dense, key))


def _pooled(key: str, padding: int) -> Block:
    return Block(key, (key,), partial(_run_pooled, key, padding))


def _flat(body: Tree, x: Tensor) -> Tensor:
    return x.flatten(1)


def _run_dense(key: str, body: Tree, x: Tensor) -> Tensor:
    return F.relu(apply_linear(body[key], x.flatten(1)))


def _run_pooled(key: str, padding: int, body: Tree, x: Tensor) -> Tensor:
    # The same values and gradients as of ReLU before pooling, which has four times as many to look at.
    return F.relu(F.max_pool2d(convolve(body[key], x, padding=padding), 2))
