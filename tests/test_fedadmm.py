"""FedADMM: a client's steps against a loop written out, what it sends, where all comes to rest, FedDyn where all take
part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training import engine as engines
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of, method

SETTING = replace(toy.SETTING, rounds=3)
EVERYBODY = replace(SETTING, participation=1.0)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, participation=1.0)
EMPTY = toy.SIZES.index(0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model(server: Tree) -> Tree:
    return {"body": server["body"], "head": server["head"]}


def like(model: Tree, seed: int) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: 0.1 * torch.randn(leaf.shape, generator=draw), model)


@pytest.mark.parametrize("previous", ["client", "server"])
@pytest.mark.parametrize("rho", [0.5, 5.0])
def test_a_client_takes_the_steps_of_the_paper_and_sends_what_changed(rho: float, previous: str) -> None:
    """w <- w - lr (g + dual + rho (w - received)); dual <- dual + rho (w - received); the change of w + dual / rho."""
    run = run_of("fedadmm", rho=rho, previous=previous)
    received, dual, last = run.task.init(), like(run.task.init(), 1), like(run.task.init(), 2)
    run.store[0] = {"dual": dual, "model": last}
    upload, kept = toy.upload_once(run)
    start, pulled = tree.flatten(received), tree.flatten(dual)
    w = [torch.nn.Parameter(leaf.clone()) for leaf in start.values()]
    optimiser = torch.optim.SGD(w, run.setting.lr, run.setting.momentum)
    for batch in data_of(run, 0).batches(run.setting.epochs):
        optimiser.zero_grad()
        F.cross_entropy(F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:]), batch.y).backward()
        for p, anchor, d in zip(w, start.values(), pulled.values(), strict=True):
            assert p.grad is not None
            p.grad += rho * (p.detach() - anchor) + d
        optimiser.step()
    trained = tree.unflatten(dict(zip(start, (p.detach() for p in w), strict=True)))
    assert largest_difference(kept["model"], trained) < 5e-6
    after = tree.add(dual, tree.sub(trained, received), rho)
    assert largest_difference(kept["dual"], after) < 5e-6 * max(1, rho)
    was = tree.add(last if previous == "client" else received, dual, 1 / rho)
    changed = tree.sub(tree.add(trained, after, 1 / rho), was)
    assert largest_difference(tree.sub(upload, received), changed) < 2e-5


def test_right_after_its_work_a_client_has_what_it_trained() -> None:
    run = run_of("fedadmm")
    run.step()
    task, client = run.task_at(1), 0
    visit = run.population.visit(client, 1, run.store[client])
    shared, images = toy.received(run, client, 1), run.population.images
    (((seen, kept),), _) = engines.serial(method(run).after_training, task, shared, images, [visit])
    _, wanted = toy.upload_once(run, client, task)
    assert largest_difference(seen, wanted["model"]) == 0.0 and largest_difference(kept, wanted) == 0.0
    visit = run.population.visit(EMPTY, 1, run.store[EMPTY])
    (((seen, kept),), _) = engines.serial(method(run).after_training, task, shared, images, [visit])
    assert largest_difference(seen, model(shared)) == 0.0 and largest_difference(kept, run.store[EMPTY]) == 0.0


@ENGINES
def test_an_empty_client_sends_what_it_received_and_keeps_what_it_has(engine: str) -> None:
    setting = replace(EVERYBODY, rounds=2)
    run = run_of("fedadmm", engine, setting)
    run.step()
    run.store[EMPTY] = mine = {"dual": like(run.task.init(), 1), "model": like(run.task.init(), 2)}
    upload, _ = toy.upload_once(run, EMPTY, run.task_at(1))
    assert largest_difference(upload, model(run.progress.server)) == 0.0
    run.step()
    assert largest_difference(run.store[EMPTY], mine) == 0.0


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("weights", ["size", "uniform"])
def test_where_all_take_part_it_is_feddyn(weights: str, engine: str) -> None:
    """The server's model is then the mean of w + dual / rho of all clients, as FedDyn's is of w + drift."""
    setting = replace(EVERYBODY, client_weights=weights, rounds=4)
    run, feddyn = run_of("fedadmm", engine, setting, rho=0.3), run_of("feddyn", engine, setting, alpha=0.3)
    for _ in range(4):
        run.step()
        feddyn.step()
        assert largest_difference(model(run.progress.server), model(feddyn.progress.server)) < 2e-5
    scaled = tree.scale(run.store[0]["dual"], 1 / 0.3)
    assert largest_difference(scaled, feddyn.store[0]["drift"]) < 2e-5


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("server_lr", [0.5, 0.25])
def test_compared_with_the_received_model_it_is_a_doubled_step_of_the_server(server_lr: float, engine: str) -> None:
    """Clients are FedAvg's at rho = 0."""
    run, fedavg = run_of("fedadmm", engine, rho=0.0, previous="server", server_lr=server_lr), run_of("fedavg", engine)
    for _ in range(3):
        start = run.progress.server
        fedavg.progress.server = start
        run.step()
        fedavg.step()
        moved = tree.add(start, tree.sub(fedavg.progress.server, start), 2 * server_lr)
        assert largest_difference(run.progress.server, moved) < 1e-6


