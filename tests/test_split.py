"""The long tail, the partitions, the clients' test sets, the groups and the measures of a split."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from bench.command.picture import spans
from bench.dataset import DataDamaged, Labels
from bench.protocol.settings import GROUP_RULES, Setting
from bench.splits.dealing import Pool, dirichlet_table
from bench.splits.heterogeneity import gini, measure
from bench.splits.longtail import class_sizes, subsample
from bench.splits.partition import PARTITIONS
from bench.splits.selection import set_aside
from bench.splits.split import (
    PartitionFailed,
    class_table,
    client_test_sizes,
    client_tests,
    describe,
    group_classes,
    make_split,
)
from bench.training.metrics import summarise

DRAWN = ("iid", "dirichlet", "fedloge", "feddf_recut", "lda")
"""Partitions that take any alpha and no users."""


def setting(**fields: Any) -> Setting:
    """Make a setting of which only the split matters."""
    rest = {"name": "t", "model": "mlp", "clients": 4, "rounds": 1, "epochs": 1, "batch_size": 8, "lr": 0.1}
    return Setting(**{**rest, **fields})


def official(num_classes: int, train: int, test: int) -> Labels:
    """Make balanced labels sorted by class, `train` and `test` of each."""
    classes = torch.arange(num_classes)
    return Labels(classes.repeat_interleave(train), classes.repeat_interleave(test))


CIFAR10, CIFAR100 = official(10, 5000, 1000), official(100, 500, 100)


def counts(labels: torch.Tensor, rows: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.bincount(labels[rows], minlength=num_classes)


# The long tail -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("imbalance", "total10", "total100"),
    [(10, 20431, 19573), (20, 17023, 15907), (50, 13996, 12608), (100, 12406, 10847), (200, 11203, 9502)],
)
def test_the_long_tails_of_cifar_have_the_published_totals(imbalance: float, total10: int, total100: int) -> None:
    assert sum(class_sizes("exponential", 5000, imbalance, 10)) == total10
    assert sum(class_sizes("exponential", 500, imbalance, 100)) == total100
    assert len(subsample(CIFAR10.train, 10, "exponential", imbalance)) == total10


def test_the_class_counts_are_the_published_ones() -> None:
    assert class_sizes("exponential", 5000, 100, 10) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert class_sizes("exponential", 5000, 50, 10) == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert class_sizes("exponential", 5000, 10, 10) == [
        5000,
        3871,
        2997,
        2320,
        1796,
        1391,
        1077,
        834,
        645,
        500,
    ]
    hundred = class_sizes("exponential", 500, 100, 100)
    assert (hundred[:3], hundred[-5:]) == ([500, 477, 455], [6, 5, 5, 5, 5])
    assert class_sizes("exponential", 500, 50, 100)[-1] == 10
    assert class_sizes("exponential", 500, 10, 100)[-1] == 50


def test_step_and_pareto_have_the_sizes_computed_by_hand() -> None:
    assert class_sizes("step", 100, 10, 5) == [100, 100, 100, 10, 10]
    # 100 * rank^-2: log 16 / log 4 = 2.
    assert class_sizes("pareto", 100, 16, 4) == [100, 25, 11, 6]
    with pytest.raises(ValueError, match="exponential, step, pareto"):
        class_sizes("exponentail", 100, 10, 5)


def test_every_class_keeps_an_image_and_one_class_is_no_error() -> None:
    assert class_sizes("exponential", 10, 1000, 3) == [10, 1, 1]
    assert class_sizes("pareto", 7, 5, 1) == [7]
    assert class_sizes("exponential", 7, 5, 1) == [7]


def test_an_imbalance_of_one_keeps_every_image() -> None:
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    assert sorted(subsample(labels, 3, "exponential", 1).tolist()) == list(range(7))


@pytest.mark.parametrize("profile", ["exponential", "step", "pareto"])
@given(
    largest=st.integers(1, 6000),
    factors=st.tuples(st.floats(1, 500), st.floats(1, 500)),
    num_classes=st.integers(1, 120),
)
def test_sizes_fall_with_the_class_and_with_the_imbalance(
    profile: str, largest: int, factors: tuple[float, float], num_classes: int
) -> None:
    mild, strong = (class_sizes(profile, largest, factor, num_classes) for factor in sorted(factors))
    assert mild[0] == largest
    assert mild == sorted(mild, reverse=True)
    assert min(mild) >= 1
    assert all(a >= b for a, b in zip(mild, strong, strict=True))


@given(seed=st.integers(0, 2**32 - 1), factors=st.tuples(st.floats(1, 30), st.floats(1, 30)))
def test_the_larger_imbalance_takes_a_part_of_the_smaller_ones_images(seed: int, factors: tuple[float, float]) -> None:
    labels = torch.from_numpy(np.random.RandomState(seed).randint(0, 5, 200))
    mild, strong = (set(subsample(labels, 5, "exponential", factor).tolist()) for factor in sorted(factors))
    assert strong <= mild


def test_the_subsample_is_the_legacy_generators_shuffle_class_by_class() -> None:
    labels = torch.tensor([1, 0, 0, 1, 0, 1, 0, 1])
    random = np.random.RandomState(0)
    zeros, ones = [1, 2, 4, 6], [0, 3, 5, 7]
    random.shuffle(zeros)
    random.shuffle(ones)
    assert subsample(labels, 2, "exponential", 2).tolist() == [*zeros[:4], *ones[:2]]


# Partitions ----------------------------------------------------------------------------------------

FIXTURE = """
 10 40 0.5  50 13996 9850 226,200,143,400,329,90  66/995    77/36  7.2  42/708  0-3/4-6/7-9
 10 40 0.5 100 12406 9829 215,141,207,171,243,132 90/1106   89/47  6.6  68/887  0-2/3-5/6-9
 10 40 1.0 100 12406 9823 257,284,401,688,137,360 96/730    59/41  7.5  73/584  0-2/3-5/6-9
