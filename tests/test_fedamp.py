"""Facts of FedAMP: its mixtures by hand, what it is without attention, whom it listens to, what strangers get."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench import Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from tests.by_hand import method

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)


def trained(name: str = "fedamp", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.finish(toy.run(ALGORITHMS[name](**fields), engine, setting=setting))


def with_models(models: list[list[float]], **fields: Any) -> Run:
    """A run at whose server each client's model is a number for the body and one for the head."""
    run = toy.run(ALGORITHMS["fedamp"](**fields))
    table = torch.tensor(models)
    run.progress.server = {"models": {"body": {"w": table[:, :1]}, "head": {"b": table[:, 1:]}}}
    return run


def sent(run: Run, client: int | None) -> Tree:
    return run.algorithm.send(run.task, run.progress.server, client)


def numbers(model: Tree) -> list[float]:
    return [float(model["body"]["w"]), float(model["head"]["b"])]


def models_of(run: Run) -> dict[int, Tree]:
    return {k: {"body": run.store[k]["body"], "head": run.store[k]["head"]} for k in run.store.clients()}


# Mixtures -----------------------------------------------------------------------------------------------------------


def test_mixtures_are_those_of_the_paper() -> None:
    """u_i = (1 - sum xi) w_i + sum xi w_j, xi_ij = alpha A'(|w_i - w_j|^2), in the paper's own constants."""
    w = np.array([[0.0, 1.0], [1.0, 1.0], [-2.0, 3.0], [0.5, 0.0]])
    squared = ((w[:, None] - w[None]) ** 2).sum(2)
    relative, attention = 0.7, 0.8
    sigma = relative * squared[~np.eye(4, dtype=bool)].mean()
    alpha = attention * sigma / 3
    xi = alpha * np.exp(-squared / sigma) / sigma
    np.fill_diagonal(xi, 0)
    expected = (1 - xi.sum(1))[:, None] * w + xi @ w
    run = with_models(w.tolist(), attention=attention, sigma=relative)
    for i in range(4):
        assert numbers(sent(run, i)) == pytest.approx(expected[i].tolist(), abs=1e-6)


@pytest.mark.equivalence
def test_attention_at_any_distance_is_the_mean() -> None:
    """All xi = 1/N, the own model's included."""
    run = with_models([[0.0, 1.0], [4.0, 2.0], [5.0, -6.0]], attention=2 / 3, sigma=1e6)
    for i in range(3):
        assert numbers(sent(run, i)) == pytest.approx([3.0, -1.0], abs=1e-3)


@pytest.mark.parametrize("attention", [0.0, 0.3, 1.0])
def test_equal_models_stay_what_they_are(attention: float) -> None:
    run = toy.run(ALGORITHMS["fedamp"](attention=attention))
    assert all(tree.largest_difference(sent(run, k), run.task.init()) == 0 for k in (0, 3))
    assert tree.largest_difference(sent(run, None), run.task.init()) < 1e-7


def test_a_mixture_lies_between_the_models_however_many_there_are() -> None:
    run = with_models([[float(k), 0.0] for k in range(200)], attention=1.0, sigma=1e6)
    assert 0 <= numbers(sent(run, 0))[0] <= 199
    assert numbers(sent(run, 0))[0] == pytest.approx(100.0, rel=0.02)  # the mean of all others


def test_one_client_hears_nobody() -> None:
    run = with_models([[2.0, 3.0]], attention=1.0)
    assert numbers(sent(run, 0)) == [2.0, 3.0]


def test_running_statistics_are_mixed_and_are_no_distance() -> None:
    run = toy.run(ALGORITHMS["fedamp"](attention=1.0))

    def mixed(apart: float) -> Tree:
        model = {
            "w": torch.tensor([[0.0], [1.0], [3.0]]),
            "stats": {"mean": apart * torch.tensor([[0.0], [1.0], [2.0]])},
        }
        run.progress.server = {"models": {"body": model, "head": {"b": torch.zeros(3, 1)}}}
        body: Tree = sent(run, 0)["body"]
        return body

    near, far = mixed(1.0), mixed(1e6)
    assert near["w"] == far["w"]
    assert float(far["stats"]["mean"]) == pytest.approx(1e6 * float(near["stats"]["mean"]))


# Rounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_without_attention_and_pull_it_is_local_training(engine: str) -> None:
    run, local = trained(engine=engine, attention=0.0, pull=0.0), trained("local", engine)
    assert tree.largest_difference({str(k): m for k, m in models_of(run).items()}, private(local)) == 0
    assert run.outcome().metrics["personal"] is not None


def private(run: Run) -> Tree:
    return {str(k): run.store[k] for k in run.store.clients()}


@pytest.mark.parametrize("off", [{"attention": 0.0}, {"pull": 0.0}])
@pytest.mark.parametrize("engine", ENGINES)
def test_each_half_of_it_matters(off: dict[str, Any], engine: str) -> None:
    one, other = models_of(trained(engine=engine)), models_of(trained(engine=engine, **off))
    assert min(tree.largest_difference(one[k], other[k]) for k in one if toy.SIZES[k]) > 1e-5


def distance(a: Tree, b: Tree) -> float:
    apart = tree.sub(a, b)
    return math.sqrt(float(tree.dot(apart, apart)))


def test_a_client_stays_closer_to_what_it_was_sent_the_stronger_the_pull() -> None:
    def gone(pull: float) -> float:
        run = toy.run(ALGORITHMS["fedamp"](pull=pull), setting=replace(toy.SETTING, momentum=0.0, epochs=10))
        run.step()
        return distance(toy.upload_once(run, 0, run.task_at(1))[0], sent(run, 0))

    near = [gone(pull) for pull in (0.0, 1.0, 10.0, 19.0)]
    assert near == sorted(near, reverse=True) and near[-1] < near[0] / 4


def test_the_pull_is_lambda_over_alpha_times_the_distance() -> None:
    """Two steps on all examples: w = u - lr g(u), then - lr (g(w) + pull (w - u))."""
    setting = replace(toy.SETTING, momentum=0.0, epochs=2, batch_size=1000)
    plain, pulled = (
        toy.upload_once(toy.run(ALGORITHMS["fedamp"](pull=pull), setting=setting))[0] for pull in (0.0, 2.0)
    )
    once = toy.upload_once(toy.run(ALGORITHMS["fedamp"](pull=2.0), setting=replace(setting, epochs=1)))[0]
    first = tree.sub(once, toy.run(ALGORITHMS["fedamp"]()).task.init())
    assert tree.largest_difference(tree.sub(pulled, plain), tree.scale(first, -2.0 * setting.lr)) < 1e-6


def test_a_client_starts_from_what_it_was_sent() -> None:
    """One step on all examples: u - lr g(u), the pull being none there, and the client's own model of no account."""
    setting = replace(toy.SETTING, momentum=0.0, epochs=1, batch_size=1000)
    run = toy.run(ALGORITHMS["fedamp"](), setting=setting)
    run.step()
    upload, kept = toy.upload_once(run, 0, run.task_at(1))
    u, rows = sent(run, 0), run.population.index[0]
    assert tree.largest_difference(u, models_of(run)[0]) > 1e-3
    leaves = [leaf.requires_grad_() for leaf in tree.flatten(u).values()]
    logits = run.task.logits(u, run.population.images.plain(rows))
    gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, run.population.images.y[rows]), leaves)
    for now, leaf, step in zip(tree.flatten(upload).values(), leaves, gradient, strict=True):
        assert torch.allclose(now, leaf - setting.lr * step, atol=1e-6)
    assert tree.largest_difference(upload, {"body": kept["body"], "head": kept["head"]}) == 0


