"""EMNIST: handwritten digits and letters of NIST's Special Database 19 in the form of MNIST, 28 x 28 pixels.

Gregory Cohen, Saeed Afshar, Jonathan Tapson, André van Schaik. EMNIST: an extension of MNIST to handwritten letters.
2017. https://arxiv.org/abs/1702.05373
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from bench import DataDamaged, Dataset, Labels, Splits, register
from bench.files.download import Remote
from bench.files.official import Official, idx_labels, idx_splits

SERVER = "https://biometrics.nist.gov/cs_links/EMNIST"
SIDE = 28


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the ways in which the authors cut the database, each a dataset of its own."""

    classes: int
    first: int
    """Label of class 0 in the files."""
    train: int
    """Images."""
    test: int
    mean: float
    """Of the training pixels in [0, 1]."""
    std: float
    checksums: tuple[str, str, str, str]
    """MD5 of the packed files: training images and labels, test images and labels."""


PARTS: Mapping[str, Part] = {
    "byclass": Part(
        classes=62,
        first=0,
        train=697_932,
        test=116_323,
        mean=0.1736,
        std=0.3317,
        checksums=(
            "712dda0bd6f00690f32236ae4325c377",
            "ee299a3ee5faf5c31e9406763eae7e43",
            "1435209e34070a9002867a9ab50160d7",
            "7a0f934bd176c798ecba96b36fda6657",
        ),
    ),
    "balanced": Part(
        classes=47,
        first=0,
        train=112_800,
        test=18_800,
        mean=0.1751,
        std=0.3332,
        checksums=(
            "4041b0d6f15785d3fa35263901b5496b",
            "7a35cc7b2b7ee7671eddf028570fbd20",
            "6818d20fe2ce1880476f747bbc80b22b",
            "acd3694070dcbf620e36670519d4b32f",
        ),
    ),
    "letters": Part(
        classes=26,
        first=1,
        train=124_800,
        test=20_800,
        mean=0.1722,
        std=0.3309,
        checksums=(
            "8795078f199c478165fe18db82625747",
            "c16de4f1848ddcdddd39ab65d2a7be52",
            "382093a19703f68edac6d01b8dfdfcad",
            "d4108920cd86601ec7689a97f2de7f59",
        ),
    ),
}
"""The checksums are not the authors' own: two projects that read these files, Deeplearning4j and pczarnik/mnists, state
them alike."""

FILES = Official(
    name="emnist",
    folder="EMNIST/raw",
    checksums={},
    of_packed=True,
    unpacked_to="gzip",
    remotes=(
        Remote(
            f"{SERVER}/gzip.zip",
            "EMNIST/raw/gzip.zip",
            md5="58c8d27c78d21e728a6bc7b3cc06412e",
            bytes=561_753_746,
            unpack=True,
        ),
    ),
    size="562 MB (one zip with all parts)",
    by_hand=f"unpack {SERVER}/gzip.zip in {{root}}/EMNIST/raw; its files may stay packed, in the folder gzip",
)
"""What all parts share; `files_of` gives those of one."""


def files_of(part: str) -> Official:
    """Give the four official files of a part."""
    known = PARTS[part]
    shapes: dict[str, tuple[int, ...]] = {}
    for which, images in (("train", known.train), ("test", known.test)):
        shapes[f"emnist-{part}-{which}-images-idx3-ubyte"] = (images, SIDE, SIDE)
        shapes[f"emnist-{part}-{which}-labels-idx1-ubyte"] = (images,)
    return replace(FILES, checksums=dict(zip(shapes, known.checksums, strict=True)), shapes=shapes)


@register("emnist")
@dataclass(frozen=True, kw_only=True)
class Emnist(Dataset):
    """One of the parts below, in the official order. All lie in one zip of 562 MB, with whatever else the authors cut.

    `byclass` has 697,932 training images and 116,323 for testing of 62 classes, digits, capitals and small letters,
    long-tailed as they were written: they are cut only where an imbalance factor is given. `balanced` has 2,400 and 400
    images of each of 47 classes, 15 small letters being one with their capitals; `letters` 4,800 and 800 of each of 26,
    both cases together. The files hold images transposed; they are given upright. Normalised by the mean and standard
    deviation of the part's training pixels.
    """

    part: Literal["byclass", "balanced", "letters"] = "balanced"
    """`byclass`, `balanced` or `letters`."""

    image_shape: ClassVar[tuple[int, int, int]] = (1, SIDE, SIDE)
    flip: ClassVar[bool] = False
    size: ClassVar[str] = FILES.size
    licence: ClassVar[str] = "none stated; NIST Special Database 19: public domain"
    citation: ClassVar[str] = (
        "Cohen, Afshar, Tapson, van Schaik, EMNIST: an extension of MNIST to handwritten letters, 2017, "
        "https://arxiv.org/abs/1702.05373"
    )
    source: ClassVar[str] = "https://www.nist.gov/itl/products-and-services/emnist-dataset"

    @property  # of the part; a fact of a dataset is only ever read
    def tail(self) -> Literal["made", "natural", "either"]:  # type: ignore[override]
        """Digits are written more often than letters."""
        return "either" if self.part == "byclass" else "made"

    @property
    def num_classes(self) -> int:
        """Of the part."""
        return PARTS[self.part].classes

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the part's training pixels."""
        return (PARTS[self.part].mean,)

    @property
    def std(self) -> tuple[float, ...]:
        """Of the part's training pixels."""
        return (PARTS[self.part].std,)

    def load(self, root: Path) -> Splits:
        """Read the four files of the part, unpacked or as .gz."""
        stored = idx_splits(files_of(self.part), root, transposed=True)
        labels = self._classes(stored.labels, root)
        return replace(stored, train_y=labels.train, test_y=labels.test)

    def labels(self, root: Path) -> Labels:
        """Read the two small files."""
        return self._classes(idx_labels(files_of(self.part), root), root)

    def verify(self, root: Path) -> None:
        """Read the images too."""
        files_of(self.part).verify(root)

    def fetch(self, root: Path) -> None:
        """Download and unpack the official zip; its files stay packed."""
        FILES.fetch(root)

    def _classes(self, stored: Labels, root: Path) -> Labels:
        """Number classes from 0."""
        known = PARTS[self.part]
        last = known.first + known.classes - 1
        for labels in (stored.train, stored.test):
            low, high = int(labels.min()), int(labels.max())
            if (low, high) != (known.first, last):
                raise DataDamaged(
                    f"{root / FILES.folder}: labels of emnist-{self.part} are from {low} to {high}, and the official "
                    f"ones from {known.first} to {last}; delete its files and run 'bench data fetch emnist' again"
                )
        return Labels(stored.train - known.first, stored.test - known.first)
