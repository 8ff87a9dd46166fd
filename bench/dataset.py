"""What a dataset plug-in is: labelled images with an official training and test part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor


class DataMissing(FileNotFoundError):
    """The files of a dataset are not where they were looked for. The message says what to fetch and where to
    put it.
    """


class DataDamaged(ValueError):
    """A file of a dataset is there and is not what it should be."""


@dataclass(frozen=True)
class Splits:
    """The official parts of a dataset; the test part never enters training."""

    train_x: Tensor
    """(N, channels, height, width) uint8."""
    train_y: Tensor
    """(N,) int64, classes 0..C-1."""
    test_x: Tensor
    """(M, channels, height, width) uint8."""
    test_y: Tensor
    """(M,) int64."""
    users: Tensor | None = None
    """(N,) int64, the natural client of each training example, if the dataset has any."""


@dataclass(frozen=True)
class Labels:
    """What a partition needs to know of a dataset."""

    train: Tensor
    """(N,) int64."""
    test: Tensor
    """(M,) int64."""
    users: Tensor | None = None
    """(N,) int64 or None."""


class Dataset(ABC):
    """A frozen dataclass of options, and how to read the files.

    Subclasses set the class attributes and implement `load`; `labels` may be overridden where labels are
    cheaper to read than images.
    """

    version: ClassVar[int] = 1
    """Raised when the same options give other numbers."""
    num_classes: ClassVar[int]
    image_shape: ClassVar[tuple[int, int, int]]
    """Channels, height, width."""
    mean: ClassVar[tuple[float, ...]]
    """Per channel, of pixels in [0, 1]."""
    std: ClassVar[tuple[float, ...]]
    scale: ClassVar[float] = 255.0
    """The pixel value that stands for 1.0."""
    flip: ClassVar[bool] = True
    """Whether a mirrored image still shows its class (false for digits)."""
    size: ClassVar[str] = ""
    """What `bench data fetch` would download, in words: "163 MB"."""
    licence: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """Address of the official files, or where they come from."""

    @abstractmethod
    def load(self, root: Path) -> Splits:
        """Read the official files below `root`.

        Raises:
            DataMissing: They are not there; the message names them, their size, their source and where to put
            them. DataDamaged: They are there and do not match their checksum or shape; the message names the
            file.
        """

    def labels(self, root: Path) -> Labels:
        """Read the labels only; same errors as `load`."""
        splits = self.load(root)
        return Labels(splits.train_y, splits.test_y, splits.users)

    def fetch(self, root: Path) -> None:
        """Download the official files to `root`; where that cannot be done, `DataMissing` says what to do
        instead.
        """
        raise DataMissing(f"{type(self).__name__.lower()} cannot be downloaded: see {self.source}")
