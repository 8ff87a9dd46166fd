"""One client's examples: a list of rows of the images, and the batches that are made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bench import keys, tree
from bench.data.batch import BY_HAND, Batch, of_view
from bench.data.images import Images


@dataclass
class Meter:
    """Counts the batches that a verb took of one client's examples, so that the loop can report samples processed."""

    epochs: float = 0.0
    """Passes over all examples; one without a gradient is a third of a training step."""
    begun: dict[object, tuple[int, float]] = field(default_factory=dict)
    """Passes that are not through: places seen, and what a whole one counts."""
    streams: dict[object, tuple[int, int, float]] = field(default_factory=dict)
    """Endless streams, in which a pass follows the other without padding: batches taken, their size, what a pass
    counts.
    """
    parts: list[LocalData] = field(default_factory=list)
    """Parts of the examples, which have meters of their own."""

    def along(self, length: int, size: int, worth: float) -> Iterator[int]:
        """Give the first place of each batch of a pass over `length` places, and count those that are taken."""
        this = object()
        for start in range(0, length, size):
            self.begun[this] = start + size, worth
            yield start
        self.begun.pop(this, None)
        self.epochs += worth

    def samples(self, n: Tensor | float) -> Tensor | float:
        """Give how many samples were processed if `n` examples are real: both () float64, or numbers."""
        total = n * self.epochs
        for seen, worth in self.begun.values():
            total = total + worth * (n.clamp(max=seen) if isinstance(n, Tensor) else min(n, seen))
        for taken, size, worth in self.streams.values():
            assert isinstance(n, Tensor)  # only padded clients have such
            passes, rest = _turns(taken, n, size)
            total = total + worth * (passes * n + rest * size)  # the last batch of a pass ends it: it is no rest
        for part in self.parts:
            total = total + part.samples()
        return total


