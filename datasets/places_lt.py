"""Places-LT: photographs of 365 kinds of places, cut to a long tail.

Ziwei Liu, Zhongqi Miao, Xiaohang Zhan, Jiayun Wang, Boqing Gong, Stella X. Yu. Large-scale long-tailed recognition in
an open world. CVPR 2019. https://arxiv.org/abs/1904.05160
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench import register
from bench.files.download import Remote
from bench.files.lists import Entries, Known, Listed

LISTS = "https://raw.githubusercontent.com/facebookresearch/classifier-balancing/main/data/Places_LT"
REMOTES = (
    Remote(
        f"{LISTS}/Places_LT_train.txt",
        "places365_standard/Places_LT_train.txt",
        sha256="726c4871dcbf07ce2f857703bfe32e9a83ffbf52d704239f6d95c4f4f4c247f7",
    ),
    Remote(
        f"{LISTS}/Places_LT_test.txt",
        "places365_standard/Places_LT_test.txt",
        sha256="44eee8441c8098c59195465abede425721bc35525d75209f9433b161a6eb37bc",
    ),
    Remote(
        "https://data.csail.mit.edu/places/places365/places365standard_easyformat.tar",
        "places365standard_easyformat.tar",
        unpack=True,
    ),
)
"""Of the archive no checksum is published; photographs are checked when they are decoded."""


@register("places_lt")
@dataclass(frozen=True, kw_only=True)
class PlacesLT(Listed):
    """62,500 training photographs, 5-4,980 of a class, and for testing the validation part of Places365, 36,500, 100
    of a class. The list `Places_LT_val.txt`, 7,300 further training photographs, is not used.

    Lies in `places365_standard`: the two lists (also packed: .xz, .gz) beside the folders `train/<class>/` and
    `val/<class>/` of Places365's archive "with easy directory structure", of 256 pixels; `train` and `val` may be
    symbolic links.
    """

    all_classes: ClassVar[int] = 365
    home: ClassVar[str] = "places365_standard"
    known: ClassVar[tuple[Known, Known]] = (
        Known(
            images=62_500,
            per_class=(5, 4980),
            digests={"Places_LT_train.txt": "6392252f8ae867bc8a5e841cc1b29e5b8ef4b636"},
        ),
        Known(
            images=36_500,
            per_class=(100, 100),
            digests={"Places_LT_test.txt": "e732e58b8aa718a2c1c11933375f5710652c2b93"},
        ),
    )
    """The lists as git has them in github.com/facebookresearch/classifier-balancing."""
    tail = "natural"
    quick: ClassVar[Mapping[str, object]] = {"batch_size": 64}
    size: ClassVar[str] = "about 25 GB"
    licence: ClassVar[str] = "none stated with the lists; of the photographs see http://places2.csail.mit.edu"
    citation: ClassVar[str] = (
        "Liu et al., Large-scale long-tailed recognition in an open world, CVPR 2019, https://arxiv.org/abs/1904.05160"
    )
    source: ClassVar[str] = (
        "http://places2.csail.mit.edu, and the lists of https://github.com/facebookresearch/classifier-balancing"
    )
    by_hand: ClassVar[str] = (
        "unpack places365standard_easyformat.tar of http://places2.csail.mit.edu/download.html so that its folders are "
        "{home}/train and {home}/val, and put Places_LT_train.txt and Places_LT_test.txt beside them, of "
        "https://github.com/facebookresearch/classifier-balancing (data/Places_LT)"
    )
    archives_have_home: ClassVar[bool] = True
    remotes: ClassVar[tuple[Remote, ...]] = REMOTES

    def parts(self, folder: Path) -> tuple[Entries, Entries]:
        """Read the two lists."""
        train, test = self.find(folder, ("Places_LT_train.txt",), ("Places_LT_test.txt",))
        return self.read(train), self.read(test)
