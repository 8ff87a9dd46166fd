"""FedDC: a client's steps against a loop written out, what the server makes of them, where all comes to rest."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of

SETTING = replace(toy.SETTING, rounds=3)
EVERYBODY = replace(SETTING, participation=1.0)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, participation=1.0)
NOBODY_EMPTY = (60, 44, 33, 17, 9, 3, 5, 26)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, sizes: Any = None, **fields: Any) -> Run:
    usual = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes or usual)


def model(server: Tree) -> Tree:
    return {"body": server["body"], "head": server["head"]}


def cohort(run: Run) -> Tree:
    """The mean model of the last cohort, as it is reported beside."""
    return run.algorithm.global_variants(run.task, run.progress.server)["cohort"]


def mean_of_all(server: Tree, key: str) -> Tree:
    ALGORITHMS["feddc"]()
    found: Tree = import_module("bench.algorithms.feddc").mean_of_all(server, key)
    return found


def like(model: Tree, seed: int) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: 0.1 * torch.randn(leaf.shape, generator=draw), model)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_a_client_takes_the_steps_of_the_paper(alpha: float, momentum: float) -> None:
    """w <- w - lr (g + alpha (w - received + h) + c - c_k); then h <- h + move, c_k <- c_k - c - move / (K lr)."""
    run = run_of("feddc", setting=replace(SETTING, momentum=momentum), alpha=alpha)
    received = run.task.init()
    h, c_k, c = (like(received, seed) for seed in (1, 2, 3))
    run.progress.server |= {"control": tree.scale(c, 8.0), "weights": torch.ones(8)}
    run.store[0] = {"drift": h, "control": c_k}
    upload, kept = toy.upload_once(run)
    start = tree.flatten(received)
    w = [torch.nn.Parameter(leaf.clone()) for leaf in start.values()]
    pulled, along = (list(tree.flatten(each).values()) for each in (h, tree.sub(c, c_k)))
    optimiser, steps = torch.optim.SGD(w, run.setting.lr, momentum), 0
    for batch in data_of(run, 0).batches(run.setting.epochs):
        optimiser.zero_grad()
        F.cross_entropy(F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:]), batch.y).backward()
        for p, anchor, drift, extra in zip(w, start.values(), pulled, along, strict=True):
            assert p.grad is not None
            p.grad += alpha * (p.detach() - anchor + drift) + extra
        optimiser.step()
        steps += 1
    trained = tree.unflatten(dict(zip(start, (p.detach() for p in w), strict=True)))
    moved = tree.sub(trained, received)
    assert largest_difference(model(upload), trained) < 1e-5
    assert largest_difference(kept["drift"], tree.add(h, moved)) < 1e-5
    gradients = sum((1 - momentum ** (steps - k)) / (1 - momentum) for k in range(steps))
    change = tree.sub(tree.scale(moved, -1 / (gradients * run.setting.lr)), c)
    assert largest_difference(upload["control"], change) < 2e-4
    assert largest_difference(kept["control"], tree.add(c_k, upload["control"])) < 1e-6


def followed(server: Tree, ends: dict[int, float], changes: dict[int, float], weights: list[float], **on: Any) -> Tree:
    trees: list[Tree] = [
        {**leaf(ends[k]), "control": leaf(changes[k])} for k in ends
    ]  # fmt: skip
    clients, algorithm = torch.tensor([*ends]), ALGORITHMS["feddc"](**on)
    given: Any = torch.tensor([weights[k] for k in ends])
    following: Tree = algorithm.aggregate(None, server, Uploads(trees, torch.ones(len(ends)), clients, given))
    return following


def leaf(value: float) -> Tree:
    return {"body": {}, "head": {"w": torch.tensor([value])}}


def value(model: Tree) -> float:
    return float(model["head"]["w"])


def at_rest(clients: int) -> Tree:
    return {**leaf(0.0), "drift": leaf(0.0), "control": leaf(0.0), "weights": torch.full((clients,), -1.0)}


def test_the_servers_steps_by_hand() -> None:
    """Four clients, of which 0 and 2 weigh 3 and 1, and 1 weighs 2 and 3 nothing."""
    weights = [3.0, 2.0, 1.0, 0.0]
    server = followed(at_rest(4), {0: 1.0, 2: 5.0}, {0: -1.0, 2: 7.0}, weights)
    assert value(server) == 2.0 + (3 * 1 + 1 * 5) / 8  # the mean is 2, and each is taken to weigh 2 as those do
    assert value(mean_of_all(server, "control")) == (3 * -1 + 1 * 7) / 8
    server = followed(server, {1: 5.0, 3: 3.0}, {1: 2.0, 3: 0.0}, weights)  # the one moves by 2, the empty one not
    assert value(server) == pytest.approx(5.0 + (3 * 1 + 1 * 5 + 2 * 2) / 6)
    assert value(mean_of_all(server, "control")) == pytest.approx((3 * -1 + 1 * 7 + 2 * 2) / 6)
    assert server["weights"].tolist() == weights
    still = followed(at_rest(4), {0: 1.0, 2: 5.0}, {0: -1.0, 2: 7.0}, weights, drift=False)
    assert value(still) == 2.0 and value(still["drift"]) == 0.0 and value(mean_of_all(still, "control")) == 0.5


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_without_drift_and_pull_it_is_scaffold(participation: float, engine: str) -> None:
    setting = replace(SETTING, participation=participation, client_weights="uniform", rounds=4)
    run = toy.finish(run_of("feddc", engine, setting, NOBODY_EMPTY, alpha=0.0, drift=False))
    scaffold = toy.finish(run_of("scaffold", engine, setting, NOBODY_EMPTY)).progress.server
    assert largest_difference(model(run.progress.server), model(scaffold)) < 1e-5
    assert largest_difference(mean_of_all(run.progress.server, "control"), scaffold["control"]) < 1e-4
    assert all(not tree.norm(run.store[k]["drift"]) for k in run.store.clients())


@ENGINES
def test_the_first_round_of_all_goes_twice_as_far_as_fedavg_without_a_pull(engine: str) -> None:
    run, fedavg = run_of("feddc", engine, EVERYBODY, alpha=0.0), run_of("fedavg", engine, EVERYBODY)
    start = fedavg.progress.server
    run.step()
    fedavg.step()
    assert largest_difference(cohort(run), fedavg.progress.server) < 1e-6
    twice = tree.add(start, tree.sub(fedavg.progress.server, start), 2.0)
    assert largest_difference(model(run.progress.server), twice) < 1e-6


@ENGINES
@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"drift": False}])
def test_pull_and_drift_both_act(off: dict[str, Any], engine: str) -> None:
    runs = [toy.finish(run_of("feddc", engine, **fields)) for fields in ({"alpha": 0.5}, {"alpha": 0.5, **off})]
    assert largest_difference(*(model(run.progress.server) for run in runs)) > 1e-2


def test_at_the_default_it_is_neither_fedavg_nor_scaffold_nor_feddyn() -> None:
    run = toy.finish(run_of("feddc"))
    for name in ("fedavg", "scaffold", "feddyn"):
        other = model(toy.finish(run_of(name)).progress.server)
        assert largest_difference(model(run.progress.server), other) > 1e-2
        assert largest_difference(cohort(run), other) > 1e-3


@pytest.mark.parametrize("weights", ["size", "uniform"])
@ENGINES
def test_the_server_knows_the_means_of_all_clients(engine: str, weights: str) -> None:
    """Of each round, under sampling; those never drawn have nothing, and an empty client keeps nothing."""
    setting = replace(SETTING, participation=0.5, rounds=4, client_weights=weights)
    run = run_of("feddc", engine, setting)
    for _ in range(4):
        run.step()
        server, store = run.progress.server, run.store
        known = server["weights"][server["weights"] >= 0]
        for key in ("drift", "control"):
            kept = [tree.scale(store[k][key], n if weights == "size" else 1.0) for k, n in enumerate(toy.SIZES) if n]
            total = kept[0]
            for each in kept[1:]:
                total = tree.add(total, each)
            assert largest_difference(server[key], total) < 1e-3
            assert largest_difference(mean_of_all(server, key), tree.scale(total, 1 / float(8 * known.mean()))) < 1e-5
    assert not tree.norm(run.store[toy.SIZES.index(0)])
    assert largest_difference(tree.sub(model(server), mean_of_all(server, "drift")), cohort(run)) == 0.0


@pytest.mark.parametrize(
    ("weights", "cohorts", "wanted"),
    [
        ([1.0, 1.0], [(0, 1)], (1 * 1 + 3 * 5) / 4),
        ([3.0, 1.0], [(0, 1)], (3 * 1 * 1 + 1 * 3 * 5) / 6),
        ([3.0, 1.0], [(0,), (0, 1), (1,)], (3 * 1 * 1 + 1 * 3 * 5) / 6),
    ],
)
def test_it_comes_to_rest_where_the_weighted_loss_is_least(
    weights: list[float], cohorts: list[tuple[int, ...]], wanted: float
) -> None:
    """(w - 1)² / 2 and 3 (w - 5)² / 2, five steps of gradient descent in each round."""
    curves, minima, alpha, lr = (1.0, 3.0), (1.0, 5.0), 0.3, 0.05
    server, drifts, controls = at_rest(2), [0.0, 0.0], [0.0, 0.0]
    for step in range(500):
        received, c = value(server), value(mean_of_all(server, "control"))
        ends, changes = {}, {}
        for k in cohorts[step % len(cohorts)]:
            w = received
            for _ in range(5):
                slope = curves[k] * (w - minima[k]) + alpha * (w - received + drifts[k]) + c - controls[k]
                w -= lr * slope
            ends[k], changes[k] = w, -c - (w - received) / (5 * lr)
            drifts[k] += w - received
            controls[k] += changes[k]
        server = followed(server, ends, changes, weights)
    assert value(server) == pytest.approx(wanted, abs=1e-3)
    assert value(mean_of_all(server, "drift")) == pytest.approx(0.0, abs=1e-3)


def test_running_statistics_are_means_and_have_neither() -> None:
    run = run_of("feddc", setting=BATCH_NORM)
    server, control = run.progress.server, run.store.initial["control"]
    sent = [{**tree.map(lambda leaf, far=far: leaf + far, model(server)), "control": control} for far in (1.0, 4.0)]
    found = run.algorithm.aggregate(run.task, server, Uploads(sent, torch.tensor([2.0, 1.0])))
    statistics, params = tree.split(tree.sub(model(found), model(server)), tree.is_statistic)
    twice = 2.0 + 2.0 * 2 / 8  # the mean move, and that of all clients
    assert all(torch.allclose(leaf, torch.tensor(2.0)) for leaf in tree.flatten(statistics).values())
    assert all(torch.allclose(leaf, torch.tensor(twice), atol=1e-5) for leaf in tree.flatten(params).values())
    kept = [server["drift"], server["control"], run.store.initial]
    assert not any(map(tree.is_statistic, [path for each in kept for path in tree.flatten(each)]))


def test_a_control_goes_down_and_its_change_comes_up() -> None:
    run, scaffold, fedavg = (toy.finish(run_of(name)).progress.cost for name in ("feddc", "scaffold", "fedavg"))
    for what in ("bytes_down", "bytes_up"):
        assert run[what] == scaffold[what] == 2 * fedavg[what]
    assert run["train_samples"] == fedavg["train_samples"]
