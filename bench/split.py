"""Whose images are whose: the long-tailed training set, its partition, and a test set for each client.

A split is a function of (labels, setting, seed) alone, never of an algorithm. Its fingerprint stands in every
result.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bench.dataset import DataDamaged, Labels
from bench.dealing import PartitionFailed as PartitionFailed
from bench.dealing import Pool, generator
from bench.heterogeneity import measure
from bench.longtail import Rows, subsample
from bench.longtail import group_classes as group_classes
from bench.partition import PARTITIONS as PARTITIONS

if TYPE_CHECKING:
    from bench.settings import Setting


@dataclass(frozen=True)
class Split:
    """A long-tailed training set dealt to clients."""

    class_counts: Tensor
    """(C,) int64, images of each class in the long-tailed training set."""
    clients: tuple[Tensor, ...]
    """For each client (n_k,) int64, ascending rows of the official training set; disjoint, maybe empty."""
    tests: tuple[Tensor, ...]
    """For each client (m_k,) int64, ascending rows of the official test set; clients may overlap."""
    fingerprint: str
    """First 16 hexadecimal digits of the SHA-256 over the labels and all rows."""


def make_split(labels: Labels, num_classes: int, setting: Setting, seed: int) -> Split:
    """Make the split that a setting and a seed describe.

    The long tail does not depend on the seed; the partition and the clients' test sets do.

    Args:
        labels: Of the official parts.
        num_classes: C.
        setting: Its profile, imbalance, partition, alpha, clients and client_test are read.
        seed: 0..2^32-1.

    Raises:
        PartitionFailed: The images cannot be dealt in this way, or there is no partition of that name.
        DataDamaged: A label lies outside 0..C-1.
    """
    for part in (labels.train, labels.test):
        low, high = (int(part.min()), int(part.max())) if len(part) else (0, 0)
        if low < 0 or high >= num_classes:
            raise DataDamaged(f"labels run from {low} to {high}, and there are {num_classes} classes")
    if not 0 <= seed < 2**32:
        raise PartitionFailed(f"seed = {seed}: must be in 0..{2**32 - 1}")
    if setting.partition not in PARTITIONS:
        known = ", ".join(PARTITIONS)
        raise PartitionFailed(f"no partition is called {setting.partition!r}; there are {known}")
    kept = subsample(labels.train, num_classes, setting.profile, setting.imbalance)
    truth = labels.train.numpy()
    pool = Pool(truth[kept], num_classes, None if labels.users is None else labels.users.numpy()[kept])
    parts = PARTITIONS[setting.partition](pool, setting.clients, setting.alpha, seed)
    clients = [np.sort(kept[part]) for part in parts]
    tests = client_tests(truth, labels.test.numpy(), clients, num_classes, setting.client_test, seed)
    return Split(
        class_counts=torch.from_numpy(np.bincount(truth[kept], minlength=num_classes)),
        clients=tuple(map(torch.from_numpy, clients)),
        tests=tuple(map(torch.from_numpy, tests)),
        fingerprint=_fingerprint(labels, clients, tests),
    )


def client_tests(train: Rows, test: Rows, clients: list[Rows], num_classes: int, rule: str, seed: int) -> list[Rows]:
    """Draw for each client test images distributed as its training images.

    Without replacement within a client, independently of other clients: their test sets may overlap.

    Args:
        train: (N,) labels of the official training set.
        test: (M,) labels of the official test set.
        clients: Training rows of each client.
        num_classes: C.
        rule: Of `client_test_sizes`.
        seed: Of the run.

    Returns:
        For each client ascending rows of the official test set.
    """
    rows = [np.flatnonzero(test == c) for c in range(num_classes)]
    available = np.array([len(of_class) for of_class in rows])
    total = sum(len(client) for client in clients)
    tests = []
    for k, client in enumerate(clients):
        sizes = client_test_sizes(np.bincount(train[client], minlength=num_classes), total, available, rule)
        random = generator(seed, "test", k)
        drawn = [random.permutation(rows[c])[: sizes[c]] for c in np.flatnonzero(sizes)]
        tests.append(np.sort(np.concatenate([np.empty(0, dtype=np.int64), *drawn])))
    return tests


def client_test_sizes(class_counts: Rows, total: int, available: Rows, rule: str) -> Rows:
    """Give the number of test images of each class for one client. M is the size of the official test set.

    Args:
        class_counts: (C,) A_c, training images of the client.
        total: N, training images of all clients.
        available: (C,) official test images.
        rule: "matched": ⌈r · A_c⌉ with one ratio r = min(M / N, smallest available_c / A_c) for all classes
            of the client: no class is dropped, and none falls short. "fedloge": ⌊A_c · M / N⌋: a class with
            few images may be dropped.

    Returns:
        (C,) numbers, at most `available`.

    Raises:
        ValueError: No such rule.

    Source: "fedloge" the released code; "matched" is ours.
    """
    everything = int(available.sum())
    if rule == "fedloge":
        # In floating point and in this order, as the reference: the floor may depend on it.
        sizes = np.floor(class_counts / max(total, 1) * everything).astype(np.int64)
    elif rule == "matched":
        # Whole numbers, for an exact ceiling: r = part / whole.
        pairs = [(int(a), int(n)) for a, n in zip(available, class_counts, strict=True) if n > 0 and a > 0]
        part, whole = min([(everything, max(total, 1)), *pairs], key=lambda ratio: ratio[0] / ratio[1])
        sizes = -(-class_counts * part // whole)
    else:
        raise ValueError(f"client_test = {rule!r}: must be one of matched, fedloge")
    return np.minimum(sizes, available)


def describe(labels: Labels, split: Split, num_classes: int, rule: str) -> dict[str, Any]:
    """Describe a split in JSON's types.

    Args:
        labels: Of the official parts.
        split: Made of them.
        num_classes: C.
        rule: Of `group_classes`.

    Returns:
        "class_counts" (C numbers), "clients" (for each "train" and "test" images and training "classes"),
        "groups" (classes that are "many", "medium", "few"), "heterogeneity" (of
        `bench.heterogeneity.measure`), "fingerprint".
    """
    table = histograms(labels, split, num_classes).numpy()
    groups = group_classes(split.class_counts, rule)
    return {
        "class_counts": split.class_counts.tolist(),
        "clients": [
            {"train": len(train), "test": len(test), "classes": int((counts > 0).sum())}
            for train, test, counts in zip(split.clients, split.tests, table, strict=True)
        ],
        "groups": {name: classes.tolist() for name, classes in groups.items()},
        "heterogeneity": measure(table),
        "fingerprint": split.fingerprint,
    }


def histograms(labels: Labels, split: Split, num_classes: int) -> Tensor:
    """Count the training images of each class at each client: (K, C) int64."""
    return torch.stack([torch.bincount(labels.train[rows], minlength=num_classes) for rows in split.clients])


def _fingerprint(labels: Labels, clients: list[Rows], tests: list[Rows]) -> str:
    sha = hashlib.sha256()
    for rows in (labels.train.numpy(), labels.test.numpy(), *clients, *tests):
        sha.update(f"{len(rows)}\n".encode())  # where one ends and the next begins
        sha.update(rows.astype("<i8").tobytes())
    return sha.hexdigest()[:16]