def test_models_that_arrive_stand_in_their_clients_places() -> None:
    run = toy.run(ALGORITHMS["fedamp"](), setting=replace(toy.SETTING, participation=0.5, lost=0.4))
    start = tree.clone(run.progress.server["models"])
    run.step()
    arrived = [k for k in run.population.cohort(0) if run.population.arrives(k, 0)]
    assert 0 < len(arrived) < 4
    for k in range(8):
        expected = models_of(run)[k] if k in arrived else tree.pick(start, k)
        assert tree.largest_difference(tree.pick(run.progress.server["models"], k), expected) == 0


def test_clients_listen_most_to_those_that_have_their_classes() -> None:
    """Dealt by label, clients k and k + 5 of 24 examples hold the same classes."""
    setting = replace(toy.SETTING, participation=1.0, rounds=6)
    run = toy.finish(toy.run(ALGORITHMS["fedamp"](sigma=0.3), setting=setting, sizes=(24,) * 8))
    counts = [run.population.class_counts(k).tolist() for k in range(8)]
    models = tree.parameters(run.progress.server["models"])
    for k, like in ((0, 5), (1, 6), (2, 7), (5, 0), (6, 1), (7, 2)):
        assert counts[k] == counts[like]
        apart = tree.map(torch.sub, models, tree.pick(models, k))
        weights = method(run).weights(apart)
        others = [j for j in range(8) if j != k]
        assert max(others, key=lambda j: float(weights[j])) == like
        assert float(weights[others].sum()) < 0.5


# Who has no model yet -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_whoever_was_never_trained_uses_what_it_is_sent(engine: str) -> None:
    """Held out of training: the mean of all models; never drawn, or without examples: its u_i."""
    setting = replace(toy.SETTING, rounds=4, participation=0.3, unseen=1)
    run = toy.finish(toy.run(ALGORITHMS["fedamp"](), engine, setting=setting))
    task, taken = run.task_at(3), run.store.clients()
    idle = next(k for k in range(7) if k not in taken)
    empty = toy.SIZES.index(0)
    assert empty in taken
    for client, asked in ((7, None), (idle, idle), (empty, empty)):
        model = personal(run, client, asked)
        assert tree.largest_difference(model, run.algorithm.send(task, run.progress.server, asked)) == 0
        assert tree.largest_difference(model, task.init()) > 1e-3
    mean = tree.map(lambda leaf: leaf.mean(0), run.progress.server["models"])
    assert tree.largest_difference(personal(run, 7, None), mean) < 1e-7
    busy = next(k for k in taken if toy.SIZES[k])
    assert tree.largest_difference(personal(run, busy, busy), models_of(run)[busy]) == 0
    unseen = run.outcome().metrics["unseen"]
    assert unseen is not None and unseen > 0.5  # of six classes


def personal(run: Run, client: int, asked: int | None) -> Tree:
    task, private = run.task_at(3), run.store[client]
    model = run.algorithm.personal_model(task, run.algorithm.send(task, run.progress.server, asked), private, None)  # type: ignore[arg-type]
    assert model is not None
    return model


# Batch norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["shared", "personal", "frozen"])
def test_batch_norm(statistics: str) -> None:
    setting = replace(toy.SETTING, model="resnet8", norm="batch", statistics=statistics, rounds=2, epochs=1, lr=0.01)
    setting = replace(setting, participation=1.0, eval_every=2, eval_clients=1)
    one, other = (
        toy.finish(toy.run(ALGORITHMS["fedamp"](), engine, setting=setting, sizes=(20, 9, 0))) for engine in ENGINES
    )
    assert tree.largest_difference(toy.states(one), toy.states(other)) < 5e-4
    kept = tree.split(one.progress.server["models"], tree.is_statistic)[0]
    start = tree.split(tree.stack([one.task.init()] * 3), tree.is_statistic)[0]
    assert (tree.largest_difference(kept, start) > 1e-3) == (statistics == "shared")
