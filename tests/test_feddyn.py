"""FedDyn: a client's steps against a loop written out, what the server makes of moves, and where all comes to rest."""

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
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model(server: Tree) -> Tree:
    return {"body": server["body"], "head": server["head"]}


def cohort(run: Run) -> Tree:
    """The mean model of the last cohort, as it is reported beside."""
    return run.algorithm.global_variants(run.task, run.progress.server)["cohort"]


def mean_drift(server: Tree) -> Tree:
    ALGORITHMS["feddyn"]()
    found: Tree = import_module("bench.algorithms.feddyn").mean_drift(server)
    return found


def like(model: Tree, seed: int) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: 0.1 * torch.randn(leaf.shape, generator=draw), model)


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_a_client_takes_the_steps_of_the_paper_and_adds_its_move(alpha: float) -> None:
    """w <- w - lr (g + alpha (w - received + drift)); then drift <- drift + w - received."""
    run = run_of("feddyn", alpha=alpha)
    received, drift = run.task.init(), like(run.task.init(), 1)
    run.store[0] = {"drift": drift}
    upload, kept = toy.upload_once(run)
    start, pulled = tree.flatten(received), tree.flatten(drift)
    w = [torch.nn.Parameter(leaf.clone()) for leaf in start.values()]
    optimiser = torch.optim.SGD(w, run.setting.lr, run.setting.momentum)
    for batch in data_of(run, 0).batches(run.setting.epochs):
        optimiser.zero_grad()
        F.cross_entropy(F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:]), batch.y).backward()
        for p, anchor, d in zip(w, start.values(), pulled.values(), strict=True):
            assert p.grad is not None
            p.grad += alpha * (p.detach() - anchor + d)
        optimiser.step()
    trained = tree.unflatten(dict(zip(start, (p.detach() for p in w), strict=True)))
    assert largest_difference(upload, trained) < 5e-6
    assert largest_difference(kept["drift"], tree.add(drift, tree.sub(trained, received))) < 5e-6


def followed(server: Tree, ends: dict[int, float], weights: list[float]) -> Tree:
    trees: list[Tree] = [{"body": {}, "head": {"w": torch.tensor([end])}} for end in ends.values()]
    clients, algorithm = torch.tensor([*ends]), ALGORITHMS["feddyn"]()
    given: Any = torch.tensor([weights[k] for k in ends])
    following: Tree = algorithm.aggregate(None, server, Uploads(trees, torch.ones(len(ends)), clients, given))
    return following


def at_rest(clients: int) -> Tree:
    params: Tree = {"body": {}, "head": {"w": torch.zeros(1)}}
    return {**params, "drift": tree.zeros_like(params), "weights": torch.full((clients,), -1.0)}


def test_the_servers_steps_by_hand() -> None:
    """Four clients, of which 0 and 2 weigh 3 and 1, and 1 weighs 2 and 3 nothing."""
    weights = [3.0, 2.0, 1.0, 0.0]
    server = followed(at_rest(4), {0: 1.0, 2: 5.0}, weights)  # the mean is 2, and each is taken to weigh 2 as those do
    assert float(server["head"]["w"]) == 2.0 + (3 * 1 + 1 * 5) / 8
    server = followed(server, {1: 5.0, 3: 3.0}, weights)  # the one moves by 2, the empty one not at all
    assert float(server["head"]["w"]) == pytest.approx(5.0 + (3 * 1 + 1 * 5 + 2 * 2) / 6)
    assert server["weights"].tolist() == weights
    server = followed(server, {3: float(server["head"]["w"])}, weights)  # plain mean, of nobody who weighs
    assert float(server["head"]["w"]) == pytest.approx(5.0 + 2 * 12 / 6)
    assert followed(at_rest(2), {1: 0.0}, [1.0, 0.0])["head"]["w"].tolist() == [0.0]


@pytest.mark.equivalence
@ENGINES
def test_the_first_round_of_all_goes_twice_as_far_as_fedavg_at_alpha_0(engine: str) -> None:
    """Its clients are FedAvg's then, and the mean of the cohort is; what is sent on is not."""
    run, fedavg = run_of("feddyn", engine, EVERYBODY, alpha=0.0), run_of("fedavg", engine, EVERYBODY)
    assert largest_difference(*(toy.upload_once(each)[0] for each in (run, fedavg))) == 0.0
    start = fedavg.progress.server
    run.step()
    fedavg.step()
    assert largest_difference(cohort(run), fedavg.progress.server) < 1e-6
    twice = tree.add(start, tree.sub(fedavg.progress.server, start), 2.0)
    assert largest_difference(model(run.progress.server), twice) < 1e-6


