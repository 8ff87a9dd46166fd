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
    vit_tiny, vit_mini      embed; block1; block2; ...; last

A hidden layer and a convolution of the small networks hold `weight` and `bias`; a branch holds such layers: `conv1`,
`conv2`, `scores`, and `model.branches` lists those that score images by themselves. The stem holds `conv` (no bias) and
`norm`; a residual unit holds such layers: `first`, `second`, `third` in resnet50, `shortcut` where its shape changes,
and `expand`, `depthwise`, `project` in mobilenet_v2. A `norm` holds `weight`, `bias` and, for batch norm, `stats`
(`mean`, `var`), with balanced statistics maybe `balance` and, under `stats`, `steps`; the trees of group and layer norm
are alike, and `model.norm` tells them apart. In airbench94 a group holds `first` and `second`, a `norm` of batch norm
no `weight`, and `whiten` has its filters under `stats`. In a transformer `embed` holds `patch`, `tokens` and
`positions`, a block `attention` (`norm`, `inputs`, `output`) and `dense` (`norm`, `hidden`, `output`), `last` a `norm`;
it has layer norm and no other. `model.tokens` says of how many tokens features are made. Other networks without a stem
have no norm layers: `--set norm=...` changes nothing there.
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
from bench.models.transformers import ViTMini, ViTTiny
from bench.plugins.names import near
from bench.plugins.registry import MODELS as MODELS


class BadModel(ValueError):
    """No such model, not for images of this size, or not with these norm layers."""


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
    "vit_tiny": ViTTiny,
    "vit_mini": ViTMini,
    "frozen": Frozen,
    "adapter": Adapter,
}
for _name, _network in BUILT_IN.items():
    MODELS.add(_name, _network)


def build(
    name: str, num_classes: int, shape: tuple[int, ...], norm: str | None = None, balanced: Balanced | None = None
) -> Model:
    """Build a model for images, or other examples, of a shape.

    Args:
        name: In `MODELS`.
        num_classes: C.
        shape: Channels, height, width of an image; or the shape of another example.
        norm: Kind of norm layers; None: group norm, or what the network has instead (`usual_norm`).
        balanced: How running statistics of batch norm move.

    Raises:
        BadModel: No such name, images too small for it, no images, or norm layers that it cannot have.
    """
    if name not in MODELS:
        raise BadModel(f"no model is called {name!r}; {near(name, MODELS)}")
    network: type[Network] = MODELS[name]
    if len(shape) != 3 and not network.any_shape:
        these = f"these examples are of shape {' x '.join(map(str, shape))}"
        raise BadModel(f"{name} needs images (channels, height, width), and {these}; choose linear or mlp")
    if min(shape[1:], default=1) < network.smallest:
        raise BadModel(f"{name} needs images of at least {network.smallest} pixels, these have {shape[1]}×{shape[2]}")
    norm = usual_norm(name) if norm is None else norm
    if norm not in network.norms:
        raise BadModel(f"{name} has norm = {' or '.join(network.norms)}, not {norm}; leave it out")
    return network(name, num_classes, shape, norm, balanced)


def usual_norm(name: str, wanted: str = "group") -> str:
    """Give the wanted kind of norm layers if a network can have it, else its first one."""
    norms: tuple[str, ...] = MODELS[name].norms
    return wanted if wanted in norms else norms[0]


def has_norm(model: Model) -> bool:
    """Tell whether a model has norm layers."""
    return any(map(is_norm, tree.flatten(model.init(keys.key(0, "meta")))))  # shapes only: nothing is drawn


def has_body(model: Model) -> bool:
    """Tell whether a model has a body of its own, apart from the head."""
    return not isinstance(model, Linear)
