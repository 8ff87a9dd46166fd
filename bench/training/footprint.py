"""What a network is in numbers, whoever trains it: its parameters, its bytes, and what one look at an image takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from bench import keys, tree
from bench.models import Model
from bench.models.layers import is_norm_statistic
from bench.training.operations import Operations

OF_THE_NETWORK = ("parameters", "model_bytes", "forward_flops")
"""Costs that are those of the network, whatever a method makes of it."""


@dataclass(frozen=True)
class Footprint:
    """Of one network."""

    parameters: int
    """Numbers that it is made of, fixed ones too; running statistics are none of them."""
    nbytes: int
    """Of all its tensors, running statistics included: what it takes to send it."""
    flops: int
    """Floating-point operations of a forward pass of one image, a multiplication and an addition being two: products of
    matrices, convolutions and attention."""

    @property
    def costs(self) -> dict[str, float]:
        """The same among the costs of a run: by the names of `OF_THE_NETWORK`."""
        numbers = (self.parameters, self.nbytes, self.flops)
        return dict(zip(OF_THE_NETWORK, map(float, numbers), strict=True))


@lru_cache(maxsize=64)
@torch.no_grad()
def footprint(model: Model) -> Footprint:
    """Measure a network: nothing is drawn, and zeros are counted, for shapes alone would load torch's compiler."""
    shapes = model.init(keys.key(0, "meta"))
    zeros = tree.map(lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype), shapes)
    with Operations() as done:
        model.logits(zeros["head"], model.features(zeros["body"], torch.zeros(1, *model.shape)))
    parameters = sum(leaf.numel() for path, leaf in tree.flatten(shapes).items() if not is_norm_statistic(path))
    return Footprint(parameters, tree.nbytes(shapes), done.total)