@ENGINES
def test_pull_and_tilt_both_act(engine: str) -> None:
    """Of the first round the pull alone, as drift is still zero; later both."""
    on, off = (run_of("feddyn", engine, EVERYBODY, alpha=alpha) for alpha in (1.0, 0.0))
    for least in (1e-3, 1e-2):
        on.step()
        off.step()
        assert largest_difference(model(on.progress.server), model(off.progress.server)) > least


def test_at_the_default_it_is_not_fedavg() -> None:
    run, fedavg = toy.finish(run_of("feddyn")), toy.finish(run_of("fedavg"))
    assert largest_difference(model(run.progress.server), fedavg.progress.server) > 1e-2
    assert largest_difference(cohort(run), fedavg.progress.server) > 1e-2


@pytest.mark.parametrize("weights", ["size", "uniform"])
@ENGINES
def test_the_server_knows_the_mean_of_all_clients_drifts(engine: str, weights: str) -> None:
    """Of each round, under sampling; those never drawn have none, and an empty client keeps none."""
    setting = replace(SETTING, participation=0.5, rounds=4, client_weights=weights)
    run = run_of("feddyn", engine, setting)
    for _ in range(4):
        run.step()
        server, store = run.progress.server, run.store
        drifts = [tree.scale(store[k]["drift"], n if weights == "size" else 1.0) for k, n in enumerate(toy.SIZES) if n]
        total = drifts[0]
        for each in drifts[1:]:
            total = tree.add(total, each)
        assert largest_difference(server["drift"], total) < 1e-3
        known = server["weights"][server["weights"] >= 0]
        assert largest_difference(mean_drift(server), tree.scale(total, 1 / float(8 * known.mean()))) < 1e-5
    assert not tree.norm(run.store[toy.SIZES.index(0)]["drift"])
    assert largest_difference(tree.sub(model(server), mean_drift(server)), cohort(run)) == 0.0


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
    """(w - 1)² / 2 and 3 (w - 5)² / 2, each minimised to the end; the mean of minima would be 3, and 2 by weights."""
    curves, minima, alpha = (1.0, 3.0), (1.0, 5.0), 2.0
    server, drifts = at_rest(2), [0.0, 0.0]
    for step in range(400):
        received, ends = float(server["head"]["w"]), {}
        for k in cohorts[step % len(cohorts)]:
            ends[k] = (curves[k] * minima[k] + alpha * (received - drifts[k])) / (curves[k] + alpha)
            drifts[k] += ends[k] - received
        server = followed(server, ends, weights)
    assert float(server["head"]["w"]) == pytest.approx(wanted, abs=1e-4)
    assert float(mean_drift(server)["head"]["w"]) == pytest.approx(0.0, abs=1e-4)


@ENGINES
def test_running_statistics_are_means_and_have_no_drift(engine: str) -> None:
    run, fedavg = (toy.finish(run_of(name, engine, BATCH_NORM, **fields)) for name, fields in
                   (("feddyn", {"alpha": 0.0}), ("fedavg", {})))  # fmt: skip
    found, mean = (tree.split(model(run.progress.server), tree.is_statistic) for run in (run, fedavg))
    assert found[0] and largest_difference(found[0], mean[0]) == 0.0
    assert largest_difference(found[1], mean[1]) > 1e-4
    reported, _ = tree.split(cohort(run), tree.is_statistic)
    assert largest_difference(reported, mean[0]) == 0.0
    assert not any(map(tree.is_statistic, [*tree.flatten(run.progress.server["drift"]), *tree.flatten(run.store[0])]))


def test_drift_is_never_sent() -> None:
    run, fedavg = toy.finish(run_of("feddyn")), toy.finish(run_of("fedavg"))
    for what in ("bytes_down", "bytes_up", "train_samples"):
        assert run.progress.cost[what] == fedavg.progress.cost[what]
