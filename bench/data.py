"""What an algorithm is handed: a batch, one client's examples, and what a cohort sent.

Images stay uint8, in one resident tensor or in a file that batches are read from; a client is a list of rows.
Normalisation and augmentation are tensor operations on whole batches, keyed by (client, round, epoch, example), hence
the same in every engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import keys, tree
from bench.dataset import Streamed
from bench.tree import Tree

AUGMENTATIONS = ("none", "crop", "crop_flip", "batch_crop_flip")
"""`crop` and `crop_flip` draw for each image (black padding of 4 pixels, an eighth of images above 32);
`batch_crop_flip` draws once for a whole batch and pads with the mean colour, which is what the CReFF family of codes
does."""


@dataclass(frozen=True)
class Batch:
    """Examples of one optimiser step."""

    x: Tensor
    """(B, channels, height, width) float32, normalised, stored channels-last."""
    y: Tensor
    """(B,) int64."""
    weight: Tensor
    """(B,) float32: 1 for an example, 0 for padding."""

    @property
    def real(self) -> Tensor:
        """Whether there is any example, and not padding only: () bool."""
        return self.weight.sum() > 0


class Images:
    """Images by number, and how to make batches of them on one device.

    Args:
        x: (N, channels, height, width) uint8: a tensor stays resident on its device, a file is read batch by batch.
        y: (N,) int64, on the device.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, likewise.
        augment: One of `AUGMENTATIONS`.
        scale: The pixel value that stands for 1.0 (255, or 16 for digits).
        rows: (N,) int64, the row of `x` of each number, where the two are not the same.
    """

    def __init__(
        self,
        x: Tensor | Streamed,
        y: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: str = "none",
        scale: float = 255.0,
        rows: Tensor | None = None,
    ) -> None:
        self.y, self.augment, self.shape, self.rows = y, augment, tuple(x.shape[1:]), rows
        self.device = y.device
        self.pad = 0 if augment == "none" else max(4, self.shape[1] // 8)
        colour = torch.tensor(mean) if augment.startswith("batch") else torch.zeros(len(mean))
        self.colour = (colour * scale).round().to(x.dtype).to(self.device)
        self.factor = (1.0 / (scale * torch.tensor(std))).to(self.device)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).to(self.device)
        self.streamed = None if isinstance(x, Tensor) else x
        # Padded once for all: a crop is then one gather.
        self.x = self._padded(x if rows is None else x[rows]) if isinstance(x, Tensor) else None

    def __len__(self) -> int:
        return len(self.y)

    def gather(self, index: Tensor) -> tuple[Images, Tensor]:
        """Make images resident: for code that cannot read a file, such as a mapped one.

        Args:
            index: Any shape, int64, the numbers that will be asked for.

        Returns:
            Images with at least these, and the index of the same shape for them.
        """
        if self.streamed is None:
            return self, index
        numbers, places = index.unique(return_inverse=True)
        resident = copy.copy(self)
        resident.y, resident.rows, resident.streamed = self.y[numbers], None, None
        resident.x = self._padded(self._read(numbers))
        return resident, places

    def prefetch(self, index: Tensor) -> None:
        """Tell which images will be asked for soon, in this order; those in memory are there already."""
        if self.streamed is not None:
            self.streamed.prefetch(self._rows(index))

    def plain(self, index: Tensor) -> Tensor:
        """Give images without augmentation: (B, channels, height, width) float32."""
        if self.x is None:
            return self._normalise(self._read(index).permute(0, 2, 3, 1))
        _, height, width = self.shape
        inner = self.x[:, self.pad : self.pad + height, self.pad : self.pad + width]
        return self._normalise(inner[index])

    def augmented(self, index: Tensor, key: Tensor, example: Tensor) -> Tensor:
        """Give randomly shifted and flipped images.

        Args:
            index: (B,) rows.
            key: () int64, of the client, round and epoch.
            example: (B,) number of the example within its client: what its own draw depends on.
        """
        if self.augment == "none":
            return self.plain(index)
        if self.augment.startswith("batch"):
            key, example = keys.fold(key, example[0]), torch.zeros_like(example)
        draws = keys.fold(key, example)
        _, height, width = self.shape
        down, right = (draws >> 8) & 0xFFFF, (draws >> 24) & 0xFFFF
        column = torch.arange(width, device=index.device)
        if self.augment.endswith("flip"):
            column = torch.where(((draws >> 40) & 1).bool()[:, None], width - 1 - column, column)
        row = torch.arange(height, device=index.device) + (down % (2 * self.pad + 1))[:, None]
        column = column + (right % (2 * self.pad + 1))[:, None]
        pixels = self.x
        if pixels is None:
            pixels, index = self._padded(self._read(index)), torch.arange(len(index), device=index.device)
        return self._normalise(pixels[index[:, None, None], row[:, :, None], column[:, None, :]])

    def _rows(self, index: Tensor) -> Tensor:
        return index.cpu() if self.rows is None else self.rows[index.cpu()]

    def _read(self, index: Tensor) -> Tensor:
        """Read (B, channels, height, width) from the file."""
        assert self.streamed is not None
        return self.streamed[self._rows(index)].to(self.device)

    def _padded(self, x: Tensor) -> Tensor:
        """Give images channels last, with a border: (B, height + 2 pad, width + 2 pad, channels)."""
        channels, height, width = self.shape
        size = (len(x), height + 2 * self.pad, width + 2 * self.pad, channels)
        padded = self.colour.expand(size).clone(memory_format=torch.contiguous_format)
        padded[:, self.pad : self.pad + height, self.pad : self.pad + width] = x.permute(0, 2, 3, 1)
        return padded

    def _normalise(self, pixels: Tensor) -> Tensor:
        return (pixels.to(torch.float32) * self.factor + self.offset).permute(0, 3, 1, 2)


@dataclass
class Meter:
    """Counts the epochs that a verb asked for, so that the loop can report samples processed."""

    epochs: float = 0.0


@dataclass(frozen=True)
class LocalData:
    """One client's training examples in one round.

    Written and read for one client. In the stacked engine many clients are padded to a common length L; the
    padding comes last and `mask` is 0 there.
    """

    images: Images
    index: Tensor
    """(L,) int64, rows of `images`; padding repeats a valid row."""
    n: Tensor
    """() int64, how many of the L are real."""
    key: Tensor
    """() int64, randomness of this client in this round."""
    class_counts: Tensor
    """(C,) int64, training examples of each class at this client."""
    batch_size: int
    meter: Meter = field(default_factory=Meter)

    @property
    def y(self) -> Tensor:
        """Labels: (L,) int64."""
        return self.images.y[self.index]

    @property
    def mask(self) -> Tensor:
        """1 for an example, 0 for padding: (L,) float32."""
        return (torch.arange(len(self.index), device=self.index.device) < self.n).to(torch.float32)

    def steps(self, epochs: int) -> Tensor:
        """Count the optimiser steps that `batches(epochs)` makes: () float32."""
        return (epochs * ((self.n + self.batch_size - 1) // self.batch_size)).to(torch.float32)

    def batches(self, epochs: int, salt: str = "") -> Iterator[Batch]:
        """Shuffle anew in each epoch and give augmented batches; the last of an epoch may be smaller.

        The order is a function of (run seed, client, round, epoch, salt): two calls with one salt see the
        same batches, so that two models of a client, or two algorithms, are trained on the same stream.
        """
        for epoch in range(epochs):
            order = keys.permutation(keys.fold(self.key, f"order {salt} {epoch}"), len(self.index), self.n)
            draws = keys.fold(self.key, f"augment {salt} {epoch}")
            mask = self.mask
            for start in range(0, len(order), self.batch_size):
                example = order[start : start + self.batch_size]
                rows = self.index[example]
                weight = mask[start : start + self.batch_size]
                yield Batch(self.images.augmented(rows, draws, example), self.images.y[rows], weight)
            self.meter.epochs += 1

    def plain_batches(self, size: int = 256) -> Iterator[Batch]:
        """Give every example once, in its stored order, without augmentation."""
        mask = self.mask
        for start in range(0, len(self.index), size):
            rows = self.index[start : start + size]
            yield Batch(self.images.plain(rows), self.images.y[rows], mask[start : start + size])
        self.meter.epochs += 1 / 3  # a forward pass is a third of a training step

    def class_means(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Average something over the examples of each class, without augmentation: (C, d) float32, zero where
        `class_counts` is.

        Args:
            of: (B, channels, height, width) -> (B, d), for example the features of a model.
        """
        sums = None
        for batch in self.plain_batches() if len(self.index) else (self._nothing(),):
            here = F.one_hot(batch.y, len(self.class_counts)) * batch.weight[:, None]
            values = here.T @ of(batch.x).float()
            sums = values if sums is None else sums + values
        assert sums is not None
        return sums / self.class_counts.clamp(min=1)[:, None]

    def _nothing(self) -> Batch:
        """Make a batch of no examples: what is computed from it has the shape of any other's."""
        return Batch(self.images.plain(self.index), self.y, self.mask)


