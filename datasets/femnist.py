"""FEMNIST: handwritten digits and letters of 28 x 28 pixels, as LEAF cuts them from NIST's forms, by writer.

Sebastian Caldas, Sai Meher Karthik Duddu, Peter Wu, Tian Li, Jakub Konečný, H. Brendan McMahan, Virginia Smith, Ameet
Talwalkar. LEAF: a benchmark for federated settings. 2018. https://arxiv.org/abs/1812.01097
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bench import DataDamaged, DataMissing, Dataset, Labels, Splits, register
from bench.system import reading

CLASSES, SIDE = 62, 28

Images = tuple[Tensor, Tensor]
"""(n, 1, 28, 28) uint8 and (n,) int64 labels of one writer."""


@register("femnist")
@dataclass(frozen=True, kw_only=True)
class Femnist(Dataset):
    """Whatever sample of FEMNIST lies in `femnist/train` and `femnist/test`, in LEAF's own JSON; writers are clients.

    Classes 0-9 are digits, 10-35 capital and 36-61 small letters; ink is dark, paper 255. Only writers with training
    and test images are kept, numbered by name; images are in LEAF's order within a writer. LEAF draws at random and
    publishes no checksums: compare results of one sample only, they have the same split fingerprint.

    Normalised by the mean and standard deviation of the training pixels of a sample of 105 writers. `quick` has a tenth
    of the writers in each of 100 rounds, and batches of 10: a writer has some 140 images.
    """

    num_classes: ClassVar[int] = CLASSES
    image_shape: ClassVar[tuple[int, int, int]] = (1, SIDE, SIDE)
    mean: ClassVar[tuple[float, ...]] = (0.9612,)
    std: ClassVar[tuple[float, ...]] = (0.1656,)
    flip: ClassVar[bool] = False
    tail: ClassVar[Literal["made", "natural", "either"]] = "natural"
    own_clients: ClassVar[bool] = True
    own_tests: ClassVar[bool] = True
    quick: ClassVar[Mapping[str, object]] = MappingProxyType({"participation": 0.1, "batch_size": 10, "rounds": 100})
    size: ClassVar[str] = "what LEAF's script draws"
    licence: ClassVar[str] = "LEAF: BSD 2-Clause; NIST Special Database 19: public domain"
    citation: ClassVar[str] = (
        "Caldas et al., LEAF: a benchmark for federated settings, 2018, https://arxiv.org/abs/1812.01097"
    )
    source: ClassVar[str] = "https://github.com/TalwalkarLab/leaf, data/femnist"

    def load(self, root: Path) -> Splits:
        """Read all files of both parts, packed by xz or gzip or not, in any order."""
        folder = root / "femnist"
        files = [(part, file) for part in ("train", "test") for file in sorted(_files(folder / part))]
        if {part for part, _ in files} != {"train", "test"}:
            raise DataMissing(
                f"femnist: {folder} has no train/*.json and test/*.json, which LEAF's script draws: {_by_hand(root)}"
            )
        states = [file.stat() for _, file in files]
        return _read(folder, tuple(files), tuple((state.st_size, state.st_mtime_ns) for state in states))

    def labels(self, root: Path) -> Labels:
        """Read the labels, which lie in the same files."""
        return self.load(root).labels


def _by_hand(root: Path) -> str:
    return (
        "run './preprocess.sh -s niid --sf 0.05 -k 0 -t sample' in data/femnist of github.com/TalwalkarLab/leaf, and "
        f"copy its data/train and data/test to {root / 'femnist'}"
    )


def _files(folder: Path) -> list[Path]:
    return [file for ending in ("*.json", "*.json.xz", "*.json.gz") for file in folder.glob(ending)]


@lru_cache(maxsize=1)
def _read(folder: Path, files: tuple[tuple[str, Path], ...], states: tuple[tuple[int, int], ...]) -> Splits:
    """Read files once for labels and images; they are known by their sizes and dates."""
    writers: dict[str, dict[str, Images]] = {"train": {}, "test": {}}
    origin: dict[tuple[str, str], Path] = {}
    for part, file in files:
        for writer, images in _parse(file).items():
            if writer in writers[part]:
                raise _damaged(file, f"writer {writer} is in {origin[part, writer].name} as well")
            writers[part][writer] = images
            origin[part, writer] = file
    both = sorted(writers["train"].keys() & writers["test"].keys())
    if not both:
        raise DataDamaged(f"no writer has training images in {folder / 'train'} and test images in {folder / 'test'}")
    x, y, users = {}, {}, {}
    for part in ("train", "test"):
        chosen = [writers[part].pop(writer) for writer in both]
        x[part] = torch.cat([pixels for pixels, _ in chosen])
        y[part] = torch.cat([classes for _, classes in chosen])
        users[part] = torch.arange(len(both)).repeat_interleave(torch.tensor([len(classes) for _, classes in chosen]))
    return Splits(x["train"], y["train"], x["test"], y["test"], users["train"], users["test"])


def _parse(file: Path) -> dict[str, Images]:
    """Read the writers of a file that have images.

    Raises:
        DataDamaged: It is cut short, or not what LEAF writes.
    """
    try:
        content = json.loads(reading.unpacked(reading.contents(file), file.suffix))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, f"it cannot be read ({error})") from error
    if not isinstance(content, dict) or not {"users", "num_samples", "user_data"} <= set(content):
        raise _damaged(file, "it must have users, num_samples and user_data")
    users, sizes, data = content["users"], content["num_samples"], content["user_data"]
    if not (isinstance(users, list) and isinstance(sizes, list) and isinstance(data, dict)):
        raise _damaged(file, "users and num_samples must be lists, and user_data an object")
    if len(users) != len(sizes) or sorted(map(str, users)) != sorted(data):
        raise _damaged(file, "users, num_samples and user_data do not name the same writers, each once")
    found = {writer: _images(file, writer, data[writer], size) for writer, size in zip(users, sizes, strict=True)}
    return {writer: images for writer, images in found.items() if len(images[1])}


def _images(file: Path, writer: str, data: Any, size: Any) -> Images:
    """Check the images of a writer, and bring them to uint8."""
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in "xy"):
        raise _damaged(file, f"writer {writer} must have lists x and y")
    try:
        x, y = np.array(data["x"]), np.array(data["y"])
    except ValueError as error:
        raise _damaged(file, f"writer {writer} has images that are not all of {SIDE * SIDE} numbers") from error
    if (len(data["x"]), len(data["y"])) != (size, size):
        found = f"{len(data['x'])} images and {len(data['y'])} labels"
        raise _damaged(file, f"writer {writer} has {found}, and num_samples says {size}")
    if size and (x.shape != (size, SIDE * SIDE) or x.dtype.kind not in "iuf"):
        raise _damaged(file, f"writer {writer} has images that are not all of {SIDE * SIDE} numbers")
    if size and (y.shape != (size,) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= CLASSES):
        raise _damaged(file, f"writer {writer} has a label that is not in 0..{CLASSES - 1}")
    pixels = np.round(255 * x)
    if not ((abs(255 * x - pixels) < 1e-6) & (pixels >= 0) & (pixels <= 255)).all():
        raise _damaged(file, f"writer {writer} has a pixel that is no multiple of 1/255 in 0..1")
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, SIDE, SIDE)
    return images, torch.from_numpy(y.astype(np.int64))


def _damaged(file: Path, what: str) -> DataDamaged:
    return DataDamaged(f"{file}: {what}; copy it again from where LEAF's script wrote it")
