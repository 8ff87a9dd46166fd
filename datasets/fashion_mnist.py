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

SERVER = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"
"""The same files lie at http://fashion-mnist.s3-website.eu-central-1.amazonaws.com, which has no https."""

FILES = Official(
    name="fashion_mnist",
    folder="FashionMNIST/raw",
    checksums={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    remotes=tuple(
        Remote(f"{SERVER}/{name}.gz", f"FashionMNIST/raw/{name}.gz", sha256=sha256, bytes=size)
        for name, sha256, size in (
            ("train-images-idx3-ubyte", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26_421_880),
            ("train-labels-idx1-ubyte", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29_515),
            ("t10k-images-idx3-ubyte", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4_422_102),
            ("t10k-labels-idx1-ubyte", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5_148),
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

    def verify(self, root: Path) -> None:
        """Read the images too."""
        FILES.verify(root)

    def fetch(self, root: Path) -> None:
        """Download the four official files, which stay packed."""
        FILES.fetch(root)
