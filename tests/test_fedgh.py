"""FedGH: a client's steps and the server's against loops written out, and what travels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, Uploads, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, trained

SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
C, D = 6, 64


def run_of(engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedgh"](**fields), engine, setting=setting)


def some(held: list[list[int]], seed: int = 0) -> tuple[Uploads, Tensor, Tensor]:
    """Uploads of clients that hold some classes, and their means as examples: (n, d), (n,)."""
    draw = torch.Generator().manual_seed(seed)
    means, flags = torch.randn(len(held), C, D, generator=draw), torch.zeros(len(held), C)
    for row, classes in zip(flags, held, strict=True):
        row[classes] = 1.0
    means = means * flags[:, :, None]
    uploads = Uploads(
        [{"means": m, "held": f} for m, f in zip(means, flags, strict=True)], torch.arange(1.0, 9)[: len(held)]
    )
    pairs = [(k, c) for k, classes in enumerate(held) for c in classes]
    x = torch.stack([means[k, c] for k, c in pairs])
    return uploads, x, torch.tensor([c for _, c in pairs])


@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_the_server_takes_plain_sgd_on_the_means(lr: float) -> None:
    """In batches, anew shuffled in each pass; momentum and decay are the clients'."""
    run = run_of(setting=replace(SETTING, batch_size=4, momentum=0.9), server_epochs=3, server_lr=lr)
    uploads, x, y = some([[0, 2, 3], [2, 5], [0, 1, 2, 4]])
    task, head = run.task_at(1), run.progress.server["head"]
    w = [head[name].clone().requires_grad_() for name in ("weight", "bias")]
    optimiser = torch.optim.SGD(w, lr)
    for epoch in range(3):
        order = keys.permutation(keys.fold(task.server_key("head"), epoch), len(y))
        for rows in order.split(4):
            optimiser.zero_grad()
            F.cross_entropy(F.linear(x[rows], *w), y[rows]).backward()
            optimiser.step()
    found = run.algorithm.aggregate(task, run.progress.server, uploads)["head"]
    assert largest_difference(found, {"weight": w[0].detach(), "bias": w[1].detach()}) < 1e-5
    assert largest_difference(found, head) > 1e-3


def test_a_class_that_nobody_holds_keeps_its_row_and_has_no_say() -> None:
    run = run_of()
    uploads, _, _ = some([[0, 2], [2, 5]])
    task, server = run.task_at(1), run.progress.server
    found = run.algorithm.aggregate(task, server, uploads)["head"]
    rest = [1, 3, 4]
    for name in ("weight", "bias"):
        assert torch.equal(found[name][rest], server["head"][name][rest])
        assert all((found[name][c] - server["head"][name][c]).abs().max() > 1e-3 for c in (0, 2, 5))
    shifted = {"head": tree.clone(server["head"])}
    shifted["head"]["bias"][rest] = 50.0
    again = run.algorithm.aggregate(task, shifted, uploads)["head"]
    assert torch.equal(again["weight"][[0, 2, 5]], found["weight"][[0, 2, 5]])
    nobody, _, _ = some([[0]])
    nobody.trees[0]["held"].zero_()
    assert largest_difference(run.algorithm.aggregate(task, server, nobody), server) == 0.0


def test_it_learns_the_means() -> None:
    run = run_of(server_epochs=200, server_lr=0.1)
    uploads, x, y = some([[0, 1, 2], [3, 4, 5]])
    head = run.algorithm.aggregate(run.task, run.progress.server, uploads)["head"]
    before = F.cross_entropy(F.linear(x, *run.progress.server["head"].values()), y)
    assert float(F.cross_entropy(F.linear(x, *head.values()), y)) < 0.05 * float(before)


def test_a_client_trains_its_own_body_under_the_received_head_and_sends_the_means_of_what_it_has_then() -> None:
    run = run_of()
    head = tree.map(lambda leaf: leaf + 0.1, run.progress.server["head"])
    body = tree.map(lambda leaf: leaf - 0.02, run.task.init()["body"])
    run.progress.server, run.store[0] = {"head": head}, {"body": body}
    data = data_of(run, 0)
    model = trained(run, {"body": body, "head": head}, data.batches(run.setting.epochs))
    upload, kept = toy.upload_once(run)
    assert set(kept) == {"body"} and largest_difference(kept["body"], model["body"]) < 5e-6
    z = run.task.model.features(model["body"], run.population.images.plain(data.index))
    for c in range(C):
        mean = z[data.y == c].mean(0) if (data.y == c).any() else torch.zeros(D)
        assert torch.allclose(upload["means"][c], mean, atol=1e-5)
    assert upload["held"].tolist() == [float((data.y == c).any()) for c in range(C)]


@ENGINES
def test_without_the_servers_training_every_body_is_fitted_to_the_initial_head(engine: str) -> None:
    runs = [toy.finish(run_of(engine, **fields)) for fields in ({"server_epochs": 0}, {})]
    assert largest_difference(runs[0].progress.server["head"], runs[0].task.init()["head"]) == 0.0
    once, twice = (run.store[next(iter(run.store.clients()))]["body"] for run in runs)
    assert largest_difference(once, twice) > 1e-4
    if engine == "serial":
        client, body = 0, runs[0].task.init()["body"]
        for round in range(SETTING.rounds):
            if client in runs[0].population.cohort(round):
                start: Tree = {"body": body, "head": runs[0].task.init()["head"]}
                body = trained(runs[0], start, data_of(runs[0], client, round).batches(SETTING.epochs))["body"]
        assert largest_difference(runs[0].store[client]["body"], body) < 1e-5


def test_the_tested_model_is_the_own_body_under_the_newest_head() -> None:
    run = toy.finish(run_of())
    shared = toy.received(run, 0, 2)
    model = run.algorithm.personal_model(run.task, shared, run.store[0], data_of(run, 0))
    assert model is not None
    assert largest_difference(model, {"body": run.store[0]["body"], "head": run.progress.server["head"]}) == 0.0


def test_a_head_comes_and_means_go() -> None:
    run = run_of()
    run.step()
    cohort = len(run.population.cohort(0))
    assert run.progress.cost["bytes_down"] == cohort * 4 * (C * D + C)
    assert run.progress.cost["bytes_up"] == cohort * 4 * (C * D + C)


@ENGINES
def test_a_client_held_out_trains_a_body_of_its_own(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(toy.SETTING, rounds=2, unseen=1)))
    received, task = run.progress.server, run.task_at(1)
    model = run.evaluator.models(task, received, received, run.store, [7], True)["unseen"][0]
    start: Tree = {"body": run.task.init()["body"], "head": received["head"]}
    wanted = trained(run, start, data_of(run, 7, 1).batches(5, "adapt 0"))
    assert largest_difference({key: model[key] for key in wanted}, wanted) < 1e-5
