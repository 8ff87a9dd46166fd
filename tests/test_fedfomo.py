"""FedFomo: mixtures by hand, local training on what is not set aside, who is sent whose model, groups are found."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import LocalData, Tree, Uploads, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured, method, two_groups

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)


def start(setting: Any = SETTING, engine: str = "serial", sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedfomo"](**fields), engine, setting=setting, sizes=sizes)


def module() -> Any:
    return importlib.import_module("bench.algorithms.fedfomo")


def point(*w: float) -> Tree:
    return {"body": {"w": torch.tensor(w[:1])}, "head": {"w": torch.tensor(w[1:])}}


def known(run: Run, client: int, round: int) -> LocalData:
    """A client's data, of which the same part is set aside as in a run."""
    return replace(data_of(run, client, round), client_key=run.population.visit(client, round, {}).client_key)


def own_model(private: Tree) -> Tree:
    return {"body": private["body"], "head": private["head"]}


# Mixtures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[float, ...], float]:
    """Models are points, whose costs are listed."""
    prices: dict[tuple[float, ...], float] = {}

    def cost(task: Any, model: Tree, data: Any) -> Tensor:
        return torch.tensor(prices[tuple(torch.cat([model["body"]["w"], model["head"]["w"]]).tolist())])

    monkeypatch.setattr(module(), "cost", cost)
    return prices


def mixed(own: Tree, base: Tree, others: list[Tree], who: list[int], **fields: Any) -> tuple[Tree, list[float]]:
    run = start(**fields)
    shared = {"models": tree.stack(others), "who": torch.tensor(who, dtype=torch.int32)}
    found, scores = method(run).mixed(run.task, shared, {**own, "base": base}, data_of(run, 0))
    return found, scores.tolist()


def test_a_step_goes_towards_what_is_better_by_how_much_and_how_near(priced: dict[tuple[float, ...], float]) -> None:
    """The baseline costs 1; 0.4, 0.9 and 1.2 at distances of 2, 0.5 and 1: scores 0.3, 0.2 and -0.2."""
    base, own, second, third = point(0, 0, 0), point(0, 2, 0), point(0.3, 0, 0.4), point(0, 0, -1)
    places = ((0.0, 0.0, 0.0), (0.0, 2.0, 0.0), tuple(torch.tensor([0.3, 0.0, 0.4]).tolist()), (0.0, 0.0, -1.0))
    priced.update(zip(places, (1.0, 0.4, 0.9, 1.2), strict=True))
    found, scores = mixed(own, base, [second, third], [3, 5], baseline="before")
    assert scores == pytest.approx([0.2, -0.2], abs=1e-6)
    assert largest_difference(found, point(0.4 * 0.3, 0.6 * 2, 0.4 * 0.4)) < 1e-6
    found, scores = mixed(own, base, [second, third], [-1, 5], baseline="before")  # nobody's
    assert scores == pytest.approx([0.0, -0.2], abs=1e-6)
    assert largest_difference(found, own) < 1e-6
    found, scores = mixed(base, own, [second, third], [3, 5])  # own is the baseline, at no distance
    assert scores == pytest.approx([0.2, -0.2], abs=1e-6)
    assert largest_difference(found, second) < 1e-6


def test_where_nothing_is_better_training_is_undone_or_goes_on(priced: dict[tuple[float, ...], float]) -> None:
    base, own, other = point(0, 0), point(0, 1), point(1, 0)
    priced.update({(0.0, 0.0): 1.0, (0.0, 1.0): 1.5, (1.0, 0.0): 1.6})
    assert largest_difference(mixed(own, base, [other], [1], baseline="before")[0], base) == 0.0
    assert largest_difference(mixed(own, base, [other], [1])[0], own) == 0.0


