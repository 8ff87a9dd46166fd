"""CIFAR-100: 60,000 colour photographs of 32 x 32 pixels in a hundred classes.

Alex Krizhevsky. Learning multiple layers of features from tiny images. Technical report, University of
Toronto, 2009. https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench import Dataset, Labels, Splits, register
from bench.files.download import Remote
from bench.files.official import Official, images_of, labels_of, unpickle

FILES = Official(
    name="cifar100",
    folder="cifar-100-python",
    checksums={
        "train": "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b",
        "test": "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864",
    },
    remotes=(
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            bytes=169_001_437,
            unpack=True,
        ),
    ),
    size="169 MB",
    by_hand="unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in {root}",
)


@register("cifar100")
@dataclass(frozen=True, kw_only=True)
class Cifar100(Dataset):
    """50,000 training images, 500 of each fine class, and 10,000 for testing, in the official order.

    Normalised by the mean and standard deviation of CIFAR-100's own training pixels.
    """

    num_classes: ClassVar[int] = 100
    image_shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    mean: ClassVar[tuple[float, ...]] = (0.5071, 0.4865, 0.4409)
    std: ClassVar[tuple[float, ...]] = (0.2673, 0.2564, 0.2762)
    size: ClassVar[str] = FILES.size
    licence: ClassVar[str] = "none stated; cite the report"
    citation: ClassVar[str] = (
        "Krizhevsky, Learning multiple layers of features from tiny images, University of Toronto, 2009"
    )
    source: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar.html"

    def load(self, root: Path) -> Splits:
        """Read the two official files."""
        train, test = ([unpickle(FILES.read(root, name))] for name in ("train", "test"))
        labels = [labels_of(part, "fine_labels") for part in (train, test)]
        return Splits(images_of(train), labels[0], images_of(test), labels[1])

    def labels(self, root: Path) -> Labels:
        """Read the labels, which lie in the same files."""
        train, test = ([unpickle(FILES.read(root, name))] for name in ("train", "test"))
        return Labels(labels_of(train, "fine_labels"), labels_of(test, "fine_labels"))

    def fetch(self, root: Path) -> None:
        """Download and unpack the official archive."""
        FILES.fetch(root)
