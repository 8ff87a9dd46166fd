"""APFL: both models' steps against a loop written out, the slope of alpha, FedAvg and Local at its two ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, tree
from bench.algorithm import stages
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
SETTING = replace(toy.SETTING, rounds=2, weight_decay=1e-2, clip=0.5)
PLAIN = replace(toy.SETTING, rounds=3, participation=0.25)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, participation=1.0, eval_every=2)
FEW = (5, 3, 0, 0, 0, 0, 0, 0)


def run_of(name: str = "apfl", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = FEW if setting.model == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def own(run: Run) -> Tree:
    return {str(k): model(run.store[k]) for k in run.store.clients()}


def model(state: Tree) -> Tree:
    return {"body": state["body"], "head": state["head"]}


def shifted(model: Tree) -> Tree:
    return tree.map(lambda leaf: leaf + 0.02 * torch.arange(leaf.numel()).reshape(leaf.shape).cos(), model)


def entropy(w: list[Tensor], batch: Batch) -> Tensor:
    return F.cross_entropy(F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:]), batch.y)


def slope(v: Tree, w: Tree, alpha: float, batch: Batch) -> float:
    """Of the mixture's loss in alpha, which is differentiated itself."""
    at = torch.tensor(alpha, requires_grad=True)
    pairs = zip(tree.flatten(v).values(), tree.flatten(w).values(), strict=True)
    (found,) = torch.autograd.grad(entropy([at * a + (1 - at) * b for a, b in pairs], batch), at)
    return float(found)


def written_out(run: Run, v: Tree, w: Tree, alpha: float, batches: list[Batch]) -> tuple[Tree, Tree]:
    """Two of torch's optimisers: w by its own gradient, v by alpha times the mixture's where both were before."""
    setting, paths = run.setting, list(tree.flatten(w))
    both = [[torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(each).values()] for each in (v, w)]
    rules = [torch.optim.SGD(each, setting.lr, setting.momentum, weight_decay=setting.weight_decay) for each in both]
    for batch in batches:
        mixed = [alpha * a.detach() + (1 - alpha) * b.detach() for a, b in zip(*both, strict=True)]
        for each, at in ((both[0], mixed), (both[1], [p.detach() for p in both[1]])):
            leaves = [leaf.requires_grad_() for leaf in at]
            for p, g in zip(each, torch.autograd.grad(entropy(leaves, batch), leaves), strict=True):
                p.grad = alpha * g if each is both[0] else g
            if setting.clip is not None:
                torch.nn.utils.clip_grad_norm_(each, setting.clip)
        for rule in rules:
            rule.step()
    v, w = (tree.unflatten(dict(zip(paths, (p.detach() for p in each), strict=True))) for each in both)
    return v, w


@pytest.mark.equivalence
@pytest.mark.parametrize("fields", [{}, {"alpha": 1.0}, {"adapt": True}])
@ENGINES
def test_the_global_model_is_fedavgs_whatever_the_mixture(engine: str, fields: dict[str, Any]) -> None:
    run, fedavg = toy.finish(run_of(engine=engine, **fields)), toy.finish(run_of("fedavg", engine))
    assert largest_difference(run.progress.server, fedavg.progress.server) == 0.0
    assert run.outcome().metrics["generic"] == fedavg.outcome().metrics["generic"]


@pytest.mark.equivalence
@ENGINES
def test_of_its_own_model_alone_it_is_training_alone(engine: str) -> None:
    run, local = toy.finish(run_of(engine=engine, alpha=1.0)), toy.finish(run_of("local", engine))
    assert largest_difference(own(run), own(local)) == 0.0
    task, server = run.task_at(1), run.progress.server
    (tested,) = run.evaluator.models(task, server, server, run.store, [0], True)["personal"]
    assert largest_difference(tested, local.store[0]) == 0.0


@pytest.mark.equivalence
@ENGINES
def test_without_its_own_model_it_is_fedavg_and_that_model_stands_still(engine: str) -> None:
    setting = replace(SETTING, weight_decay=0.0)
    run = toy.finish(run_of(engine=engine, setting=setting, alpha=0.0))
    fedavg = toy.finish(run_of("fedavg", engine, setting))
    assert all(largest_difference(each, run.task.init()) == 0.0 for each in own(run).values())
    assert run.outcome().metrics["personal"] == fedavg.outcome().metrics["personal"]


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_both_models_take_the_steps_of_the_paper(clip: float | None, adapt: bool) -> None:
    """On the same batches, both from where they were before a batch; each is clipped by itself."""
    run = run_of(setting=replace(SETTING, clip=clip), adapt=adapt)
    w, v, alpha = run.progress.server, shifted(run.task.init()), 0.3
    run.store[0] = {**v, "alpha": torch.tensor(alpha)}
    batches = list(data_of(run, 0).batches(run.setting.epochs))
    if adapt:
        alpha -= run.setting.lr * slope(v, w, alpha, batches[0])
        assert abs(alpha - 0.3) > 1e-3
    upload, kept = toy.upload_once(run)
    expected = written_out(run, v, w, alpha, batches)
    assert largest_difference(model(kept), expected[0]) < 5e-6
    assert largest_difference(upload, expected[1]) < 5e-6
    assert float(kept["alpha"]) == pytest.approx(alpha, abs=1e-6)
    assert largest_difference(expected[0], written_out(run, v, w, 0.5, batches)[0]) > 1e-4


