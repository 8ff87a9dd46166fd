"""SCAFFOLD: a client's steps and control against a loop written out, and what the server makes of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of

SETTING = replace(toy.SETTING, rounds=3, participation=0.5)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", participation=1.0, rounds=1, epochs=1, batch_size=8)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(engine: str = "serial", setting: Any = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["scaffold"](**fields), engine, setting=setting, sizes=sizes)


def like(model: Tree, seed: int) -> Tree:
    """Some control: numbers of a gradient's size."""
    draw = torch.Generator().manual_seed(seed)
    return tree.map(lambda leaf: 0.1 * torch.randn(leaf.shape, generator=draw), model)


def model_of(server: Tree) -> Tree:
    return {"body": server["body"], "head": server["head"]}


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_client_takes_the_steps_of_the_paper_and_keeps_the_mean_gradient(momentum: float) -> None:
    """y <- y - lr (g(y) - c_k + c); then c_k <- c_k - c + (x - y) / (K lr), by option II, without momentum."""
    run = run_of(setting=replace(SETTING, momentum=momentum))
    model = run.task.init()
    c, c_k = like(model, 1), like(model, 2)
    run.progress.server, run.store[0] = {**model, "control": c}, {"control": c_k}
    upload, kept = toy.upload_once(run)
    w = [leaf.clone().requires_grad_() for leaf in tree.flatten(model).values()]
    towards = [a - b for a, b in zip(tree.flatten(c).values(), tree.flatten(c_k).values(), strict=True)]
    optimiser, taken = torch.optim.SGD(w, run.setting.lr, momentum), []
    for batch in data_of(run, 0, 0).batches(run.setting.epochs):
        hidden = torch.relu(batch.x.flatten(1) @ w[0].T + w[1])
        gradient = torch.autograd.grad(F.cross_entropy(hidden @ w[2].T + w[3], batch.y), w)
        for p, g, extra in zip(w, gradient, towards, strict=True):
            p.grad = g + extra
        taken.append(gradient)
        optimiser.step()
    trained = tree.unflatten(dict(zip(tree.flatten(model), (p.detach() for p in w), strict=True)))
    assert largest_difference(model_of(upload), trained) < 5e-6
    # Momentum repeats a gradient: of K steps the k-th one is in the displacement (1 - rho^(K - k)) / (1 - rho) times.
    steps = len(taken)
    worth = [(1 - momentum ** (steps - k)) / (1 - momentum) for k in range(steps)]
    averaged = [sum(a * g for a, g in zip(worth, each, strict=True)) / sum(worth) for each in zip(*taken, strict=True)]
    wanted = tree.unflatten(dict(zip(tree.flatten(model), averaged, strict=True)))
    assert largest_difference(kept["control"], wanted) < 1e-4
    assert largest_difference(upload["control"], tree.sub(kept["control"], c_k)) < 1e-6


def some_uploads(run: Run, clients: tuple[int, ...]) -> list[Tree]:
    return [{**like(run.task.init(), k), "control": like(run.task.init(), 10 + k)} for k in clients]


@pytest.mark.parametrize("server_lr", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0]])
def test_models_count_by_the_settings_weights_and_controls_by_the_share_that_took_part(
    server_lr: float, weights: list[float] | None
) -> None:
    """x <- x + eta_g (mean y - x), c <- c + sum_k (c_k+ - c_k) / N, of N = 8 clients."""
    run = run_of(server_lr=server_lr)
    before = {**run.task.init(), "control": like(run.task.init(), 3)}
    trees, sizes = some_uploads(run, (0, 1, 2)), torch.tensor([60.0, 44.0, 33.0]).double()
    given = None if weights is None else torch.tensor(weights).double()
    after = run.algorithm.aggregate(run.task, before, Uploads(trees, sizes, weights=given))
    shares = sizes / sizes.sum() if given is None else given / given.sum()
    old, new = tree.flatten(before), tree.flatten(after)
    sent = [tree.flatten(each) for each in trees]
    for path, leaf in old.items():
        if path.startswith("control"):
            wanted = leaf + sum(each[path] for each in sent) / 8
        else:
            mean = sum(share * each[path] for share, each in zip(shares.tolist(), sent, strict=True))
            wanted = leaf + server_lr * (mean - leaf)
        assert torch.allclose(new[path], wanted, atol=1e-6), path


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("weights", ["size", "uniform"])
def test_its_first_round_is_fedavg_under_either_weights(weights: str, engine: str) -> None:
    setting = replace(toy.SETTING, rounds=1, participation=1.0, client_weights=weights)
    server = toy.finish(run_of(engine, setting)).progress.server
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=setting)).progress.server
    assert largest_difference(model_of(server), fedavg) < 1e-6


@ENGINES
def test_running_statistics_are_means_at_any_step_of_the_server(engine: str) -> None:
    """A variance that is stepped beyond the mean may end below zero; weights are stepped."""
    runs = [run_of(engine, BATCH_NORM, FEW, server_lr=lr) for lr in (1.0, 3.0)]
    start = runs[0].progress.server
    one, three = (toy.finish(run).progress.server for run in runs)
    (statistics, weights), (same, further) = (tree.split(model_of(each), tree.is_statistic) for each in (one, three))
    assert largest_difference(statistics, same) == 0.0
    assert largest_difference(statistics, tree.split(model_of(start), tree.is_statistic)[0]) > 1e-3
    begun = tree.split(model_of(start), tree.is_statistic)[1]
    assert largest_difference(tree.sub(further, begun), tree.scale(tree.sub(weights, begun), 3.0)) < 1e-5
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=BATCH_NORM, sizes=FEW)).progress.server
    assert largest_difference(tree.split(fedavg, tree.is_statistic)[0], statistics) < 1e-4


@ENGINES
def test_variances_stay_apart_from_zero_over_rounds_of_large_steps(engine: str) -> None:
    """Running statistics of one are 0.9^rounds after as many batches, and no less."""
    run = toy.finish(run_of(engine, replace(BATCH_NORM, rounds=3, batch_size=32), FEW, server_lr=3.0))
    leaves = tree.flatten(run.progress.server)
    smallest = min(float(leaf.min()) for path, leaf in leaves.items() if path.endswith("stats/var"))
    assert smallest > 0.9**3 - 1e-3


@ENGINES
def test_an_empty_client_keeps_its_control(engine: str) -> None:
    run = run_of(engine, replace(SETTING, participation=1.0))
    mine = {"control": like(run.task.init(), 5)}
    empty = toy.SIZES.index(0)
    run.store[empty] = mine
    assert largest_difference(toy.finish(run).store[empty], mine) == 0.0


def test_without_controls_each_client_drifts_to_its_own_data() -> None:
    """With them the mean of gradients at the clients goes to zero at a point that all share: drift is less."""
    setting = replace(toy.SETTING, participation=1.0, rounds=12, momentum=0.0, lr=0.1, eval_every=12)

    def drift(name: str) -> float:
        run = toy.run(ALGORITHMS[name](), setting=setting)
        toy.finish(run)
        moved = [tree.sub(model_of(toy.upload_once(run, k, run.task_at(11))[0]), model_of(run.progress.server))
                 for k in (0, 1, 2)]  # fmt: skip
        return sum(math.sqrt(float(tree.dot(each, each))) for each in moved)

    assert drift("scaffold") < 0.8 * drift("fedavg")
