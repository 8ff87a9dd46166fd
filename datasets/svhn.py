"""SVHN: colour photographs of house numbers, cropped to one digit each, 32 x 32 pixels.

Yuval Netzer, Tao Wang, Adam Coates, Alessandro Bissacco, Bo Wu, Andrew Y. Ng. Reading digits in natural images with
unsupervised feature learning. NIPS workshop on deep learning and unsupervised feature learning, 2011.
http://ufldl.stanford.edu/housenumbers
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bench import Dataset, Labels, Splits, register
from bench.files.download import Remote
from bench.files.official import Official

SERVER = "https://ufldl.stanford.edu/housenumbers"

FILES = Official(
    name="svhn",
    folder="svhn",
    checksums={
        "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
        "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    },
    remotes=(
        Remote(f"{SERVER}/train_32x32.mat", "svhn/train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
        Remote(f"{SERVER}/test_32x32.mat", "svhn/test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 64_275_384),
    ),
    size="246 MB",
    by_hand=f"put train_32x32.mat and test_32x32.mat of {SERVER} (format 2) in {{root}}/svhn",
)


@register("svhn")
@dataclass(frozen=True, kw_only=True)
class Svhn(Dataset):
    """73,257 training images and 26,032 for testing, in the official order; format 2, without the "extra" part.

    Class c is the digit c; the files call the digit 0 "10". Not balanced as it is: the long tail is cut with the
    rarest digit's number of images for its largest class. Normalised by the mean and standard deviation of the
    training pixels.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    mean: ClassVar[tuple[float, ...]] = (0.4377, 0.4438, 0.4728)
    std: ClassVar[tuple[float, ...]] = (0.1980, 0.2010, 0.1970)
    flip: ClassVar[bool] = False
    size: ClassVar[str] = FILES.size
    licence: ClassVar[str] = "none stated; for non-commercial use only"
    citation: ClassVar[str] = (
        "Netzer, Wang, Coates, Bissacco, Wu, Ng, Reading digits in natural images with unsupervised feature learning, "
        "NIPS workshop on deep learning and unsupervised feature learning, 2011"
    )
    source: ClassVar[str] = SERVER

    def load(self, root: Path) -> Splits:
        """Read the two official files."""
        (train_x, train_y), (test_x, test_y) = (_read(root, name, "X", "y") for name in FILES.checksums)
        return Splits(_images(train_x), _classes(train_y), _images(test_x), _classes(test_y))

    def labels(self, root: Path) -> Labels:
        """Read the labels, which lie in the same files."""
        (train,), (test,) = (_read(root, name, "y") for name in FILES.checksums)
        return Labels(_classes(train), _classes(test))

    def fetch(self, root: Path) -> None:
        """Download the two official files."""
        FILES.fetch(root)


def _read(root: Path, name: str, *variables: str) -> list[Tensor]:
    from scipy.io import loadmat

    file: Any = io.BytesIO(FILES.read(root, name))  # the stubs want a path
    content = loadmat(file, variable_names=variables)
    return [torch.from_numpy(np.ascontiguousarray(content[variable].T)) for variable in variables]


def _images(stored: Tensor) -> Tensor:
    """Bring images as they are stored, transposed, (N, channels, width, height), to (N, channels, height, width)."""
    return stored.transpose(2, 3).contiguous()


def _classes(stored: Tensor) -> Tensor:
    """Bring labels as they are stored, (1, N) uint8 from 1 to 10, to (N,) int64 classes."""
    return stored[0].long() % 10
