"""Weights of which a mask keeps a part: as one row, packed by the mask, and how many each layer keeps.

A *row* is all matrices and filters of a body one after the other, (n,); a mask is a row of bool, and travels as a bit
an entry. What a mask keeps is packed into (k,) values in the row's order: k is known to who packs, so that no shape
depends on what the mask says, and no device is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import bits, tree
from bench.tree import Tree

KEPT = "kept"
"""Key of a packed body below which the values lie that its mask keeps."""


def packed(row: Tensor, mask: Tensor, count: int) -> Tensor:
    """Give the entries of a row that a mask keeps, in their order.

    Args:
        row: (n,).
        mask: (n,) bool.
        count: How many it keeps, or more.

    Returns:
        (count,) of the row's dtype; zeros behind the last entry.
    """
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    return row.new_zeros(count + 1).scatter(0, place, row)[:count]


def unpacked(values: Tensor, mask: Tensor) -> Tensor:
    """Undo `packed`: (n,) with zeros where the mask keeps nothing, of (k,) values."""
    place = torch.where(mask, mask.cumsum(0) - 1, len(values))
    return torch.cat([values, values.new_zeros(1)])[place]


def mask_bits(mask: Tensor) -> Tensor:
    """Write a mask as it travels: (n,) bool to (⌈n / 8⌉,) uint8."""
    return bits.pack(mask.to(torch.int32), 1)


def mask_of(sent: Tensor, n: int) -> Tensor:
    """Undo `mask_bits`: (n,) bool."""
    return bits.unpack(sent, 1, n).bool()


def ranks(values: Tensor) -> Tensor:
    """Give the place of each entry of (n,) values among them, from the largest down, of equals by their order: (n,)
    int64.
    """
    order = values.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


def largest(values: Tensor, among: Tensor, count: Tensor | int) -> Tensor:
    """Mark the largest of some entries: (n,) bool.

    Args:
        values: (n,) finite.
        among: (n,) bool, which entries may be marked.
        count: How many are, at most as many as may be.
    """
    return ranks(torch.where(among, values, -math.inf)) < count


@dataclass(frozen=True)
class Weights:
    """The weights of a body that a mask is of."""

    paths: tuple[str, ...]
    """Of their leaves in the body, in its order."""
    shapes: tuple[tuple[int, ...], ...]
    """Of these leaves."""

    @property
    def sizes(self) -> list[int]:
        """Entries of each leaf."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def total(self) -> int:
        """Entries of a row."""
        return sum(self.sizes)

    def row(self, body: Tree, device: torch.device) -> Tensor:
        """Lay the weights of a body out: (n,) float32, on the device that they are on."""
        leaves = tree.flatten(body)
        return torch.cat([torch.zeros(0, device=device), *(leaves[path].flatten() for path in self.paths)])

    def leaves(self, row: Tensor) -> Tree:
        """Give the entries of a row, of weights or of a mask, the shapes that they have in a body."""
        parts = zip(self.paths, row.split(self.sizes), self.shapes, strict=True)
        return tree.unflatten({path: part.reshape(shape) for path, part, shape in parts})

    def pack(self, body: Tree, mask: Tensor, count: int) -> Tree:
        """Give a body of which the weights are packed, below `KEPT`, and all else is as it was."""
        rest = tree.split(body, lambda path: path not in self.paths)[0]
        return {**rest, KEPT: packed(self.row(body, mask.device), mask, count)}

    def unpack(self, body: Tree, mask: Tensor, like: Tree) -> Tree:
        """Undo `pack`: weights that the mask does not keep are zero.

        Args:
            body: Packed.
            mask: (n,) bool.
            like: Of the body before it was packed, for the order of its keys; its values say nothing.
        """
        rest = {key: part for key, part in body.items() if key != KEPT}
        return tree.merge(like, tree.merge(rest, self.leaves(unpacked(body[KEPT], mask))))


def weights_of(body: Tree) -> Weights:
    """Find the matrices and filters of a body: leaves of two axes or more that are trained."""
    found = {path: leaf.shape for path, leaf in tree.flatten(body).items() if _is_weight(path, leaf)}
    return Weights(tuple(found), tuple(tuple(shape) for shape in found.values()))


def _is_weight(path: str, leaf: Tensor) -> bool:
    return leaf.ndim > 1 and not tree.is_statistic(path)


def densities(shapes: Sequence[Sequence[int]], total: float, power: float = 1.0) -> list[float]:
    """Share a number of entries out among layers by Erdős-Rényi kernels: p_l = min(1, ε (Σ dims_l / Π dims_l)^power).

    ε is such that the layers hold `total` entries together. Small layers are denser than large ones, and those that
    would be more than dense are dense.

    Source: Evci, Gale, Menick, Castro, Elsen. Rigging the Lottery. ICML 2020. https://arxiv.org/abs/1911.11134

    Args:
        shapes: Of the layers.
        total: Entries that are kept, at most as many as there are.
        power: 1 for the paper's; 0 for one density in all layers.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [(sum(shape) / size) ** power for shape, size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while len(dense) < len(sizes):
        others = [k for k in range(len(sizes)) if k not in dense]
        scale = (total - sum(sizes[k] for k in dense)) / sum(raw[k] * sizes[k] for k in others)
        over = {k for k in others if scale * raw[k] > 1}
        if not over:
            return [1.0 if k in dense else scale * raw[k] for k in range(len(sizes))]
        dense |= over
    return [1.0] * len(sizes)


def counts(shapes: Sequence[Sequence[int]], total: int, power: float = 1.0) -> tuple[int, ...]:
    """Give how many entries each layer keeps, by `densities`: whole numbers, at least one in each, that add up to
    `total`, or to the nearest number that there can be.
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = min(max(total, len(sizes)), sum(sizes))
    exact = [p * size for p, size in zip(densities(shapes, total, power), sizes, strict=True)]
    whole = [min(max(int(each), 1), size) for each, size in zip(exact, sizes, strict=True)]
    while sum(whole) != total:  # by those that are furthest from what they should be
        step = 1 if sum(whole) < total else -1
        free = [k for k in range(len(sizes)) if 1 <= whole[k] + step <= sizes[k]]
        whole[max(free, key=lambda k: step * (exact[k] - whole[k]))] += step
    return tuple(whole)
