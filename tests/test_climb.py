"""CLIMB: multipliers and weights by hand, FedAvg where no constraint binds, who is badly served counts more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured

SETTING = replace(toy.SETTING, rounds=4)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, participation=1.0)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
ONE: dict[str, Any] = {"block": 1}
"""The multipliers move in every round."""


def run_of(name: str, engine: str = "serial", setting: Setting = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


def loss_of(run: Run, model: Tree, client: int) -> float:
    """Mean cross-entropy of a model over a client's examples."""
    visit = run.population.visit(client, 0, {})
    x, y = run.population.images.plain(visit.index), run.population.images.y[visit.index]
    z = torch.relu(x.flatten(1) @ model["body"]["hidden"]["weight"].T + model["body"]["hidden"]["bias"])
    return float(F.cross_entropy(z @ model["head"]["weight"].T + model["head"]["bias"], y))


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("client_weights", ["size", "uniform"])
@pytest.mark.parametrize("off", [{"dual_lr": 0.0}, {"tolerance": 1000.0}])
def test_where_no_constraint_binds_it_is_fedavg(off: dict[str, Any], client_weights: str, engine: str) -> None:
    setting = replace(SETTING, client_weights=client_weights)
    runs = run_of("climb", engine, setting, **ONE, **off), run_of("fedavg", engine, setting)
    assert largest_difference(*(model(toy.finish(run)) for run in runs)) == 0.0
    assert runs[0].progress.server["multipliers"].eq(0).all()


def test_where_one_binds_it_is_not() -> None:
    """At the defaults the first block is FedAvg's, for multipliers act from the next one on."""
    setting = replace(SETTING, rounds=8)
    run, fedavg = run_of("climb", setting=setting), run_of("fedavg", setting=setting)
    apart = []
    for _ in range(8):
        run.step()
        fedavg.step()
        apart.append(largest_difference(model(run), model(fedavg)))
    assert apart[:5] == [0.0] * 5 and apart[5] > 1e-5


def judged(multipliers: list[float], losses: list[float], sizes: list[float], clients: list[int], **on: Any) -> Tree:
    run = run_of("climb", **on)
    server = {**run.progress.server, "multipliers": torch.tensor(multipliers)}
    sent = [{"loss": torch.tensor(each)} for each in losses]
    uploads = Uploads(sent, torch.tensor(sizes), torch.tensor(clients))
    algorithm: Any = run.algorithm
    found: Tree = algorithm.judge(replace(run.task, num_clients=len(multipliers)), server, uploads)
    return found


def test_weights_and_multipliers_by_hand() -> None:
    found = judged([0.0, 0.0, 0.2, 0.6], [1.0, 2.0, 3.0, 6.0], [9.0, 9.0, 9.0, 9.0], [0, 1, 2, 3], dual_lr=2.0)
    assert found["weights"].tolist() == pytest.approx([0.8, 0.8, 1.0, 1.4])
    expected = [0.0, 0.0, 0.2 + 0.5 * (0 - 0.01), 0.6 + 0.5 * (3 - 0.01)]  # of a mean of 3
    assert found["multipliers"].tolist() == pytest.approx(expected)
    assert judged([0.0] * 2, [0.0, 99.0], [1.0] * 2, [0, 1], largest=7.0)["multipliers"].tolist() == [0.0, 7.0]


def test_empty_clients_and_those_whose_loss_is_lost_keep_their_multiplier() -> None:
    found = judged([0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 3.0], [4.0, 0.0, 4.0], [0, 1, 3], dual_lr=4.0, tolerance=0.0)
    assert found["multipliers"].tolist() == pytest.approx([0.0, 0.5, 0.5, 1.5])  # of a mean of 2
    assert found["weights"].tolist() == [1.0] * 4


def test_weights_add_up_to_the_number_of_clients_and_multipliers_rise_while_violated() -> None:
    run = run_of("climb", setting=replace(SETTING, rounds=6), dual_lr=1.0, **ONE)
    losses, multipliers = [], [run.progress.server["multipliers"]]
    for _ in range(6):
        losses.append([loss_of(run, model(run), k) if toy.SIZES[k] else None for k in range(8)])
        run.step()
        server = run.progress.server
        assert float(server["weights"].sum()) == pytest.approx(8.0, abs=1e-5)
        multipliers.append(server["multipliers"])
    for round, told in enumerate(losses):
        known = [each for each in told if each is not None]
        mean = sum(known) / len(known)
        for k, each in enumerate(told):
            step = 0.0 if each is None else (each - mean - 0.01) / 8
            expected = max(float(multipliers[round][k]) + step, 0.0)
            assert float(multipliers[round + 1][k]) == pytest.approx(expected, abs=1e-5)
    assert multipliers[-1].max() > 0.05 and multipliers[-1][toy.SIZES.index(0)] == 0


