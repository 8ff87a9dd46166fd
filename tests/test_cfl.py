"""CFL: FedAvg while nobody parts, who parts by hand, clusters of clients and not of places, who was absent."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured, two_groups

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=4, weight_decay=1e-2, clip=1.0)


def start(setting: Any = SETTING, engine: str = "serial", sizes: tuple[int, ...] = (24,) * 8, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["cfl"](**fields), engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {"body": run.progress.server["body"], "head": run.progress.server["head"]}


def pulled(run: Run, pulls: dict[int, list[float]], sizes: list[float] | None = None) -> list[int]:
    """Take a round in which clients move the first biases of what they are sent; give everybody's cluster then."""
    task, uploads = run.task_at(3), []
    for k, pull in pulls.items():
        sent = run.algorithm.send(task, run.progress.server, k)
        bias = sent["head"]["bias"] + torch.tensor(pull + [0.0] * (6 - len(pull)))
        uploads.append(tree.merge(sent, {"head": {"bias": bias}}))
    weights = torch.tensor([1.0] * len(pulls) if sizes is None else sizes, dtype=torch.float64)
    arrived = Uploads(uploads, weights, torch.tensor([*pulls]))
    run.progress.server = run.algorithm.aggregate(task, run.progress.server, arrived)
    found: list[int] = run.progress.server["cluster"].tolist()
    return found


def bias(run: Run, client: int | None) -> list[float]:
    found: list[float] = run.algorithm.send(run.task_at(3), run.progress.server, client)["head"]["bias"][:3].tolist()
    return found


# Parting --------------------------------------------------------------------------------------------------------------


def test_clients_part_by_complete_linkage() -> None:
    """On a line at 0, 1, 2.2, 3.6: chains would leave the last one alone, complete linkage parts in pairs."""
    halves = importlib.import_module("bench.algorithms.cfl").halves
    at = torch.tensor([0.0, 1.0, 2.2, 3.6], dtype=torch.float64)
    second = halves((at[:, None] - at).abs())
    assert second[0] == second[1] != second[2] == second[3]
    assert sum(halves(torch.ones(3, 3).double() - torch.eye(3).double())) in (1, 2)  # of equal distances too


def test_whoever_pulls_the_other_way_leaves_and_both_parts_take_their_own_mean() -> None:
    run = start()
    found = pulled(run, {0: [1.0], 1: [1.2], 2: [-1.0], 3: [1.0, 0.1], 5: [-1.1], 6: [-1.2, 0.1]})
    assert [found[k] for k in (0, 1, 3)] == [found[0]] * 3 and [found[k] for k in (2, 5, 6)] == [1 - found[0]] * 3
    before = run.task.init()["head"]["bias"][:3].tolist()
    assert bias(run, 0) == pytest.approx([before[0] + 3.2 / 3, before[1] + 0.1 / 3, before[2]], abs=1e-6)
    assert bias(run, 2) == pytest.approx([before[0] - 3.3 / 3, before[1] + 0.1 / 3, before[2]], abs=1e-6)
    assert bias(run, None) == before  # what it was before they parted


def test_how_far_clients_went_does_not_count_in_who_leaves() -> None:
    """By inner products the shortest update would be by itself, near none."""
    run = start(short=0.9)
    found = pulled(run, {0: [9.0, 1.0], 1: [0.1, -0.02], 2: [-0.1, 3.0], 3: [-0.02, 0.1], 5: [5.0, -1.0]})
    assert [found[k] for k in (0, 1, 5)] == [0] * 3 and [found[k] for k in (2, 3)] == [1] * 2


def test_the_larger_part_stays_and_with_it_whoever_never_took_part() -> None:
    run = start()
    assert pulled(run, {0: [-1.0], 1: [1.0], 2: [1.0, 0.1], 5: [-1.1], 6: [-1.0, 0.1]}) == [0, 1, 1, 0, 0, 0, 0, 0]


def test_of_clusters_that_part_again_clients_leave_and_not_places() -> None:
    """The second time those in question are not the first of all."""
    run = start()
    found = pulled(run, {0: [1.0], 1: [1.0], 2: [1.1], 3: [-1.0], 4: [-1.0], 5: [-1.0], 6: [-1.0], 7: [-1.0]})
    assert found == [1, 1, 1, 0, 0, 0, 0, 0]
    pulls = {k: [0.5, 0.0] for k in range(3)} | {3: [0.0, 1.0], 4: [0.0, 1.1], 5: [0.0, 1.0]}
    assert pulled(run, {**pulls, 6: [0.0, -1.6], 7: [0.0, -1.7]}) == [1, 1, 1, 0, 0, 0, 2, 2]
    assert bias(run, 0)[0] > bias(run, 7)[0] and bias(run, 3)[1] > bias(run, 7)[1]


