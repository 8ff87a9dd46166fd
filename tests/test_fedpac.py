"""Facts of FedPAC: its programmes and statistics by hand, what is FedRep's of it, what prototypes do."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)


def start(setting: Any = SETTING, engine: str = "serial", sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedpac"](**fields), engine, setting=setting, sizes=sizes)


def combination(average: Any, variance: Any) -> np.ndarray[Any, Any]:
    found: Tensor = importlib.import_module("bench.algorithms.fedpac").combination(
        torch.as_tensor(average, dtype=torch.float32), torch.as_tensor(variance, dtype=torch.float32)
    )
    return found.numpy()


# Programmes -----------------------------------------------------------------------------------------------------------


def test_weights_have_their_values_by_hand() -> None:
    """Two clients alike and one at a squared distance of 150, variances 1: Q = diag(1, 1, 151), a = Q^-1 1 / 303."""
    weights = combination([[[0.0, 0.0]], [[0.0, 0.0]], [[150**0.5, 0.0]]], [1.0, 1.0, 1.0])
    assert weights[0] == pytest.approx([151 / 303, 151 / 303, 1 / 303], abs=1e-6)
    assert weights[1] == pytest.approx(weights[0])
    assert weights[2] == pytest.approx([1 / 303, 1 / 303, 301 / 303], abs=1e-6)


def test_whoever_knows_exactly_keeps_its_head() -> None:
    weights = combination(np.random.default_rng(0).random((5, 3, 4)), np.zeros(5))
    assert weights == pytest.approx(np.eye(5), abs=1e-5)


def test_whoever_knows_nothing_leaves_it_to_the_others() -> None:
    """Equal averages: weights go as 1 / V."""
    weights = combination(np.ones((3, 2, 2)), [1.0, 2.0, 1e9])
    assert weights[2] == pytest.approx([2 / 3, 1 / 3, 0], abs=1e-6)


def least(q: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The least a^T q a on the simplex, by trying every set of clients whose weights are not zero."""
    found, best = np.zeros(len(q)), np.inf
    for size in range(1, len(q) + 1):
        for some in map(list, itertools.combinations(range(len(q)), size)):
            a = np.linalg.solve(q[np.ix_(some, some)], np.ones(size))
            a = a / a.sum()
            value = a @ q[np.ix_(some, some)] @ a
            if (a >= 0).all() and value < best:
                found, best = np.zeros(len(q)), value
                found[some] = a
    return found


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("noise", [1e-3, 1e-1])
def test_weights_are_the_least_of_all_supports(scale: float, noise: float) -> None:
    draw = np.random.default_rng(3)
    average, variance = draw.random((6, 3, 4)).astype("f"), (noise * draw.random(6)).astype("f")
    weights, zeros = combination(scale * average, scale**2 * variance), 0
    for i in range(6):
        apart = (average[i] - average).reshape(6, -1).astype(float)
        expected = least(np.diag(variance) + apart @ apart.T)
        zeros += int((expected == 0).sum())
        assert weights[i] == pytest.approx(expected, abs=1e-4)
    assert (weights >= 0).all() and weights.sum(1) == pytest.approx(np.ones(6), abs=1e-6)
    assert zeros > 0


# The client -----------------------------------------------------------------------------------------------------------


def features(run: Run, client: int, body: Tree) -> tuple[Any, Any]:
    rows = run.population.index[client]
    z = run.task.model.features(body, run.population.images.plain(rows))
    return z.double().numpy(), run.population.images.y[rows].numpy()


def test_statistics_are_those_of_the_received_body() -> None:
    run = start()
    run.step()
    for client in (0, 4, 5):
        upload, _ = toy.upload_once(run, client, run.task_at(1))
        z, y = features(run, client, run.progress.server["body"])
        n, average, variance = len(y), np.zeros((6, 64)), 0.0
        for c in range(6):
            if (y == c).any():
                share, mine = (y == c).mean(), z[y == c]
                average[c] = share * mine.mean(0)
                variance += share * (mine @ mine.T).trace() / len(mine) - share**2 * (mine.mean(0) ** 2).sum()
        assert upload["average"].numpy() == pytest.approx(average, abs=1e-5)
        assert float(upload["variance"]) == pytest.approx(variance / n, rel=1e-3, abs=1e-7)
        assert upload["counts"].tolist() == np.bincount(y, minlength=6).tolist()


