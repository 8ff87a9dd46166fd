"""Tiny ImageNet: 110,000 pictures of 64 x 64 pixels in 200 classes of ImageNet, from a course at Stanford.

Ya Le, Xuan Yang. Tiny ImageNet visual recognition challenge. CS 231N, Stanford University, 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from bench import register
from bench.files.download import Remote
from bench.files.lists import Entries, Known, Listed, leads_out, repeated, text_lines
from bench.files.walk import images_below


@register("tiny_imagenet")
@dataclass(frozen=True, kw_only=True)
class TinyImagenet(Listed):
    """The training part, 500 pictures of a class, for training, and the validation part, 50 of a class, for testing;
    the official test part has no labels.

    Lies in `tiny-imagenet-200`, as the official zip unpacks: `wnids.txt`, `train/<wnid>/images/*.JPEG`,
    `val/val_annotations.txt` and `val/images/*.JPEG`. Classes are numbered in the order of their wnids, as
    torchvision's ImageFolder does; training pictures stand in the order of their names.
    """

    one_folder_per_class: ClassVar[bool] = False  # the validation part has one folder
    all_classes: ClassVar[int] = 200
    home: ClassVar[str] = "tiny-imagenet-200"
    known: ClassVar[tuple[Known, Known]] = (
        Known(images=100_000, per_class=(500, 500)),
        Known(images=10_000, per_class=(50, 50)),
    )
    size: ClassVar[str] = "248 MB"
    licence: ClassVar[str] = "none stated; the pictures are ImageNet's: non-commercial research and education"
    citation: ClassVar[str] = "Le, Yang, Tiny ImageNet visual recognition challenge, CS 231N, Stanford University, 2015"
    source: ClassVar[str] = "https://cs231n.stanford.edu/tiny-imagenet-200.zip"
    by_hand: ClassVar[str] = "unpack https://cs231n.stanford.edu/tiny-imagenet-200.zip so that its folder is {home}"
    archives_have_home: ClassVar[bool] = True
    remotes: ClassVar[tuple[Remote, ...]] = (
        Remote(
            "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "tiny-imagenet-200.zip",
            md5="90528d7ca1a48142e341f4ef8d21d0de",
            bytes=248_100_043,
            unpack=True,
        ),
    )

    def parts(self, folder: Path) -> tuple[Entries, Entries]:
        """List the training pictures, and read the annotations of the validation part."""
        names, train, annotations = self.find(folder, ("wnids.txt",), ("train",), ("val/val_annotations.txt",))
        wnids = sorted(text_lines(names, self.again()))
        self.refuse(names, "lines that are no class, or one twice", [*filter(leads_out, wnids), *repeated(wnids)])
        found = [images_below(train / wnid / "images", (".jpeg",)) for wnid in wnids]
        paths = [f"train/{wnid}/images/{name}" for wnid, images in zip(wnids, found, strict=True) for name in images]
        labels = np.repeat(np.arange(len(wnids)), [len(images) for images in found])
        rows = [line.split("\t") for line in text_lines(annotations, self.again())]
        class_of = {wnid: row for row, wnid in enumerate(wnids)}
        odd = (f"line {number}" for number, row in enumerate(rows, 1) if len(row) < 2 or row[1] not in class_of)
        self.refuse(annotations, "lines that are not a picture and a class", odd)
        test = Entries(
            annotations, [f"val/images/{row[0]}" for row in rows], np.array([class_of[row[1]] for row in rows])
        )
        return Entries(train, paths, labels), test
