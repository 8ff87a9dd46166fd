"""Digits: 1,797 scans of handwritten digits of 8 x 8 pixels, shipped with scikit-learn.

E. Alpaydin, C. Kaynak. Optical recognition of handwritten digits. UCI Machine Learning Repository, 1998.
https://doi.org/10.24432/C50P49
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from bench import DataMissing, Dataset, Splits, register

TESTED = 50
"""Test images of each class."""


@register("digits")
@dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """The first 50 scans of each class in stored order are for testing (500), the others for training
    (1,297).

    The split is ours: the part that scikit-learn ships has none. Pixels are 0 to 16. Normalised by the mean
    and standard deviation of the training pixels.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    mean: ClassVar[tuple[float, ...]] = (0.304,)
    std: ClassVar[tuple[float, ...]] = (0.375,)
    scale: ClassVar[float] = 16.0
    flip: ClassVar[bool] = False
    size: ClassVar[str] = "nothing to download"
    licence: ClassVar[str] = "CC BY 4.0"
    citation: ClassVar[str] = (
        "Alpaydin, Kaynak, Optical recognition of handwritten digits, UCI Machine Learning Repository, 1998"
    )
    source: ClassVar[str] = "https://doi.org/10.24432/C50P49, test part, as scikit-learn's load_digits"

    def load(self, root: Path) -> Splits:
        """Read the scans from scikit-learn; `root` is not used."""
        scans = torch.from_numpy(np.loadtxt(_file(), delimiter=",", dtype=np.uint8))  # (1797, 64 pixels and a label)
        x, y = scans[:, :64].reshape(-1, 1, 8, 8), scans[:, 64].long()
        seen = (y[:, None] == torch.arange(10)).cumsum(0)  # (1797, 10) scans of each class so far
        tested = seen.gather(1, y[:, None])[:, 0] <= TESTED
        return Splits(x[~tested], y[~tested], x[tested], y[tested])

    def fetch(self, root: Path) -> None:
        """Do nothing: the scans came with scikit-learn."""


def _file() -> Path:
    """Find the scans beside scikit-learn, without importing it: that takes longer than a run's first rounds."""
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        if (file := Path(folder, "datasets", "data", "digits.csv.gz")).exists():
            return file
    raise DataMissing("digits: scikit-learn, which they come with, is not installed; pip install scikit-learn")