@pytest.mark.parametrize(("alpha", "by"), [(1.0, -0.1), (0.0, 0.1)])
def test_alpha_stays_a_share(alpha: float, by: float) -> None:
    """A model of its own that went down (up) the slope wants more than all (less than nothing) of the mixture."""
    run = run_of(setting=replace(SETTING, clip=None), adapt=True)
    w, (batch, *_) = run.progress.server, data_of(run, 0).batches(1)
    _, gradient, _ = run.task.gradient(run.task.loss, w, batch)
    v = tree.add(w, gradient, by)
    assert slope(v, w, alpha, batch) * by > 0.01
    run.store[0] = {**v, "alpha": torch.tensor(alpha)}
    assert float(toy.upload_once(run)[1]["alpha"]) == alpha


@ENGINES
def test_alpha_moves_once_a_round_and_where_it_is_told_to(engine: str) -> None:
    """Not in the first round, in which both models are the initial one, nor without examples."""
    for adapt in (False, True):
        run = toy.finish(run_of(engine=engine, adapt=adapt))
        later = {k for k in run.population.cohort(1) if toy.SIZES[k]}
        moved = {k for k in run.store.clients() if float(run.store[k]["alpha"]) != 0.5}
        assert moved == (later if adapt else set()) and later
        extra = sum(min(toy.SIZES[k], 16) for r in range(2) for k in run.population.cohort(r)) if adapt else 0
        fedavg = toy.finish(run_of("fedavg", engine)).progress.cost
        assert run.progress.cost["train_samples"] == fedavg["train_samples"] + extra
        assert all(run.progress.cost[what] == fedavg[what] for what in ("bytes_down", "bytes_up"))


def test_tested_is_the_mixture_with_the_newest_global_model() -> None:
    run = toy.finish(run_of(setting=replace(PLAIN, participation=0.5), alpha=0.25))
    task, server = run.task_at(2), run.progress.server
    earlier = next(k for k in run.store.clients() if k not in run.population.cohort(2) and toy.SIZES[k])
    (tested,) = run.evaluator.models(task, server, server, run.store, [earlier], True)["personal"]
    mixed = tree.map(lambda v, w: 0.25 * v + 0.75 * w, model(run.store[earlier]), server)
    assert largest_difference(tested, mixed) < 1e-6
    assert min(largest_difference(mixed, each) for each in (server, model(run.store[earlier]))) > 1e-3


@ENGINES
@pytest.mark.parametrize("unseen", [0, 2])
def test_who_never_took_part_starts_a_model_of_its_own_from_the_received_one(unseen: int, engine: str) -> None:
    run = toy.finish(run_of(engine=engine, setting=replace(PLAIN, unseen=unseen), alpha=0.25))
    population, server, task = run.population, run.progress.server, run.task_at(2)
    never = [k for k in range(population.training) if k not in run.store.clients() and len(population.index[k])]
    client = population.size - 1 if unseen else never[0]
    named = run.evaluator.models(task, server, server, run.store, [client], True)
    (tested,) = named["unseen" if unseen else "personal"]
    v, _ = written_out(run, server, server, 0.25, list(data_of(run, client, 2).batches(run.setting.epochs)))
    assert largest_difference(tested, tree.map(lambda v, w: 0.25 * v + 0.75 * w, v, server)) < 1e-5
    assert largest_difference(model(run.store[client]), run.task.init()) == 0.0
    assert stages(run.algorithm.newcomer_adaptation(task)) == ()


def test_running_statistics_of_its_own_model_are_those_of_the_mixture() -> None:
    run = run_of(setting=BATCH_NORM)
    v, w, (batch,) = shifted(run.task.init()), run.progress.server, data_of(run, 0).batches(1)
    run.store[0] = {**v, "alpha": torch.tensor(0.5)}
    statistics, weights = tree.split(v, tree.is_statistic)
    mixed = tree.merge(tree.map(lambda a, b: 0.5 * a + 0.5 * b, weights, w), statistics)
    found, expected, alone = (
        tree.split(each, tree.is_statistic)[0]
        for each in (
            model(toy.upload_once(run)[1]),
            run.task.gradient(run.task.loss, mixed, batch)[2],
            run.task.gradient(run.task.loss, v, batch)[2],
        )
    )
    assert found and largest_difference(found, expected) < 1e-6 and largest_difference(found, alone) > 1e-3


def test_engines_agree_under_batch_norm() -> None:
    runs = [run_of("apfl", engine, BATCH_NORM) for engine in ("serial", "stacked")]
    for run in runs:
        run.step()
    assert largest_difference(*map(toy.states, runs)) < 2e-4
