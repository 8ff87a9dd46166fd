"""Your own images: a folder per class, or one each below `train` and `test`, and whose they are if you know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from bench import DataDamaged, DataMissing, keys, register
from bench.files.listing import Listing
from bench.files.lists import Entries, leads_out, listing, read_table, refuse, repeated
from bench.files.photographs import Photographs
from bench.files.walk import Seen, images_below

FIX = "correct it and try again"
TEST_SHARE = 0.2


@register("folder")
@dataclass(frozen=True, kw_only=True)
class Folder(Photographs):
    """The images in `path/<class>/`, or in `path/train/<class>/` and `path/test/<class>/`, and in folders below these,
    in the order of their names. Links are followed, also to other disks; none may lead up, or to what is there already.
    Classes are numbered in the order of their names. They are cut to a long tail only
    where an imbalance factor is given.

    Without `train` and `test` a share of each class, `test_share`, is the test part. An image is in it or not by its
    name, class included: to add, remove or replace images moves no other, and the folder is split alike everywhere.
    Only of a class that would have none for testing, or none for training, the next one is taken.

    `path/clients.csv`, which need not be there, has the columns path (below `path`, such as `train/<class>/...`) and
    client, with a row for every training image; test images have each a row too, or none at all. The clients are then
    the natural users: `--partition users`. In a result the images stand for themselves, by a digest of their paths and
    sizes, not `path`.
    """

    tail = "either"
    mutable: ClassVar[bool] = True
    size: ClassVar[str] = "nothing to download"
    licence: ClassVar[str] = "your own"
    citation: ClassVar[str] = "your own"
    source: ClassVar[str] = "your own images"

    path: str = "folder"
    """Of the folder; below the working directory if it is not absolute."""
    test_share: Annotated[float, Interval(gt=0, lt=1)] = TEST_SHARE
    """Share of each class that is set aside for testing, where there is no `train` and no `test`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(Path(self.path).expanduser().absolute()))

    @property
    def num_classes(self) -> int:
        """Folders of classes."""
        return len(self._classes("train"))

    @property
    def folder_name(self) -> str:
        """The folder's own name, with a digest of its place."""
        share = "" if self.test_share == TEST_SHARE else f"-{self.test_share:g}"
        return f"folder-{Path(self.path).name}-{hashlib.sha256(self.path.encode()).hexdigest()[:8]}{share}"

    @property
    def expected(self) -> None:
        """As many as there are."""

    def test_part(self, root: Path) -> str | None:
        """Say how many images are set aside, if any are."""
        if self._is_parted():
            return None
        train, test = self._set_aside()
        return (
            f"{len(test.paths):,} of {len(train.paths) + len(test.paths):,} images, set aside by their names "
            f"(test_share {self.test_share:g} of each class, one at least)"
        )

    def listing(self, root: Path) -> Listing:
        """List the images; `root` is not used."""
        folder = Path(self.path)
        train, test = self._both_parts() if self._is_parted() else self._set_aside()
        if (folder / "clients.csv").exists():
            train, test = self._with_clients(folder / "clients.csv", train, test)
        return listing(folder, train, test, (_sizes(folder, train), _sizes(folder, test)))

    def identity(self) -> dict[str, Any]:
        """Give size and contents, wherever the folder is."""
        return {"pixels": self.pixels, "listing": self.listing(Path()).digest()}

    def fetch(self, root: Path) -> None:
        """Say where the images must be."""
        self._classes("train")
        self._classes("test")

    def _is_parted(self) -> bool:
        """Tell whether training and test images lie apart; if there is nothing at all, they should."""
        folder = Path(self.path)
        return not folder.is_dir() or any((folder / part).is_dir() for part in ("train", "test"))

    def _classes(self, part: str) -> list[str]:
        folder = Path(self.path) / (part if self._is_parted() else "")
        if not folder.is_dir():
            raise DataMissing(
                f"folder: there is no {folder}; put your images in {self.path}/<class>/, or in "
                f"{self.path}/train/<class>/ and {self.path}/test/<class>/, or name another folder, as in "
                "folder(path='photographs')"
            )
        classes = sorted(below.name for below in folder.iterdir() if below.is_dir() and below.name[0] != ".")
        if len(classes) < 2:
            raise DataDamaged(f"{folder} has {len(classes)} folders; it must have one for each of two classes or more")
        return classes

    def _both_parts(self) -> tuple[Entries, Entries]:
        """List the images of two parts."""
        folder = Path(self.path)
        if self.test_share != TEST_SHARE:
            raise DataDamaged(f"{folder} has train and test of its own, which no test_share changes; leave it out")
        classes, tested = self._classes("train"), self._classes("test")
        differing = sorted(set(classes) ^ set(tested))
        if differing:
            lacking = "test" if differing[0] in classes else "train"
            raise DataDamaged(
                f"{folder / lacking} has no class {differing[0]!r}, and the other part has ({len(differing)} such "
                f"classes); each class needs a folder with images in train and in test"
            )
        needed = "each needs images in train and in test"
        seen = Seen()
        train, test = (_images(folder / part, f"{part}/", classes, 1, needed, seen) for part in ("train", "test"))
        seen.refuse_twice([str(folder / path) for part in (train, test) for path in part.paths])
        return train, test

    def _set_aside(self) -> tuple[Entries, Entries]:
        """List all images, and part them by their names."""
        needed = "each needs one for training and one for testing"
        seen = Seen()
        found = _images(Path(self.path), "", self._classes("train"), 2, needed, seen)
        seen.refuse_twice([str(Path(self.path) / path) for path in found.paths])
        draws = keys.uniform_rows(keys.fold_each(keys.fold(keys.key(0), "test part"), found.paths), 1)[:, 0].numpy()
        tested = draws < self.test_share
        for label in range(found.labels[-1] + 1):
            own = np.flatnonzero(found.labels == label)
            own = own[np.argsort(draws[own], kind="stable")]
            tested[own[0]], tested[own[-1]] = True, False
        rows = (np.flatnonzero(~tested).tolist(), np.flatnonzero(tested).tolist())
        train, test = (Entries(found.source, [found.paths[row] for row in part], found.labels[part]) for part in rows)
        return train, test

    def _with_clients(self, source: Path, train: Entries, test: Entries) -> tuple[Entries, Entries]:
        """Read whose each image is."""
        table = read_table(source, ["path", "client"], FIX)
        rows = list(zip(table["path"], table["client"], strict=True))
        refuse(source, "clients without an image", (client for path, client in rows if not path), FIX)
        refuse(source, "images without a client", (path for path, client in rows if not client), FIX)
        refuse(source, "paths that stand there twice", repeated(table["path"]), FIX)
        images, client = {*train.paths, *test.paths}, dict(rows)
        refuse(source, "paths where there is no image", (path for path in table["path"] if path not in images), FIX)
        parts = [train, test] if any(path in client for path in test.paths) else [train]
        absent = (path for part in parts for path in part.paths if path not in client)
        refuse(source, "images without a client", absent, FIX)
        owned = [Entries(part.source, part.paths, part.labels, [client[path] for path in part.paths]) for part in parts]
        return owned[0], owned[1] if len(owned) == 2 else test


def _images(folder: Path, prefix: str, classes: list[str], least: int, needed: str, seen: Seen) -> Entries:
    """List the images below the folders of classes; their paths begin with `prefix`."""
    found = [images_below(folder / name, seen=seen) for name in classes]
    without = "an image" if least == 1 else f"{least} images"
    few = [name for name, images in zip(classes, found, strict=True) if len(images) < least]
    refuse(folder, f"classes without {without}", few, needed)
    paths = [f"{prefix}{name}/{image}" for name, images in zip(classes, found, strict=True) for image in images]
    odd = (repr(path) for path in paths if leads_out(path))
    refuse(folder, "images with odd characters in their names", odd, "rename them")
    return Entries(folder, paths, np.repeat(np.arange(len(classes)), [len(images) for images in found]))


def _sizes(folder: Path, part: Entries) -> Tensor:
    try:
        return torch.tensor([(folder / path).stat().st_size for path in part.paths])
    except OSError as error:  # a link that leads nowhere
        raise DataDamaged(f"{error.filename} cannot be read ({error.strerror}); take it away and try again") from error
