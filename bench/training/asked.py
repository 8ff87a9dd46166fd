"""What a network is told of training images before the first round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.data import Images
from bench.models import Model
from bench.training.engine import counted
from bench.training.population import Population
from bench.tree import Tree

_AT_ONCE = 2**20
"""Numbers of images that are looked at together."""


@dataclass(frozen=True)
class Told:
    """What all training clients said together."""

    total: Tensor
    """(s,) float64, on the host."""
    nbytes: int
    """Sent by all of them, once."""
    flops: float
    """Of what they computed."""


def tell(model: Model, population: Population) -> Told:
    """Have each training client add up what a network asks of its images, none augmented, and add that up in the order
    of the clients, in float64.
    """
    total, flops = torch.zeros(size(model), dtype=torch.float64), 0.0
    for client in range(population.training):
        own, work = counted(partial(_sum, model, population.images, population.index[client]))
        total, flops = total + own["sum"].cpu(), flops + work
    return Told(total, population.training * total.nbytes, flops)


def size(model: Model) -> int:
    """Give how many numbers a client sends for a network that asks some: s."""
    return len(model.summary(torch.zeros(0, *model.shape)))


def _sum(model: Model, images: Images, index: Tensor) -> Tree:
    """Add up over some images, (n,) rows."""
    least = model.summary(images.plain(index[:0]))
    at_once = max(1, _AT_ONCE // math.prod(model.shape))
    return {"sum": sum((model.summary(images.plain(part)) for part in index.split(at_once) if len(part)), start=least)}