@pytest.mark.parametrize("weights", [[2.0, 0.5, 1.0], [0.25, 0.0, -3.0]])
def test_a_step_is_the_sum_of_weighted_updates(weights: list[float]) -> None:
    """Nobody divides by the sum of the weights, and one below zero counts as zero."""
    run = run_of("climb")
    all_weights = torch.ones(8)
    all_weights[[1, 4, 7]] = torch.tensor(weights)
    server: Tree = {**run.progress.server, "weights": all_weights}
    moves, sizes = (0.3, -0.2, 0.7), (10.0, 30.0, 60.0)
    old = model(run)
    sent = [tree.map(lambda leaf, move=move: leaf + move, old) for move in moves]
    uploads = Uploads(sent, torch.tensor(sizes), torch.tensor([1, 4, 7]))
    found = run.algorithm.aggregate(run.task, server, uploads)
    step = sum(w * n / 100 * m for w, n, m in zip([max(w, 0.0) for w in weights], sizes, moves, strict=True))
    expected = tree.map(lambda leaf: leaf + step, old)
    assert largest_difference({key: found[key] for key in old}, expected) < 1e-6


def test_running_statistics_are_averaged_whatever_the_step() -> None:
    run = run_of("climb", setting=BATCH_NORM)
    run.progress.server["weights"] = torch.full((8,), 0.5)
    old = model(run)
    task = run.task_at(0)
    sent = [toy.upload_once(run, k, task, run.algorithm.exchanges(task)[-1])[0] for k in (0, 1)]
    uploads = Uploads(sent, torch.tensor([20.0, 9.0]))
    found = run.algorithm.aggregate(run.task, run.progress.server, uploads)
    moved, mean = {key: found[key] for key in old}, uploads.mean()
    (statistics, params), (expected, whole) = (tree.split(each, tree.is_statistic) for each in (moved, mean))
    assert statistics and largest_difference(statistics, expected) < 1e-6
    start = tree.parameters(old)
    assert largest_difference(params, tree.add(start, tree.sub(whole, start), 0.5)) < 1e-6


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_sends_the_mean_loss_of_the_received_model(engine: str) -> None:
    run = run_of("climb", engine, tolerance=0.0, dual_lr=8.0, **ONE)
    losses = [loss_of(run, model(run), k) if n else None for k, n in enumerate(toy.SIZES)]
    run.step()
    known = [each for each in losses if each is not None]
    mean = sum(known) / len(known)
    expected = [max(each - mean, 0.0) if each is not None else 0.0 for each in losses]
    assert run.progress.server["multipliers"].tolist() == pytest.approx(expected, abs=1e-5)


def test_clients_that_are_badly_served_are_served_better() -> None:
    setting = replace(toy.SETTING, rounds=10, participation=1.0, eval_every=10)
    gaps = []
    for dual_lr in (0.0, 20.0):
        run = toy.finish(run_of("climb", "stacked", setting, dual_lr=dual_lr, **ONE))
        losses = [loss_of(run, model(run), k) for k, n in enumerate(toy.SIZES) if n]
        gaps.append(max(losses) - sum(losses) / len(losses))
    assert gaps[1] < 0.8 * gaps[0]


def test_what_is_sent_is_fedavgs_and_a_loss_of_every_client_once_a_block() -> None:
    run, fedavg = (toy.finish(run_of(name, setting=replace(SETTING, rounds=6))) for name in ("climb", "fedavg"))
    down, up = (run.progress.cost[way] - fedavg.progress.cost[way] for way in ("bytes_down", "bytes_up"))
    assert up == 2 * 8 * 4
    assert down == 2 * 8 * tree.nbytes(model(run))
    samples = run.progress.cost["train_samples"] - fedavg.progress.cost["train_samples"]
    assert samples == pytest.approx(2 * sum(toy.SIZES) / 3)


def test_engines_agree_under_batch_norm() -> None:
    runs = [run_of("climb", engine, BATCH_NORM, dual_lr=8.0, **ONE) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(toy.finish(run)) for run in runs)) < 2e-4


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    run = toy.finish(run_of("climb", engine, setting))
    assert run.progress.server["weights"].shape == (7,)
    assert measured(run, "unseen") > 0.8
