"""MNIST: 70,000 grey pictures of 28 x 28 pixels of handwritten digits.

Yann LeCun, Léon Bottou, Yoshua Bengio, Patrick Haffner. Gradient-based learning applied to document recognition.
Proceedings of the IEEE 86 (11), 1998. http://yann.lecun.com/exdb/mnist
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench import Dataset, Labels, Splits, register
from bench.files.download import Remote
from bench.files.official import Official, idx_labels, idx_splits

SERVER = "https://ossci-datasets.s3.amazonaws.com/mnist"
"""Where torchvision takes the official files from; their own server answers no more."""

FILES = Official(
    name="mnist",
    folder="MNIST/raw",
    checksums={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    remotes=tuple(
        Remote(f"{SERVER}/{name}.gz", f"MNIST/raw/{name}.gz", md5, size)
        for name, md5, size in (
            ("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
            ("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            ("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
            ("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
        )
    ),
    size="12 MB",
    by_hand=f"put the four .gz files of {SERVER} in {{root}}/MNIST/raw",
)


@register("mnist")
@dataclass(frozen=True, kw_only=True)
class Mnist(Dataset):
    """60,000 training images, 5,421 to 6,742 of a digit, and 10,000 for testing, in the official order.

    Not quite balanced as it is: the long tail is cut with the rarest digit's number of images for its largest class.
    Normalised by the mean and standard deviation of its own training pixels.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    mean: ClassVar[tuple[float, ...]] = (0.1307,)
    std: ClassVar[tuple[float, ...]] = (0.3081,)
    flip: ClassVar[bool] = False
    size: ClassVar[str] = FILES.size
    licence: ClassVar[str] = "none stated by its authors; often given as CC BY-SA 3.0"
    citation: ClassVar[str] = (
        "LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, Proceedings of the "
        "IEEE 86 (11), 1998"
    )
    source: ClassVar[str] = "http://yann.lecun.com/exdb/mnist"

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
