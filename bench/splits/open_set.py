"""Open classes: withheld from whatever is dealt to clients, so that no training client has an image of any.

What a client held out of training is asked in an open-set test is a function of its labels and a key: which images of
its classes are its labelled shots, and which test images it takes for one of these classes or for none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import keys
from bench.protocol.settings import Setting


def open_classes(setting: Setting, num_classes: int, seed: int) -> Tensor:
    """Draw the classes that are withheld: (n,) int64, ascending; none where the setting asks for none.

    Args:
        setting: How many, and its `split_seed`.
        num_classes: C.
        seed: Of the run.
    """
    if not setting.open_classes:
        return torch.empty(0, dtype=torch.int64)
    return keys.choice(keys.fold(keys.key(setting.seed_of_split(seed)), "open"), num_classes, setting.open_classes)


def known_rows(labels: Tensor, withheld: Tensor) -> Tensor:
    """Give the rows that are of no withheld class: (n,) int64, ascending, of (N,) int64 labels."""
    return torch.nonzero(~torch.isin(labels, withheld)).flatten()


@dataclass(frozen=True)
class Episode:
    """What one client is asked, as places among its own training images, its own test images, and the open ones."""

    shots: Tensor
    """(S,) int64, of its training images, class by class."""
    known: Tensor
    """(n,) int64, ascending, of its test images: all of the classes that have shots."""
    open: Tensor
    """(m,) int64, ascending, of the official test images of open classes: as many as known ones, or all."""


def episode(
    setting: Setting, key: Tensor, client: int, train: Tensor, test: Tensor, open_images: int
) -> Episode | None:
    """Choose shots and test images of one client; None where fewer than two of its classes have enough of them.

    Args:
        setting: Its `shots` and `ways`.
        key: () int64, of the run, on the host.
        client: Which.
        train: (N,) int64, classes of its training images, on the host; none is open.
        test: (M,) int64, classes of its test images, on the host; none is open.
        open_images: Official test images of open classes.
    """
    key = keys.fold(key, "open set", client)
    classes, images = train.unique(return_counts=True)
    enough = classes[(images >= setting.shots) & torch.isin(classes, test)]
    if setting.ways is not None and setting.ways < len(enough):
        enough = enough[keys.choice(keys.fold(key, "ways"), len(enough), setting.ways)]
    if len(enough) < 2:
        return None
    order = keys.permutation(keys.fold(key, "shots"), len(train))  # of which each class takes its first
    shots = [order[train[order] == label][: setting.shots] for label in enough]
    known = torch.nonzero(torch.isin(test, enough)).flatten()
    asked = keys.choice(keys.fold(key, "asked"), open_images, min(len(known), open_images))
    return Episode(torch.cat(shots), known, asked)
