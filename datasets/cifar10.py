"""CIFAR-10: 60,000 colour photographs of 32 x 32 pixels in ten classes of things and animals.

Alex Krizhevsky. Learning multiple layers of features from tiny images. Technical report, University of
Toronto, 2009. https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench import Dataset, Labels, Splits, register
from bench.files.download import Remote
from bench.files.official import Official, images_of, labels_of, unpickle

FILES = Official(
    name="cifar10",
    folder="cifar-10-batches-py",
    checksums={
        "data_batch_1": "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "data_batch_2": "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "data_batch_3": "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "data_batch_4": "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "data_batch_5": "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
        "test_batch": "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
    },
    remotes=(
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            bytes=170_498_071,
            unpack=True,
        ),
    ),
    size="170 MB",
    by_hand="unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in {root}",
)


@register("cifar10")
@dataclass(frozen=True, kw_only=True)
class Cifar10(Dataset):
    """50,000 training images, 5,000 of each class, and 10,000 for testing, in the official order.

    Normalised by the mean and standard deviation of CIFAR-10's own training pixels. FedLoGe's code takes
    ImageNet's (0.485, 0.456, 0.406 / 0.229, 0.224, 0.225) for this dataset.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    std: ClassVar[tuple[float, ...]] = (0.2470, 0.2435, 0.2616)
    size: ClassVar[str] = FILES.size
    licence: ClassVar[str] = "none stated; cite the report"
    citation: ClassVar[str] = (
        "Krizhevsky, Learning multiple layers of features from tiny images, University of Toronto, 2009"
    )
    source: ClassVar[str] = "https://www.cs.toronto.edu/~kriz/cifar.html"

    def load(self, root: Path) -> Splits:
        """Read the six official batches."""
        *train, test = _batches(root)
        return Splits(images_of(train), labels_of(train, "labels"), images_of([test]), labels_of([test], "labels"))

    def labels(self, root: Path) -> Labels:
        """Read the labels, which lie in the same files."""
        *train, test = _batches(root)
        return Labels(labels_of(train, "labels"), labels_of([test], "labels"))

    def fetch(self, root: Path) -> None:
        """Download and unpack the official archive."""
        FILES.fetch(root)


def _batches(root: Path) -> list[dict[str, Any]]:
    return [unpickle(FILES.read(root, name)) for name in FILES.checksums]
