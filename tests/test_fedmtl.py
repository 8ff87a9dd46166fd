"""FedMTL: its penalty and relations by hand, local training where nothing pulls, who is drawn to whom."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
PLAIN = replace(toy.SETTING, momentum=0.9, weight_decay=1e-2)


def start(setting: Any = SETTING, engine: str = "serial", sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedmtl"](**fields), engine, setting=setting, sizes=sizes)


def private(run: Run) -> Tree:
    return {str(k): run.store[k] for k in run.store.clients()}


def related(models: Any) -> Tensor:
    """Omega of models that are rows of numbers, in two leaves."""
    rows = torch.as_tensor(models, dtype=torch.float32)
    found: Tensor = importlib.import_module("bench.algorithms.fedmtl").related({"a": rows[:, :1], "b": rows[:, 1:]})
    return found


# Relations ------------------------------------------------------------------------------------------------------------


def test_models_that_are_equal_or_equally_far_apart_are_unrelated() -> None:
    for models in (np.ones((4, 3)), np.eye(4) * 2, np.eye(5) * 1e-5, np.zeros((3, 2))):
        n = len(models)
        assert torch.allclose(related(models), torch.eye(n) - 1 / n, atol=1e-4)
    assert related([[1.0, 2.0]]).tolist() == [[0.0]]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_relations_are_the_inverse_root_of_how_models_differ(scale: float) -> None:
    """By numpy: the pseudo-inverse of the root of W^T W, whose trace is made N - 1."""
    models = np.random.default_rng(1).normal(size=(5, 8)).astype("f")
    apart = (models - models.mean(0)).astype(float)
    squares, directions = np.linalg.eigh(apart @ apart.T)
    assert squares[1] ** 0.5 > 0.1 * np.sqrt(squares[1:]).mean()  # nothing is at the floor
    omega = (directions[:, 1:] / np.sqrt(squares[1:])) @ directions[:, 1:].T
    expected = omega / np.trace(omega) * 4
    found = related(scale * models).numpy()
    assert found == pytest.approx(expected, abs=1e-4)
    assert found.sum(1) == pytest.approx(np.zeros(5), abs=1e-5)


def test_whoever_differs_little_is_drawn_together_most_and_not_without_end() -> None:
    """Two groups of three, far from each other; two of a group are equal."""
    draw = np.random.default_rng(2).normal(size=(6, 10)) * 0.3
    draw[:3] += 5.0
    draw[1] = draw[0]
    omega = related(draw)
    within = [float(omega[i, j]) for g in (range(3), range(3, 6)) for i in g for j in g if i < j]
    between = [float(omega[i, j]) for i in range(3) for j in range(3, 6)]
    assert max(within) < min(between) < 0.05 and min(within) == float(omega[0, 1])
    assert float(torch.linalg.eigvalsh(omega).max()) < 4.0
    assert float(omega.trace()) == pytest.approx(5.0, abs=1e-4)


# What is sent, and the step that is taken ----------------------------------------------------------------------------


def test_the_penalty_is_that_of_the_paper() -> None:
    """own w + pull is the gradient of tr(W Omega W^T) / 2; with I - 1 1^T / N it is w less the mean of all."""
    run = start()
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3)).astype("f"))
    for omega in (torch.eye(8) - 1 / 8, related(w)):
        run.progress.server = {"models": {"body": {"w": w}}, "relations": omega}
        parameters = w.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((parameters.T @ omega @ parameters).trace() / 2, parameters)
        for k in range(8):
            sent = run.algorithm.send(run.task, run.progress.server, k)
            assert torch.allclose(sent["own"] * w[k] + sent["pull"]["body"]["w"], gradient[k], atol=1e-5)
            if float(omega[0, 1]) == -0.125:
                assert torch.allclose(gradient[k], w[k] - w.mean(0), atol=1e-6)


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_steps_are_those_of_the_objective(pull: float) -> None:
    run = start(PLAIN, pull=pull)
    run.step()
    task, server, begin = run.task_at(1), run.progress.server, run.store[0]
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(begin).values()]
    tables, row = list(tree.flatten(server["models"]).values()), server["relations"][0]
    optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
    for batch in data_of(run, 0, 1).batches(2):
        optimiser.zero_grad()
        scores = F.linear(torch.relu(F.linear(batch.x.flatten(1), w[0], w[1])), w[2], w[3])
        loss = F.cross_entropy(scores, batch.y)
        for p, table in zip(w, tables, strict=True):
            loss = loss + pull / 2 * row[0] * p.square().sum()
            loss = loss + pull * sum(row[j] * (p * table[j]).sum() for j in range(1, 8))
        loss.backward()
        optimiser.step()
    expected = tree.unflatten(dict(zip(tree.flatten(begin), (p.detach() for p in w), strict=True)))
    upload, kept = toy.upload_once(run, 0, task)
    assert largest_difference(upload, expected) < 1e-5
    assert largest_difference(kept, upload) == 0.0
    if pull:
        without, _ = toy.upload_once(replaced(run, 0.0), 0, task)
        assert largest_difference(upload, without) > 1e-3


def replaced(run: Run, pull: float) -> Run:
    """The same states under another pull."""
    other = start(run.setting, pull=pull)
    other.progress.server = run.progress.server
    other.store[0] = run.store[0]
    return other


# Rounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("relations", ["learned", "mean"])
def test_without_a_pull_it_is_local_training(engine: str, relations: str) -> None:
    run = toy.finish(start(engine=engine, pull=0.0, relations=relations))
    local = toy.finish(toy.run(ALGORITHMS["local"](), engine, setting=SETTING))
    assert largest_difference(private(run), private(local)) == 0.0
    pulled = toy.finish(start(engine=engine, relations=relations))
    assert largest_difference(private(pulled), private(local)) > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_relations_that_are_learnt_matter_from_the_second_round_on(engine: str) -> None:
    runs = [start(engine=engine, relations=relations) for relations in ("learned", "mean")]
    for run in runs:
        run.step()
    assert largest_difference(private(runs[0]), private(runs[1])) < 1e-6
    for run in runs:
        toy.finish(run)
    assert largest_difference(private(runs[0]), private(runs[1])) > 1e-4
    assert torch.equal(runs[1].progress.server["relations"], torch.eye(8) - 1 / 8)


def test_those_that_are_not_drawn_keep_their_places() -> None:
    run = start(replace(toy.SETTING, participation=0.5, lost=0.4))
    first = tree.clone(run.progress.server["models"])
    run.step()
    arrived = [k for k in run.population.cohort(0) if run.population.arrives(k, 0)]
    assert 0 < len(arrived) < 4
    for k in range(8):
        expected = run.store[k] if k in arrived else tree.pick(first, k)
        assert largest_difference(tree.pick(run.progress.server["models"], k), expected) == 0.0


def test_clients_of_the_same_classes_are_drawn_together_most() -> None:
    """Dealt by label, clients k and k + 5 of 24 examples hold the same classes."""
    setting = replace(toy.SETTING, participation=1.0, rounds=6)
    run = toy.finish(start(setting, sizes=(24,) * 8, pull=0.1))
    for k, like in ((0, 5), (1, 6), (2, 7), (5, 0), (6, 1), (7, 2)):
        row = run.progress.server["relations"][k].tolist()
        assert min(range(8), key=lambda j: row[j]) == like


def test_a_pull_and_a_number_go_down_and_a_model_comes_up() -> None:
    run = start(replace(toy.SETTING, participation=1.0))
    run.step()
    parameters = sum(leaf.numel() for leaf in tree.flatten(run.task.init()).values())
    assert run.progress.cost["bytes_down"] == 8 * (4 * parameters + 4)
    assert run.progress.cost["bytes_up"] == 8 * 4 * parameters


# Newcomers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_newcomers_use_the_model_to_which_they_would_be_drawn(engine: str) -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=4, participation=0.3, unseen=1), engine))
    task, server = run.task_at(3), run.progress.server
    idle = next(k for k in range(7) if k not in run.store.clients())
    row, own = server["relations"][idle], server["relations"][idle, idle]
    weights = torch.where(torch.arange(7) == idle, torch.zeros(7), -row / own)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-4)
    (model,) = run.evaluator.models(task, server, {}, run.store, [idle], True)["personal"]
    expected = tree.map(lambda leaf: torch.tensordot(weights, leaf, 1), server["models"])
    assert largest_difference(model, expected) < 1e-5
    (model,) = run.evaluator.models(task, server, {}, run.store, [7], True)["unseen"]
    mean = tree.map(lambda leaf: leaf.mean(0), server["models"])
    assert largest_difference(model["body"], mean["body"]) < 1e-6
    assert largest_difference(model["head"], mean["head"]) > 1e-3
    assert measured(run, "unseen") > 0.5


def test_running_statistics_stay_at_the_client() -> None:
    setting = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, clients=2, participation=1.0)
    run = start(setting, sizes=(9, 0))
    upload, kept = toy.upload_once(run)
    uploads = Uploads([upload, upload], torch.ones(2, dtype=torch.float64))
    after = run.algorithm.aggregate(run.task_at(0), run.progress.server, uploads)
    assert not any(tree.is_statistic(path) for path in tree.flatten(after))
    mine, first = (tree.split(each, tree.is_statistic)[0] for each in (kept, run.task.init()))
    assert largest_difference(mine, first) > 1e-3
