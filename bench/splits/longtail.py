"""From a balanced training set to a long-tailed one, and the names of its ends: many, medium, few.

The subsample is a function of the labels, the profile and the imbalance alone: the same for every seed and
partition, and the one of a larger imbalance lies within the one of a smaller.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Rows = npt.NDArray[np.int64]
"""Row numbers of a training or test set, or labels."""

MANY, FEW = 100, 20
"""Rule "count": many is above the first, few below the second."""
HEAD_PERCENT, MIDDLE_PERCENT = 75, 95
"""Rule "cumulative": shares of all images at which the head and the middle end."""


def class_sizes(profile: str, largest: int, imbalance: float, num_classes: int) -> list[int]:
    """Give the number of images that each class of a long-tailed set has.

    Args:
        profile: "exponential": largest · imbalance^(-c / (C-1)); "step": the first ⌈C/2⌉ classes keep
            `largest`, the others have largest / imbalance; "pareto", a power law of the rank: largest ·
            (c+1)^(-log imbalance / log C).
        largest: Images of class 0.
        imbalance: Largest class over smallest class, ≥ 1.
        num_classes: C.

    Returns:
        C numbers, rounded down, descending, at least 1 each.

    Raises:
        ValueError: No such profile.

    Source: "exponential" Cui et al. 2019, https://arxiv.org/abs/1901.05555; "step" Buda et al. 2018,
    https://arxiv.org/abs/1710.05381; "pareto" is our own formula.
    """
    if profile == "exponential":
        shares = [imbalance ** (-c / max(num_classes - 1, 1)) for c in range(num_classes)]
    elif profile == "step":
        shares = [1.0 if c < math.ceil(num_classes / 2) else 1.0 / imbalance for c in range(num_classes)]
    elif profile == "pareto":
        exponent = -math.log(imbalance) / math.log(max(num_classes, 2))
        shares = [(c + 1) ** exponent for c in range(num_classes)]
    else:
        raise ValueError(f"profile = {profile!r}: must be one of exponential, step, pareto")
    # 499.9999999 is 500 that met floating-point arithmetic.
    return [max(1, math.floor(round(largest * share, 6))) for share in shares]


def by_class(labels: Rows, num_classes: int) -> list[Rows]:
    """Give for each class its ascending rows, in one pass whatever the number of classes.

    Args:
        labels: (N,) classes 0..C-1.
        num_classes: C.
    """
    counts = np.bincount(labels, minlength=num_classes)
    return np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])


def subsample(labels: Tensor, num_classes: int, profile: str, imbalance: float | None) -> Rows:
    """Choose the rows of the official training set that make the long-tailed one.

    Class 0 is the largest. An imbalance of None or 1 keeps every image; above, the smallest class of the official set
    says how many images class 0 has, so that the ratio is kept where classes differ a little in size.

    Args:
        labels: (N,) int64, classes 0..C-1, of the official training set.
        num_classes: C.
        profile: Of `class_sizes`.
        imbalance: Likewise.

    Returns:
        (n,) rows, class by class, shuffled within a class.

    Source: the released code of FedLoGe and of the CReFF line: NumPy's legacy generator with seed 0 shuffles
    the rows of each class in turn, and the first are kept.
    """
    truth = labels.numpy()
    available = np.bincount(truth, minlength=num_classes)
    sizes = available
    if imbalance is not None and imbalance > 1 and available.any():
        sizes = np.array(class_sizes(profile, int(available[available > 0].min()), imbalance, num_classes))
    kept = [rows[:size] for rows, size in zip(shuffled(labels, num_classes), sizes, strict=True)]
    return np.concatenate(kept).astype(np.int64)


def shuffled(labels: Tensor, num_classes: int) -> list[Rows]:
    """Give for each class its rows in the order in which a tail keeps them, the same for every tail."""
    random = np.random.RandomState(0)
    rows = by_class(labels.numpy(), num_classes)
    for of_class in rows:
        random.shuffle(of_class)
    return rows


def group_classes(class_counts: Tensor, rule: str, withheld: Tensor | None = None) -> dict[str, Tensor]:
    """Name the classes with many, a medium number of, and few training images.

    Args:
        class_counts: (C,) int64, of the global long-tailed training set.
        rule: "thirds": of the classes by size, largest first, equal ones in their order; 4, 3 and 3 of ten, and where
            two are left over both ends have one more. "count": above 100, 20 to 100, below 20 images. "cumulative":
            classes by size, largest first; the head ends with the class in which 75 % of all images are reached, the
            middle with the one in which 95 % are.
        withheld: (n,) int64, classes that are in no group, as no client has an image of them; None: there are none.

    Returns:
        Ascending classes under "many", "medium" and "few": every other class once, a group may be empty.

    Raises:
        ValueError: No such rule.

    Source: "count" Liu et al. 2019, https://arxiv.org/abs/1904.05160; "cumulative" the released code of
    Fed-GraB and FedLoGe, which counts the clients' test images instead.
    """
    if withheld is not None and len(withheld):
        known = torch.nonzero(~torch.isin(torch.arange(len(class_counts)), withheld)).flatten()
        return {group: known[classes] for group, classes in group_classes(class_counts[known], rule).items()}
    if rule == "thirds":
        everything = len(class_counts)
        place = torch.empty_like(class_counts)
        place[torch.sort(class_counts, descending=True, stable=True).indices] = torch.arange(everything)
        many, few = place < (everything + 2) // 3, place >= everything - (everything + 1) // 3
    elif rule == "count":
        few, many = class_counts < FEW, class_counts > MANY
    elif rule == "cumulative":
        order = torch.sort(class_counts, descending=True, stable=True).indices
        reached = class_counts[order].cumsum(0)
        before = torch.empty_like(reached)
        before[order] = reached - class_counts[order]  # images of all larger classes
        total = class_counts.sum()
        many, few = 100 * before < HEAD_PERCENT * total, 100 * before >= MIDDLE_PERCENT * total
    else:
        raise ValueError(f"groups = {rule!r}: must be one of thirds, count, cumulative")
    return {
        "many": many.nonzero().flatten(),
        "medium": (~many & ~few).nonzero().flatten(),
        "few": few.nonzero().flatten(),
    }