def test_distances_are_of_parameters_alone() -> None:
    run = start()
    data, model = data_of(run, 0), run.task.init()
    model["body"]["norm"] = {"stats": {"mean": torch.zeros(3)}}
    nearer = tree.map(lambda leaf: leaf - 0.01 * leaf, model)
    found = []
    for gap in (0.0, 1e3):
        nearer["body"]["norm"] = {"stats": {"mean": torch.full((3,), gap)}}
        shared = {"models": tree.stack([nearer]), "who": torch.tensor([1], dtype=torch.int32)}
        found.append(float(method(run).mixed(run.task, shared, {**model, "base": model}, data)[1]))
    assert found[0] == found[1] != 0


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_alone_it_is_local_training_on_what_is_not_set_aside(engine: str) -> None:
    run = start(engine=engine, peers=0)
    kept = {k: run.task.init() for k in range(8)}
    for r in range(3):
        task = run.task_at(r)
        for k in run.population.cohort(r):
            rest, aside = known(run, k, r).part(0.2, "validation")
            assert len(rest.index) + len(aside.index) == toy.SIZES[k]
            assert (len(aside.index) > 0) == (toy.SIZES[k] > 3)
            kept[k] = task.sgd(task.loss, kept[k], rest.batches(task.epochs))
        run.step()
    for k in run.store.clients():
        apart = largest_difference(own_model(run.store[k]), kept[k])
        assert apart == 0.0 if engine == "serial" else apart < 1e-5


def test_others_matter_and_so_does_the_baseline() -> None:
    one, alone, other = (toy.finish(start(**fields)) for fields in ({}, {"peers": 0}, {"baseline": "before"}))
    for run in (alone, other):
        apart = [largest_difference(own_model(one.store[k]), own_model(run.store[k])) for k in one.store.clients()]
        assert max(apart) > 1e-3


def test_a_client_keeps_where_it_started_and_whoever_sets_nothing_aside_goes_on() -> None:
    run = start(replace(toy.SETTING, participation=1.0), baseline="before")
    run.step()
    task = run.task_at(1)
    for k in (0, 5):
        shared = toy.received(run, k, 1)
        personal = run.algorithm.personal_model(task, shared, run.store[k], known(run, k, 1))
        upload, kept = toy.upload_once(run, k, task)
        assert personal is not None and largest_difference(personal, kept["base"]) == 0.0
        assert largest_difference(own_model(upload), own_model(kept)) == 0.0
        seen, after = run.algorithm.after_training(task, shared, run.store[k], known(run, k, 1))
        trained = run.algorithm.personal_model(task, seen, after, known(run, k, 1))
        assert trained is not None and largest_difference(trained, own_model(upload)) == 0.0
        assert (largest_difference(kept["base"], own_model(run.store[k])) == 0.0) == (k == 5)  # three examples


# Who is sent whose model ----------------------------------------------------------------------------------------------


def chosen(likes: list[float], there: list[bool], count: int, explore: float, seed: int = 0) -> list[int]:
    found: list[int] = (
        module().chosen(torch.tensor(likes), torch.tensor(there), count, explore, keys.key(seed)).tolist()
    )
    return found


def test_those_liked_best_are_chosen_and_of_equals_any() -> None:
    likes = [0.1, -1.0, 0.9, 0.3, 5.0, 0.2]
    there = [True, True, True, True, False, True]
    assert chosen(likes, there, 3, 0.0) == [2, 3, 5]
    assert chosen(likes, there, 6, 0.0) == [2, 3, 5, 0, 1, 4]  # whoever is not there comes last
    firsts = {tuple(chosen([0.0] * 6, there, 2, 0.0, seed)) for seed in range(40)}
    assert len(firsts) > 10 and all(4 not in pair for pair in firsts)


def test_some_are_drawn() -> None:
    likes, there = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0], [True] * 6
    drawn = [chosen(likes, there, 2, 1.0, seed) for seed in range(300)]
    share = [sum(k in each for each in drawn) / 300 for k in range(6)]
    assert all(abs(s - 1 / 3) < 0.1 for s in share) and all(len(set(each)) == 2 for each in drawn)
    drawn = [chosen(likes, there, 2, 0.3, seed) for seed in range(300)]
    best = sum(set(each) == {0, 1} for each in drawn) / 300
    assert 0.7**2 < best < 0.7**2 + 0.25 and all(0 in each or 1 in each for each in drawn[:1])


