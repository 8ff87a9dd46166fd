"""How often test images of a class were taken for which: all that is kept of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Answers = dict[str, list[Tensor]]
"""Model name to what it took the test images of each client for, of all of them for a generic model: (3, n) int64 with
class, predicted class and number of images, ascending; what never happened is not there."""


def sparse(taken: Tensor, sizes: Sequence[int], num_classes: int) -> list[Tensor]:
    """Add up images by model, class and predicted class: of each model as in `Answers`.

    Args:
        taken: (2, n) int64, class and predicted class, on the host.
        sizes: How many of the n are of each model, one after the other.
        num_classes: C.
    """
    model = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    triples, images = torch.unique((model * num_classes + taken[0]) * num_classes + taken[1], return_counts=True)
    pairs = triples % num_classes**2
    lengths = torch.bincount(triples // num_classes**2, minlength=len(sizes)).tolist()
    return list(torch.stack([pairs // num_classes, pairs % num_classes, images]).split(lengths, 1))


def right(answers: Sequence[Tensor], num_classes: int) -> tuple[Tensor, Tensor]:
    """Count right answers and test images of each client and class: (K, C) int64 each, of K entries of `Answers`."""
    correct, total = torch.zeros(2, len(answers) * num_classes, dtype=torch.int64)
    classes, predicted, images = torch.cat(list(answers), 1)
    sizes = torch.tensor([told.shape[1] for told in answers])
    place = torch.arange(len(answers)).repeat_interleave(sizes) * num_classes + classes
    total.index_add_(0, place, images)
    correct.index_add_(0, place, images * (classes == predicted))
    return correct.reshape(-1, num_classes), total.reshape(-1, num_classes)
