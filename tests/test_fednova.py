"""FedNova: the server's step by hand, how often a gradient counts, FedAvg where all take as many steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference

SETTING = replace(toy.SETTING, rounds=3)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, participation=1.0)
FEW = (20, 5, 0, 0, 0, 0, 0, 0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, sizes: tuple[int, ...] = toy.SIZES) -> Run:
    return toy.run(ALGORITHMS[name](), engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {"body": run.progress.server["body"], "head": run.progress.server["head"]}


def averaged(
    start: list[float], ends: list[list[float]], gradients: list[float], sizes: list[float], weights: Any = None
) -> list[float]:
    trees: list[Tree] = [
        {"body": {}, "head": {"w": torch.tensor(end)}, "gradients": torch.tensor(a)}
        for end, a in zip(ends, gradients, strict=True)
    ]
    server: Tree = {"body": {}, "head": {"w": torch.tensor(start)}}
    uploads = Uploads(trees, torch.tensor(sizes), weights=weights)
    algorithm: Any = ALGORITHMS["fednova"]()
    found = algorithm.aggregate(None, server, uploads)
    assert found.keys() == server.keys()
    return [float(x) for x in found["head"]["w"]]


@pytest.mark.parametrize(
    ("gradients", "sizes", "wanted"),
    [
        ([1.0, 4.0], [1.0, 1.0], [2.5 * 0.5, 2.5 * 0.25]),
        ([2.0, 4.0], [1.0, 3.0], [3.5 * 0.125, 3.5 * 0.375]),
        ([3.0, 3.0], [1.0, 3.0], [0.25, 1.5]),  # FedAvg's
        ([2.0, 0.0], [1.0, 0.0], [1.0, 0.0]),  # the second one is empty
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),  # both are: nobody moved
    ],
)
def test_the_step_by_hand(gradients: list[float], sizes: list[float], wanted: list[float]) -> None:
    """tau sum_k p_k Delta_k / a_k with tau = sum_k p_k a_k, from two clients that went to (1, 0) and (0, 2)."""
    ends = [[1.0, 0.0], [0.0, 2.0]]
    ends = [end if n else [0.0, 0.0] for end, n in zip(ends, sizes, strict=True)]
    assert averaged([0.0, 0.0], ends, gradients, sizes) == pytest.approx(wanted, abs=1e-6)
    shifted = averaged([5.0, -7.0], [[a + 5, b - 7] for a, b in ends], gradients, sizes)
    assert shifted == pytest.approx([wanted[0] + 5, wanted[1] - 7], abs=1e-5)


def test_whose_update_counts_how_much_is_the_settings() -> None:
    found = averaged([0.0], [[1.0], [4.0]], [1.0, 2.0], [9.0, 1.0], torch.tensor([1.0, 1.0]))
    assert found == pytest.approx([1.5 * (0.5 * 1.0 + 0.5 * 2.0)])


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@ENGINES
def test_a_gradient_counts_as_often_as_momentum_repeats_it(momentum: float, engine: str) -> None:
    """The displacement of K steps along one slope, by torch's own momentum."""
    run = run_of("fednova", engine, replace(SETTING, momentum=momentum))
    for client, n in enumerate(toy.SIZES):
        count = torch.nn.Parameter(torch.zeros(()))
        optimiser = torch.optim.SGD([count], 1.0, momentum)
        for _ in range(2 * -(-n // 16)):
            count.grad = -torch.ones(())
            optimiser.step()
        assert float(toy.upload_once(run, client)[0]["gradients"]) == pytest.approx(float(count.detach()), rel=1e-5)


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [SETTING, replace(SETTING, momentum=0.9, clip=1.0, weight_decay=1e-2)])
@ENGINES
def test_where_all_take_as_many_steps_it_is_fedavg(engine: str, setting: Any) -> None:
    sizes = (17, 18, 19, 20, 21, 22, 23, 24)  # two batches each
    runs = [toy.finish(run_of(name, engine, setting, sizes)) for name in ("fednova", "fedavg")]
    assert largest_difference(*map(model, runs)) < 1e-6


@ENGINES
def test_where_they_do_not_it_is_not(engine: str) -> None:
    runs = [toy.finish(run_of(name, engine)) for name in ("fednova", "fedavg")]
    assert largest_difference(*map(model, runs)) > 1e-2


def test_it_ends_at_the_minimum_of_what_clients_minimise_together_and_fedavg_elsewhere() -> None:
    """(w - 1)² / 2 at a client of one step, (w + 1)² / 2 at one of twenty; both weigh alike."""
    ends = {}
    for counted in (True, False):
        w = 0.0
        for _ in range(300):
            near, far = w + 0.01 * (1 - w), -1 + 0.99**20 * (w + 1)
            (w,) = averaged([w], [[near], [far]], [1.0, 20.0] if counted else [1.0, 1.0], [1.0, 1.0])
        ends[counted] = w
    assert abs(ends[True]) < 0.06 and ends[False] < -0.8


@ENGINES
def test_running_statistics_are_fedavgs_and_weights_are_not(engine: str) -> None:
    runs = [toy.finish(run_of(name, engine, replace(BATCH_NORM, batch_size=8), FEW)) for name in ("fednova", "fedavg")]
    (found, params), (statistics, mean) = (tree.split(model(run), tree.is_statistic) for run in runs)
    assert statistics and largest_difference(found, statistics) == 0.0
    assert largest_difference(params, mean) > 1e-4


def test_one_number_more_comes_up() -> None:
    run, fedavg = toy.finish(run_of("fednova")), toy.finish(run_of("fedavg"))
    assert run.progress.cost["bytes_down"] == fedavg.progress.cost["bytes_down"]
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"] + 3 * 6 * 4  # rounds, clients of each