def test_for_the_absent_stands_what_they_last_changed() -> None:
    run = start(short=0.0)
    assert pulled(run, {k: [1.0 if k % 2 else -1.0, 0.1 * k] for k in range(8)}) == [0] * 8
    other = start()
    other.progress.server = run.progress.server
    found = pulled(other, {0: [-1.0], 1: [1.0], 2: [-1.0], 3: [1.0]})
    assert found in ([0, 1] * 4, [1, 0] * 4)


def test_a_part_of_which_nobody_was_there_goes_on_from_where_all_were() -> None:
    run, other = start(short=0.0), start(short=0.8)
    pulled(run, {k: [5.0] if k in (1, 3, 5) else [-1.0] for k in range(8)})
    other.progress.server, before = run.progress.server, bias(run, 1)
    found = pulled(other, {0: [-1.0, 1.0], 2: [-1.0, -1.0], 4: [-1.0, 1.0], 6: [-1.0, -1.0]})
    assert found == [0, 1, 0, 1, 0, 1, 0, 0]
    assert bias(other, 1) == before and bias(other, 0)[0] == pytest.approx(before[0] - 1.0)


@pytest.mark.parametrize(
    ("pulls", "sizes", "fields"),
    [
        ([[1.0], [1.0], [-1.0]], None, {}),  # the mean is a third of the longest
        ([[1.0], [-1.0]], None, {}),  # two are too few
        ([[1.0], [-1.0], [1.0], [-1.0]], [1.0, 1.0, 0.0, 0.0], {}),  # and so they are without empty ones
        ([[1.0], [-1.0], [1.0], [-1.0]], [3.0, 1.0, 3.0, 1.0], {}),  # who counts more decides on the mean
        ([[1.0], [-1.0], [1.0], [-1.0]], None, {"short": 0.0}),
        ([[1.0], [-1.0], [1.0], [-1.0]], None, {"clusters": 1}),
        ([[1.0], [-1.0], [1.0], [-1.0]], None, {"wait": 1.0}),
        ([[0.0]] * 4, None, {"short": 1.0}),  # nobody pulls
    ],
)
def test_they_stay_together(pulls: list[list[float]], sizes: list[float] | None, fields: dict[str, Any]) -> None:
    assert pulled(start(**fields), dict(enumerate(pulls)), sizes) == [0] * 8


def test_they_part_where_the_mean_is_short_by_what_the_longest_is() -> None:
    pulls = {0: [1.0], 1: [1.0], 2: [-1.0]}
    assert pulled(start(short=0.34), pulls) == [0, 0, 1, 0, 0, 0, 0, 0]
    assert pulled(start(short=0.33), pulls) == [0] * 8
    four = {0: [1.0], 1: [-1.0], 2: [1.0], 3: [-1.0]}
    assert sorted(pulled(start(), four)) == [0] * 6 + [1] * 2


# Rounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weights", ["size", "uniform"])
def test_while_nobody_parts_it_is_fedavg(engine: str, weights: str) -> None:
    setting = replace(SETTING, client_weights=weights)
    run = toy.finish(start(setting, engine, toy.SIZES, short=0.0))
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=setting))
    assert largest_difference(model(run), fedavg.progress.server) == 0.0
    assert largest_difference(toy.received(run, 3), fedavg.progress.server) == 0.0
    assert run.outcome().metrics["personal"] == fedavg.outcome().metrics["personal"]


@pytest.mark.parametrize("engine", ENGINES)
def test_clusters_go_on_apart(engine: str) -> None:
    run = toy.finish(start(replace(SETTING, participation=1.0), engine, short=0.9))
    place = run.progress.server["cluster"].tolist()
    assert set(place) == set(range(max(place) + 1)) and 1 <= max(place) < 8
    apart = largest_difference(tree.pick(run.progress.server["models"], 0), tree.pick(run.progress.server["models"], 1))
    assert apart > 1e-3


def test_two_groups_of_clients_are_found_and_never_mixed() -> None:
    setting = replace(toy.SETTING, participation=1.0, rounds=8, momentum=0.0)
    run = start(setting, sizes=(24,) * 8, short=0.5, clusters=2)
    two_groups(run)
    toy.finish(run)
    assert run.progress.server["cluster"].tolist() in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


def test_a_model_goes_down_and_one_comes_up() -> None:
    run = start(replace(SETTING, participation=1.0))
    run.step()
    parameters = sum(leaf.numel() for leaf in tree.flatten(run.task.init()).values())
    assert run.progress.cost["bytes_down"] == run.progress.cost["bytes_up"] == 8 * 4 * parameters


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_held_out_gets_the_model_before_they_parted(engine: str) -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=8, unseen=1, eval_every=8), engine))
    assert largest_difference(run.algorithm.send(run.task_at(7), run.progress.server, None), model(run)) == 0.0
    assert measured(run, "unseen") > 0.8 and run.outcome().metrics["generic"] is None
