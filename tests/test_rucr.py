"""RUCR: a round by automatic differentiation, means and directions by numpy, FedAvg without its two ideas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, measured

SETTING = replace(toy.SETTING, participation=0.5, rounds=3, momentum=0.9, weight_decay=1e-2)
OFF: dict[str, Any] = {"unify": 0.0, "last_rounds": 0}
CHEAP: dict[str, Any] = {"mixtures": 60, "head_epochs": 2}
ONE_CLASS = 5


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, sizes: Any = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model_of(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_switched_off_it_is_fedavg_and_rectified_heads_never_train(engine: str) -> None:
    off, only_last, fedavg, on = (
        toy.finish(run_of(name, engine, **fields))
        for name, fields in (("rucr", OFF), ("rucr", {**CHEAP, "unify": 0.0}), ("fedavg", {}), ("rucr", CHEAP))
    )
    for run in (off, only_last):
        assert largest_difference(model_of(run), model_of(fedavg)) == 0.0
    tested = off.algorithm.global_model(off.task_at(2), off.progress.server)
    assert tested is not None and largest_difference(tested, model_of(off)) == 0.0
    assert largest_difference(only_last.progress.server["rectified"], only_last.progress.server["head"]) > 1e-3
    assert largest_difference(model_of(on), model_of(fedavg)) > 1e-4


def test_all_clients_are_asked_in_the_last_rounds_only() -> None:
    run = run_of("rucr", last_rounds=1)
    trips = [run.algorithm.exchanges(run.task_at(round)) for round in range(3)]
    assert [len(each) for each in trips] == [2, 2, 3] and [each.everyone for each in trips[2]] == [False, True, False]
    never = run_of("rucr", last_rounds=0)
    assert [len(never.algorithm.exchanges(never.task_at(round))) for round in range(3)] == [2, 2, 2]


def hidden(body: Sequence[Tensor], x: Tensor) -> Tensor:
    return torch.relu(F.linear(x.flatten(1), *body))


def features(run: Run, body: Tree, client: int, round: int) -> tuple[Any, Any]:
    data = data_of(run, client, round)
    with torch.no_grad():
        z = hidden(list(tree.flatten(body).values()), run.population.images.plain(data.index))
    return z.double().numpy(), data.y.numpy()


def unite(run: Run, body: Tree, clients: Any, round: int, directed: bool) -> tuple[Any, Any]:
    """Mean features of classes over clients, weighed by examples, and how many these are."""
    total, counts = np.zeros((6, 64)), np.zeros(6)
    for k in clients:
        z, y = features(run, body, k, round)
        for c in np.unique(y):
            mean = z[y == c].mean(0)
            total[c] += (y == c).sum() * (mean / np.linalg.norm(mean) if directed else mean)
            counts[c] += (y == c).sum()
    return total / np.maximum(counts, 1)[:, None], counts


def pulled(z: Tensor, y: Tensor, means: Any, counts: Any, there: set[int], temperature: float) -> Tensor:
    """Row by row: cosines of classes that the client has, and the log of its class's share for the label's."""
    rows = []
    for row, label in zip(z, y.tolist(), strict=True):
        s = []
        for c in range(6):
            mean = torch.from_numpy(means[c]).float()
            cosine = row @ mean / (row.norm().clamp(min=1e-12) * mean.norm()) if c in there else torch.zeros(())
            s.append(cosine / temperature + (math.log(counts[c] / counts.sum()) if c == label else 0.0))
        rows.append(torch.stack(s).logsumexp(0) - s[label])
    return torch.stack(rows).mean()


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_round_is_the_papers(engine: str) -> None:
    run = run_of("rucr", engine, replace(SETTING, rounds=2), unify=0.8, temperature=0.4, last_rounds=1, **CHEAP)
    run.step()
    before, cohort = run.progress.server, run.population.cohort(1)
    means, counts = unite(run, before["body"], cohort, 1, False)
    directions, _ = unite(run, before["body"], range(8), 1, True)
    models, heads = [], []
    for k in cohort:
        data = data_of(run, k, 1)
        there = set(data.y.tolist())
        w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(model_of(run)).values()]
        optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
        for batch in data.batches(2):
            z = hidden(w[:2], batch.x)
            entropy = F.cross_entropy(F.linear(z, *w[2:]), batch.y)
            optimiser.zero_grad()
            (entropy + 0.8 * pulled(z, batch.y, means, counts, there, 0.4)).backward()
            optimiser.step()
        models.append(tree.unflatten(dict(zip(tree.flatten(model_of(run)), [p.detach() for p in w], strict=True))))
        heads.append(rectified(run, before, k, directions, models[-1]["head"]))
    run.step()
    assert np.abs(run.progress.server["means"].numpy() - means).max() < 1e-4
    assert np.abs(run.progress.server["directions"].numpy() - directions).max() < 1e-5
    assert np.abs(run.progress.server["share"].numpy() - counts / counts.sum()).max() < 1e-6
    assert largest_difference(model_of(run), mean_by_size(run, cohort, models)) < 5e-5
    wanted = mean_by_size(run, cohort, [{"head": head} for head in heads])["head"]
    assert largest_difference(run.progress.server["rectified"], wanted) < 5e-5
    assert largest_difference(run.progress.server["head"], wanted) > 1e-3


def rectified(run: Run, server: Tree, client: int, directions: Any, head: Tree) -> Tree:
    """Train a linear layer on mixtures, by the client's draws."""
    z, _ = features(run, server["body"], client, 1)
    if not len(z):
        return head
    key = data_of(run, client, 1).key
    which = (keys.uniform(keys.fold(key, "which"), 360) * len(z)).long().tolist()
    share = keys.uniform(keys.fold(key, "share"), 360).tolist()
    mixed, labels = [], []
    for place, (row, u) in enumerate(zip(which, share, strict=True)):
        c = place // 60
        u = 0.35 + u * (0.95 - 0.35)
        mixed.append(u * directions[c] + (1 - u) * z[row] / np.linalg.norm(z[row]))
        labels.append(c)
    x, y = torch.from_numpy(np.stack(mixed)).float(), torch.tensor(labels)
    w = [torch.nn.Parameter(head[name].clone()) for name in ("weight", "bias")]
    optimiser = torch.optim.SGD(w, lr=0.01)
    for epoch in range(2):
        for rows in keys.permutation(keys.fold(key, "mixtures", epoch), 360).split(256):
            optimiser.zero_grad()
            F.cross_entropy(F.linear(x[rows], *w), y[rows]).backward()
            optimiser.step()
    return {"weight": w[0].detach(), "bias": w[1].detach()}


