"""From one training set to clients: partitions by name.

Every partition takes a `Pool`, the number of clients K, alpha, a seed and the fields that it alone reads. It gives K
arrays of positions in the pool, disjoint, and covering it unless users are sampled, or raises `PartitionFailed` after
bounded work.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from bench.splits.dealing import PartitionFailed, Pool, cut, deal, dirichlet_table, generator, require, require_alpha
from bench.splits.longtail import Rows, by_class

LEAST_DIRICHLET, LEAST_LDA = 2, 10
"""Smallest client of `dirichlet` (our choice) and of `lda` (FedML's)."""
BLOCK = 10
"""Workers that `feddf_recut` draws together."""

Partition = Callable[..., list[Rows]]
"""Pool, clients, alpha, seed, and by name what `READ_BY` says, to one (n_k,) array of positions for each client."""


def iid(pool: Pool, clients: int, alpha: float, seed: int) -> list[Rows]:
    """Deal the shuffled images evenly: sizes differ by one at most. `alpha` is not used.

    Raises:
        PartitionFailed: More clients than images.
    """
    require("iid", pool, clients, 1)
    return cut(generator(seed, "iid").permutation(len(pool.labels)), clients)


def dirichlet(pool: Pool, clients: int, alpha: float, seed: int) -> list[Rows]:
    """Split each class in Dirichlet proportions, drawn again until every client has two images.

    Args:
        pool: N images.
        clients: K.
        alpha: Concentration, > 0; small is more skewed (0.1 is strong, 100 nearly even).
        seed: Of the run.

    Raises:
        PartitionFailed: No draw gave every client two images.

    Source: the class-wise form of Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022; the cuts at
    rounded cumulated proportions are those of most later code.
    """
    require("dirichlet", pool, clients, LEAST_DIRICHLET)
    random = generator(seed, "dirichlet")
    table = dirichlet_table("dirichlet", random, pool, clients, alpha, LEAST_DIRICHLET, capped=False)
    return deal(random, pool, table)


def fedloge(pool: Pool, clients: int, alpha: float, seed: int) -> list[Rows]:
    """Draw a client for each image from its class's Dirichlet proportions, bit for bit as FedLoGe does.

    Random numbers are those after seeding NumPy's legacy generator. A (K, C) matrix of coin tosses that always show
    one is drawn first: it decides nothing and moves the stream. A client may end up empty.

    Args:
        pool: N images.
        clients: K.
        alpha: Concentration, > 0.
        seed: 0..2^32-1.

    Raises:
        PartitionFailed: More clients than images, or alpha so small or so large that proportions vanish.

    Source: github.com/ZackZikaiXiao/FedLoGe; Fed-GraB, FedReLa and FedGPA have the same.
    """
    require("fedloge", pool, clients, 1)
    require_alpha("fedloge", clients, alpha)
    random = np.random.RandomState(seed)
    random.binomial(1, 1, (clients, pool.num_classes))
    owner = np.empty(len(pool.labels), dtype=np.int64)
    rows = by_class(pool.labels, pool.num_classes)
    for c, count in enumerate(np.bincount(pool.labels, minlength=pool.num_classes)):
        proportions = random.dirichlet(np.full(clients, alpha))
        if not np.isfinite(proportions).all():
            raise PartitionFailed(f"fedloge: alpha = {alpha:g} is too small to draw from; use a larger one")
        owner[rows[c]] = random.choice(clients, size=count, p=proportions)
    return by_class(owner, clients)


def feddf_recut(pool: Pool, clients: int, alpha: float, seed: int) -> list[Rows]:
    """Split by Dirichlet within blocks of ten workers, then cut all workers' images anew in equal parts.

    Each block gets its share of the shuffled images. In a block each class is split by Dirichlet(alpha) over
    the workers that do not yet hold the mean; drawn again until every worker has half the mean. The second
    cut makes all clients equal in size and blurs the borders between them: milder than alpha suggests.

    Args:
        pool: N images.
        clients: K; the last block has fewer than ten workers if K is no multiple.
        alpha: Concentration, > 0.
        seed: Of the run.

    Raises:
        PartitionFailed: More clients than images, or no draw gave every worker half the mean.

    Source: Lin et al. 2020 (FedDF), https://arxiv.org/abs/2006.07242, as used by CReFF and its line.
    """
    require("feddf_recut", pool, clients, 1)
    random = generator(seed, "feddf_recut")
    order = random.permutation(len(pool.labels))
    dealt = []
    for first in range(0, clients, BLOCK):
        workers = min(BLOCK, clients - first)
        start, stop = (len(order) * edge // clients for edge in (first, first + workers))
        rows = np.sort(order[start:stop])
        block = Pool(pool.labels[rows], pool.num_classes)
        half = len(rows) // workers // 2
        table = dirichlet_table("feddf_recut", random, block, workers, alpha, half, capped=True)
        dealt += [rows[part] for part in deal(random, block, table)]
    return cut(np.concatenate(dealt), clients)


def lda(pool: Pool, clients: int, alpha: float, seed: int) -> list[Rows]:
    """Split each class by Dirichlet over the clients that do not yet hold the mean number of images.

    Drawn again until every client has ten. Sizes differ, less than with `dirichlet`.

    Args:
        pool: N images.
        clients: K.
        alpha: Concentration, > 0.
        seed: Of the run.

    Raises:
        PartitionFailed: No draw gave every client ten images.

    Source: He et al. 2020 (FedML), https://arxiv.org/abs/2007.13518, as used by GBME, FedCRAC and RedGrape.
    """
    require("lda", pool, clients, LEAST_LDA)
    random = generator(seed, "lda")
    table = dirichlet_table("lda", random, pool, clients, alpha, LEAST_LDA, capped=True)
    return deal(random, pool, table)


def shards(pool: Pool, clients: int, alpha: float, seed: int) -> list[Rows]:
    """Sort by class, cut in K · alpha shards of one size, and deal `alpha` of them, two by default, to each client.

    Args:
        pool: N images.
        clients: K.
        alpha: Shards of a client, a whole number ≥ 1. A shard over a border has two classes or more.
        seed: Of the run.

    Raises:
        PartitionFailed: Alpha is not whole, or there are more shards than images.

    Source: McMahan et al. 2017, https://arxiv.org/abs/1602.05629, section 3.
    """
    if not 1 <= alpha < math.inf or alpha != int(alpha):
        raise PartitionFailed(f"shards: alpha = {alpha:g}: must be whole, the shards of a client; say 2")
    each = int(alpha)
    require("shards", pool, clients, each)
    random = generator(seed, "shards")
    rows = [random.permutation(of_class) for of_class in by_class(pool.labels, pool.num_classes)]
    pieces = cut(np.concatenate(rows), clients * each)
    hands = random.permutation(clients * each).reshape(clients, each)
    return [np.concatenate([pieces[piece] for piece in hand]) for hand in hands]


def classes(
    pool: Pool, clients: int, alpha: float, seed: int, *, classes_per_client: int | None, sizes: str = "equal"
) -> list[Rows]:
    """Give each client exactly `classes_per_client` classes, two by default, and share each class among the clients
    that have it. `alpha` is not used.

    Of C classes that have images each is had by ⌊K · c / C⌋ clients, or one more; which ones is drawn. Equal shares of
    a class differ by one image at most; unequal ones follow weights exp(z_k) of the clients, z_k standard normal, and
    each has one image at least.

    Args:
        pool: N images.
        clients: K.
        alpha: Not used.
        seed: Of the run.
        classes_per_client: c.
        sizes: "equal" or "unequal".

    Raises:
        PartitionFailed: There are fewer classes than c, or more than clients can have, or a class has fewer images than
            clients.

    Source: the "pathological" split of personalised federated learning; McMahan et al. 2017,
    https://arxiv.org/abs/1602.05629, come near it by shards, of which one may have two classes.
    """
    require("classes", pool, clients, 1)
    rows = by_class(pool.labels, pool.num_classes)
    there = [c for c, of_class in enumerate(rows) if len(of_class)]
    if classes_per_client is None:
        raise PartitionFailed("classes: say how many of each client with --set classes_per_client=2")
    if classes_per_client > len(there):
        told = f"classes: classes_per_client = {classes_per_client}, and {len(there):,} classes have images"
        raise PartitionFailed(f"{told}; say no more than that")
    if clients * classes_per_client < len(there):
        told = f"classes: classes_per_client = {classes_per_client} of {clients:,} clients leaves some classes"
        raise PartitionFailed(f"{told} of {len(there):,} to nobody; use more clients, or a larger one")
    random = generator(seed, "classes")
    # Who has most places left comes first, so that all classes are through at the same time.
    places = np.full(len(there), clients * classes_per_client // len(there))
    places[random.permutation(len(there))[: clients * classes_per_client % len(there)]] += 1
    has = np.zeros((clients, len(there)), dtype=np.bool_)
    for k in random.permutation(clients):
        chosen = np.lexsort((random.random_sample(len(there)), -places))[:classes_per_client]
        has[k, chosen] = True
        places[chosen] -= 1
    spread = random.standard_normal(clients) if sizes == "unequal" else np.zeros(clients)
    table = np.zeros((pool.num_classes, clients), dtype=np.int64)
    for c, holders in zip(there, has.T, strict=True):
        who = random.permutation(np.flatnonzero(holders))
        spare = len(rows[c]) - len(who)
        if spare < 0:
            told = f"classes: {len(rows[c]):,} images of class {c} cannot give each of {len(who):,} clients one"
            raise PartitionFailed(f"{told}; use fewer clients, a smaller classes_per_client or a smaller imbalance")
        reached = np.exp(spread[who]).cumsum()
        ends = np.floor(reached * spare / reached[-1]).astype(np.int64)
        ends[-1] = spare
        table[c, who] = 1 + np.diff(ends, prepend=0)
    return deal(random, pool, table)


def users(pool: Pool, clients: int, alpha: float, seed: int, *, users: str = "merge") -> list[Rows]:
    """Make clients of the dataset's natural users, each whole: of fewer clients than users each is one user, drawn at
    random, or with users=merge several. `alpha` is not used.

    With as many clients as users each client is one user, in random order.

    Args:
        pool: N images with users.
        clients: K.
        alpha: Not used.
        seed: Of the run.
        users: "sample" leaves users out, "merge" deals them all.

    Raises:
        PartitionFailed: The dataset has no users, or fewer than clients.
    """
    if pool.users is None:
        raise PartitionFailed("users: this dataset does not say whose images it has; use another partition")
    require("users", pool, clients, 1)
    names, user = np.unique(pool.users, return_inverse=True)
    if len(names) < clients:
        raise PartitionFailed(f"users: {clients:,} clients, and {len(names):,} users have images; use fewer clients")
    client = generator(seed, "users").permutation(len(names))
    if users == "sample":
        drawn = np.flatnonzero(client[user] < clients)
        return [drawn[of_one] for of_one in by_class(client[user[drawn]], clients)]
    return by_class(client[user] % clients, clients)


PARTITIONS: dict[str, Partition] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "fedloge": fedloge,
    "feddf_recut": feddf_recut,
    "lda": lda,
    "shards": shards,
    "classes": classes,
    "users": users,
}
"""Name to partition."""
