"""Whose images are whose: the long-tailed training set, its partition, and a test set for each client.

A split is a function of (labels, setting, seed) alone, never of an algorithm, and of the setting's `split_seed` instead
of the run's seed where there is one. Its fingerprint stands in every result.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from bench.dataset import DataDamaged, Labels
from bench.plugins.names import near
from bench.protocol.settings import READ_BY, Setting
from bench.splits.dealing import PartitionFailed as PartitionFailed
from bench.splits.dealing import Pool, reseed
from bench.splits.heterogeneity import measure
from bench.splits.longtail import Rows, by_class, subsample
from bench.splits.longtail import group_classes as group_classes
from bench.splits.open_set import known_rows, open_classes
from bench.splits.partition import PARTITIONS as PARTITIONS


@dataclass(frozen=True)
class Split:
    """A long-tailed training set dealt to clients."""

    class_counts: Tensor
    """(C,) int64, images of each class at all clients: of the long-tailed training set, unless some are left out."""
    clients: tuple[Tensor, ...]
    """For each client (n_k,) int64, ascending rows of the official training set; disjoint, maybe empty."""
    tests: tuple[Tensor, ...]
    """For each client (m_k,) int64, ascending rows of the official test set; clients may overlap."""
    fingerprint: str
    """First 16 hexadecimal digits of the SHA-256 over the labels and all rows."""
    left_out: int = 0
    """Images of the long-tailed training set that are in no client, as their users were not drawn."""
    open: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(n,) int64, ascending classes that are withheld from all clients."""


def make_split(labels: Labels, num_classes: int, setting: Setting, seed: int) -> Split:
    """Make the split that a setting and a seed describe.

    The long tail does not depend on the seed; the partition and the clients' test sets do, on the setting's
    `split_seed` if it has one.

    Args:
        labels: Of the official parts.
        num_classes: C.
        setting: Its profile, imbalance, partition, alpha, clients, client_test, split_seed, open_classes and the
            fields of `READ_BY` are read.
        seed: Of the run, 0..2^32-1.

    Raises:
        PartitionFailed: The images cannot be dealt in this way, there is no partition of that name, or too few classes
            would be known.
        DataDamaged: A label lies outside 0..C-1.
    """
    for part in (labels.train, labels.test):
        low, high = (int(part.min()), int(part.max())) if len(part) else (0, 0)
        if low < 0 or high >= num_classes:
            raise DataDamaged(f"labels run from {low} to {high}, and there are {num_classes} classes")
    if not 0 <= seed < 2**32:
        raise PartitionFailed(f"seed = {seed}: must be in 0..{2**32 - 1}")
    seed = setting.seed_of_split(seed)
    if setting.partition not in PARTITIONS:
        raise PartitionFailed(f"no partition is called {setting.partition!r}; {near(setting.partition, PARTITIONS)}")
    if setting.open_classes > num_classes - 2:
        said = f"open_classes = {setting.open_classes}: of {num_classes} classes"
        raise PartitionFailed(f"{said} at most {max(num_classes - 2, 0)} can be withheld, so that two are known")
    withheld = open_classes(setting, num_classes, seed)
    kept = subsample(labels.train, num_classes, setting.profile, setting.imbalance)
    kept = _known(kept, labels.train, withheld)
    truth = labels.train.numpy()
    pool = Pool(truth[kept], num_classes, None if labels.users is None else labels.users.numpy()[kept])
    own = {field: getattr(setting, field) for field, partition in READ_BY.items() if partition == setting.partition}
    # A partition without alpha is given 0, which it does not read.
    parts = PARTITIONS[setting.partition](pool, _clients(pool, setting), setting.alpha or 0.0, seed, **own)
    clients = [np.sort(kept[part]) for part in parts]
    dealt = np.concatenate(clients)
    if setting.client_test == "own":
        tests = [_known(rows, labels.test, withheld) for rows in own_tests(labels, clients)]
    else:
        tests = client_tests(truth, labels.test.numpy(), clients, num_classes, setting.client_test, seed)
    return Split(
        class_counts=torch.from_numpy(np.bincount(truth[dealt], minlength=num_classes)),
        clients=tuple(map(torch.from_numpy, clients)),
        tests=tuple(map(torch.from_numpy, tests)),
        fingerprint=_fingerprint(labels, clients, tests),
        left_out=len(kept) - len(dealt),
        open=withheld,
    )


def _clients(pool: Pool, setting: Setting) -> int:
    """Give the number of clients: as many as there are natural users where the setting does not say."""
    if setting.clients is not None:
        return setting.clients
    if pool.users is None:
        raise PartitionFailed("this dataset does not say whose images it has; say how many clients with --clients")
    return len(np.unique(pool.users))


def _known(rows: Rows, labels: Tensor, withheld: Tensor) -> Rows:
    """Leave out the rows of classes that are withheld."""
    return rows[known_rows(labels[rows], withheld).numpy()] if len(withheld) else rows