def test_at_the_default_it_is_neither_fedavg_nor_feddyn_and_each_field_acts() -> None:
    run = model(toy.finish(run_of("fedadmm")).progress.server)
    for name in ("fedavg", "feddyn"):
        assert largest_difference(run, model(toy.finish(run_of(name)).progress.server)) > 1e-3
    for fields in ({"previous": "server"}, {"server_lr": 0.5}, {"rho": 0.5}):
        assert largest_difference(run, toy.finish(run_of("fedadmm", **fields)).progress.server) > 1e-3


def rounds(count: int, cohorts: list[tuple[int, ...]], start: float, **fields: Any) -> tuple[float, list[float]]:
    """Where server and dual variables come to, of (w - 1)² / 2 and 3 (w - 5)² / 2, five steps of descent each round."""
    algorithm: Any = ALGORITHMS["fedadmm"](**fields)
    curves, minima, rho, lr = (1.0, 3.0), (1.0, 5.0), algorithm.rho, 0.05
    server: Tree = {"body": {}, "head": {"w": torch.tensor([start], dtype=torch.float64)}}
    duals, lasts = [0.0, 0.0], [start, start]
    for step in range(count):
        received, sent = float(server["head"]["w"]), []
        for k in cohorts[step % len(cohorts)]:
            w = received
            for _ in range(5):
                w -= lr * (curves[k] * (w - minima[k]) + duals[k] + rho * (w - received))
            duals[k] += rho * (w - received)
            last = lasts[k] if algorithm.previous == "client" else received
            sent.append({"body": {}, "head": {"w": torch.tensor([2 * w - last], dtype=torch.float64)}})
            lasts[k] = w
        server = algorithm.aggregate(None, server, Uploads(sent, torch.ones(len(sent))))
    return float(server["head"]["w"]), duals


@pytest.mark.parametrize(
    ("cohorts", "fields", "wanted"),
    [
        ([(0, 1)], {"server_lr": 1.0}, 4.0),
        ([(0,), (1,)], {"server_lr": 0.5}, 4.0),
        ([(0,), (1,)], {"server_lr": 1.0}, (2 * 4 - 0.25 * 9) / (2 - 0.25)),  # a server that goes too far from it
        ([(0, 1)], {"previous": "server"}, (2 * 4 + 0.25 * 9) / (2 + 0.25)),  # and one that it pulls for ever
    ],
)
def test_where_it_comes_to_rest(cohorts: list[tuple[int, ...]], fields: dict[str, Any], wanted: float) -> None:
    """At 4 the mean loss is least; the first model is 9."""
    found, duals = rounds(800, cohorts, 9.0, rho=0.5, **fields)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert sum(duals) / 2 == pytest.approx(-2 * (wanted - 4), abs=1e-3)


def test_running_statistics_are_means_whatever_the_step() -> None:
    run = run_of("fedadmm", setting=BATCH_NORM, server_lr=0.5)
    server = run.progress.server
    sent = [tree.map(lambda leaf, far=far: leaf + far, server) for far in (1.0, 4.0)]
    found = run.algorithm.aggregate(run.task, server, Uploads(sent, torch.tensor([2.0, 1.0])))
    statistics, params = tree.split(tree.sub(found, server), tree.is_statistic)
    assert all(torch.allclose(leaf, torch.tensor(2.0)) for leaf in tree.flatten(statistics).values())
    assert all(torch.allclose(leaf, torch.tensor(1.0), atol=1e-5) for leaf in tree.flatten(params).values())
    upload, kept = toy.upload_once(run, 1)
    (trained, _), (usual, _) = (
        tree.split(each, tree.is_statistic)
        for each in (upload, toy.upload_once(run_of("fedavg", setting=BATCH_NORM), 1)[0])
    )
    assert trained and not any(map(tree.is_statistic, tree.flatten(kept)))
    assert largest_difference(trained, usual) < 1e-4  # of the first step, which the dual variable does not reach


def test_nothing_more_is_sent() -> None:
    run, fedavg = toy.finish(run_of("fedadmm")), toy.finish(run_of("fedavg"))
    for what in ("bytes_down", "bytes_up", "train_samples"):
        assert run.progress.cost[what] == fedavg.progress.cost[what]