def _turns(taken: int, n: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Give how many whole passes over `n` examples a number of batches is, and how many batches are left over."""
    each = ((n + size - 1) // size).clamp(min=1)  # without examples: padding, of which a pass is one batch
    return taken // each, taken % each


@dataclass(frozen=True)
class LocalData:
    """One client's training examples in one round, or those at the server.

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
    """(C,) int64, training examples of each class at this client; 0 where labels are not known."""
    batch_size: int
    meter: Meter = field(default_factory=Meter)
    client_key: Tensor = BY_HAND
    """() int64, randomness of this client, the same in every round."""
    padded: bool = False
    """Whether n may be less than L: no shape may then depend on it. Otherwise all L are real."""
    labelled: bool = True
    """Whether labels are known."""
    passes: Tensor | None = None
    """(L,) int64, passes that were made over each example before this round, where its orientation hangs on that
    (`Images.alternates`); None: none."""
    views: int = 1
    """How often a batch has each example where nobody says: more than once for a loss part that compares views."""

    @property
    def y(self) -> Tensor:
        """Labels: (L,) int64; -1 where they are not known."""
        return self._labels(self.index)

    @property
    def teacher(self) -> Tensor | None:
        """What a teacher makes of the examples as they are, not augmented: (L, d) float32, as `y` has labels; only of
        clients, and for algorithms that declare the need "teacher".
        """
        return None if self.images.teacher is None else self.images.teacher[self.index]

    @property
    def mask(self) -> Tensor:
        """1 for an example, 0 for padding: (L,) float32."""
        return (torch.arange(len(self.index), device=self.index.device) < self.n).to(torch.float32)

    def steps(self, epochs: int) -> Tensor:
        """Count the optimiser steps that `batches(epochs)` makes: () float32."""
        return (epochs * ((self.n + self.batch_size - 1) // self.batch_size)).to(torch.float32)

    def batches(
        self,
        epochs: int | None = None,
        salt: str = "",
        *,
        steps: int | None = None,
        weights: Tensor | None = None,
        views: int | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Batch]:
        """Shuffle anew in each epoch and give augmented batches; the last of an epoch may be smaller.

        The order is a function of (run seed, client, round, epoch, salt): two calls with one salt see the
        same batches, so that two models of a client, or two algorithms, are trained on the same stream.

        Args:
            epochs: How often every example comes; or else
            steps: how many batches, whatever the client's size: the first of an endless stream of epochs. A client
                without examples has none (in the stacked engine batches of padding, which change nothing).
            salt: Names another stream.
            weights: (L,), one for each example, ≥ 0, any scale: an epoch is then n draws with replacement, such as
                balanced ones by `(1 / data.class_counts.clamp(min=1))[data.y]`. All zero is all equal.
            views: How often each example is augmented: x, y and so on are (views · B, ...), the first B of them the
                batch of one view. A sample is counted for each. By default once, or as often as a loss part asks.
            batch_size: B; the setting's by default.

        Raises:
            ValueError: Neither epochs nor steps, or both; or weights of another shape.
        """
        if (epochs is None) == (steps is None):
            raise ValueError("data.batches wants a number of epochs or of steps, and not both")
        if weights is not None and weights.shape != self.index.shape:
            shape = f"{tuple(weights.shape)}, and there are {len(self.index)} examples"
            raise ValueError(f"data.batches: weights are {shape}; give one for each, by class as in weights[data.y]")
        size = self.batch_size if batch_size is None else batch_size
        views = self.views if views is None else views
        if epochs is not None:
            return self._epochs(range(epochs), salt, weights, views, size)
        assert steps is not None
        if not len(self.index):
            return iter(())
        if self.padded:
            return self._stream(steps, salt, weights, views, size)
        return itertools.islice(self._epochs(itertools.count(), salt, weights, views, size), steps)

    def plain(self, batch: Batch) -> Tensor:
        """Give the examples of one of its batches as they are, not augmented: of the form of `batch.x`.

        For networks of which a part looks at this picture of an example, and another part at that of the batch. Nothing
        is counted besides what the batch is: who puts both through a whole network asks for two views.
        """
        return self.images.plain(self.index[batch.example])

    def plain_batches(self, size: int = 256) -> Iterator[Batch]:
        """Give every example once, in its stored order, without augmentation."""
        mask, example = self.mask, torch.arange(len(self.index), device=self.index.device)
        for start in self.meter.along(len(self.index), size, 1 / 3):
            part = slice(start, start + size)
            rows = self.index[part]
            yield Batch(self.images.plain(rows), self._labels(rows), mask[part], example[part], self.key, start)

    def class_means(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Average something over the examples of each class, without augmentation: (C, d) float32, zero where
        `class_counts` is.

        Args:
            of: (B, channels, height, width) -> (B, d), for example the features of a model.
        """
        sums = None
        for batch in self.plain_batches() if len(self.index) else (self._nothing(),):
            here = (batch.y[:, None] == torch.arange(len(self.class_counts), device=batch.y.device)) * batch.weight[
                :, None
            ]
            values = here.T @ of(batch.x).float()
            sums = values if sums is None else sums + values
        assert sums is not None
        return sums / self.class_counts.clamp(min=1)[:, None]

    def mean(self, of: Callable[[Batch], Tensor]) -> Tensor:
        """Average over all examples, without augmentation, what `of` averages over a batch's, such as a loss: (); 0
        without examples.
        """
        total = self.key.new_zeros((), dtype=torch.float32)
        for batch in self.plain_batches():
            total = total + of(batch) * batch.weight.sum()
        return total / self.n.clamp(min=1)

    def _nothing(self) -> Batch:
        """Make a batch of no examples: what is computed from it has the shape of any other's."""
        return Batch(self.images.plain(self.index), self.y, self.mask)

    def part(self, share: float, purpose: str) -> tuple[LocalData, LocalData]:
        """Set examples aside, for validation or early stopping: (the rest, those aside).

        Of each class with n_c examples ⌊share · n_c⌋ go aside, so none of a class with fewer than 1 / share. Which
        ones is a function of (run seed, client, purpose), the same in every round. Both keep the stored order.

        Args:
            share: In [0, 1].
            purpose: Names the choice; another one is unrelated.

        Raises:
            ValueError: A share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"data.part: share = {share}: must be in [0, 1]")
        length, classes, device = len(self.index), len(self.class_counts), self.index.device
        real = torch.arange(length, device=device) < self.n
        group = torch.where(real, self.y + 1, classes + 1)  # without a label, class 0..C-1, padding
        counts = torch.zeros(classes + 2, dtype=torch.int64, device=device).scatter_add(0, group, real.long())
        # 28.9999999 is 29 that met floating-point arithmetic
        taken = (tree.in_float64(counts) * share + 1e-6).floor().to(counts)
        key = keys.fold(self.client_key, "part", purpose)
        order = keys.permutation(key, length, self.n)
        order = order[torch.argsort(group[order], stable=True)]
        rank = torch.arange(length, device=device) - (counts.cumsum(0) - counts)[group[order]]
        aside = torch.zeros_like(real).scatter(0, order, rank < taken[group[order]])
        most = min(length, int(length * share) + 1) if self.padded else int(aside.sum())  # more never go aside
        rest = self._where(real & ~aside, (counts - taken)[1:-1], length if self.padded else length - most)
        return rest, replace(self._where(aside, taken[1:-1], most), key=keys.fold(self.key, "aside", purpose))

    def of_each_class(self, count: int, salt: str = "") -> LocalData:
        """Draw some examples of each class that has so many, and none of the others; in each round anew.

        Args:
            count: How many of each, ≥ 1.
            salt: Names another draw.

        Returns:
            At most C · count examples, in the stored order; what is not there is padding, also of a single client.
        """
        length, classes = len(self.index), len(self.class_counts)
        real = torch.arange(length, device=self.index.device) < self.n
        group = torch.where(real & (self.y >= 0), self.y, classes)  # the last: without a label, or padding
        counts = torch.cat([self.class_counts, self.class_counts.new_zeros(1)])
        order = keys.permutation(keys.fold(self.key, "of each class", salt), length, self.n)
        order = order[torch.argsort(group[order], stable=True)]
        group = group[order]
        rank = torch.arange(length, device=order.device) - (counts.cumsum(0) - counts)[group]
        chosen = torch.zeros_like(real).scatter(0, order, (rank < count) & (counts[group] >= count))
        drawn = torch.where(self.class_counts >= count, count, 0)
        return self._where(chosen, drawn, min(length, classes * count))

    def unlabelled(self) -> LocalData:
        """Give the same examples without labels: y is -1, and class counts are 0."""
        return replace(self, labelled=False, class_counts=torch.zeros_like(self.class_counts))

    def anew(self, key: Tensor) -> LocalData:
        """Give the same examples with the randomness of another key, and count what is processed from here on."""
        return replace(self, key=key, meter=Meter())

    def after(self, epochs: int) -> LocalData:
        """Give the same examples after so many more passes over them: what alternates goes on from there."""
        return self if self.passes is None else replace(self, passes=self.passes + epochs)

    def samples(self) -> Tensor | float:
        """Count the samples that were processed, exactly, per view and batch taken: () float64 for a padded client, a
        number for any other, so that nobody waits for a GPU. For the loop.
        """
        return self.meter.samples(tree.in_float64(self.n) if self.padded else float(len(self.index)))

    def _labels(self, rows: Tensor) -> Tensor:
        return self.images.y[rows] if self.labelled else torch.full_like(rows, -1)

    def _epochs(
        self, epochs: Iterable[int], salt: str, weights: Tensor | None, views: int, size: int
    ) -> Iterator[Batch]:
        # Of stacked clients a batch would lie in pieces, of which products have other bits.
        mask, several = self.mask, 1 if self.padded or views > 1 else self.images.batches_at_once(size)
        for epoch in epochs:
            order = self._order(keys.fold(self.key, f"{_word(weights)} {salt} {epoch}"), weights)
            key = keys.fold(self.key, f"augment {salt} {epoch}")
            ready: Iterator[Batch] = iter(())
            for start in self.meter.along(len(order), size, views):
                if start % (several * size) == 0:
                    part = slice(start, start + several * size)
                    made = self._batch(order[part], mask[part], key, epoch, start, weights is not None, views)
                    ready = made.parts(size) if several > 1 else iter((made,))
                yield next(ready)

    def _stream(self, steps: int, salt: str, weights: Tensor | None, views: int, size: int) -> Iterator[Batch]:
        """Do the same for a padded client, of which nobody knows here when an epoch ends: each batch asks anew."""
        ordering = keys.fold_each(self.key, [f"{_word(weights)} {salt} {epoch}" for epoch in range(steps)])
        drawing = keys.fold_each(self.key, [f"augment {salt} {epoch}" for epoch in range(steps)])
        length, this = len(self.index), object()
        offset = torch.arange(min(size, length), device=self.index.device)
        for step in range(steps):
            passed, turn = _turns(step, self.n, size)
            place = turn * size + offset
            order = self._order(ordering[passed[None]][0], weights)
            weight = (place < self.n).to(torch.float32)
            self.meter.streams[this] = step + 1, size, views
            example = order[place.clamp(max=length - 1)]
            key = drawing[passed[None]][0]
            yield self._batch(example, weight, key, passed, turn * size, weights is not None, views)

    def _order(self, key: Tensor, weights: Tensor | None) -> Tensor:
        """Give the example at each place of an epoch: (L,) int64, of padding last."""
        if weights is None:
            return keys.permutation(key, len(self.index), self.n)
        mask = tree.in_float64(self.mask)
        weights = tree.in_float64(weights) * mask
        return keys.weighted(key, torch.where(weights.sum() > 0, weights, mask), len(weights))

    def _batch(
        self,
        example: Tensor,
        weight: Tensor,
        key: Tensor,
        epoch: int | Tensor,
        first: int | Tensor,
        again: bool,
        views: int,
    ) -> Batch:
        rows = self.index[example]
        # An example that comes again is another picture each time.
        own = first + torch.arange(len(example), device=example.device) if again else example
        before = epoch if self.passes is None else self.passes[example] + epoch
        # Two views are the two orientations of what alternates.
        seen = [self.images.augmented(rows, of_view(key, view), own, before + view) for view in range(views)]
        y = self._labels(rows)
        if views == 1:
            return Batch(seen[0], y, weight, example, key, first)
        y, weight, example = y.repeat(views), weight.repeat(views), example.repeat(views)
        return Batch(torch.cat(seen), y, weight, example, key, first, views)

    def _where(self, chosen: Tensor, class_counts: Tensor, length: int) -> LocalData:
        """Give some examples, (L,) bool, as data of their own: `length` of them, which are all and maybe padding."""
        order = torch.argsort(~chosen, stable=True)[:length]
        passes = None if self.passes is None else self.passes[order]
        part = replace(
            self, index=self.index[order], n=chosen.sum(), class_counts=class_counts, meter=Meter(), passes=passes
        )
        self.meter.parts.append(part)
        return part


def _word(weights: Tensor | None) -> str:
    """Name the randomness of an order, so that draws with replacement are unrelated to it."""
    return "order" if weights is None else "draw"