100 20 0.5  50 12608 9261 557,682,644,784,649,592 437/1030 732/308 48.0 318/777 0-30/31-61/62-99
100 20 1.0  50 12608 9142 570,712,662,720,618,725 477/817  528/329 57.1 335/602 0-30/31-60/61-99
100 40 0.5 100 10847 8636 264,285,233,378,283,185 185/406 2133/619 31.2 136/342 0-24/25-49/50-99
"""
"""Seed 3407: classes, clients, alpha, imbalance; images, local test images, the first six clients, smallest
and largest client, (client, class) pairs without a training image and with training but no test image,
classes in a local test set, smallest and largest local test set, groups."""


@pytest.mark.parametrize("row", FIXTURE.strip().splitlines(), ids=lambda row: "-".join(row.split()[:4]))
def test_the_fedloge_partition_is_that_of_the_authors_logs(row: str) -> None:
    num_classes, clients, alpha, imbalance = (float(word) for word in row.split()[:4])
    labels = CIFAR10 if num_classes == 10 else CIFAR100
    chosen = setting(clients=int(clients), alpha=alpha, imbalance=imbalance, partition="fedloge", client_test="fedloge")
    split = make_split(labels, int(num_classes), chosen, 3407)
    train = torch.from_numpy(class_table(labels, split, int(num_classes)).toarray())
    test = torch.stack([counts(labels.test, rows, int(num_classes)) for rows in split.tests])
    sizes, tested = train.sum(1), test.sum(1)
    groups = group_classes(test.sum(0), "cumulative")  # of the local test sets, as in the authors' code
    found = [
        str(int(sizes.sum())),
        str(int(tested.sum())),
        ",".join(map(str, sizes[:6].tolist())),
        f"{sizes.min()}/{sizes.max()}",
        f"{(train == 0).sum()}/{((train > 0) & (test == 0)).sum()}",
        f"{(test > 0).sum(1).double().mean():.1f}",
        f"{tested.min()}/{tested.max()}",
        "/".join(spans(classes.tolist()) for classes in groups.values()),
    ]
    assert found == row.split()[4:]


GOLDEN = {
    "iid": "85a8a3541441ee95",
    "dirichlet": "1b512df11f474c18",
    "fedloge": "98514f6c2ba59751",
    "feddf_recut": "7af0dc6109c81a6a",
    "lda": "4304490a0d52b774",
    "shards": "c6bb87006bf3caf7",
    "classes": "f06f9cd79b25e4e3",
}
"""Fingerprints of CIFAR-10-LT 50 in 40 clients; if one changes, so have the splits of stored results."""


@pytest.mark.parametrize("partition", GOLDEN)
def test_splits_never_change_silently(partition: str) -> None:
    alpha = 2.0 if partition == "shards" else 0.5
    chosen = setting(clients=40, alpha=alpha, imbalance=50, partition=partition, classes_per_client=2)
    assert make_split(CIFAR10, 10, chosen, 3407).fingerprint == GOLDEN[partition]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Labels, int, Setting, int]:
    """Draw a small dataset in random order, with users, a setting and a seed."""
    num_classes = draw(st.integers(2, 6))
    random = np.random.RandomState(draw(st.integers(0, 1000)))
    labels = official(num_classes, draw(st.integers(20, 60)), draw(st.integers(1, 20)))
    train, test = (torch.from_numpy(random.permutation(part.numpy())) for part in (labels.train, labels.test))
    users = torch.from_numpy(random.randint(0, 12, len(train)))
    partition = draw(st.sampled_from(list(PARTITIONS)))
    alpha = draw(st.sampled_from([1.0, 2.0, 3.0]) if partition == "shards" else st.floats(0.3, 20))
    chosen = setting(
        clients=draw(st.integers(1, 6)),
        alpha=alpha,
        partition=partition,
        imbalance=draw(st.floats(1, 20)),
        profile=draw(st.sampled_from(["exponential", "step", "pareto"])),
        client_test=draw(st.sampled_from(["matched", "fedloge", "balanced", "global"])),
        classes_per_client=draw(st.integers(1, num_classes)),
    )
    return Labels(train, test, users), num_classes, chosen, draw(st.integers(0, 2**32 - 1))


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_any_split_is_disjoint_covers_the_long_tail_and_repeats(
    case: tuple[Labels, int, Setting, int],
) -> None:
    labels, num_classes, chosen, seed = case
    try:
        split = make_split(labels, num_classes, chosen, seed)
    except PartitionFailed:
        reject()
    kept = subsample(labels.train, num_classes, chosen.profile, chosen.imbalance)
    assert torch.cat(split.clients).sort().values.tolist() == sorted(kept.tolist())
    assert class_table(labels, split, num_classes).sum(0).tolist() == split.class_counts.tolist()
    assert all((rows.diff() > 0).all() for rows in (*split.clients, *split.tests))
    assert len(split.clients) == len(split.tests) == chosen.clients
    again = make_split(labels, num_classes, chosen, seed)
    assert again.fingerprint == split.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(again.tests, split.tests, strict=True))


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_any_client_is_tested_on_its_own_distribution(case: tuple[Labels, int, Setting, int]) -> None:
    labels, num_classes, chosen, seed = case
    try:
        split = make_split(labels, num_classes, chosen, seed)
    except PartitionFailed:
        reject()
    available = torch.bincount(labels.test, minlength=num_classes).tolist()
    share = Fraction(len(labels.test), int(split.class_counts.sum()))
    for trained, tested in zip(split.clients, split.tests, strict=True):
        train = counts(labels.train, trained, num_classes).tolist()
        test = counts(labels.test, tested, num_classes).tolist()
        if chosen.client_test == "fedloge":
            for a, t, most in zip(train, test, available, strict=True):
                assert t == most or t <= a * share < t + 1
            continue
        ratio = min([share, *(Fraction(most, a) for a, most in zip(train, available, strict=True) if a)])
        matched = [math.ceil(a * ratio) for a in train]
        if chosen.client_test == "matched":
            assert test == matched
            assert [a > 0 for a in train] == [t > 0 for t in test]  # no class is dropped, none is added
        else:
            like = split.class_counts.tolist() if chosen.client_test == "global" else [int(a > 0) for a in train]
            whole = sum(matched), max(sum(like), 1)
            ratio = min([Fraction(*whole), *(Fraction(m, a) for a, m in zip(like, available, strict=True) if a)])
            assert test == [math.ceil(a * ratio) for a in like]


@pytest.mark.parametrize("partition", [*DRAWN, "shards", "users"])
def test_another_seed_is_another_split_of_the_same_images(partition: str) -> None:
    labels = replace(official(5, 60, 20), users=torch.arange(300) % 9)
    chosen = setting(alpha=2.0, imbalance=3, partition=partition)
    one, other = (make_split(labels, 5, chosen, seed) for seed in (0, 1))
    assert one.fingerprint != other.fingerprint
    assert not all(map(torch.equal, one.clients, other.clients))
    assert torch.equal(torch.cat(one.clients).sort().values, torch.cat(other.clients).sort().values)


@pytest.mark.parametrize("partition", [*DRAWN, "shards", "users"])
def test_a_seed_of_the_split_takes_the_place_of_the_runs(partition: str) -> None:
    labels = replace(official(5, 60, 20), users=torch.arange(300) % 9)
    free = setting(alpha=2.0, imbalance=3, partition=partition)
    held = replace(free, split_seed=7)
    splits = [make_split(labels, 5, held, 0), make_split(labels, 5, held, 1), make_split(labels, 5, free, 7)]
    assert len({split.fingerprint for split in splits}) == 1
    for split in splits[1:]:
        assert all(map(torch.equal, split.clients, splits[0].clients))
        assert all(map(torch.equal, split.tests, splits[0].tests))
    assert make_split(labels, 5, free, 0).fingerprint != splits[0].fingerprint
    assert make_split(labels, 5, replace(free, split_seed=0), 7).fingerprint != splits[0].fingerprint
    asides = [set_aside(labels, 5, *one, 0.2) for one in ((held, 0), (held, 1), (free, 7))]
    assert all(all(map(torch.equal, aside.tests, asides[0].tests)) for aside in asides)


def test_a_split_neither_reads_nor_moves_global_randomness() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    for partition in DRAWN:
        make_split(official(5, 60, 20), 5, setting(partition=partition), 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # type: ignore[index]


def test_two_clients_with_the_same_images_draw_their_tests_apart() -> None:
    split = make_split(official(2, 50, 50), 2, setting(clients=2, partition="iid"), 0)
    assert not torch.equal(split.tests[0], split.tests[1])


def pool(num_classes: int, each: int) -> Pool:
    return Pool(np.repeat(np.arange(num_classes), each), num_classes)


def test_iid_and_recut_clients_are_equal_in_size() -> None:
    for partition in ("iid", "feddf_recut"):
        sizes = [len(part) for part in PARTITIONS[partition](pool(5, 99), 13, 0.5, 0)]
        assert set(sizes) == {38, 39}


def test_dirichlet_and_lda_keep_their_smallest_size() -> None:
    assert min(len(part) for part in PARTITIONS["dirichlet"](pool(10, 50), 30, 0.3, 5)) >= 2
    assert min(len(part) for part in PARTITIONS["lda"](pool(10, 50), 20, 0.3, 5)) >= 10


def test_lda_gives_no_later_class_to_a_client_that_holds_the_mean() -> None:
    parts = PARTITIONS["lda"](pool(10, 100), 10, 0.5, 1)
    for part in parts:
        table = np.bincount(part // 100, minlength=10)
        held = table.cumsum()
        assert not table[1:][held[:-1] >= 100].any()


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 12))
def test_a_drawn_table_deals_every_image(seed: int, sizes: list[int], clients: int) -> None:
    dealt = Pool(np.repeat(np.arange(len(sizes)), sizes), len(sizes))
    random = np.random.RandomState(seed)
    for capped in (True, False):
        table = dirichlet_table("t", random, dealt, clients, 0.5, 0, capped=capped)
        assert table.shape == (len(sizes), clients) and table.min() >= 0
        assert table.sum(1).tolist() == sizes


def test_a_shard_client_has_at_most_as_many_classes_as_shards() -> None:
    parts = PARTITIONS["shards"](pool(10, 40), 20, 2.0, 0)
    assert {len(part) for part in parts} == {20}
    assert max(len(set((part // 40).tolist())) for part in parts) == 2


def test_users_stay_whole() -> None:
    users = np.arange(200) % 7
    people = Pool(np.sort(np.arange(200) % 5), 5, users)
    parts = PARTITIONS["users"](people, 3, 1.0, 0)
    owners = [set(users[part].tolist()) for part in parts]
    assert sum(map(len, owners)) == 7 and set.union(*owners) == set(range(7))
    assert [len(set(users[part].tolist())) for part in PARTITIONS["users"](people, 7, 1.0, 0)] == [1] * 7


def test_a_small_alpha_is_more_skewed() -> None:
    skews = []
    for alpha in (0.1, 1.0, 100.0):
        split = make_split(official(5, 200, 20), 5, setting(clients=8, alpha=alpha), 0)
        skews.append(describe(official(5, 200, 20), split, 5, "count")["heterogeneity"]["total_variation"])
    assert skews[0] > skews[1] + 0.1 > skews[2] + 0.2


# What cannot be done -------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", [*DRAWN, "shards"])
def test_more_clients_than_images_is_refused_in_a_sentence(partition: str) -> None:
    with pytest.raises(PartitionFailed, match=rf"{partition}: 10 images cannot give each of 11 clients"):
        PARTITIONS[partition](pool(2, 5), 11, 1.0, 0)


@pytest.mark.parametrize("partition", [*DRAWN, "shards"])
def test_zero_clients_are_refused_in_a_sentence(partition: str) -> None:
    with pytest.raises(PartitionFailed, match="0 clients; there must be at least one"):
        PARTITIONS[partition](pool(2, 5), 0, 1.0, 0)


@pytest.mark.parametrize("partition", ["dirichlet", "feddf_recut", "lda"])
@pytest.mark.parametrize("alpha", [0.01, 1e-300])
def test_a_hopeless_partition_ends_soon_with_a_sentence(partition: str, alpha: float) -> None:
    start = time.monotonic()
    with pytest.raises(PartitionFailed, match=r"draws split .* larger alpha"):
        PARTITIONS[partition](pool(3, 1000), 100, alpha, 0)
    assert time.monotonic() - start < 30


def test_vanishing_proportions_are_refused_in_a_sentence() -> None:
    with pytest.raises(PartitionFailed, match="too small to draw from"):
        PARTITIONS["fedloge"](pool(3, 10), 5, 1e-300, 0)
    with pytest.raises(PartitionFailed, match=r"alpha = 1e-300"):  # where any size would do
        PARTITIONS["feddf_recut"](pool(3, 4), 10, 1e-300, 0)


def test_users_and_shards_say_what_they_need() -> None:
    with pytest.raises(PartitionFailed, match="does not say whose"):
        PARTITIONS["users"](pool(3, 10), 5, 1.0, 0)
    with pytest.raises(PartitionFailed, match="5 clients, and 2 users have images"):
        PARTITIONS["users"](Pool(np.zeros(10, np.int64), 1, np.arange(10) % 2), 5, 1.0, 0)
    with pytest.raises(PartitionFailed, match=r"alpha = 0\.5: must be whole"):
        PARTITIONS["shards"](pool(3, 10), 5, 0.5, 0)


def test_wrong_names_labels_and_seeds_are_refused_in_a_sentence() -> None:
    labels = official(3, 30, 10)
    with pytest.raises(PartitionFailed, match="no partition is called 'dirichlt'; did you mean dirichlet"):
        make_split(labels, 3, setting(partition="dirichlt"), 0)
    with pytest.raises(DataDamaged, match="labels run from 0 to 2, and there are 2 classes"):
        make_split(labels, 2, setting(), 0)
    with pytest.raises(PartitionFailed, match="seed = -1"):
        make_split(labels, 3, setting(), -1)
    with pytest.raises(ValueError, match="count, cumulative"):
        group_classes(torch.tensor([3, 2]), "counts")
    with pytest.raises(ValueError, match="matched, fedloge"):
        client_test_sizes(np.array([1]), 1, np.array([1]), 1, "match")


def test_a_client_without_images_has_no_test_images() -> None:
    for rule in ("matched", "fedloge"):
        assert client_test_sizes(np.zeros(2, np.int64), 10, np.array([5, 5]), 10, rule).tolist() == [0, 0]


def test_client_test_sizes_are_those_computed_by_hand() -> None:
    own, available = np.array([300, 7, 0, 1]), np.array([100, 100, 100, 100])
    # N = 1000, M = 400: 0.4 would ask for 120 of class 0, of which there are 100; hence a third.
    assert client_test_sizes(own, 1000, available, int(available.sum()), "matched").tolist() == [100, 3, 0, 1]
    assert client_test_sizes(own, 1000, available, int(available.sum()), "fedloge").tolist() == [100, 2, 0, 0]


def drawn(rule: str, train: list[list[int]], available: list[int]) -> list[list[int]]:
    """Give how many test images of each class clients are given that have so many for training."""
    num_classes = len(available)
    labels = np.concatenate([np.repeat(np.arange(num_classes), counts) for counts in train])
    ends = np.cumsum([sum(counts) for counts in train])
    clients = np.split(np.arange(len(labels)), ends[:-1])
    test = np.repeat(np.arange(num_classes), available)
    tests = client_tests(labels, test, clients, num_classes, rule, 0)
    return [np.bincount(test[rows], minlength=num_classes).tolist() for rows in tests]


def test_balanced_and_global_client_tests_are_those_computed_by_hand() -> None:
    train, available = [[40, 10, 0], [0, 0, 50], [0, 0, 0]], [20, 20, 10]  # half as many for testing
    assert drawn("matched", train, available) == [[20, 5, 0], [0, 0, 10], [0, 0, 0]]
    assert drawn("balanced", train, available) == [[13, 13, 0], [0, 0, 10], [0, 0, 0]]  # 25 among two, 10 for one
    assert drawn("global", train, available) == [[8, 2, 10], [4, 1, 5], [0, 0, 0]]  # 10 are all there are of class 2


def test_where_little_is_there_a_balanced_test_takes_equally_little_and_every_class_is_in_a_global_one() -> None:
    assert drawn("balanced", [[90, 10]], [50, 3]) == [[3, 3]]
    assert drawn("balanced", [[30, 30, 30]], [60, 60, 0]) == [[40, 40, 0]]  # a class without test images takes no share
    assert drawn("global", [[1, 0, 0], [500, 5, 1]], [100, 100, 100])[0] == [1, 1, 1]


def test_in_balanced_tests_all_images_and_all_classes_weigh_the_same() -> None:
    split = make_split(CIFAR10, 10, setting(clients=20, imbalance=50, alpha=0.3, client_test="balanced"), 0)
    total = torch.stack([counts(CIFAR10.test, rows, 10) for rows in split.tests])
    correct = (total * torch.rand(total.shape, generator=torch.Generator().manual_seed(0))).long()
    measured = summarise({"personal": (correct, total)}, {"few": torch.arange(10)})
    assert measured["personal.balanced"] == pytest.approx(measured["personal"], abs=1e-12)


# Groups and measures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_classes", "imbalance", "sizes"),
    [
        (100, 100, (35, 35, 30)),
        (100, 50, (41, 41, 18)),
        (100, 10, (69, 31, 0)),
        (10, 100, (8, 2, 0)),
        (10, 50, (9, 1, 0)),
    ],
)
def test_groups_by_count_have_the_published_sizes(num_classes: int, imbalance: float, sizes: tuple[int, ...]) -> None:
    tail = torch.tensor(class_sizes("exponential", 50000 // num_classes, imbalance, num_classes))
    groups = group_classes(tail, "count")
    assert tuple(len(groups[name]) for name in ("many", "medium", "few")) == sizes


@pytest.mark.parametrize(
    ("num_classes", "imbalance", "sizes"),
    [(10, 50, (4, 3, 3)), (10, 100, (3, 3, 4)), (100, 50, (34, 34, 32)), (100, 100, (30, 31, 39))],
)
def test_groups_by_cumulated_share_have_the_published_sizes(
    num_classes: int, imbalance: float, sizes: tuple[int, ...]
) -> None:
    tail = torch.tensor(class_sizes("exponential", 50000 // num_classes, imbalance, num_classes))
    groups = group_classes(tail, "cumulative")
    assert tuple(len(classes) for classes in groups.values()) == sizes


@pytest.mark.parametrize(
    ("num_classes", "sizes"),
    [
        (10, (4, 3, 3)),
        (11, (4, 3, 4)),
        (100, (34, 33, 33)),
        (62, (21, 20, 21)),
        (3, (1, 1, 1)),
        (2, (1, 0, 1)),
        (1, (1, 0, 0)),
    ],
)
def test_thirds_are_thirds_and_the_larger_ones_are_in_front(num_classes: int, sizes: tuple[int, ...]) -> None:
    groups = group_classes(torch.arange(num_classes), "thirds")  # the last class is the largest
    assert tuple(len(classes) for classes in groups.values()) == sizes
    ranked = [*groups["few"].tolist(), *groups["medium"].tolist(), *groups["many"].tolist()]
    assert ranked == list(range(num_classes))


def test_equal_classes_are_ranked_by_their_number() -> None:
    groups = group_classes(torch.tensor([5, 9, 5, 9, 5, 5, 1]), "thirds")
    assert [classes.tolist() for classes in groups.values()] == [[0, 1, 3], [2, 4], [5, 6]]


def test_group_borders_are_where_they_are_said_to_be() -> None:
    by_count = group_classes(torch.tensor([101, 100, 20, 19, 0]), "count")
    assert [classes.tolist() for classes in by_count.values()] == [[0], [1, 2], [3, 4]]
    # Shares 75, 20 and 5 % in this order of size: each border closes its class.
    by_share = group_classes(torch.tensor([5, 75, 20]), "cumulative")
    assert [classes.tolist() for classes in by_share.values()] == [[1], [2], [0]]
    one = group_classes(torch.tensor([96, 2, 2]), "cumulative")
    assert [classes.tolist() for classes in one.values()] == [[0], [], [1, 2]]


@given(st.lists(st.integers(0, 500), min_size=1, max_size=30), st.sampled_from(GROUP_RULES))
def test_every_class_is_in_one_group(sizes: list[int], rule: str) -> None:
    groups = group_classes(torch.tensor(sizes), rule)
    assert list(groups) == ["many", "medium", "few"]
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(len(sizes)))
    assert all(classes.dtype == torch.int64 for classes in groups.values())


def test_measures_are_those_computed_by_hand() -> None:
    found = measure(np.array([[4, 0], [0, 4]]))
    # Client (1, 0), all (1/2, 1/2), their mean (3/4, 1/4) with entropy 0.811278: 0.811278 - (0 + 1) / 2.
    assert found == pytest.approx(
        {
            "classes_per_client": 1.0,
            "total_variation": 0.5,
            "jensen_shannon": 0.311278,
            "size_min": 4.0,
            "size_median": 4.0,
            "size_max": 4.0,
            "size_gini": 0.0,
            "effective_clients": 2.0,
        },
        abs=1e-6,
    )
    unequal = measure(np.array([[1, 0], [3, 0], [0, 0]]))
    assert unequal["effective_clients"] == pytest.approx(16 / 10)
    assert unequal["total_variation"] == unequal["jensen_shannon"] == 0.0
    assert gini(np.array([1, 3])) == pytest.approx(0.25)


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=6))
def test_the_divergence_is_scipys(table: list[list[int]]) -> None:
    rows = np.array(table) + np.array([1, 0, 0, 0])
    expected = np.mean([jensenshannon(row, rows.sum(0), base=2) ** 2 for row in rows])
    assert measure(rows)["jensen_shannon"] == pytest.approx(expected, abs=1e-7)


def test_a_description_is_json_and_agrees_with_the_split() -> None:
    labels = official(4, 60, 30)
    chosen = setting(clients=5, imbalance=6, alpha=1.0)
    split = make_split(labels, 4, chosen, 0)
    document = cast("dict[str, Any]", json.loads(json.dumps(describe(labels, split, 4, "count"))))
    keys = ["class_counts", "clients", "groups", "users", "left_out", "heterogeneity", "fingerprint"]
    assert list(document) == keys
    assert document["class_counts"] == [60, 33, 18, 10]
    assert document["groups"] == {"many": [], "medium": [0, 1], "few": [2, 3]}
    for client, train, test in zip(document["clients"], split.clients, split.tests, strict=True):
        assert client == {
            "train": len(train),
            "test": len(test),
            "classes": len(set(labels.train[train].tolist())),
        }
    assert document["fingerprint"] == split.fingerprint
    assert len(split.fingerprint) == 16
