"""The networks by name, which of them fit which images, and what their bodies are made of.

`model.blocks` are the stages of a body, `block_of(model, path)` names the one a leaf belongs to, and `is_norm(path)`
tells norm layers from the others: `tree.split(params, is_norm)`. Keys of a body, block by block:

    linear, frozen          none: one block, `flat`, without weights
    mlp, adapter            hidden
    small_cnn, fedavg_cnn   conv1, conv2, hidden
    lenet5                  conv1, conv2, hidden1, hidden2
    light_cnn               raw, augmented (block `branches`); fusion
    resnet...               stem; stage1_1, stage1_2, ... (block `stage1`); stage2_1, ... (`stage2`); ...
    airbench94              whiten; group1; group2; group3
    mobilenet_v2            stem; stage1_1; stage2_1, stage2_2 (`stage2`); ... stage7_1; last

A hidden layer and a convolution of the small networks hold `weight` and `bias`; a branch holds such layers: `conv1`,
`conv2`, `scores`, and `model.branches` lists those that score images by themselves. The stem holds `conv` (no bias) and
`norm`; a residual unit holds such layers: `first`, `second`, `third` in resnet50, `shortcut` where its shape changes,
and `expand`, `depthwise`, `project` in mobilenet_v2. A `norm` holds `weight`, `bias` and, for batch norm, `stats`
(`mean`, `var`), with balanced statistics maybe `balance` and, under `stats`, `steps`; the trees of group and layer norm
are alike, and `model.norm` tells them apart. In airbench94 a group holds `first` and `second`, a `norm` of batch norm
no `weight`, and `whiten` has its filters under `stats`. Other networks without a stem have no norm layers: `--set
norm=...` changes nothing there.
"""

from __future__ import annotations

from bench import keys, tree
from bench.models.airbench import Airbench94
from bench.models.balanced import Balanced
from bench.models.layers import is_norm as is_norm
from bench.models.light import LightCNN
from bench.models.mobilenets import MobileNetV2
from bench.models.networks import MLP, Adapter, FedAvgCNN, Frozen, LeNet5, Linear, SmallCNN
from bench.models.networks import Block as Block
from bench.models.networks import Model as Model
from bench.models.networks import Network as Network
from bench.models.networks import block_of as block_of
from bench.models.resnets import (
    ResNet8,
    ResNet10,
    ResNet18,
    ResNet18For64,
    ResNet20,
    ResNet32,
    ResNet34,
    ResNet50,
    ResNet56,
)
from bench.plugins.names import near
from bench.plugins.registry import MODELS as MODELS


class BadModel(ValueError):
    """No such model, or not for images of this size."""


BUILT_IN: dict[str, type[Network]] = {
    "linear": Linear,
    "mlp": MLP,
    "small_cnn": SmallCNN,
    "lenet5": LeNet5,
    "fedavg_cnn": FedAvgCNN,
    "light_cnn": LightCNN,
    "resnet8": ResNet8,
    "resnet10": ResNet10,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "resnet32": ResNet32,
    "resnet34": ResNet34,
    "resnet56": ResNet56,
    "resnet18_64": ResNet18For64,
    "resnet50": ResNet50,
    "mobilenet_v2": MobileNetV2,
    "airbench94": Airbench94,
    "frozen": Frozen,
    "adapter": Adapter,
}
for _name, _network in BUILT_IN.items():
    MODELS.add(_name, _network)


def build(
    name: str, num_classes: int, shape: tuple[int, ...], norm: str = "group", balanced: Balanced | None = None
) -> Model:
    """Build a model for images, or other examples, of a shape; `balanced` says how running statistics move.

    Raises:
        BadModel: No such name, images too small for it, or no images.
    """
    if name not in MODELS:
        raise BadModel(f"no model is called {name!r}; {near(name, MODELS)}")
    network: type[Network] = MODELS[name]
    if len(shape) != 3 and not network.any_shape:
        these = f"these examples are of shape {' x '.join(map(str, shape))}"
        raise BadModel(f"{name} needs images (channels, height, width), and {these}; choose linear or mlp")
    if min(shape[1:], default=1) < network.smallest:
        raise BadModel(f"{name} needs images of at least {network.smallest} pixels, these have {shape[1]}×{shape[2]}")
    return network(name, num_classes, shape, norm, balanced)


def has_norm(model: Model) -> bool:
    """Tell whether a model has norm layers."""
    return any(map(is_norm, tree.flatten(model.init(keys.key(0, "meta")))))  # shapes only: nothing is drawn


def has_body(model: Model) -> bool:
    """Tell whether a model has a body of its own, apart from the head."""
    return not isinstance(model, Linear)
