"""Clients with so many classes exactly, users drawn or merged, every partition at the ends of alpha, and who is who."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench.command.main import main
from bench.dataset import Labels
from bench.plugins.registry import ALGORITHMS, DATASETS
from bench.protocol.settings import LATER, READ_BY, BadConfig, Setting
from bench.splits.dealing import PartitionFailed, Pool
from bench.splits.partition import PARTITIONS
from bench.splits.split import Split, describe, make_split
from bench.sweep.config import Sweep
from bench.sweep.driver import check_data
from bench.sweep.resolving import resolve_setting
from bench.sweep.run import Run


def setting(**fields: Any) -> Setting:
    """Make a setting of which only the split matters."""
    rest = {"name": "t", "model": "mlp", "clients": 4, "rounds": 1, "epochs": 1, "batch_size": 8, "lr": 0.1}
    return Setting(**{**rest, **fields})


def pool(*sizes: int) -> Pool:
    """So many images of each class."""
    return Pool(np.repeat(np.arange(len(sizes)), sizes), len(sizes))


def table(parts: list[Any], of: Pool) -> Any:
    """(K, C) images of each class at each client."""
    return np.stack([np.bincount(of.labels[part], minlength=of.num_classes) for part in parts])


# So many classes exactly ------------------------------------------------------------------------------------


def classes(of: Pool, clients: int, each: int, sizes: str = "equal", seed: int = 0) -> list[Any]:
    return PARTITIONS["classes"](of, clients, 0.0, seed, classes_per_client=each, sizes=sizes)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("seed", range(12))
def test_each_client_has_exactly_so_many_classes_and_every_image_is_dealt_once(sizes: str, seed: int) -> None:
    random = np.random.RandomState(seed)
    for _ in range(8):
        counts = random.randint(40, 120, random.randint(1, 9))
        counts[random.permutation(len(counts))[: random.randint(0, len(counts))]] = 0  # classes that nobody can have
        there = int((counts > 0).sum())
        each = random.randint(1, there + 1)
        clients = random.randint(-(-there // each), 40)
        of = pool(*counts)
        parts = classes(of, clients, each, sizes, seed)
        dealt = table(parts, of)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(of.labels)))
        assert ((dealt > 0).sum(1) == each).all()
        holders = (dealt > 0).sum(0)[counts > 0]
        fewest = clients * each // there
        assert set(holders.tolist()) <= {fewest, fewest + 1} and (holders > fewest).sum() == clients * each % there
        if sizes == "equal":
            shares = [column[column > 0] for column in dealt.T if column.any()]
            assert all(share.max() - share.min() <= 1 for share in shares)


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_the_seed_deals_the_classes_the_shares_and_the_images(sizes: str) -> None:
    of = pool(*[60] * 10)
    one, again, other = (classes(of, 20, 2, sizes, seed) for seed in (3, 3, 4))
    assert all(map(np.array_equal, one, again))
    assert ((table(one, of) > 0) != (table(other, of) > 0)).any()
    one, other = (classes(pool(60), 3, 1, sizes, seed) for seed in (3, 4))  # where there is nothing to choose
    assert not any(map(np.array_equal, one, other))


def test_pairs_of_classes_are_drawn_and_no_client_is_first() -> None:
    pairs, fewest, more = set(), set(), np.zeros(7)
    for seed in range(60):
        has = table(classes(pool(*[30] * 5), 7, 2, seed=seed), pool(*[30] * 5)) > 0
        pairs |= {tuple(np.flatnonzero(row)) for row in has}
        fewest |= set(np.flatnonzero(has.sum(0) == 2))
        more += has[:, has.sum(0) == 3].sum(1)  # 14 places: four classes have three clients, one has two
    assert len(pairs) == 10 and len(fewest) == 5
    assert more.max() < 1.25 * more.min()
    largest = [
        max(range(3), key=[len(part) for part in classes(pool(10), 3, 1, seed=seed)].__getitem__) for seed in range(9)
    ]
    assert set(largest) == {0, 1, 2}  # who has the image that is over


def test_equal_shares_make_equal_clients_of_equal_classes_and_unequal_ones_follow_the_clients() -> None:
    of = pool(*[1000] * 10)
    assert {len(part) for part in classes(of, 20, 2)} == {500}
    dealt = table(classes(of, 100, 5, "unequal"), of)
    shares = np.where(dealt > 0, dealt, np.nan)
    spread = np.nanstd(np.log(shares - 0.5), axis=0).mean()
    assert 0.7 < spread < 1.3  # the standard deviation of the weights' logarithm
    beyond = np.log(shares) - np.nanmean(np.log(shares), axis=0)
    assert np.nanstd(beyond, axis=1).mean() < 0.5  # a client's weight is that of all its classes


@pytest.mark.parametrize(
    ("deal", "said"),
    [
        (lambda: classes(pool(9, 9, 0), 4, 3), "classes_per_client = 3, and 2 classes have images; say no more"),
        (
            lambda: classes(pool(9, 9, 9), 2, 1),
            "classes_per_client = 1 of 2 clients leaves some classes of 3 to nobody; use more clients, or a larger",
        ),
        (lambda: classes(pool(9, 3), 4, 2), "3 images of class 1 cannot give each of 4 clients one; use fewer clients"),
        (lambda: classes(pool(9), 10, 1), "9 images cannot give each of 10 clients one image"),
        (lambda: classes(pool(9), 0, 1), "0 clients; there must be at least one"),
        (lambda: make_split(official(3, 9), 3, setting(partition="classes"), 0), "--set classes_per_client=2"),
    ],
)
def test_classes_that_cannot_be_dealt_so_are_refused_in_a_sentence(deal: Callable[[], object], said: str) -> None:
    with pytest.raises(PartitionFailed) as caught:
        deal()
    assert said in str(caught.value) and str(caught.value).startswith("classes: ")


def official(num_classes: int, train: int, users: int | None = None) -> Labels:
    labels = torch.arange(num_classes).repeat_interleave(train)
    test = torch.arange(num_classes).repeat_interleave(10)
    if users is None:
        return Labels(labels, test)
    return Labels(labels, test, torch.arange(len(labels)) % users, torch.arange(len(test)) % users)


@pytest.mark.parametrize("rule", ["matched", "fedloge", "balanced", "global"])
def test_clients_of_some_classes_are_tested_on_them(rule: str) -> None:
    labels = official(6, 60)
    chosen = setting(partition="classes", classes_per_client=2, clients=9, imbalance=3.0, client_test=rule)
    split = make_split(labels, 6, chosen, 0)
    for trained, tested in zip(split.clients, split.tests, strict=True):
        has, seen = (set(part.tolist()) for part in (labels.train[trained], labels.test[tested]))
        assert len(has) == 2 and (seen == has if rule in ("matched", "balanced") else seen <= set(range(6)))


# Users ------------------------------------------------------------------------------------------------------


def users_of(split: Split, labels: Labels) -> list[list[int]]:
    assert labels.users is not None
    return [labels.users[rows].unique().tolist() for rows in split.clients]


def test_fewer_clients_than_users_are_users_drawn_by_the_seed() -> None:
    labels = official(3, 40, users=12)
    sampled = setting(partition="users", clients=5, users="sample", alpha=None, client_test="own")
    splits = [make_split(labels, 3, sampled, seed) for seed in range(40)]
    for split in splits:
        found = users_of(split, labels)
        assert [len(each) for each in found] == [1] * 5 and len({each[0] for each in found}) == 5
        assert all(len(rows) == 10 for rows in split.clients)  # each whole
        assert split.left_out == 120 - 50 and split.class_counts.sum() == 50
        counted = torch.bincount(labels.train[torch.cat(split.clients)], minlength=3)
        assert torch.equal(split.class_counts, counted)
        assert labels.test_users is not None
        assert [labels.test_users[rows].unique().tolist() for rows in split.tests] == found
    drawn = [user for split in splits for (user,) in users_of(split, labels)]
    assert set(drawn) == set(range(12))
    assert make_split(labels, 3, sampled, 7).fingerprint == splits[7].fingerprint != splits[8].fingerprint
    said = describe(labels, splits[0], 3, "thirds")
    assert (said["users"], said["left_out"]) == ({"train": 12, "test": 12, "dealt": 5}, 70)


def test_merged_users_are_all_there_and_as_many_clients_as_users_are_the_same_either_way() -> None:
    labels = official(3, 40, users=12)
    for clients, counts in ((5, [3, 3, 2, 2, 2]), (12, [1] * 12)):
        both = {
            rule: make_split(labels, 3, setting(partition="users", clients=clients, users=rule, alpha=None), 0)
            for rule in ("merge", "sample")
        }
        assert sorted(map(len, users_of(both["merge"], labels)), reverse=True) == counts
        assert both["merge"].left_out == 0
        assert (both["merge"].fingerprint == both["sample"].fingerprint) == (clients == 12)


@pytest.mark.parametrize("rule", ["merge", "sample"])
def test_more_clients_than_users_are_refused(rule: str) -> None:
    with pytest.raises(PartitionFailed, match="13 clients, and 12 users have images; use fewer clients"):
        make_split(official(3, 40, users=12), 3, setting(partition="users", clients=13, users=rule), 0)


# The ends of alpha ------------------------------------------------------------------------------------------

OWN: dict[str, dict[str, Any]] = {"classes": {"classes_per_client": 2}}
TINY = ("too small to draw from", "use fewer clients, a larger alpha or a smaller imbalance")
HUGE = "is too large to draw from; 1000 is nearly even already, and --partition iid deals evenly without any"


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e308])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_partition_answers_the_ends_of_alpha_with_a_split_or_a_sentence(partition: str, alpha: float) -> None:
    of = replace(pool(60, 60, 60), users=np.arange(180) % 9)

    def deal() -> list[Any]:
        return PARTITIONS[partition](of, 6, alpha, 0, **OWN.get(partition, {}))

    if partition in ("iid", "users", "classes"):
        assert sum(map(len, deal())) == 180  # not read
        return
    with pytest.raises(PartitionFailed) as caught:
        deal()
    said = str(caught.value)
    assert said.startswith(f"{partition}: ") and "\n" not in said and len(said) < 250
    if partition == "shards":
        assert (
            "must be whole, the shards of a client; say 2" in said
            if alpha != 1e308
            else "cannot give each of 6 clients 1e+308 images" in said
        )
    elif not alpha > 0:
        assert "must be above 0; small is more skewed" in said
    elif alpha < 1:
        assert any(each in said for each in TINY)
    else:
        assert HUGE in said


@pytest.mark.parametrize("partition", ["dirichlet", "fedloge", "feddf_recut", "lda"])
def test_a_huge_alpha_that_can_be_drawn_is_nearly_even(partition: str) -> None:
    of = pool(60, 60, 60)
    assert np.abs(table(PARTITIONS[partition](of, 6, 1e300, 0), of) - 10).max() <= (9 if partition == "fedloge" else 1)


def test_where_alpha_is_large_a_larger_one_is_no_advice() -> None:
    for alpha, advised in ((0.1, True), (1e6, False)):
        with pytest.raises(PartitionFailed) as caught:
            PARTITIONS["dirichlet"](pool(*[1] * 30), 15, alpha, 0)
        assert ("a larger alpha" in str(caught.value)) == advised


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_setting_has_a_finite_alpha_above_0(alpha: float) -> None:
    with pytest.raises(BadConfig, match="must be a number above 0 and up to"):
        setting(alpha=alpha)


# Who is who -------------------------------------------------------------------------------------------------


def run(dataset: str = "digits", alpha: tuple[float, ...] = (), **overrides: object) -> Run:
    asked = Sweep(
        algorithms=(ALGORITHMS["fedavg"](),), datasets=(DATASETS[dataset](),), overrides=overrides, alpha=alpha,
        engine="serial", data_root=Path(),
    )  # fmt: skip
    (only,) = asked.expand()
    return only


BEFORE: list[tuple[str, tuple[float, ...], dict[str, object]]] = [
    ("a0711930c16d digits", (), {}),
    ("731926bd2a5f digits", (), {"partition": "iid"}),
    ("a1f5d2e039e1 digits", (2.0,), {"partition": "shards"}),
    ("cb2c538bb744 femnist", (), {}),
    ("1067197c1fae femnist", (), {"clients": 50, "users": "merge"}),  # which was what --clients 50 did
]


@pytest.mark.parametrize(("before", "alpha", "overrides"), BEFORE)
def test_runs_of_before_keep_their_identity(
    before: str, alpha: tuple[float, ...], overrides: dict[str, object]
) -> None:
    protocol, dataset = before.split()
    assert run(dataset, alpha, **overrides).protocol == protocol


def test_what_a_partition_reads_is_told_where_it_is_read() -> None:
    assert not LATER.keys() & run().identity()["setting"].keys()
    told = {key: run(partition="classes").fields().get(key) for key in READ_BY}
    assert told == {"classes_per_client": 2, "sizes": None, "users": None}
    assert run(partition="classes").id == run(partition="classes", classes_per_client=2, sizes="equal").id
    ids = {
        run(partition="classes").id,
        run(partition="classes", classes_per_client=3).id,
        run(partition="classes", sizes="unequal").id,
        run("femnist", clients=50).id,
        run("femnist", clients=50, users="merge").id,
    }
    assert len(ids) == 5
    assert run("femnist", clients=50).id == run("femnist", clients=50, users="sample").id
    assert run("femnist", clients=50).overrides() == {"clients": 50, "users": "sample"}
    assert run("femnist", users="merge").id == run("femnist").id  # every user is a client
    assert run(partition="classes").setting.alpha is None


def test_shards_are_two_unless_it_is_said_otherwise() -> None:
    shards = run(partition="shards")
    assert shards.identity()["setting"]["alpha"] == 2.0 and shards.id == run(partition="shards", alpha=(2.0,)).id
    assert run(partition="shards", alpha=(3.0,)).setting.alpha == 3.0
    for word in ("list", "show"):
        told = invoke(*((word, "partitions") if word == "list" else (word, "shards")))
        assert "two by default" in told


@pytest.mark.parametrize(
    ("dataset", "fields", "said"),
    [
        ("digits", {"sizes": "unequal"}, "sizes = unequal: --partition dirichlet does not read it; leave it out, or"),
        ("digits", {"classes_per_client": 3}, "choose --partition classes"),
        ("digits", {"users": "sample"}, "choose --partition users"),
        ("digits", {"partition": "classes", "alpha": 0.5}, "--alpha 0.5: each client has some classes"),
        (
            "digits",
            {"partition": "classes", "classes_per_client": 0},
            "classes_per_client = 0: must be a whole number",
        ),
        ("digits", {"partition": "classes", "sizes": "odd"}, "sizes = 'odd': must be one of equal, unequal"),
        ("femnist", {"users": "draw"}, "users = 'draw': must be one of merge, sample"),
        ("femnist", {"users": "sample"}, "every user is a client; say how many clients there are with --clients"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused(dataset: str, fields: dict[str, object], said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        resolve_setting("quick", DATASETS[dataset](), fields)
    assert said in str(caught.value)


def test_fields_of_one_partition_are_read_by_one() -> None:
    assert set(READ_BY.values()) <= set(PARTITIONS) and READ_BY.keys() <= LATER.keys()
    assert all(getattr(Setting, field) == value for field, value in LATER.items())


def test_holding_out_all_natural_users_is_refused_before_any_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = official(10, 30, users=9)
    monkeypatch.setattr("bench.files.source.labels", lambda dataset, root: labels)
    users: dict[str, Any] = {"partition": "users", "clients": None, "alpha": None}
    held = {unseen: replace(run(), setting=replace(run().setting, **users, unseen=unseen)) for unseen in (8, 9)}
    check_data([held[8]])
    with pytest.raises(BadConfig, match=r"unseen = 9: must be in 0\.\.8 \(clients - 1\)"):
        check_data([held[9]])


# The commands -----------------------------------------------------------------------------------------------


def invoke(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert not result.exit_code, result.output
    return result.output


def test_stats_says_what_of_the_classes_and_who_is_left_out(tmp_path: Path) -> None:
    told = invoke("data", "stats", "digits", "--partition", "classes", "--set", "classes_per_client=3")
    assert "20 clients by classes (3 a client, equal sizes)" in told
    images = {part: np.arange(64 * n, dtype=np.uint8).reshape(n, 1, 8, 8) for part, n in (("train", 90), ("test", 30))}
    arrays = {f"{part}_x": x for part, x in images.items()} | {
        f"{p}_y": np.arange(len(x)) % 3 for p, x in images.items()
    }
    np.savez(tmp_path / "people.npz", train_users=np.arange(90) % 9, **arrays)  # type: ignore[arg-type]
    dataset = f"arrays(path={str(tmp_path / 'people.npz')!r})"
    words = ("data", "stats", dataset, "--partition", "users", "--clients", "4")
    told = invoke(*words)
    assert "natural users, dealt 4\n" in told and "images in no client  50\n" in told
    assert "in no client" not in invoke(*words, "--set", "users=merge")
    assert json.loads(invoke(*words, "--json"))["left_out"] == 50
