"""FedAvgM: the server's steps against the paper's recursion written out, and FedAvg where there is no momentum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench import Exchange, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured

SETTING = replace(toy.SETTING, momentum=0.9, weight_decay=1e-2, clip=1.0)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {"body": run.progress.server["body"], "head": run.progress.server["head"]}


def mean_of_the_round(run: Run) -> Tree:
    """What FedAvg would make of the model that this run has, with the same clients on the same batches."""
    fedavg = run_of("fedavg", setting=run.setting)
    fedavg.progress.server = model(run)
    fedavg.exchange(run.task_at(run.progress.round), Exchange())
    return fedavg.progress.server


def numbers(params: Tree) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.concatenate([leaf.double().numpy().ravel() for leaf in tree.flatten(tree.parameters(params)).values()])


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_without_momentum_it_is_fedavg(engine: str) -> None:
    still, fedavg = toy.finish(run_of("fedavgm", engine, server_momentum=0.0)), toy.finish(run_of("fedavg", engine))
    assert largest_difference(model(still), model(fedavg)) < 1e-6


@pytest.mark.equivalence
def test_the_first_round_is_fedavgs_and_the_second_is_not() -> None:
    run, fedavg = run_of("fedavgm"), run_of("fedavg")
    run.step()
    fedavg.step()
    assert largest_difference(model(run), model(fedavg)) < 1e-6
    run.step()
    fedavg.step()
    assert largest_difference(model(run), model(fedavg)) > 1e-2


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_server_follows_the_papers_recursion(beta: float, norm: str) -> None:
    setting = replace(SETTING, model="resnet8", norm=norm, rounds=3) if norm == "batch" else SETTING
    run = run_of("fedavgm", setting=setting, server_momentum=beta)
    w = numbers(model(run))
    v = np.zeros_like(w)
    for _ in range(3):
        mean = mean_of_the_round(run)
        v = beta * v + (w - numbers(mean))
        w = w - v
        run.step()
        assert np.abs(numbers(model(run)) - w).max() < 1e-5
        statistics = [tree.split(one, tree.is_statistic)[0] for one in (model(run), mean)]
        assert largest_difference(*statistics) == 0.0 and bool(statistics[0]) == (norm == "batch")


def test_steps_by_hand_and_it_rolls_on_where_clients_stand_still() -> None:
    algorithm = ALGORITHMS["fedavgm"](server_momentum=0.5)
    task = run_of("fedavgm").task
    server: Tree = {part: {"w": torch.zeros(1)} for part in ("body", "head")}
    server["momentum"] = tree.clone(server)
    reached = []
    for moves in ((1.0, 5.0), (1.0, 5.0), (0.0, 0.0), (0.0, 0.0)):  # means of 2, 2, 0, 0 by sizes 3 and 1
        old = {part: server[part] for part in ("body", "head")}
        uploads = [tree.map(lambda leaf, move=move: leaf + move, old) for move in moves]
        server = algorithm.aggregate(task, server, Uploads(uploads, torch.tensor([3.0, 1.0])))
        reached.append(float(server["head"]["w"]))
    assert reached == [2.0, 2.0 + 3.0, 5.0 + 1.5, 6.5 + 0.75]


def test_the_momentum_is_never_sent() -> None:
    run, fedavg = toy.finish(run_of("fedavgm")), toy.finish(run_of("fedavg"))
    for what in ("bytes_down", "bytes_up"):
        assert run.progress.cost[what] == fedavg.progress.cost[what]


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("fedavgm", engine, setting, server_momentum=0.5)), "unseen") > 0.8
