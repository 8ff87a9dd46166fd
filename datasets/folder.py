"""Your own images: a folder per class below `train` and `test`, and whose they are if you know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bench import DataDamaged, DataMissing, register
from bench.files.listing import Listing
from bench.files.lists import Entries, images_below, leads_out, listing, read_table, refuse, repeated
from bench.files.photographs import Photographs

FIX = "correct it and try again"


@register("folder")
@dataclass(frozen=True, kw_only=True)
class Folder(Photographs):
    """The images in `path/train/<class>/` and `path/test/<class>/`, and in folders below these, in the order of their
    names. Classes are numbered in the order of their names. They are cut to a long tail only where an imbalance factor
    is given.

    `path/clients.csv`, which need not be there, has the columns path (`train/<class>/...`) and client, with a row for
    every training image; test images have each a row too, or none at all. The clients are then the natural users:
    `--partition users`. In a result the images stand for themselves, by a digest of their paths and sizes, not `path`.
    """

    tail = "either"
    mutable: ClassVar[bool] = True
    size: ClassVar[str] = "nothing to download"
    licence: ClassVar[str] = "your own"
    citation: ClassVar[str] = "your own"
    source: ClassVar[str] = "your own images"

    path: str = "folder"
    """Of the folder; below the working directory if it is not absolute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "path", str(Path(self.path).expanduser().absolute()))

    @property
    def num_classes(self) -> int:
        """Folders in `train`."""
        return len(self._classes("train"))

    @property
    def folder_name(self) -> str:
        """The folder's own name, with a digest of its place."""
        return f"folder-{Path(self.path).name}-{hashlib.sha256(self.path.encode()).hexdigest()[:8]}"

    @property
    def expected(self) -> None:
        """As many as there are."""

    def listing(self, root: Path) -> Listing:
        """List the images; `root` is not used."""
        folder = Path(self.path)
        classes, tested = self._classes("train"), self._classes("test")
        differing = sorted(set(classes) ^ set(tested))
        if differing:
            lacking = "test" if differing[0] in classes else "train"
            raise DataDamaged(
                f"{folder / lacking} has no class {differing[0]!r}, and the other part has ({len(differing)} such "
                f"classes); each class needs a folder with images in train and in test"
            )
        train, test = (self._part(folder, part, classes) for part in ("train", "test"))
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

    def _classes(self, part: str) -> list[str]:
        folder = Path(self.path) / part
        if not folder.is_dir():
            raise DataMissing(
                f"folder: there is no {folder}; put your images in {self.path}/train/<class>/ and "
                f"{self.path}/test/<class>/, or name another folder, as in folder(path='photographs')"
            )
        classes = sorted(below.name for below in folder.iterdir() if below.is_dir() and below.name[0] != ".")
        if len(classes) < 2:
            raise DataDamaged(f"{folder} has {len(classes)} folders; it must have one for each of two classes or more")
        return classes

    def _part(self, folder: Path, part: str, classes: list[str]) -> Entries:
        found = [images_below(folder / part / name) for name in classes]
        empty = [name for name, images in zip(classes, found, strict=True) if not images]
        refuse(folder / part, "classes without an image", empty, "each needs images in train and in test")
        paths = [f"{part}/{name}/{image}" for name, images in zip(classes, found, strict=True) for image in images]
        odd = (repr(path) for path in paths if leads_out(path))
        refuse(folder / part, "images with odd characters in their names", odd, "rename them")
        labels = np.repeat(np.arange(len(classes)), [len(images) for images in found])
        return Entries(folder / part, paths, labels)

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


def _sizes(folder: Path, part: Entries) -> Tensor:
    try:
        return torch.tensor([(folder / path).stat().st_size for path in part.paths])
    except OSError as error:  # a link that leads nowhere
        raise DataDamaged(f"{error.filename} cannot be read ({error.strerror}); take it away and try again") from error