def test_prototypes_are_those_of_the_trained_body() -> None:
    run = start()
    upload, _ = toy.upload_once(run, 1)
    z, y = features(run, 1, upload["body"])
    for c in range(6):
        expected = z[y == c].mean(0) if (y == c).any() else np.zeros(64)
        assert upload["prototypes"][c].numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_without_prototypes_and_mixtures_it_is_fedrep(engine: str) -> None:
    """One epoch on the head, the setting's on the body, at one learning rate."""
    run = toy.finish(start(engine=engine, align=0.0, combine=False, head_lr=SETTING.lr))
    fedrep = ALGORITHMS["fedrep"](head_epochs=1, body_epochs=SETTING.epochs)
    other = toy.finish(toy.run(fedrep, engine, setting=SETTING))
    assert tree.largest_difference(run.progress.server["body"], other.progress.server["body"]) == 0
    for k in other.store.clients():
        assert (
            tree.largest_difference(
                {"head": run.algorithm.send(run.task, run.progress.server, k)["head"]}, other.store[k]
            )
            == 0
        )
    assert run.outcome().metrics["personal"] == other.outcome().metrics["personal"]


@pytest.mark.parametrize("engine", ENGINES)
def test_features_are_drawn_from_the_second_round_on(engine: str) -> None:
    runs = [start(engine=engine, align=align, combine=False) for align in (0.0, 1.0)]
    for run in runs:
        run.step()
    assert tree.largest_difference(runs[0].progress.server, runs[1].progress.server) == 0
    for run in runs:
        run.step()
    assert tree.largest_difference(runs[0].progress.server, runs[1].progress.server) > 1e-4


def test_features_come_closer_to_the_prototypes_the_stronger_they_are_drawn() -> None:
    def gap(align: float) -> float:
        run = start(align=align)
        run.step()
        upload, _ = toy.upload_once(run, 0, run.task_at(1))
        z, y = features(run, 0, upload["body"])
        return float(((z - run.progress.server["prototypes"].numpy()[y]) ** 2).mean())

    gaps = [gap(align) for align in (0.0, 1.0, 10.0)]
    assert gaps == sorted(gaps, reverse=True) and gaps[2] < 0.7 * gaps[0]


def test_a_step_is_the_gradient_of_its_loss() -> None:
    """One step of the body on all examples: cross-entropy under the trained head, and the mean squared difference."""
    setting = replace(toy.SETTING, momentum=0.0, epochs=1, batch_size=1000)
    run = start(setting, align=3.0)
    run.step()
    task, server = run.task_at(1), run.progress.server
    upload, _ = toy.upload_once(run, 0, task)
    rows = run.population.index[0]
    x, y = run.population.images.plain(rows), run.population.images.y[rows]
    body = tree.map(lambda leaf: leaf.clone().requires_grad_(), server["body"])
    head = tree.map(lambda leaf: leaf.clone().requires_grad_(), run.algorithm.send(task, server, 0)["head"])
    z = task.model.features(body, x)
    first = torch.nn.functional.cross_entropy(task.model.logits(head, z.detach()), y)
    step = torch.autograd.grad(first, list(tree.flatten(head).values()))
    expected = dict(zip(tree.flatten(head), step, strict=True))
    head = tree.unflatten({path: leaf.detach() - 0.1 * expected[path] for path, leaf in tree.flatten(head).items()})
    assert tree.largest_difference(upload["head"], head) < 1e-6
    loss = torch.nn.functional.cross_entropy(task.model.logits(head, z), y)
    loss = loss + 3.0 * torch.nn.functional.mse_loss(z, server["prototypes"][y])
    step = torch.autograd.grad(loss, list(tree.flatten(body).values()))
    expected = dict(zip(tree.flatten(body), step, strict=True))
    body = tree.unflatten({path: leaf.detach() - task.lr * expected[path] for path, leaf in tree.flatten(body).items()})
    assert tree.largest_difference(upload["body"], body) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_class_without_prototype_is_drawn_to_the_clients_own_centre(engine: str) -> None:
    """To send it that centre changes nothing; to send another one does."""
    run = start(engine=engine)
    run.step()
    task, prototypes = run.task_at(1), run.progress.server["prototypes"].clone()
    z, y = features(run, 0, run.progress.server["body"])
    held = int(y[0])

    def body(row: Tensor) -> Tree:
        changed = prototypes.clone()
        changed[held] = row
        run.progress.server = {**run.progress.server, "prototypes": changed}
        upload: Tree = toy.upload_once(run, 0, task)[0]["body"]
        return upload

    without = body(torch.zeros(64))
    assert tree.largest_difference(without, body(torch.from_numpy(z[y == held].mean(0)).float())) < 1e-6
    assert tree.largest_difference(without, body(prototypes[held])) > 1e-5


# The server -----------------------------------------------------------------------------------------------------------