def test_scores_stand_under_who_gave_them_and_whose_models_they_are_of() -> None:
    run = start(replace(toy.SETTING, participation=0.5))
    run.step()
    before, ids = run.progress.server, (1, 4, 6)
    sent = [toy.upload_once(run, k, run.task_at(1))[0] for k in ids]
    for row, upload in enumerate(sent):
        upload["who"] = torch.tensor([2, 0, 5, -1], dtype=torch.int32)
        upload["scores"] = torch.tensor([0.5, -0.25, 2.0, 0.0]) * (row + 1)
    sizes = torch.tensor([float(toy.SIZES[k]) for k in ids], dtype=torch.float64)
    after = run.algorithm.aggregate(run.task_at(1), before, Uploads(sent, sizes, torch.tensor(ids)))
    expected = before["affinity"].clone()
    for row, k in enumerate(ids):
        expected[k, [2, 0, 5]] += torch.tensor([0.5, -0.25, 2.0]) * (row + 1)
    assert torch.allclose(after["affinity"], expected)
    known = [max(float(before["known"][k]), float(k in (1, 4))) for k in range(8)]  # client 6 has no examples
    assert after["known"].tolist() == known
    for row, k in enumerate(ids):
        assert largest_difference(tree.pick(after["models"], k), own_model(sent[row])) == 0.0


def test_nobody_is_sent_its_own_model_or_one_that_there_is_not() -> None:
    run = start(replace(toy.SETTING, participation=0.4), peers=7)
    assert all(toy.received(run, k)["who"].tolist() == [-1] * 7 for k in range(8))
    run.step()
    known = {k for k in run.population.cohort(0) if toy.SIZES[k]}
    for k in (*range(8), None):
        sent = run.algorithm.send(run.task_at(1), run.progress.server, k)
        assert sorted(w for w in sent["who"].tolist() if w >= 0) == sorted(known - {k})
        for place, w in enumerate(sent["who"].tolist()):
            if w >= 0:
                there = tree.pick(run.progress.server["models"], w)
                assert largest_difference(tree.pick(sent["models"], place), there) == 0.0


def test_exploring_ends() -> None:
    run = start(replace(toy.SETTING, participation=1.0, rounds=30), peers=2, explore=0.3, decay=0.05)
    run.step()
    likes = torch.arange(64.0).reshape(8, 8)
    run.progress.server = {**run.progress.server, "affinity": likes, "known": torch.ones(8)}
    sets = [run.algorithm.send(run.task_at(r), run.progress.server, 0)["who"].tolist() for r in range(30)]
    assert all(who == [7, 6] for who in sets[6:])
    assert run.algorithm.send(run.task_at(0), run.progress.server, None)["who"].tolist() == [7, 6]
    often = start(replace(toy.SETTING, participation=1.0, rounds=30), peers=2, explore=1.0, decay=0.0)
    sets = [often.algorithm.send(often.task_at(r), run.progress.server, 0)["who"].tolist() for r in range(30)]
    assert sum(who == [7, 6] for who in sets) < 10


def test_two_groups_of_clients_find_their_like() -> None:
    run = start(replace(toy.SETTING, participation=1.0, rounds=5), sizes=(24,) * 8, peers=7)
    two_groups(run)
    toy.finish(run)
    likes = run.progress.server["affinity"]
    for k in range(8):
        mine = [float(likes[k, j]) for j in range(8) if j // 4 == k // 4 and j != k]
        others = [float(likes[k, j]) for j in range(8) if j // 4 != k // 4]
        assert sum(mine) / 3 > sum(others) / 4


def test_models_go_down_and_one_comes_up_with_scores() -> None:
    run = start(replace(toy.SETTING, participation=1.0), peers=3)
    run.step()
    parameters = sum(leaf.numel() for leaf in tree.flatten(run.task.init()).values())
    assert run.progress.cost["bytes_down"] == 8 * 3 * (4 * parameters + 4)
    assert run.progress.cost["bytes_up"] == 8 * (4 * parameters + 3 * (4 + 4))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_held_out_mixes_models_that_are_liked(engine: str) -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=8, unseen=1, eval_every=8), engine))
    assert measured(run, "unseen") > 0.5 and run.outcome().metrics["generic"] is None
