"""A small dataset of photographs, for tests of how such are prepared and read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import DataMissing
from bench.files.decode import decode
from bench.files.listing import Listing, Part
from bench.files.photographs import Photographs, Pixels
from bench.files.prepared import Stored
from bench.preparing import preparation
from tests import trees

TRAIN, TEST, PIXELS, CHUNK = 37, 9, 16, 8


@dataclass(frozen=True, kw_only=True)
class Shots(Photographs):
    """Photographs that are listed in `shots/list.txt`, the last `TEST` of them for testing."""

    num_classes: ClassVar[int] = 3
    tail = "natural"
    pixels: Pixels = PIXELS

    @property
    def folder_name(self) -> str:
        return "shots"

    def listing(self, root: Path) -> Listing:
        try:
            lines = (root / "shots" / "list.txt").read_text().splitlines()
        except FileNotFoundError as error:
            raise DataMissing("shots: list.txt is not there") from error
        paths, labels = zip(*(line.split() for line in lines), strict=True)
        y = torch.tensor([int(label) for label in labels])
        users = torch.arange(len(paths)) % 5
        return Listing(
            root / "shots", Part(paths[:-TEST], y[:-TEST], users[:-TEST]), Part(paths[-TEST:], y[-TEST:], users[-TEST:])
        )


class Heard(preparation.Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.begun: list[tuple[str, int, int]] = []
        self.done = 0

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.begun.append((what, total, done))

    def advance(self, photographs: int) -> None:
        self.done += photographs


def write_shots(root: Path) -> Path:
    """Write the list of `Shots` and its photographs: JPEG, and a few PNG."""
    names = [f"a/{row}.{'png' if row % 5 == 0 else 'jpg'}" for row in range(TRAIN + TEST)]
    for row, name in enumerate(names):
        trees.photograph(root / "shots" / name, row % 3, row)
    (root / "shots" / "list.txt").write_text("".join(f"{name} {row % 3}\n" for row, name in enumerate(names)))
    return root


def prepare(root: Path, jobs: int | None = 1, heard: Heard | None = None, **fields: Any) -> preparation.Prepared:
    return preparation.prepare(Shots(**fields), root, jobs, heard or Heard(), chunk=CHUNK)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(root: Path, part: str = "train") -> Tensor:
    """Decode without a store."""
    listing = Shots().listing(root)
    paths = (listing.train if part == "train" else listing.test).paths
    return torch.stack([torch.from_numpy(decode(listing.folder / path, PIXELS)) for path in paths]).permute(0, 3, 1, 2)


def streamed(root: Path) -> Stored:
    """Open the training part."""
    images = Shots().load(root).train_x
    assert isinstance(images, Stored)
    return images


def damage(file: Path, kind: Any) -> None:
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind is not None and kind[0] == "cut":
        file.write_bytes(content[: kind[1] % len(content)])
    elif kind is not None and kind[0] == "longer":
        file.write_bytes(content + kind[1])
    elif kind is not None:
        content[kind[1] % len(content)] ^= kind[2]
        file.write_bytes(content)
