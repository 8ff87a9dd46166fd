"""The file that `bench new` writes: a plug-in that keeps the contract and does the default thing."""

from __future__ import annotations

import keyword
from pathlib import Path

from bench.protocol.settings import BadConfig
from bench.registry import ALGORITHMS, DATASETS

_ALGORITHM = '''"""{Class}: one line on what it does that others do not.

Authors. Title. Venue year. https://link (algorithm or section)

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        nowhere
"""

from dataclasses import dataclass

from bench import Algorithm, LocalData, Task, Tree, register


@register("{name}")
@dataclass(frozen=True, kw_only=True)
class {Class}(Algorithm):
    """What is not written here is the default of `Algorithm`: the server averages a body and a head."""

    extra_epochs: int = 0
    """Epochs on top of the setting's: an example of a field, which `{name}(extra_epochs=1)` sets."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train the received model on the client's examples; give what is sent, and what the client keeps."""
        return task.sgd(task.loss, shared, data.batches(task.epochs + self.extra_epochs)), private
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

_TEMPLATES = {"algorithm": _ALGORITHM, "dataset": _DATASET}


def write(kind: str, name: str, folder: Path) -> Path:
    """Write a plug-in file.

    Args:
        kind: "algorithm" or "dataset".
        name: Of the plug-in and its file; "-" is written "_".
        folder: Made if it is not there.

    Raises:
        BadConfig: The name cannot be a module's, is taken, or the file is there or cannot be written.
    """
    name = name.replace("-", "_")
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or name.startswith("_"):
        raise BadConfig(f"{name!r} cannot name a file and a class; use lower-case letters, digits and _")
    if name in (ALGORITHMS if kind == "algorithm" else DATASETS):
        raise BadConfig(f"there is a {kind} called {name!r} already; choose another name")
    file = folder / f"{name}.py"
    content = _TEMPLATES[kind].format(name=name, Class="".join(map(str.capitalize, name.split("_"))))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(content)
    except FileExistsError as error:
        raise BadConfig(f"{file} is there already and is left alone; choose another name or --out") from error
    except OSError as error:
        raise BadConfig(f"{file} cannot be written: {error.strerror}; choose another --out") from error
    return file
