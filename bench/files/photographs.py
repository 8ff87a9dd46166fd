"""Datasets of photographs: lists first, then a store of decoded images that runs read by slices."""

from __future__ import annotations

import shlex
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, TypeAlias

from annotated_types import Interval

from bench.dataset import DataDamaged, DataMissing, Dataset, Labels, Splits
from bench.files import prepared
from bench.files.compared import require_whole
from bench.files.listing import Listing
from bench.plugins.registry import label

Pixels: TypeAlias = Annotated[int, Interval(ge=8, le=1024)]


@dataclass(frozen=True, kw_only=True)
class Photographs(Dataset):
    """What datasets of photographs share. Subclasses give `folder_name`, `listing` and the facts of `Dataset`.

    Photographs are decoded once, by `bench data prepare`: the shorter side is scaled to `pixels`, and the middle square
    is kept. Normalised by ImageNet's mean and standard deviation, as is the custom.
    """

    mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)
    mutable: ClassVar[bool] = False
    """Whether files may change: then the list is compared with the prepared store's at each run."""

    pixels: Pixels = 64
    """Height and width that photographs are prepared for."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.pixels, self.pixels)

    @property
    @abstractmethod
    def folder_name(self) -> str:
        """What the prepared store's folder is called, options that choose photographs included: "inat-2018"."""

    @abstractmethod
    def listing(self, root: Path) -> Listing:
        """Read the official lists below `root`, not the photographs.

        Raises:
            DataMissing: They are not there. DataDamaged: They are not what they should be.
        """

    def store(self, root: Path) -> Path:
        """Give the folder of the prepared store."""
        return root / "prepared" / f"{self.folder_name}-{self.pixels}px"

    def labels(self, root: Path) -> Labels:
        """Read labels and users: from the prepared store, else from the lists; no photograph is needed."""
        store = self._prepared(root)
        return self.listing(root).labels if store is None else store.labels

    def load(self, root: Path) -> Splits:
        """Open the prepared store; images are read when they are needed.

        Raises:
            DataMissing: Nothing is prepared yet, or not all. DataDamaged: The store is not what was written.
        """
        store = self._prepared(root)
        if store is None:
            self.listing(root)  # says what to fetch where there is nothing at all
            call = label(self, without=("pixels",))
            raise DataMissing(f"{call} is not prepared in {root}; run once: {self.prepare_command(root)}")
        return store.splits()

    def require(self, root: Path) -> None:
        """Raise what `load` would: it reads no image."""
        self.load(root)

    def verify(self, root: Path) -> None:
        """Compare the prepared store with its checksums, unless this state of it was compared before."""
        if store := self._prepared(root):
            require_whole(store)

    def prepare_command(self, root: Path) -> str:
        """Spell the command that prepares this dataset."""
        call = shlex.quote(label(self, without=("pixels",)))
        return f"bench data prepare {call} --size {self.pixels} --data-root {shlex.quote(str(root))}"

    def _prepared(self, root: Path) -> prepared.Store | None:
        store = prepared.find(self.store(root))
        if store is None or not self.mutable:
            return store
        listing = self.listing(root)
        if store.listing != listing.digest():
            raise DataDamaged(
                f"{label(self)}: photographs were added, removed or replaced since it was prepared; run "
                f"again: {self.prepare_command(root)}"
            )
        return store
