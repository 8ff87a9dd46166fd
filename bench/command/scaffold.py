"""The file that `bench new` writes: a plug-in that keeps the contract and does the default thing."""

from __future__ import annotations

import keyword
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from bench.plugins.names import with_article
from bench.plugins.registry import ALGORITHMS, DATASETS, MODELS, PARTS, Registry
from bench.protocol.settings import BadConfig

_ALGORITHM = '''"""{Class}: one line on what it does that others do not.

Authors. Title. Venue year. https://link (algorithm or section)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Passes         E + extra_epochs
Departs        nowhere
"""

from dataclasses import dataclass

from bench import Algorithm, LocalData, Task, Tree, register
from bench.ranges import Epochs


@register("{name}")
@dataclass(frozen=True, kw_only=True)
class {Class}(Algorithm):
    """What is not written here is the default of `Algorithm`: the server averages a body and a head."""

    extra_epochs: Epochs = 0
    """Epochs on top of the setting's: an example of a field, which `{name}(extra_epochs=1)` sets."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the received model on the client's examples; give what is sent, and what the client keeps."""
        return task.sgd(task.loss, shared, data.batches(task.epochs + self.extra_epochs)), private
'''

_PART = '''"""{Class}: one line on what it changes in any method; as written, label smoothing.

Authors. Title. Venue year. https://link (equation)

Kind           loss
Learns         nothing beyond updates
Departs        nowhere
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Loss, Task, register
from bench.losses import mean
from bench.ranges import Share


@register("{name}")
@dataclass(frozen=True, kw_only=True)
class {Class}(Loss):
    """A loss takes the place of cross-entropy; the other kinds are `Correction`, `Aggregation` and `Channel`."""

    neutral: ClassVar[Mapping[str, object]] = {{"smoothing": 0.0}}

    smoothing: Share = 0.1
    """Of the label, what all classes have alike: `{name}(smoothing=0.2)` sets it."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        """Give the mean over the real examples of a batch; `counts` are the client's class counts, (C,)."""
        apart = F.cross_entropy(logits.float(), batch.y, reduction="none", label_smoothing=self.smoothing)
        return mean(apart, batch)
'''

_DATASET = '''"""{Class}: one line on what the images show.

Authors. Title. Venue year. https://link
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from bench import Dataset, Splits, keys, register


@register("{name}")
@dataclass(frozen=True, kw_only=True)
class {Class}(Dataset):
    """Noisy pictures of ten random patterns, made on the spot; others would read files below `root`."""

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.22,)
    flip: ClassVar[bool] = False
    size: ClassVar[str] = "nothing to download"
    licence: ClassVar[str] = "public domain"
    citation: ClassVar[str] = "none"
    source: ClassVar[str] = "made on the spot"

    def load(self, root: Path) -> Splits:
        """Give the official parts; if files are missing, raise `bench.DataMissing` and say what to fetch."""
        train_x, train_y = self._draw("train", 100)
        test_x, test_y = self._draw("test", 30)
        return Splits(train_x, train_y, test_x, test_y)

    def _draw(self, part: str, each: int) -> tuple[Tensor, Tensor]:
        """Draw `each` images of every class: (N, 1, 8, 8) uint8 and (N,) int64."""
        labels = torch.arange(self.num_classes).repeat_interleave(each)
        key = keys.fold(keys.key(0), "{name}")
        patterns = keys.uniform(keys.fold(key, "patterns"), self.num_classes, 1, 8, 8)
        noise = keys.uniform(keys.fold(key, part), len(labels), 1, 8, 8)
        return (255 * (0.5 * patterns[labels] + 0.5 * noise)).to(torch.uint8), labels
'''

_MODEL = '''"""{Class}: one line on what it is made of.

Authors. Title. Venue year. https://link (table or section)
"""

from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bench import Block, Network, Tree, keys, register
from bench.models.layers import NormedConvolution, apply_linear, linear


@register("{name}")
class {Class}(Network):
    """A convolution with a norm layer, averaged, and 64 ReLU units; a linear head is on top of all."""

    feature_size: ClassVar[int] = 64
    smallest: ClassVar[int] = 4

    @property
    def filters(self) -> NormedConvolution:
        """The convolution, for images of `self.shape`; which kind of norm layer follows it is the setting's choice."""
        return NormedConvolution("conv", self.norm, inputs=self.shape[0], outputs=32, size=3, stride=2)

    def init_body(self, key: Tensor) -> Tree:
        """Draw the body's weights, each layer's from a key of its own."""
        return {{
            "conv": self.filters.init(keys.fold(key, "conv")),
            "hidden": linear(keys.fold(key, "hidden"), 64, 32 * 4 * 4),
        }}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Name the stages one after the other, the keys that each reads, and what it does."""
        return Block("conv", ("conv",), partial(filtered, self.filters)), Block("hidden", ("hidden",), hidden)


def filtered(filters: NormedConvolution, body: Tree, x: Tensor) -> Tensor:
    """(B, channels, height, width) -> (B, 32, 4, 4)."""
    return F.adaptive_avg_pool2d(F.relu(filters(body, x)), 4)


def hidden(body: Tree, x: Tensor) -> Tensor:
    """(B, 32, 4, 4) -> (B, 64)."""
    return F.relu(apply_linear(body["hidden"], x.flatten(1)))
'''

_TEMPLATES: dict[str, tuple[str, Registry[Any]]] = {
    "algorithm": (_ALGORITHM, ALGORITHMS),
    "part": (_PART, PARTS),
    "dataset": (_DATASET, DATASETS),
    "model": (_MODEL, MODELS),
}


def write(kind: str, name: str, folder: Path) -> Path:
    """Write a plug-in file.

    Args:
        kind: "algorithm", "part", "dataset" or "model".
        name: Of the plug-in and its file; "-" is written "_".
        folder: Made if it is not there.

    Raises:
        BadConfig: The name cannot be a module's, is taken, is a package's, or the file is there or cannot be written.
    """
    name = name.replace("-", "_")
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or name.startswith("_"):
        raise BadConfig(f"{name!r} cannot name a file and a class; use lower-case letters, digits and _")
    template, taken = _TEMPLATES[kind]
    if name in taken:
        raise BadConfig(f"there is {with_article(kind)} called {name!r} already; choose another name")
    if name == "bench" or name in sys.stdlib_module_names or name in packages_distributions():
        raise BadConfig(f"a file called {name}.py would hide the package {name} from this suite; choose another name")
    file = folder / f"{name}.py"
    content = template.format(name=name, Class="".join(map(str.capitalize, name.split("_"))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(content)
    except FileExistsError as error:
        raise BadConfig(f"{file} is there already and is left alone; choose another name or --out") from error
    except OSError as error:
        raise BadConfig(f"{file} cannot be written: {error.strerror}; choose another --out") from error
    return file