class Uploads:
    """What the clients of a cohort sent, as far as it arrived, in the order of their ids.

    Args:
        trees: One upload a client, all of one structure; at least one.
        sizes: (K,) training examples of each client.
        clients: (K,) int64, their ids, ascending; 0..K-1 by default.
    """

    def __init__(self, trees: Sequence[Tree], sizes: Tensor, clients: Tensor | None = None) -> None:
        self.trees, self.sizes = trees, sizes
        self.clients = torch.arange(len(trees), device=sizes.device) if clients is None else clients

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, key: str) -> Tree:
        """Stack an upload that is a tree: every leaf (K, ...)."""
        return tree.stack([upload[key] for upload in self.trees])

    def tensor(self, key: str) -> Tensor:
        """Stack an upload that is a single tensor: (K, ...)."""
        return torch.stack([upload[key] for upload in self.trees])

    def mean(self, key: str | None = None, weights: Tensor | Tree | None = None) -> Any:
        """Average over the clients, in float64 and in the order of their ids.

        Args:
            key: Which upload, a tree or a tensor; all of them, as a tree, when None.
            weights: (K,), or (K, C) for a mean per class over leaves (C, ...), or a tree of (K, ...) tensors, for each
                leaf its own; by default the clients' sizes. They need not sum to one. Where all weights are zero the
                plain mean is taken.
        """

        def shares(weights: Tensor) -> Tensor:
            weights = weights.to(torch.float64)
            total = weights.sum(0, keepdim=True)
            return torch.where(total > 0, weights / total.clamp(min=1e-300), torch.ones_like(weights) / len(weights))

        weights = self.sizes if weights is None else weights
        return self._combine(key, tree.map(shares, weights) if isinstance(weights, dict) else shares(weights))

    def sum(self, key: str | None = None, weights: Tensor | Tree | None = None) -> Any:
        """Add up over the clients, like `mean` but with the weights as they are; by default 1 each."""
        return self._combine(key, torch.ones_like(self.sizes) if weights is None else weights)

    def _combine(self, key: str | None, weights: Tensor | Tree) -> Any:
        def combine(weights: Tensor, *leaves: Tensor) -> Tensor:
            weights = weights.to(torch.float64)
            if weights.ndim > 1:
                w = weights.reshape(weights.shape + (1,) * (leaves[0].ndim + 1 - weights.ndim))
                return (torch.stack(leaves).to(torch.float64) * w).sum(0).to(leaves[0].dtype)
            result = torch.zeros_like(leaves[0], dtype=torch.float64)
            for leaf, weight in zip(leaves, weights.tolist(), strict=True):
                result.add_(leaf, alpha=weight)  # one after the other: K models are never held twice
            return result.to(leaves[0].dtype)

        sent = self.trees if key is None else [upload[key] for upload in self.trees]
        if isinstance(weights, dict):
            return tree.map(combine, weights, *sent)
        if isinstance(sent[0], Tensor):
            return combine(weights, *sent)
        return tree.map(lambda *leaves: combine(weights, *leaves), *sent)
