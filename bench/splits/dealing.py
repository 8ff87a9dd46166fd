"""How images are dealt to clients: the pieces that the partitions of `bench.splits.partition` are made of.

Random numbers come from NumPy's legacy generator, whose streams never change between versions.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.splits.longtail import Rows, by_class

TRIES = 10_000
"""Draws after which a partition with a smallest client size is given up; they take seconds at most."""

_NEARLY_EVEN = 100.0
"""A concentration from which on a larger one helps no more."""
_DRAWS_AT_ONCE, _DRAWS_AT_MOST = 200_000, 200_000_000  # classes x clients x tries


class PartitionFailed(ValueError):
    """These images cannot be dealt to these clients in this way. The message says why and what to change."""


@dataclass(frozen=True)
class Pool:
    """What is dealt to the clients."""

    labels: Rows
    """(N,) classes 0..C-1, ascending."""
    num_classes: int
    users: Rows | None = None
    """(N,) natural client of each image, if the dataset has any."""


def generator(seed: int, *purpose: str | int) -> np.random.RandomState:
    """Make the random numbers of a seed and a purpose; another purpose has an unrelated stream."""
    random = np.random.RandomState(0)
    reseed(random, seed, *purpose)
    return random


def reseed(stream: np.random.RandomState, seed: int, *purpose: str | int) -> None:
    """Have a generator give the random numbers of a seed and a purpose: quicker than a new one."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    stream.seed(np.frombuffer(digest, dtype="<u4").astype(np.int64))


def require(partition: str, pool: Pool, clients: int, least: int) -> None:
    """Refuse at once what no draw can do.

    Raises:
        PartitionFailed: No client, or fewer images than `least` for each.
    """
    images = len(pool.labels)
    if clients < 1:
        raise PartitionFailed(f"{partition}: {clients} clients; there must be at least one")
    if images < clients * least:
        wanted = "one image" if least == 1 else f"{least:,} images" if least < 1e9 else f"{least:.0e} images"
        raise PartitionFailed(
            f"{partition}: {images:,} images cannot give each of {clients:,} clients {wanted}; "
            "use fewer clients or a smaller imbalance"
        )


def require_alpha(partition: str, clients: int, alpha: float) -> None:
    """Refuse a concentration that proportions of so many clients cannot be drawn by.

    Raises:
        PartitionFailed: It is not above 0, or so large that the sum over the clients is no number.
    """
    if not alpha > 0:
        raise PartitionFailed(f"{partition}: alpha = {alpha:g}: must be above 0; small is more skewed")
    if not math.isfinite(alpha * clients):
        raise PartitionFailed(
            f"{partition}: alpha = {alpha:g} is too large to draw from; 1000 is nearly even already, and "
            "--partition iid deals evenly without any"
        )


def cut(rows: Rows, parts: int) -> list[Rows]:
    """Cut in consecutive parts whose sizes differ by one at most."""
    return np.array_split(rows, parts)


def deal(random: np.random.RandomState, pool: Pool, table: Rows) -> list[Rows]:
    """Give out the images, shuffled within their class, by a (C, K) table of counts.

    Returns:
        For each client positions in the pool, class by class.
    """
    clients: list[list[Rows]] = [[] for _ in range(table.shape[1])]
    for rows, counts in zip(by_class(pool.labels, pool.num_classes), table, strict=True):
        parts = np.split(random.permutation(rows), counts.cumsum()[:-1])
        for k in np.flatnonzero(counts):
            clients[k].append(parts[k])
    nothing = np.empty(0, dtype=np.int64)
    return [np.concatenate([nothing, *client]) for client in clients]


def dirichlet_table(
    partition: str,
    random: np.random.RandomState,
    pool: Pool,
    clients: int,
    alpha: float,
    least: int,
    *,
    capped: bool,
) -> Rows:
    """Draw how many images of each class each client gets, until every client has `least`.

    For each class p ~ Dirichlet(alpha · 1_K), and the class is cut at ⌊n_c · cumulated p⌋.

    Args:
        partition: Its name, for the error.
        random: Where to draw from.
        pool: N images.
        clients: K.
        alpha: Concentration, > 0.
        least: Smallest client size.
        capped: Whether a client that holds N / K images or more gets none of the later classes.

    Returns:
        (C, K) counts whose rows sum to the class counts.

    Raises:
        PartitionFailed: As of `require_alpha`, or after `TRIES` draws (fewer if there are very many classes and
            clients).
    """
    require_alpha(partition, clients, alpha)
    class_counts = np.bincount(pool.labels, minlength=pool.num_classes)
    capacity = len(pool.labels) / clients if capped else np.inf
    cells = clients * pool.num_classes
    tries, drawn = max(10, min(TRIES, _DRAWS_AT_MOST // cells)), 0
    while drawn < tries:  # many draws are made at once, the first that fits is taken
        batch = max(1, min(tries - drawn, _DRAWS_AT_ONCE // cells))
        drawn += batch
        tables, sound = _draw_tables(random, class_counts, clients, alpha, capacity, batch)
        fits = sound & (tables.sum(1).min(1) >= least)
        if fits.any():
            table: Rows = tables[fits.argmax()]
            return table
    raise PartitionFailed(
        f"{partition}: none of {drawn:,} draws split {len(pool.labels):,} images so that each of {clients:,} "
        f"clients has at least {least:,} (alpha = {alpha:g}); "
        f"use fewer clients{', a larger alpha' if alpha < _NEARLY_EVEN else ''} or a smaller imbalance"
    )


def _draw_tables(
    random: np.random.RandomState, class_counts: Rows, clients: int, alpha: float, capacity: float, batch: int
) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Draw (batch, C, K) counts, and say which of the (batch,) draws are sound."""
    held = np.zeros((batch, clients), dtype=np.int64)
    tables = np.zeros((batch, len(class_counts), clients), dtype=np.int64)
    sound = np.ones(batch, dtype=np.bool_)
    for c in np.flatnonzero(class_counts):
        proportions = random.dirichlet(np.full(clients, alpha), size=batch)
        proportions = np.where(held < capacity, proportions, 0.0)
        total = proportions.sum(1, keepdims=True)
        drawn = total > 0  # not so where alpha is so small that all proportions vanish, or are NaN
        sound &= drawn[:, 0]
        proportions = np.where(drawn, proportions / np.where(drawn, total, 1.0), 0.0)
        cuts = np.floor(proportions.cumsum(1) * class_counts[c]).astype(np.int64)
        cuts[:, -1] = class_counts[c]
        tables[:, c] = np.diff(cuts, axis=1, prepend=0)
        held += tables[:, c]
    return tables, sound
