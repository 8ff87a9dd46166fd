"""CINIC-10: 270,000 pictures of 32 x 32 pixels in CIFAR-10's ten classes, from CIFAR-10 and ImageNet.

Luke N. Darlow, Elliot J. Crowley, Antreas Antoniou, Amos J. Storkey. CINIC-10 is not ImageNet or CIFAR-10. 2018.
https://arxiv.org/abs/1810.03505
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from bench import register
from bench.files.download import Remote
from bench.files.lists import Entries, Known, Listed
from bench.files.photographs import Pixels
from bench.files.walk import images_below

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PART = Known(images=90_000, per_class=(9000, 9000))


@register("cinic10")
@dataclass(frozen=True, kw_only=True)
class Cinic10(Listed):
    """The part `train` for training and the part `test` for testing, 90,000 pictures each, 9,000 of a class; the part
    `valid`, as large, is not used. All of CIFAR-10's own test pictures are in `test`.

    Lies in `cinic10`: `train/<class>/*.png` and `test/<class>/*.png`, in the order of their names. Normalised by the
    means and standard deviations that its authors give.
    """

    one_folder_per_class: ClassVar[bool] = False  # it is how the labels are read
    mean: ClassVar[tuple[float, ...]] = (0.47889522, 0.47227842, 0.43047404)
    std: ClassVar[tuple[float, ...]] = (0.24205776, 0.23828046, 0.25874835)
    all_classes: ClassVar[int] = len(CLASSES)
    home: ClassVar[str] = "cinic10"
    known: ClassVar[tuple[Known, Known]] = (PART, PART)
    size: ClassVar[str] = "688 MB"
    licence: ClassVar[str] = "CC BY 4.0; the pictures are CIFAR-10's and ImageNet's"
    citation: ClassVar[str] = (
        "Darlow et al., CINIC-10 is not ImageNet or CIFAR-10, 2018, https://arxiv.org/abs/1810.03505"
    )
    source: ClassVar[str] = "https://doi.org/10.7488/ds/2448"
    by_hand: ClassVar[str] = "unpack CINIC-10.tar.gz of https://doi.org/10.7488/ds/2448 in {home}"
    remotes: ClassVar[tuple[Remote, ...]] = (
        Remote(
            "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
            "CINIC-10.tar.gz",
            md5="6ee4d0c996905fe93221de577967a372",
            bytes=687_544_992,
            unpack=True,
        ),
    )

    pixels: Pixels = 32
    """Height and width that pictures are prepared for; they have 32."""

    def parts(self, folder: Path) -> tuple[Entries, Entries]:
        """List the pictures in the folders of classes."""
        self.find(folder, ("train",), ("test",))
        return self._part(folder, "train"), self._part(folder, "test")

    def _part(self, folder: Path, part: str) -> Entries:
        found = [images_below(folder / part / kind, (".png",)) for kind in CLASSES]
        paths = [f"{part}/{kind}/{image}" for kind, images in zip(CLASSES, found, strict=True) for image in images]
        return Entries(folder / part, paths, np.repeat(np.arange(len(CLASSES)), [len(images) for images in found]))
