"""Fashion-MNIST: 70,000 grey pictures of 28 x 28 pixels of ten kinds of clothes, shoes and bags.

Han Xiao, Kashif Rasul, Roland Vollgraf. Fashion-MNIST: a novel image dataset for benchmarking machine
learning algorithms. 2017. https://arxiv.org/abs/1708.07747
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench import Dataset, Labels, Splits, register
from bench.files.download import Remote
from bench.files.official import Official, idx_labels, idx_splits

SERVER = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"

FILES = Official(
    name="fashion_mnist",
    folder="FashionMNIST/raw",
    checksums={
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    remotes=tuple(
        Remote(f"{SERVER}/{name}.gz", f"FashionMNIST/raw/{name}.gz", md5, size)
        for name, md5, size in (
            ("train-images-idx3-ubyte", "8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
            ("train-labels-idx1-ubyte", "25c81989df183df01b3e8a0aad5dffbe", 29_515),
            ("t10k-images-idx3-ubyte", "bef4ecab320f06d8554ea6380940ec79", 4_422_102),
            ("t10k-labels-idx1-ubyte", "bb300cfdad3c16e7a12a480ee83cd310", 5_148),
        )
    ),
    size="31 MB",
    by_hand="put the four .gz files of https://github.com/zalandoresearch/fashion-mnist (data/fashion) in "
    "{root}/FashionMNIST/raw",
)


@register("fashion_mnist")
@dataclass(frozen=True, kw_only=True)
class FashionMnist(Dataset):
    """60,000 training images, 6,000 of each class, and 10,000 for testing, in the official order.

    Normalised by the mean and standard deviation of its own training pixels.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    mean: ClassVar[tuple[float, ...]] = (0.2860,)
    std: ClassVar[tuple[float, ...]] = (0.3530,)
    size: ClassVar[str] = FILES.size
    licence: ClassVar[str] = "MIT"
    citation: ClassVar[str] = (
        "Xiao, Rasul, Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning "
        "algorithms, 2017, https://arxiv.org/abs/1708.07747"
    )
    source: ClassVar[str] = "https://github.com/zalandoresearch/fashion-mnist"

    def load(self, root: Path) -> Splits:
        """Read the four official files, unpacked or as .gz."""
        return idx_splits(FILES, root)

    def labels(self, root: Path) -> Labels:
        """Read the two small files."""
        return idx_labels(FILES, root)

    def fetch(self, root: Path) -> None:
        """Download the four official files, which stay packed."""
        FILES.fetch(root)
