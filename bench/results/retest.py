"""Kept models tested anew, on whatever images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.data import Images
from bench.results.kept import Kept, Module

_SLICE = 128
"""Images of a pass."""


@dataclass(frozen=True)
class Retested:
    """What the models of one name got right."""

    clients: tuple[int, ...]
    """Whose they are, ascending; (-1,) for a generic one."""
    correct: Tensor
    """(K, C) int64."""
    total: Tensor
    """(K, C) int64."""


def retest(
    kept: Kept, images: Images, rows: Sequence[Tensor] | None = None, official: Tensor | None = None
) -> dict[str, Retested]:
    """Test all models that a run kept, by name.

    Args:
        kept: The models.
        images: Normalised as the run's were.
        rows: (n_k,) int64, for each client those of the images that its own models are tested on; None: all.
        official: (n,) int64, those that the other models are tested on; None: all.
    """
    everything = torch.arange(len(images), device=images.device)
    found = {}
    for name in kept.names():
        clients = kept.clients(name)
        if clients:
            own = [everything if rows is None else rows[client] for client in clients]
            tested = [
                _count(kept.module(name, client), images, some) for client, some in zip(clients, own, strict=True)
            ]
        else:
            tested = [_count(kept.module(name), images, everything if official is None else official)]
        correct, total = (torch.stack(column) for column in zip(*tested, strict=True))
        found[name] = Retested(tuple(clients) or (-1,), correct, total)
    return found


def _count(module: Module, images: Images, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Count right answers and images of each class: (C,) int64 twice."""
    y, classes = images.y[rows], module.network.classes
    with torch.no_grad():
        parts = [module(images.plain(part)).argmax(1) for part in rows.split(_SLICE) if len(part)]
    right = torch.cat([y.new_empty(0), *parts]) == y
    return torch.bincount(y[right], minlength=classes), torch.bincount(y, minlength=classes)
