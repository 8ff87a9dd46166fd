"""FedGELA: lengths by hand, its steps against a loop written out, two views of one body, and what travels once."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import LocalData, Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured, method

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=2, momentum=0.9, weight_decay=1e-2, clip=1.0)


def run_of(engine: str = "serial", setting: Any = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedgela"](**fields), engine, setting=setting, sizes=sizes)


def stretched(etf: Tensor, data: LocalData) -> Tensor:
    found: Tensor = importlib.import_module("bench.algorithms.fedgela").stretched(etf, data)
    return found


def counting(run: Run, *counts: int) -> LocalData:
    """Client 0's data, as if it had so many examples of each class."""
    return replace(data_of(run, 0), class_counts=torch.tensor(counts), n=torch.tensor(sum(counts)))


def directions(body: Tree, x: Tensor) -> Tensor:
    return F.normalize(torch.relu(F.linear(x.flatten(1), body["hidden"]["weight"], body["hidden"]["bias"])))


def test_a_direction_is_as_long_as_its_class_is_frequent() -> None:
    """Of eight examples three quarters are of class 0, and an even share were a sixth."""
    run = run_of()
    etf = run.progress.server["etf"]
    found = stretched(etf, counting(run, 6, 2, 0, 0, 0, 0))
    assert found.norm(dim=1).tolist() == pytest.approx([4.5, 1.5, 0, 0, 0, 0], abs=1e-5)
    assert torch.allclose(found[0] / 4.5, etf[0])


@pytest.mark.equivalence
def test_with_equally_many_of_each_class_the_frame_is_as_it_was() -> None:
    run = run_of()
    etf = run.progress.server["etf"]
    assert torch.equal(stretched(etf, counting(run, 5, 5, 5, 5, 5, 5)), etf)
    assert torch.allclose(etf @ etf.T, 1.2 * torch.eye(6) - 0.2, atol=1e-6)


def test_a_client_without_examples_has_a_frame_without_lengths() -> None:
    run = run_of()
    assert torch.equal(stretched(run.progress.server["etf"], counting(run, 0, 0, 0, 0, 0, 0)), torch.zeros(6, 64))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_steps_are_those_of_the_papers_loss(temperature: float) -> None:
    """A class that the client has not is no more likely than e^0."""
    run = run_of(setting=replace(SETTING, clip=None), temperature=temperature)
    data, etf = data_of(run, 1), run.progress.server["etf"].clone()
    share = torch.bincount(data.y, minlength=6) / len(data.y)
    held = torch.nonzero(share).flatten()
    assert 1 < len(held) < 6 and float(share.max()) > 1.2 / len(held)
    start = run.progress.server["body"]
    w = [leaf.clone().requires_grad_() for leaf in tree.flatten(start).values()]
    optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
    for batch in data.batches(2):
        z = torch.relu(F.linear(batch.x.flatten(1), *w))
        cosines = (z @ etf.T) / z.norm(dim=1, keepdim=True)
        logits = 6 * share * cosines / temperature
        entropy = (logits[:, held].exp().sum(1) + 6 - len(held)).log() - logits[torch.arange(len(z)), batch.y]
        optimiser.zero_grad()
        entropy.mean().backward()
        optimiser.step()
    upload, _ = toy.upload_once(run, 1)
    assert upload.keys() == {"body"}
    moved = tree.flatten(upload["body"]).values()
    assert all(torch.allclose(mine, theirs, atol=5e-6) for mine, theirs in zip(moved, w, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_lengths_matter(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = toy.finish(run_of(engine)).progress.server["body"]
    monkeypatch.setattr(importlib.import_module("bench.algorithms.fedgela"), "stretched", lambda etf, data: etf)
    assert largest_difference(mine, toy.finish(run_of(engine)).progress.server["body"]) > 1e-3


def test_the_generic_model_scores_by_the_frame_and_the_personal_one_by_its_lengths() -> None:
    run = toy.finish(run_of())
    task, server, data = run.task_at(1), run.progress.server, data_of(run, 0)
    x = run.population.images.plain(run.population.index[1])
    cosines = directions(server["body"], x) @ server["etf"].T
    generic, personal = method(run).global_model(task, server), method(run).personal_model(task, server, {}, data)
    assert torch.allclose(method(run).predict(task, generic, x), cosines / 0.2, atol=1e-5)
    share = 6 * torch.bincount(data.y, minlength=6) / len(data.y)
    scores = method(run).predict(task, personal, x)
    assert torch.allclose(scores, share * cosines / 0.2, atol=1e-4)
    assert bool((scores[:, share == 0] == 0).all())  # they may win, where others are below zero


@pytest.mark.parametrize("engine", ENGINES)
def test_the_frame_never_moves_and_travels_once(engine: str) -> None:
    setting = replace(SETTING, rounds=3, participation=0.5)
    run = run_of(engine, setting)
    frame = run.progress.server["etf"].clone()
    cost = toy.finish(run).progress.cost
    cohorts = [run.population.cohort(round) for round in range(3)]
    visits, clients, body = sum(map(len, cohorts)), len({k for cohort in cohorts for k in cohort}), 64 * 64 + 64
    assert visits > clients
    assert cost["bytes_down"] == 4 * (visits * body + clients * 6 * 64)
    assert cost["bytes_up"] == 4 * visits * body
    assert torch.equal(run.progress.server["etf"], frame)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_held_out_stretches_the_frame_by_its_own_classes_and_tunes_nothing(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)))
    task, server = run.task_at(7), run.progress.server
    (model,) = run.evaluator.models(task, server, server, run.store, [7], True)["unseen"]
    expected = {"body": server["body"], "etf": stretched(server["etf"], data_of(run, 7))}
    assert largest_difference(model, expected) < 1e-6
    assert measured(run, "unseen") > 0.8


def test_of_more_classes_than_features_directions_are_still_of_length_one() -> None:
    run = run_of()
    etf = method(run).init_server(replace(run.task, num_classes=100))["etf"]
    assert etf.shape == (100, 64) and torch.allclose(etf.norm(dim=1), torch.ones(100))
