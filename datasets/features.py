"""Features of any dataset, made once by `bench data embed`: classifier-level methods in minutes on a CPU.

bench data embed inat --model resnet50 --weights resnet50.pth
bench run --algos fedloge,creff --dataset "features(path='.../prepared/inat-resnet50-0f3a9c21')"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from bench import DataDamaged, DataMissing, Dataset, Labels, Splits, register, tree
from bench.files import data_root, prepared
from bench.files.compared import require_whole
from bench.files.lists import is_number
from bench.files.moments import moments


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a store's index says, apart from the labels: it travels with the dataset."""

    classes: int
    features: int
    """d."""
    listing: str
    """Digest of what they were made of: images, body, weights."""
    contents: str
    """Checksum of features and labels."""


@register("features")
@dataclass(frozen=True, kw_only=True)
class Features(Dataset):
    """The features of all images, under the labels and the natural users of the dataset they were made of.

    They are passed on as they were stored, float16, unless they are to be normalised, and the model is `frozen`: a head
    alone. No image is shifted or mirrored. A run is told from others by what the features are, not by where they lie.
    Embeddings that were made by other means, of any shape, are read by `arrays`.
    """

    scale: ClassVar[float] = 1.0
    flip: ClassVar[bool] = False
    tail: ClassVar[Literal["made", "natural", "either"]] = "either"
    quick: ClassVar[Mapping[str, object]] = {"model": "frozen", "augment": "none"}
    size: ClassVar[str] = "nothing to download"
    licence: ClassVar[str] = "that of the images and of the weights they were made with"
    citation: ClassVar[str] = "that of the images, and of the weights they were made with"
    source: ClassVar[str] = "'bench data embed', which prints the path"

    path: str = "features"
    """Folder that `bench data embed` made; or its name alone, where it lies in `prepared` of $BENCH_DATA or the cache.
    """
    normalise: Literal["standard", "none"] = "none"
    """`standard`: mean 0 and deviation 1 of each feature over the training part, a constant one is 0; `none`: as they
    are."""

    def __post_init__(self) -> None:
        if not self._is_name():
            object.__setattr__(self, "path", str(Path(self.path).expanduser().absolute()))

    @property
    def num_classes(self) -> int:
        """Of the dataset they were made of."""
        return self._facts.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Features, 1, 1."""
        return (self._facts.features, 1, 1)

    @property
    def mean(self) -> tuple[float, ...]:
        """Zero, where nothing is taken away."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """One, where nothing is scaled."""
        return self._moments[1]

    def load(self, root: Path) -> Splits:
        """Open the store; `root` is not used."""
        return self._store().splits()

    def labels(self, root: Path) -> Labels:
        """Read the labels, which lie beside the features."""
        return self._store().labels

    def verify(self, root: Path) -> None:
        """Compare the store with its checksums, unless this state of it was compared before."""
        require_whole(self._store())

    def identity(self) -> dict[str, Any]:
        """Give what they were made of, and a checksum of all features and labels, and what is not usual."""
        own = {"listing": self._facts.listing, "contents": self._facts.contents}
        return own if self.normalise == "none" else {**own, "normalise": self.normalise}

    @classmethod
    def found(cls, told: Mapping[str, Any], root: Path) -> Features | None:
        """Look through the features that were made below `root`."""
        normalise: Literal["standard", "none"] = "standard" if told.get("normalise") == "standard" else "none"
        for index in sorted((root / "prepared").glob(f"*/{prepared.INDEX}")):
            known = cls(path=str(index.parent), normalise=normalise)
            with suppress(DataDamaged, DataMissing):
                if known.identity() == told:
                    return known
        return None

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.normalise == "standard":
            return moments(self._store().part("train"))
        return (0.0,) * self._facts.features, (1.0,) * self._facts.features

    @cached_property
    def _facts(self) -> Facts:
        store = self._store()
        columns = {key: column for key, column in vars(store.labels).items() if column is not None}
        images = {part: list(sums) for part, sums in store.chunks.items()}
        return Facts(
            classes=int(store.plan.made_by["classes"]),
            features=store.plan.shape[0],
            listing=store.listing,
            contents=prepared.checksum({"images": images, "labels": tree.digest([columns])})[:16],
        )

    def _is_name(self) -> bool:
        """Whether it is looked for where features are made."""
        return Path(self.path).name == self.path and not Path(self.path).exists() and self.path != "features"

    def _store(self) -> prepared.Store:
        folder = data_root(None) / "prepared" / self.path if self._is_name() else Path(self.path)
        store = prepared.find(folder)
        if store is None:
            how = "bench data embed NAME --model resnet50 --weights FILE"
            if self._is_name() and (told := re.fullmatch(r"(\w+)-(.+)-\w+", self.path)):
                how = f"bench data embed {told[1]} --model {told[2]} ..."
            raise DataMissing(
                f"features: {folder} holds none, or not all; '{how}' makes them and says which path to give"
            )
        if store.plan.dtype != "float16" or "classes" not in store.plan.made_by:
            raise DataDamaged(f"features: {self.path} holds images, not features; name a folder of 'bench data embed'")
        classes, labels = str(store.plan.made_by["classes"]), store.labels
        if not is_number(classes) or not 2 <= int(classes) <= len(labels.train):
            raise DataDamaged(f"features: {self.path} says that it has {classes} classes; make it anew")
        return store