def test_prototypes_are_means_over_examples_and_stay_where_nobody_has_the_class() -> None:
    run = start()
    run.step()
    task, before = run.task_at(1), run.progress.server
    sent = {k: toy.upload_once(run, k, task)[0] for k in (0, 3, 4)}
    sizes = torch.tensor([toy.SIZES[k] for k in sent], dtype=torch.float64)
    after = run.algorithm.aggregate(task, before, Uploads(list(sent.values()), sizes, torch.tensor(list(sent))))
    found = {k: features(run, k, upload["body"]) for k, upload in sent.items()}
    held = np.concatenate([y for _, y in found.values()])
    assert 0 < len(set(held)) < 6
    for c in range(6):
        mine = [z[y == c] for z, y in found.values()]
        expected = np.concatenate(mine).mean(0) if (held == c).any() else before["prototypes"][c].numpy()
        assert after["prototypes"][c].numpy() == pytest.approx(expected, abs=1e-5)


def test_heads_are_mixtures_of_those_that_arrived_and_stand_under_their_clients() -> None:
    run = start(replace(SETTING, participation=0.5))
    run.step()
    task, before, ids = run.task_at(1), run.progress.server, (1, 4, 6, 7)
    sent = [toy.upload_once(run, k, task)[0] for k in ids]
    uploads = Uploads(sent, torch.tensor([float(toy.SIZES[k]) for k in ids]), torch.tensor(ids))
    after = run.algorithm.aggregate(task, before, uploads)
    full = [0, 1, 3]  # client 6 has no examples
    weights = combination(
        torch.stack([sent[k]["average"] for k in full]), torch.stack([sent[k]["variance"] for k in full])
    )
    assert (weights > 0).sum() > 3  # some do share
    heads = np.stack([sent[k]["head"]["weight"].numpy() for k in full])
    for row, k in enumerate(full):
        expected = np.tensordot(weights[row], heads, 1)
        assert after["heads"]["weight"][ids[k]].numpy() == pytest.approx(expected, abs=1e-6)
    others = [0, 2, 3, 5, 6]
    assert torch.equal(after["heads"]["weight"][others], before["heads"]["weight"][others])


def test_clients_of_equal_data_share_their_heads() -> None:
    """Clients k and k + 5 of 24 examples hold the same classes: nobody listens more to a third."""
    setting = replace(toy.SETTING, participation=1.0, rounds=3)
    run = toy.finish(start(setting, sizes=(24,) * 8))
    sent = [toy.upload_once(run, k, run.task_at(2))[0] for k in range(8)]
    weights = combination(
        torch.stack([upload["average"] for upload in sent]), torch.stack([upload["variance"] for upload in sent])
    )
    for k, like in ((0, 5), (1, 6), (2, 7), (5, 0), (6, 1), (7, 2)):
        assert max((j for j in range(8) if j != k), key=lambda j: weights[k, j]) == like
        assert weights[k, like] > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_combining_matters(engine: str) -> None:
    one, other = (toy.finish(start(engine=engine, combine=combine)).progress.server for combine in (True, False))
    assert tree.largest_difference(one["heads"], other["heads"]) > 1e-3


def test_a_client_held_out_of_training_gets_the_mean_of_all_heads() -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=6, unseen=1)))
    head = run.algorithm.send(run.task, run.progress.server, None)["head"]
    mean = tree.map(lambda leaf: torch.from_numpy(leaf.numpy().mean(0)), run.progress.server["heads"])
    assert len(run.progress.server["heads"]["bias"]) == 7
    assert tree.largest_difference(head, mean) < 1e-6
    unseen = run.outcome().metrics["unseen"]
    assert unseen is not None and unseen > 0.5  # of six classes


# Batch norm -----------------------------------------------------------------------------------------------------------

NORMED = replace(toy.SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, lr=0.01, participation=1.0)
NORMED = replace(NORMED, eval_every=2, eval_clients=1)


@pytest.mark.parametrize("statistics", ["shared", "personal", "frozen"])
def test_batch_norm(statistics: str) -> None:
    setting = replace(NORMED, statistics=statistics)
    one, other = (toy.finish(start(setting, engine, sizes=(20, 9, 0), head_lr=0.01)) for engine in ENGINES)
    assert tree.largest_difference(toy.states(one), toy.states(other)) < 5e-4
    kept = tree.split(one.progress.server["body"], tree.is_statistic)[0]
    first = tree.split(one.task.init()["body"], tree.is_statistic)[0]
    assert (tree.largest_difference(kept, first) > 1e-3) == (statistics == "shared")


def test_the_head_is_trained_on_the_features_that_are_tested() -> None:
    """While the body stands still it is in evaluation mode: a step of the head by hand."""
    run = start(replace(NORMED, momentum=0.0, batch_size=1000), sizes=(20, 9, 0))
    upload, _ = toy.upload_once(run)
    task, head = run.task_at(0), tree.map(lambda leaf: leaf.clone().requires_grad_(), run.task.init()["head"])
    z, y = features(run, 0, run.progress.server["body"])
    logits = task.model.logits(head, torch.from_numpy(z).float())
    step = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)), list(head.values()))
    for name, gradient in zip(head, step, strict=True):
        assert torch.allclose(upload["head"][name], head[name] - 0.1 * gradient, atol=1e-5)
