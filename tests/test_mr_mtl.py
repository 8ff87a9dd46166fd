"""MR-MTL: its steps against a loop written out, local training where nothing pulls, and what it is not: Ditto."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
PLAIN = replace(toy.SETTING, momentum=0.9, weight_decay=1e-2)


def start(setting: Any = SETTING, engine: str = "serial", name: str = "mr_mtl", **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting)


def private(run: Run) -> Tree:
    return {str(k): run.store[k] for k in run.store.clients()}


def shifted(model: Tree, by: float) -> Tree:
    return tree.map(lambda leaf: leaf + by * torch.arange(leaf.numel()).reshape(leaf.shape).cos(), model)


def solved(run: Run, begin: Tree, anchor: Tree, pull: float) -> Tree:
    """torch's SGD on cross-entropy + pull / 2 |v - anchor|^2 over the batches of client 0."""
    v = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(begin).values()]
    still = list(tree.flatten(anchor).values())
    optimiser = torch.optim.SGD(v, run.setting.lr, run.setting.momentum, weight_decay=run.setting.weight_decay)
    for batch in data_of(run, 0).batches(run.setting.epochs):
        optimiser.zero_grad()
        scores = F.linear(torch.relu(F.linear(batch.x.flatten(1), v[0], v[1])), v[2], v[3])
        apart = torch.stack([(p - a).square().sum() for p, a in zip(v, still, strict=True)]).sum()
        (F.cross_entropy(scores, batch.y) + pull / 2 * apart).backward()
        optimiser.step()
    return tree.unflatten(dict(zip(tree.flatten(begin), (p.detach() for p in v), strict=True)))


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_a_client_goes_on_from_its_own_model_drawn_to_the_received_one(pull: float) -> None:
    run = start(PLAIN, pull=pull)
    own, received = shifted(run.task.init(), 0.02), shifted(run.task.init(), -0.03)
    run.store[0], run.progress.server = own, received
    upload, kept = toy.upload_once(run)
    expected = solved(run, own, received, pull)
    assert largest_difference(upload, expected) < 5e-6
    assert largest_difference(kept, upload) == 0.0
    assert largest_difference(upload, solved(run, own, received, 0.7 - pull)) > 1e-3
    assert largest_difference(upload, solved(run, received, received, pull)) > 1e-3


def test_the_server_has_the_mean_of_what_clients_keep() -> None:
    run = start(replace(toy.SETTING, participation=1.0))
    run.step()
    mean = mean_by_size(run, range(8), [run.store[k] for k in range(8)])
    assert largest_difference(run.progress.server, mean) < 1e-6


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_pull_it_is_local_training(engine: str) -> None:
    run, local = toy.finish(start(engine=engine, pull=0.0)), toy.finish(start(engine=engine, name="local"))
    assert largest_difference(private(run), private(local)) == 0.0


def test_with_one_it_is_neither_local_training_nor_ditto() -> None:
    run = toy.finish(start())
    for name in ("local", "ditto"):
        assert largest_difference(private(run), private(toy.finish(start(name=name)))) > 1e-3
    fedavg = toy.finish(start(name="fedavg"))
    assert largest_difference(run.progress.server, fedavg.progress.server) > 1e-3
    for what in ("train_samples", "bytes_down", "bytes_up"):  # one model is trained, sent and received
        assert run.progress.cost[what] == fedavg.progress.cost[what]


def test_clients_stay_closer_together_the_stronger_the_pull() -> None:
    def spread(pull: float) -> float:
        run = toy.finish(start(replace(toy.SETTING, participation=1.0, momentum=0.0, rounds=3), pull=pull))
        apart = [tree.sub(run.store[k], run.progress.server) for k in range(8)]
        return sum(float(tree.dot(each, each)) for each in apart)

    spreads = [spread(pull) for pull in (0.0, 0.3, 1.0, 10.0)]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.2 * spreads[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_whoever_never_took_part_uses_the_mean(engine: str) -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=3, participation=0.3, unseen=1), engine))
    task, server = run.task_at(2), run.progress.server
    idle = next(k for k in range(7) if k not in run.store.clients())
    (model,) = run.evaluator.models(task, server, server, run.store, [idle], True)["personal"]
    assert largest_difference(model, server) == 0.0
    (model,) = run.evaluator.models(task, server, server, run.store, [7], True)["unseen"]
    assert largest_difference(model["body"], server["body"]) == 0.0
    assert largest_difference(model["head"], server["head"]) > 1e-3
    assert largest_difference(run.store[7], task.init()) == 0.0
