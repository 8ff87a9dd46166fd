"""What the clients of a cohort sent, and sums of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench import tree
from bench.tree import Tree

_ENTRIES = 2**17  # of a leaf that is weighted by class, held in float64 at once


class Uploads:
    """What the clients of a cohort sent, as far as it arrived, in the order of their ids.

    Args:
        trees: One upload a client, all of one structure; at least one.
        sizes: (K,) training examples of each client.
        clients: (K,) int64, their ids, ascending; 0..K-1 by default.
        weights: (K,), how much each counts in a mean by the setting; the sizes by default.
    """

    def __init__(
        self, trees: Sequence[Tree], sizes: Tensor, clients: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        self.trees, self.sizes = trees, sizes
        self.weights = sizes if weights is None else weights
        self.clients = torch.arange(len(trees), device=sizes.device) if clients is None else clients

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, key: str) -> Any:
        """Stack an upload: every leaf of a tree, or a single tensor, (K, ...)."""
        sent = [upload[key] for upload in self.trees]
        return torch.stack(sent) if isinstance(sent[0], Tensor) else tree.stack(sent)

    def tensor(self, key: str) -> Tensor:
        """Stack an upload that is a single tensor, (K, ...), with its type."""
        stacked: Tensor = self[key]
        return stacked

    def mean(self, key: str | None = None, weights: Tensor | Tree | None = None) -> Any:
        """Average over the clients, in float64 and in the order of their ids.

        Args:
            key: Which upload, a tree or a tensor; all of them, as a tree, when None.
            weights: (K,), or (K, C) for a mean per class over leaves (C, ...), or a tree of (K, ...) tensors, for each
                leaf its own; by default the setting's (`client_weights`). They need not sum to one. Where all weights
                are zero the plain mean is taken.
        """

        if weights is None:
            return self._combine(key, self._usual)
        return self._combine(key, tree.map(_shares, weights) if isinstance(weights, dict) else _shares(weights))

    def sum(self, key: str | None = None, weights: Tensor | Tree | None = None) -> Any:
        """Add up over the clients, like `mean` but with the weights as they are; by default 1 each."""
        return self._combine(key, [1.0] * len(self) if weights is None else weights)

    @cached_property
    def _usual(self) -> list[float]:
        """Shares of the setting, (K,), which the device is asked for once."""
        return _told(_shares(self.weights))

    def _combine(self, key: str | None, weights: Tensor | Tree | list[float]) -> Any:
        def combine(weights: Tensor | list[float], *leaves: Tensor) -> Tensor:
            if isinstance(weights, Tensor) and weights.ndim > 1:
                weights = tree.in_float64(weights)
                w = weights.reshape(weights.shape + (1,) * (leaves[0].ndim + 1 - weights.ndim))
                return _summed(w.expand(-1, *leaves[0].shape), leaves)
            result = torch.zeros_like(tree.in_float64(leaves[0]))
            for leaf, weight in zip(leaves, _told(weights), strict=True):
                result.add_(leaf.to(result.device), alpha=weight)  # one after the other: K models are never held twice
            return result.to(leaves[0])

        sent = self.trees if key is None else [upload[key] for upload in self.trees]
        if isinstance(weights, dict):
            return tree.map(combine, weights, *sent)
        weights = _told(weights) if isinstance(weights, list) or weights.ndim == 1 else weights
        if isinstance(sent[0], Tensor):
            return combine(weights, *sent)
        return tree.map(lambda *leaves: combine(weights, *leaves), *sent)


def _summed(weights: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Add up K leaves (n, ...) by their weights, (K, n, ...): some rows at a time, so that they stay in a cache."""
    rows = max(1, _ENTRIES * len(leaves[0]) // max(leaves[0].numel(), 1))
    parts = zip(weights.split(rows, 1), *(leaf.split(rows) for leaf in leaves), strict=True)
    sums = [(tree.in_float64(torch.stack(part)) * shares).sum(0) for shares, *part in parts]
    return torch.cat(sums).to(leaves[0])


def _shares(weights: Tensor) -> Tensor:
    """Have weights, (K, ...), add up to one: float64; those that are all zero are all equal."""
    weights = tree.in_float64(weights)
    total = weights.sum(0, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=1e-300), torch.ones_like(weights) / len(weights))


def _told(weights: Tensor | list[float]) -> list[float]:
    """Give (K,) weights as the host's numbers; a device is waited for."""
    told: list[float] = weights if isinstance(weights, list) else tree.in_float64(weights).tolist()
    return told
