"""Unfreeze: who trains when, what stands still, what is sent and computed of it, and branches that train apart."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, keys, models, tree
from bench.contract import toy
from bench.data import Batch
from bench.models import block_of
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.sweep import forecast
from bench.training.operations import Operations
from bench.training.rounds import Run
from bench.tree import largest_difference
from bench.validation.plausible import _on_the_toy
from tests.by_hand import data_of, done, mean_by_size, measured

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
HOSTILE = replace(toy.SETTING, momentum=0.9, weight_decay=1e-2, clip=0.5, rounds=3)
LARGE = toy.Toy(enlarged=2)
LIGHT = replace(HOSTILE, model="light_cnn", rounds=5, epochs=1, eval_every=5, augment="crop")
DEEP = replace(HOSTILE, model="resnet8", norm="batch", rounds=1, epochs=1)
SMALL = (9, 5, 0, 3, 0, 0, 0, 0)


def start(engine: str = "serial", setting: Any = HOSTILE, name: str = "unfreeze", **fields: Any) -> Run:
    dataset = LARGE if setting.model == "light_cnn" else toy.Toy()
    sizes = SMALL if setting.model == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, dataset=dataset, sizes=sizes)


def layers(run: Run) -> list[str]:
    """What trains in each round, in words."""
    return [" ".join(run.algorithm.layers(run.task_at(r))) for r in range(run.setting.rounds)]  # type: ignore[attr-defined]


def paths(values: Tree) -> set[str]:
    return {*tree.flatten(values)}


def module() -> Any:
    return importlib.import_module("bench.algorithms.unfreeze")


# Who trains when ------------------------------------------------------------------------------------------------------


def test_layers_join_from_the_head_down() -> None:
    run = start(setting=replace(LIGHT, rounds=10), every=2)
    assert layers(run) == 3 * ["branches"] + 2 * ["head"] + 2 * ["head fusion"] + 3 * ["head fusion branches"]
    run = start(setting=replace(LIGHT, rounds=6), every=1, branch_rounds=0.0)
    assert layers(run) == ["head", "head fusion", *4 * ["head fusion branches"]]
    run = start(setting=replace(LIGHT, rounds=4), every=1, branch_rounds=0.5, order="first_last")
    assert layers(run) == ["branches", "branches", "branches", "branches fusion"]


def test_blocks_of_any_network_join_and_those_without_weights_are_none() -> None:
    run = start(setting=replace(DEEP, rounds=6), every=1)
    assert layers(run)[:3] == ["head", "head stage3", "head stage3 stage2"]
    assert layers(run)[4:] == 2 * ["head stage3 stage2 stage1 stem"]
    for model in ("linear", "frozen"):
        assert layers(start(setting=replace(HOSTILE, model=model), order="first_last")) == 3 * ["head"]


@pytest.mark.parametrize(("share", "rounds", "first"), [(0.3, 50, 15), (0.07, 100, 7), (0.0, 9, 0), (1.0, 9, 9)])
def test_branches_train_for_their_share_of_the_rounds_exactly(share: float, rounds: int, first: int) -> None:
    run = start(setting=replace(LIGHT, rounds=rounds), branch_rounds=share)
    assert run.algorithm.begins(run.task) == first  # type: ignore[attr-defined]
    without = start(setting=replace(HOSTILE, rounds=rounds), branch_rounds=share)
    assert without.algorithm.begins(without.task) == 0  # type: ignore[attr-defined]


# Equivalences ---------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("setting", [HOSTILE, replace(LIGHT, rounds=1)], ids=["mlp", "light_cnn"])
def test_with_all_free_from_the_start_it_is_fedavg(setting: Any, engine: str) -> None:
    run = toy.finish(start(engine, setting, every=0, branch_rounds=0.0))
    fedavg = toy.finish(start(engine, setting, "fedavg"))
    assert largest_difference(run.progress.server, fedavg.progress.server) == 0.0
    assert run.outcome().metrics == fedavg.outcome().metrics
    for cost in ("bytes_up", "bytes_down", "train_samples", "train_flops"):
        assert run.progress.cost[cost] == fedavg.progress.cost[cost]


@pytest.mark.equivalence
def test_with_all_free_it_is_fedavg_under_batch_norm_too() -> None:
    """All statistics move then, although what stands still keeps its own."""
    run, fedavg = done(start(setting=DEEP, every=0)), done(start(setting=DEEP, name="fedavg"))
    assert largest_difference(run.progress.server, fedavg.progress.server) == 0.0


@pytest.mark.equivalence
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_without_branches_their_rounds_are_not_there(share: float) -> None:
    runs = [done(start(every=1, branch_rounds=each)) for each in (share, 0.0)]
    assert largest_difference(runs[0].progress.server, runs[1].progress.server) == 0.0
    assert largest_difference(runs[0].progress.server, done(start(every=0)).progress.server) > 1e-3


def test_with_a_body_that_never_joins_the_head_learns_from_its_features() -> None:
    run = start(setting=replace(HOSTILE, clip=None), every=10_000)
    upload, _ = toy.upload_once(run)
    given = run.progress.server
    data = data_of(run, 0)
    w = [leaf.clone().requires_grad_() for leaf in given["head"].values()]
    optimiser = torch.optim.SGD(w, run.setting.lr, run.setting.momentum, weight_decay=run.setting.weight_decay)
    for batch in data.batches(run.setting.epochs):
        optimiser.zero_grad()
        z = run.task.model.features(given["body"], batch.x)
        F.cross_entropy(F.linear(z, *w), batch.y).backward()
        optimiser.step()
    assert largest_difference(upload["head"], dict(zip(given["head"], (p.detach() for p in w), strict=True))) < 1e-6


# What stands still ----------------------------------------------------------------------------------------------------


@ENGINES
def test_what_does_not_train_stays_as_it_is_to_the_bit(engine: str) -> None:
    """Momentum and weight decay would move it, and averages of equal numbers would round."""
    run = start(engine, LIGHT, every=1, branch_rounds=0.2)
    for r in range(4):
        before, train = tree.flatten(tree.clone(run.progress.server)), layers(run)[r].split()
        run.step()
        after = tree.flatten(run.progress.server)
        moved = {path for path, leaf in before.items() if not torch.equal(leaf, after[path])}
        assert moved == {path for path in before if block_of(run.task.model, path) in train}, r
    assert layers(run)[:4] == ["branches", "head", "head fusion", "head fusion branches"]


def test_norm_layers_that_stand_still_keep_their_statistics_and_use_them() -> None:
    """As in a test, so that what lies above learns from what it will see there."""
    run = start(setting=replace(DEEP, rounds=2), every=1)
    for r in range(2):
        before = tree.clone(run.progress.server)
        run.exchange(run.task_at(r), run.algorithm.exchanges(run.task_at(r))[0])
        statistics = [path for path in tree.flatten(before) if tree.is_statistic(path)]
        moved = {
            path for path in statistics
            if not torch.equal(tree.flatten(before)[path], tree.flatten(run.progress.server)[path])
        }  # fmt: skip
        assert moved == {path for path in statistics if block_of(run.task.model, path) in layers(run)[r].split()}
    run = start(setting=replace(DEEP, clip=None, momentum=0.0, weight_decay=0.0, batch_size=16))
    server, task = run.progress.server, run.task_at(0)
    upload, _ = toy.upload_once(run)
    batch = next(iter(data_of(run, 0).batches(1)))
    w = {key: leaf.clone().requires_grad_() for key, leaf in server["head"].items()}
    F.cross_entropy(task.model.logits(w, task.model.features(server["body"], batch.x)), batch.y).backward()
    expected = {key: leaf.detach() - task.lr * leaf.grad for key, leaf in w.items() if leaf.grad is not None}
    assert largest_difference(upload["head"], expected) < 1e-5


# What is sent, and computed -------------------------------------------------------------------------------------------


def test_what_trains_is_sent_and_nothing_else() -> None:
    run = start(setting=replace(LIGHT, rounds=4), every=1, branch_rounds=0.25)
    model = run.task.model.init(keys.key(0, "meta"))
    sent, downs = [], []
    for r in range(4):
        task = run.task_at(r)
        upload, _ = toy.upload_once(run, 0, task)
        assert list(upload) == ["body", "head"]
        assert paths(upload) == {path for path in paths(model) if block_of(task.model, path) in layers(run)[r].split()}
        before = dict(run.progress.cost)
        run.step()
        sent.append(run.progress.cost["bytes_up"] - before.get("bytes_up", 0.0))
        downs.append(run.progress.cost["bytes_down"] - before.get("bytes_down", 0.0))
    head, fusion = tree.nbytes(model["head"]), tree.nbytes(model["body"]["fusion"])
    whole = tree.nbytes(model)
    assert sent == [6 * each for each in (whole - head - fusion, head, head + fusion, whole)]
    assert downs == 4 * [6 * whole] and head == 4 * (32 * 6 + 6)


def test_the_head_of_the_published_network_takes_330_numbers() -> None:
    model = models.build("light_cnn", 10, (1, 28, 28))
    run = start()
    task = replace(run.task, model=model)
    shared = run.algorithm.init_server(task)
    moving, _ = tree.split(shared, lambda path: block_of(model, path) in ["head"])
    assert run.algorithm.payload_bytes(task, {"body": {}, **moving}) == 330 * 4


def test_means_are_of_what_came_and_the_rest_is_kept() -> None:
    run = start(every=1)
    cohort = run.population.cohort(0)
    uploads = [toy.upload_once(run, k)[0] for k in cohort]
    before = tree.clone(run.progress.server)
    run.step()
    assert all(upload["body"] == {} for upload in uploads)
    assert largest_difference(run.progress.server["head"], mean_by_size(run, cohort, uploads)["head"]) < 1e-6
    assert largest_difference(run.progress.server["body"], before["body"]) == 0.0


def test_each_phase_is_counted_by_what_it_computes() -> None:
    run = start(setting=replace(LIGHT, rounds=4, participation=1.0), every=1, branch_rounds=0.25)
    spent = []
    for r in range(4):
        visit = run.population.visit(0, r, {})
        with Operations() as done_by_hand:
            toy.upload_once(run, 0, run.task_at(r))
        before = run.progress.cost.get("train_flops", 0.0)
        run.step()
        spent.append(run.progress.cost["train_flops"] - before)
        assert spent[-1] == pytest.approx(done_by_hand.total / len(visit.index) * sum(toy.SIZES))
    branches, head, fusion, everything = spent
    assert head < fusion < branches < everything


def test_a_forecast_tries_rounds_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(setting=replace(LIGHT, rounds=12, participation=1.0), every=2, branch_rounds=0.25)
    told = {"branches": 4.0, "head": 1.0, "head fusion": 2.0, "head fusion branches": 5.0}
    tried = []

    def step() -> None:
        tried.append(layers(run)[run.progress.round])
        run.progress.round += 1

    def timed(work: Any) -> float:
        work()
        return told[tried[-1]]

    monkeypatch.setattr(run, "step", step)
    monkeypatch.setattr(forecast, "_timed", timed)
    between = range(1, 11)
    assert forecast._seconds_between(run, between) == pytest.approx(sum(told[layers(run)[r]] for r in between))
    assert tried == list(told)


# Branches -------------------------------------------------------------------------------------------------------------


def test_each_branch_learns_from_its_own_picture() -> None:
    """By hand, a step: the first from images as they are, the second from shifted ones, and neither from the other."""
    setting = replace(LIGHT, clip=None, momentum=0.0, weight_decay=0.0, batch_size=64)
    run = start(setting=setting)
    upload, _ = toy.upload_once(run)
    task, body = run.task_at(0), run.progress.server["body"]
    data = data_of(run, 0)
    batch = next(iter(data.batches(1)))
    plain = run.population.images.plain(data.index[batch.example])
    assert float((plain - batch.x).abs().max()) > 0.1 and torch.equal(data.plain(batch), plain)
    for branch, x in zip(task.model.branches, (plain, batch.x), strict=True):
        (name,) = branch.keys
        w = tree.map(lambda leaf: leaf.clone().requires_grad_(), body[name])
        F.cross_entropy(branch.run({name: w}, x), batch.y).backward()
        expected = tree.map(lambda leaf: leaf.detach() - task.lr * leaf.grad, w)
        assert largest_difference(upload["body"][name], expected) < 1e-5
        assert largest_difference(expected, body[name]) > 1e-4
    assert upload["head"] == {} and {*upload["body"]} == {"raw", "augmented"}


def test_the_picture_as_it_is_costs_no_further_sample() -> None:
    """Each of both goes through half a network."""
    run, fedavg = (done(start(setting=replace(LIGHT, rounds=1), name=name)) for name in ("unfreeze", "fedavg"))
    assert run.progress.cost["train_samples"] == fedavg.progress.cost["train_samples"]
    assert 0.8 < run.progress.cost["train_flops"] / fedavg.progress.cost["train_flops"] < 1.0


def test_a_loss_part_takes_the_place_of_both_losses() -> None:
    model = models.build("light_cnn", 6, (1, 16, 16))
    body, x = model.init(keys.key(1))["body"], keys.normal(keys.key(2), 8, 1, 16, 16)
    batch = Batch(x, torch.arange(8) % 6, torch.ones(8))
    task = replace(start().task, model=model)
    found = module().scored_apart(task, body, batch, 2 * x)
    each = [F.cross_entropy(branch.run(body, k * x), batch.y) for branch, k in zip(model.branches, (2, 1), strict=True)]
    assert float(found) == pytest.approx(float(sum(each)))
    counted = replace(task, objective=lambda logits, features, batch: logits.new_tensor(3.0))
    assert float(module().scored_apart(counted, body, batch, x)) == 6.0


def test_it_learns_by_branches_first() -> None:
    setting = replace(toy.SETTING, model="light_cnn", rounds=9, eval_every=9, lr=0.1)
    assert measured(toy.finish(start(setting=setting, every=2)), "generic") > 0.8


def test_from_the_images_on_the_head_stays_as_it_was_drawn() -> None:
    run = start(setting=replace(HOSTILE, rounds=2), every=2, order="first_last")
    before = tree.clone(run.progress.server)
    done(run)
    assert layers(run) == ["hidden", "hidden"]
    assert largest_difference(run.progress.server["head"], before["head"]) == 0.0
    assert largest_difference(run.progress.server["body"], before["body"]) > 1e-3


def test_both_engines_train_branches_alike() -> None:
    setting = replace(LIGHT, rounds=2, clip=5.0, participation=1.0)
    runs = [done(start(engine, setting, branch_rounds=0.5)) for engine in ("serial", "stacked")]
    assert largest_difference(runs[0].progress.server, runs[1].progress.server) < 2e-4


@pytest.mark.parametrize("part", ["topk", "krum"])
def test_parts_act_on_what_travels(part: str) -> None:
    algorithm, method = parse_algorithms(f"unfreeze(every=1)+{part}, unfreeze(every=1)")
    run, plain = (done(toy.run(each, setting=replace(HOSTILE, rounds=2))) for each in (algorithm, method))
    moved = largest_difference(tree.split(run.progress.server, lambda path: "parts" in path)[1], plain.progress.server)
    assert 1e-4 < moved < 10 and tree.is_finite(toy.states(run))
    assert [run.algorithm.exchanges(run.task_at(r))[0].phase for r in range(2)] == ["head", "head hidden"]


def test_statistics_may_stay_at_clients() -> None:
    run = done(start(setting=replace(DEEP, statistics="personal", rounds=2), every=1))
    assert tree.is_finite(run.progress.server)


# What a board knows of it ---------------------------------------------------------------------------------------------


def test_what_is_sent_up_is_told_by_the_runs_own_network() -> None:
    """All of the toy's network trains from the start, where branches of the run's do."""
    method = ALGORITHMS["unfreeze"](every=0)
    assert _on_the_toy(method, 1, "resnet8").alike and _on_the_toy(method, 1, "resnet8").passes == 1
    light = _on_the_toy(method, 1, "light_cnn")
    assert not light.alike and light.passes == 1
