"""FedAdagrad, FedAdam, FedYogi: the server's steps against the paper's recursions written out, and where they meet."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import Exchange, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW

NAMES = ("fedadagrad", "fedadam", "fedyogi")
EACH = pytest.mark.parametrize("name", NAMES)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, batch_size=8)


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {"body": run.progress.server["body"], "head": run.progress.server["head"]}


def server_of(algorithm: Any, start: list[float]) -> Tree:
    """A server at rest whose model is one tensor."""
    params: Tree = {"body": {}, "head": {"w": torch.tensor(start)}}
    return {**params, "moments": algorithm._rule.start(params)}


def moved(algorithm: Any, server: Tree, by: list[float]) -> Tree:
    """What the server makes of three examples' client that goes twice as far, and of one's that goes back as far."""
    trees = [{"body": {}, "head": {"w": server["head"]["w"] + factor * torch.tensor(by)}} for factor in (2.0, -2.0)]
    following: Tree = algorithm.aggregate(None, server, Uploads(trees, torch.tensor([3.0, 1.0])))
    return following


@pytest.mark.parametrize("beta", [0.0, 0.6, None])
@EACH
def test_the_server_follows_the_papers_recursion(name: str, beta: float | None) -> None:
    """Two coordinates over five rounds, one of which stands still in the last three; beta_1 of None is the default."""
    fields = {} if beta is None else {"server_momentum": beta}
    algorithm: Any = ALGORITHMS[name](server_lr=0.5, eps=0.01, **fields)
    server = server_of(algorithm, [1.0, -2.0])
    one = algorithm.server_momentum
    assert one == (beta if beta is not None else 0.0 if name == "fedadagrad" else 0.9)
    w, m, v = [1.0, -2.0], [0.0, 0.0], [0.01**2] * 2
    for delta in ([0.3, -1.5], [0.1, 2.0], [0.02, 0.0], [-0.2, 0.0], [0.0, 0.0]):
        for k, d in enumerate(delta):
            m[k] = one * m[k] + (1 - one) * d
            if name == "fedadagrad":
                v[k] = v[k] + d**2
            elif name == "fedadam":
                v[k] = 0.99 * v[k] + 0.01 * d**2
            else:
                sign = (v[k] > d**2) - (v[k] < d**2)
                v[k] = v[k] - 0.01 * d**2 * sign
            w[k] += 0.5 * m[k] / (math.sqrt(v[k]) + 0.01)
        server = moved(algorithm, server, delta)
        assert server["head"]["w"].tolist() == pytest.approx(w, abs=1e-5)
        assert server["moments"]["first"]["head"]["w"].tolist() == pytest.approx(
            [-x for x in m], abs=1e-6
        )  # of gradients
        assert server["moments"]["second"]["head"]["w"].tolist() == pytest.approx(v, rel=1e-5)


@EACH
def test_without_memory_the_first_step_has_one_length_everywhere(name: str) -> None:
    """Delta / sqrt(Delta²): its sign, however long it is."""
    memoryless = {} if name == "fedadagrad" else {"square_momentum": 0.0}
    algorithm = ALGORITHMS[name](server_lr=0.25, server_momentum=0.0, eps=1e-8, **memoryless)
    server = moved(algorithm, server_of(algorithm, [0.0, 0.0, 0.0]), [3.0, -0.01, 0.0])
    assert server["head"]["w"].tolist() == pytest.approx([0.25, -0.25, 0.0], abs=1e-5)


def test_yogis_squares_stay_where_the_newest_is_alike_and_move_by_what_it_is_and_not_by_what_they_were() -> None:
    def after(name: str, second: float, delta: float) -> float:
        algorithm = ALGORITHMS[name]()
        server = server_of(algorithm, [0.0])
        server["moments"]["second"]["head"]["w"] = torch.tensor([second])
        return float(moved(algorithm, server, [delta])["moments"]["second"]["head"]["w"])

    assert after("fedyogi", 0.25, 0.5) == 0.25
    assert after("fedyogi", 100.0, 1.0) == pytest.approx(99.99)
    assert after("fedadam", 100.0, 1.0) == pytest.approx(99.01)
    assert after("fedyogi", 0.01, 1.0) == pytest.approx(0.02)
    assert after("fedadam", 0.01, 1.0) == pytest.approx(0.0199)


@pytest.mark.equivalence
@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi"])
@ENGINES
def test_with_a_large_eps_steps_are_fedavgs(name: str, engine: str) -> None:
    """Squares are then nothing beside the eps² that they begin with: w + lr · Delta / (eps + eps)."""
    far = {"server_lr": 200.0, "eps": 100.0, "server_momentum": 0.0}
    found, fedavg = toy.finish(run_of(name, engine, **far)), toy.finish(run_of("fedavg", engine))
    assert largest_difference(model(found), model(fedavg)) < 1e-5


@pytest.mark.equivalence
def test_adams_first_step_too_though_its_squares_fade() -> None:
    run = run_of("fedadam", server_lr=10.0 * (1 + math.sqrt(0.99)), eps=10.0, server_momentum=0.0)
    fedavg = run_of("fedavg")
    run.step()
    fedavg.step()
    assert largest_difference(model(run), model(fedavg)) < 1e-5


@EACH
@ENGINES
def test_at_the_defaults_they_are_not_fedavg(name: str, engine: str) -> None:
    found, fedavg = toy.finish(run_of(name, engine)), toy.finish(run_of("fedavg", engine))
    assert largest_difference(model(found), model(fedavg)) > 1e-2


@EACH
def test_running_statistics_are_averaged_and_have_no_moments(name: str) -> None:
    run, fedavg = run_of(name, setting=BATCH_NORM), run_of("fedavg", setting=BATCH_NORM)
    for _ in range(2):
        fedavg.progress.server = model(run)
        fedavg.exchange(run.task_at(run.progress.round), Exchange())
        run.step()
    found, mean = (tree.split(each, tree.is_statistic) for each in (model(run), fedavg.progress.server))
    assert found[0] and largest_difference(found[0], mean[0]) == 0.0
    assert largest_difference(found[1], mean[1]) > 1e-3
    assert not any(tree.is_statistic(path) for path in tree.flatten(run.progress.server["moments"]))


@EACH
def test_moments_are_never_sent(name: str) -> None:
    run, fedavg = toy.finish(run_of(name)), toy.finish(run_of("fedavg"))
    for what in ("bytes_down", "bytes_up"):
        assert run.progress.cost[what] == fedavg.progress.cost[what]


@EACH
def test_a_round_of_empty_clients_does_no_harm(name: str) -> None:
    """Nothing over nothing: a coordinate that never moved has only eps below it."""
    run = toy.finish(toy.run(ALGORITHMS[name](), setting=SETTING, sizes=(0, 0, 0, 0, 0, 0, 0, 5)))
    assert tree.is_finite(run.progress.server)