def test_a_client_of_one_class_pays_for_the_angle_to_its_mean() -> None:
    """log(1 + (C - 1) exp(-cos/t)): absent classes still count with e^0."""
    run = run_of("rucr", setting=replace(SETTING, epochs=1, weight_decay=0.0, momentum=0.0), unify=1.0)
    data = data_of(run, ONE_CLASS)
    (label,) = data.y.unique().tolist()
    means, share = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(6)
    share[label] = 1.0
    run.progress.server = {**run.progress.server, "means": means, "share": share}
    model = model_of(run)
    w = [leaf.clone().requires_grad_() for leaf in tree.flatten(model).values()]
    z = hidden(w[:2], run.population.images.plain(data.index))
    angle = torch.cosine_similarity(z, means[label][None])
    loss = F.cross_entropy(F.linear(z, *w[2:]), data.y) + (1 + 5 * (-angle / 0.9).exp()).log().mean()
    slopes = torch.autograd.grad(loss, w)
    moved = zip(tree.flatten(model).items(), slopes, strict=True)
    wanted = {path: leaf.detach() - 0.05 * g for (path, leaf), g in moved}
    upload = toy.upload_once(run, ONE_CLASS, exchange=run.algorithm.exchanges(run.task_at(0))[-1])[0]
    assert len(data.y) <= SETTING.batch_size
    assert largest_difference({key: upload[key] for key in ("body", "head")}, tree.unflatten(wanted)) < 1e-6


def test_features_come_nearer_to_their_classes_means_the_stronger_the_pull() -> None:
    angles = []
    for unify in (0.0, 1.0, 5.0):
        run = run_of("rucr", setting=replace(SETTING, participation=1.0, rounds=4), **{**OFF, "unify": unify})
        toy.finish(run)
        body = run.progress.server["body"]
        means, _ = unite(run, body, range(8), 3, False)
        z, y = (np.concatenate(each) for each in zip(*(features(run, body, k, 3) for k in range(8)), strict=True))
        cosine = (z * means[y]).sum(1) / np.linalg.norm(z, axis=1) / np.linalg.norm(means[y], axis=1)
        angles.append(cosine.mean())
    assert angles == sorted(angles) and angles[2] > angles[0] + 0.01


def test_the_rectified_head_is_tested() -> None:
    run = toy.finish(run_of("rucr", **CHEAP))
    model = run.algorithm.global_model(run.task_at(2), run.progress.server)
    assert model is not None
    assert largest_difference(model["head"], run.progress.server["rectified"]) == 0.0
    assert largest_difference(model["body"], run.progress.server["body"]) == 0.0
    shared = run.algorithm.broadcast(run.task_at(2), run.progress.server)
    mine = run.algorithm.personal_model(run.task_at(2), shared, {}, data_of(run, 0))
    assert mine is not None and largest_difference(mine, model) == 0.0


def test_bytes_are_two_trips_with_means_and_counts() -> None:
    """And, in a last round, one of all clients."""
    run = run_of("rucr", setting=replace(SETTING, rounds=1), **OFF)
    last = run_of("rucr", setting=replace(SETTING, rounds=1), **{**CHEAP, "last_rounds": 1})
    c, d, model, n = 6, 64, tree.nbytes(model_of(run)), len(run.population.cohort(0))
    statistics, head = 4 * (c * d + c), 4 * (c * d + c)
    down = model + head + 4 * (2 * c * d + c)
    for each in (run, last):
        toy.finish(each)
    assert run.progress.cost["bytes_down"] == 2 * n * down
    assert run.progress.cost["bytes_up"] == n * (statistics + model)
    assert last.progress.cost["bytes_down"] - run.progress.cost["bytes_down"] == 8 * down
    assert last.progress.cost["bytes_up"] - run.progress.cost["bytes_up"] == 8 * statistics + n * head


def test_engines_agree_under_batch_norm() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, participation=1.0)
    sizes = (20, 9, 0, 0, 0, 0, 0, 0)
    runs = [toy.finish(run_of("rucr", engine, setting, sizes, **CHEAP)) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(run) for run in runs)) < 1e-4


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("rucr", engine, setting, **CHEAP)), "unseen") > 0.8


def test_the_defaults_are_the_references() -> None:
    method = ALGORITHMS["rucr"]()
    assert (method.unify, method.temperature, method.last_rounds) == (0.15, 0.9, 20)
    assert (method.mixtures, method.head_epochs, method.head_lr) == (100, 50, 0.01)
