"""The networks by name, which of them fit which images, and what their bodies are made of.

`model.blocks` are the stages of a body, `block_of(model, path)` names the one a leaf belongs to, and `is_norm(path)`
tells norm layers from the others: `tree.split(params, is_norm)`. Keys of a body, block by block:

    linear, frozen          none: one block, `flat`, without weights
    mlp                     hidden
    small_cnn, fedavg_cnn   conv1, conv2, hidden
    resnet...               stem; stage1_1, stage1_2, ... (block `stage1`); stage2_1, ... (`stage2`); ...

A hidden layer and a convolution of the small networks hold `weight` and `bias`. The stem holds `conv` (no bias) and
`norm`; a residual unit holds such layers: `first`, `second`, `third` in resnet50, and `shortcut` where its shape
changes. A `norm` holds `weight`, `bias` and, for batch norm, `stats` (`mean`, `var`).
"""

from __future__ import annotations

from collections.abc import Callable

from bench.models.layers import is_norm as is_norm
from bench.models.networks import MLP, FedAvgCNN, Frozen, Linear, SmallCNN
from bench.models.networks import Block as Block
from bench.models.networks import Model as Model
from bench.models.networks import block_of as block_of
from bench.models.resnets import BottleneckResNet, ResNet, ResNet18For64


class BadModel(ValueError):
    """No such model, or not for images of this size."""


MODELS: dict[str, Callable[[int, tuple[int, ...], str], Model]] = {
    "linear": lambda c, s, n: Linear("linear", c, s, n),
    "mlp": lambda c, s, n: MLP("mlp", c, s, n),
    "small_cnn": lambda c, s, n: SmallCNN("small_cnn", c, s, n),
    "fedavg_cnn": lambda c, s, n: FedAvgCNN("fedavg_cnn", c, s, n),
    "resnet8": lambda c, s, n: ResNet("resnet8", c, s, n, (1, 1, 1), (64, 128, 256)),
    "resnet18": lambda c, s, n: ResNet("resnet18", c, s, n, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet32": lambda c, s, n: ResNet("resnet32", c, s, n, (5, 5, 5), (16, 32, 64)),
    "resnet34": lambda c, s, n: ResNet("resnet34", c, s, n, (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet56": lambda c, s, n: ResNet("resnet56", c, s, n, (9, 9, 9), (16, 32, 64)),
    "resnet18_64": lambda c, s, n: ResNet18For64("resnet18_64", c, s, n, (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet50": lambda c, s, n: BottleneckResNet("resnet50", c, s, n, (3, 4, 6, 3), (64, 128, 256, 512)),
    "frozen": lambda c, s, n: Frozen("frozen", c, s, n),
}
"""Name to builder: (classes, image shape, norm) -> model."""

_ANY_SHAPE = ("linear", "mlp", "frozen")
"""Models that flatten what they are given."""
_SMALLEST = {"fedavg_cnn": 16, "small_cnn": 8, "resnet18": 8, "resnet34": 8, "resnet18_64": 16, "resnet50": 32}


def build(name: str, num_classes: int, shape: tuple[int, ...], norm: str = "group") -> Model:
    """Build a model for images, or other examples, of a shape.

    Raises:
        BadModel: No such name, images too small for it, or no images.
    """
    if name not in MODELS:
        raise BadModel(f"no model is called {name!r}; there are {', '.join(MODELS)}")
    if len(shape) != 3 and name not in _ANY_SHAPE:
        these = f"these examples are of shape {' x '.join(map(str, shape))}"
        raise BadModel(f"{name} needs images (channels, height, width), and {these}; choose linear or mlp")
    if min(shape[1:], default=1) < _SMALLEST.get(name, 1):
        raise BadModel(f"{name} needs images of at least {_SMALLEST[name]} pixels, these have {shape[1]}×{shape[2]}")
    return MODELS[name](num_classes, shape, norm)


def is_convolutional(model: Model) -> bool:
    """Tell whether most of a model's work is convolutions: then stacking clients does not pay on a CPU."""
    return isinstance(model, SmallCNN | FedAvgCNN | ResNet)


def has_body(model: Model) -> bool:
    """Tell whether a model has a body of its own, apart from the head."""
    return not isinstance(model, Linear)
