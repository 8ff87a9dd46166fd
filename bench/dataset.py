"""What a dataset plug-in is: labelled images with an official training and test part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from bench.ranges import Ranged


class DataMissing(FileNotFoundError):
    """The files of a dataset are not where they were looked for. The message says what to fetch and where to
    put it.
    """


class DataDamaged(ValueError):
    """A file of a dataset is there and is not what it should be."""


class Streamed(Protocol):
    """Examples that stay in a file and are read by rows: more than memory holds."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, channels, height, width), or (N, ...) as `Dataset.image_shape` says."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read: uint8 pixels, or float16 features."""

    def __len__(self) -> int:
        """Give N."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read images by (n,) int64 rows, in that order: (n, channels, height, width) in memory of their own."""

    def prefetch(self, rows: Tensor) -> None:
        """Tell that these rows will be read soon; returns at once."""


class DataTooLarge(DataDamaged, MemoryError):
    """The files of a dataset do not fit in memory: a run of it may have to wait until it has all memory for itself."""


@dataclass(frozen=True)
class Splits:
    """The official parts of a dataset; the test part never enters training."""

    train_x: Tensor | Streamed
    """(N, channels, height, width) uint8, or examples of any shape (N, ...) in float16 or float32; (n, ...) if only the
    rows of `held` are there.
    """
    train_y: Tensor
    """(N,) int64, classes 0..C-1."""
    test_x: Tensor | Streamed
    """(M, ...), likewise."""
    test_y: Tensor
    """(M,) int64."""
    users: Tensor | None = None
    """(N,) int64, the natural client of each training example, if the dataset has any."""
    test_users: Tensor | None = None
    """(M,) int64, the same for test examples; numbers as in `users`."""
    held: Tensor | None = None
    """(n,) int64, ascending rows of the training part that `train_x` holds; None: all."""

    @property
    def labels(self) -> Labels:
        """What a partition needs to know."""
        return Labels(self.train_y, self.test_y, self.users, self.test_users)


@dataclass(frozen=True)
class Labels:
    """What a partition needs to know of a dataset."""

    train: Tensor
    """(N,) int64."""
    test: Tensor
    """(M,) int64."""
    users: Tensor | None = None
    """(N,) int64 or None."""
    test_users: Tensor | None = None
    """(M,) int64 or None; numbers as in `users`."""


class Dataset(Ranged, ABC):
    """A frozen dataclass of options, and how to read the files.

    Subclasses give the facts below, as class attributes or, where they depend on options, as properties, and
    implement `load`; `labels` may be overridden where labels are cheaper to read than images.
    """

    revision: ClassVar[int] = 1
    """Raised when the same options give other numbers."""
    scale: ClassVar[float] = 255.0
    """The pixel value that stands for 1.0; 1 where examples are floating numbers."""
    flip: ClassVar[bool] = True
    """Whether a mirrored image still shows its class (false for digits)."""
    tail: ClassVar[Literal["made", "natural", "either"]] = "made"
    """"made": balanced, an imbalance factor cuts it; "natural": long-tailed as it is, and never cut; "either":
    kept as it is unless a factor is given.
    """
    own_clients: ClassVar[bool] = False
    """Whether clients are by default the natural users of the training part."""
    own_tests: ClassVar[bool] = False
    """Whether the same users' test images are known, which such clients are then tested on."""
    quick: ClassVar[Mapping[str, object]] = {}
    """Fields in which the setting `quick` differs on this dataset."""
    size: ClassVar[str] = ""
    """What `bench data fetch` would download, in words: "163 MB"."""
    licence: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """Address of the official files, or where they come from."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C."""

    @property
    def groups(self) -> str:
        """Rule of many / medium / few: "thirds" of the classes by size, or by "count" where classes are hundreds. A
        dataset of ten classes has no class of under 20 images at any usual imbalance.
        """
        return "thirds" if self.num_classes < 300 else "count"

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height, width; of an example that is no image whatever axes it has, channels or features first."""

    @property
    def pictures(self) -> bool:
        """Whether examples are pictures, which may be shifted and mirrored."""
        return len(self.image_shape) == 3 and self.image_shape[1:] != (1, 1)

    @property
    @abstractmethod
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1], or of floating numbers as they are."""

    @property
    @abstractmethod
    def std(self) -> tuple[float, ...]:
        """Per channel, likewise."""

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
        return self.load(root).labels

    def require(self, root: Path) -> None:
        """Raise what `load` would, where labels can be there without images."""

    def verify(self, root: Path) -> None:
        """Compare images with their checksums, where neither `labels` nor `load` does; raises as `load`."""

    def test_part(self, root: Path) -> str | None:
        """Say where the test part comes from, where nobody gave one, in words; else None."""
        return None

    def fetch(self, root: Path) -> None:
        """Download the official files to `root`; where that cannot be done, `DataMissing` says what to do
        instead.
        """
        raise DataMissing(f"{type(self).__name__.lower()} cannot be downloaded: see {self.source}")

    def identity(self) -> dict[str, Any]:
        """Give what tells this dataset from others of its class, in JSON's types: its fields. A user's own files are
        told by their contents instead, not by where they lie.
        """
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def found(cls, told: Mapping[str, Any], root: Path) -> Dataset | None:
        """Find a user's own files below `root` by what `identity` told of them; None: they are not where such files
        are looked for. Nothing that `told` says is taken for a path.
        """
        return None