def client_tests(train: Rows, test: Rows, clients: list[Rows], num_classes: int, rule: str, seed: int) -> list[Rows]:
    """Draw test images for each client.

    Without replacement within a client, independently of other clients: their test sets may overlap. A client is given
    as many as "matched" gives; "balanced" and "global" only distribute them otherwise, rounded up as there, so that a
    client whose test has few images of many classes is given more.

    Args:
        train: (N,) labels of the official training set.
        test: (M,) labels of the official test set.
        clients: Training rows of each client.
        num_classes: C.
        rule: Of `client_test_sizes`, or "balanced": as many of each class that the client has; or "global":
            distributed as the training images of all clients together.
        seed: Of the split.

    Returns:
        For each client ascending rows of the official test set.
    """
    rows = by_class(test, num_classes)
    available = np.bincount(test, minlength=num_classes)
    everything, total = len(test), sum(len(client) for client in clients)
    together = np.unique(train[np.concatenate(clients)], return_counts=True)
    random = np.random.RandomState(0)
    tests = []
    for k, client in enumerate(clients):
        present, counts = np.unique(train[client], return_counts=True)
        first = "fedloge" if rule == "fedloge" else "matched"
        sizes = client_test_sizes(counts, total, available[present], everything, first)
        if rule in ("balanced", "global"):
            present, counts = together if rule == "global" else (present, np.ones_like(present))
            there = available[present] > 0
            present, counts = present[there], counts[there]
            sizes = client_test_sizes(counts, int(counts.sum()), available[present], int(sizes.sum()), "matched")
        reseed(random, seed, "test", k)
        drawn = [random.permutation(rows[c])[:size] for c, size in zip(present, sizes, strict=True) if size]
        tests.append(np.sort(np.concatenate([np.empty(0, dtype=np.int64), *drawn])))
    return tests


def own_tests(labels: Labels, clients: list[Rows]) -> list[Rows]:
    """Give each client the test images of the users whose training images it has.

    Args:
        labels: With users of both parts.
        clients: Training rows of each client.

    Returns:
        For each client ascending rows of the official test set; none where its users have no test image.

    Raises:
        PartitionFailed: The dataset does not say whose test images it has.
    """
    if labels.users is None or labels.test_users is None:
        raise PartitionFailed("client_test = own: this dataset does not say whose test images it has; use matched")
    users, test_users = labels.users.numpy(), labels.test_users.numpy()
    everyone = 1 + max(int(part.max()) if len(part) else -1 for part in (users, test_users))
    rows = by_class(test_users, everyone)
    nothing = np.empty(0, dtype=np.int64)
    own = [[rows[user] for user in np.unique(users[client])] for client in clients]
    return [np.sort(np.concatenate([nothing, *parts])) for parts in own]


def client_test_sizes(class_counts: Rows, total: int, available: Rows, everything: int, rule: str) -> Rows:
    """Give the number of test images of each class for one client.

    Args:
        class_counts: (C,) A_c, training images of the client; classes it lacks may be left out.
        total: N, training images of all clients.
        available: (C,) official test images of the same classes.
        everything: M, official test images of all classes.
        rule: "matched": ⌈r · A_c⌉ with one ratio r = min(M / N, smallest available_c / A_c) for all classes
            of the client: no class is dropped, and none falls short. "fedloge": ⌊A_c · M / N⌋: a class with
            few images may be dropped.

    Returns:
        (C,) numbers, at most `available`.

    Raises:
        ValueError: No such rule.

    Source: "fedloge" the released code; "matched" is ours.
    """
    if rule == "fedloge":
        # In floating point and in this order, as the reference: the floor may depend on it.
        sizes = np.floor(class_counts / max(total, 1) * everything).astype(np.int64)
    elif rule == "matched":
        # Whole numbers, for an exact ceiling: r = part / whole.
        pairs = [(a, n) for a, n in zip(available.tolist(), class_counts.tolist(), strict=True) if n > 0 and a > 0]
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
        "groups" (classes that are "many", "medium", "few"), "users" (natural ones of "train" and "test", and "dealt"
        to clients; None where the dataset does not say), "left_out" (images in no client), "heterogeneity" (of
        `bench.splits.heterogeneity.measure`), "fingerprint".
    """
    table = class_table(labels, split, num_classes)
    groups = group_classes(split.class_counts, rule, split.open)
    return {
        "class_counts": split.class_counts.tolist(),
        "clients": [
            {"train": len(train), "test": len(test), "classes": classes}
            for train, test, classes in zip(split.clients, split.tests, np.diff(table.indptr).tolist(), strict=True)
        ],
        "groups": {name: classes.tolist() for name, classes in groups.items()},
        "users": {
            part: None if users is None else len(users.unique())
            for part, users in (
                ("train", labels.users),
                ("test", labels.test_users),
                ("dealt", None if labels.users is None else labels.users[torch.cat(split.clients)]),
            )
        },
        "left_out": split.left_out,
        "heterogeneity": measure(table),
        "fingerprint": split.fingerprint,
    }


def class_table(labels: Labels, split: Split, num_classes: int) -> csr_array:
    """Count the training images of each class at each client: (K, C), sparse, as most cells of many clients are
    empty.
    """
    sizes = np.array([len(rows) for rows in split.clients])
    client = np.arange(len(sizes)).repeat(sizes)
    label = labels.train[torch.cat(split.clients)].numpy()
    return csr_array(coo_array((np.ones_like(label), (client, label)), shape=(len(sizes), num_classes)))


def _fingerprint(labels: Labels, clients: list[Rows], tests: list[Rows]) -> str:
    sha = hashlib.sha256()
    for rows in (labels.train.numpy(), labels.test.numpy(), *clients, *tests):
        sha.update(f"{len(rows)}\n".encode())  # where one ends and the next begins
        sha.update(rows.astype("<i8").tobytes())
    return sha.hexdigest()[:16]
