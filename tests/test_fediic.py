"""FedIIC: a round by automatic differentiation, pair by pair; balanced softmax without its ideas; anchors; bytes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, measured

fediic = importlib.import_module("bench.algorithms.fediic")

SETTING = replace(toy.SETTING, participation=0.5, rounds=2, momentum=0.9, weight_decay=1e-2)
CHEAP = "projection=16, spread_steps=20"
OFF = f"within=0, between=0, difficult=0, {CHEAP}"
PARTS = ("body", "head", "projector")


def run_of(spelt: str, engine: str = "serial", setting: Any = SETTING, **more: Any) -> Run:
    (algorithm,) = parse_algorithms(spelt)
    return toy.run(algorithm, engine, setting=setting, **more)


def part_of(run: Run, *parts: str) -> Tree:
    return {key: run.progress.server[key] for key in parts}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_without_contrasts_and_difficulty_it_is_fedavg_with_balanced_softmax(engine: str) -> None:
    """Up to rounding: products of two views at once have other bits."""
    off, other, plain = (
        toy.finish(run_of(spelt, engine)) for spelt in (f"fediic({OFF})", "fedavg+balanced_softmax", "fedavg")
    )
    assert largest_difference(part_of(off, "body", "head"), part_of(other, "body", "head")) < 1e-5
    assert largest_difference(part_of(off, "body", "head"), part_of(plain, "body", "head")) > 1e-3
    crossed = toy.finish(run_of(f"fediic({OFF})+cross_entropy", engine))
    assert largest_difference(part_of(crossed, "body", "head"), part_of(plain, "body", "head")) < 1e-6


@pytest.mark.parametrize("on", ["within=2", "between=2", "difficult=0.25"])
def test_each_idea_changes_something(on: str) -> None:
    name = on.partition("=")[0]
    rest = ", ".join(f"{each}=0" for each in ("within", "between", "difficult") if each != name)
    runs = [toy.finish(run_of(f"fediic({spelt}, {CHEAP})")) for spelt in (f"{rest}, {on}", f"{rest}, {name}=0")]
    assert largest_difference(*(part_of(run, "body", "head") for run in runs)) > 1e-4


def losses_of(run: Run, server: Tree, client: int, round: int) -> tuple[Any, Any]:
    """By class: the sum of cross-entropies of the received model, and how many there are."""
    data = data_of(run, client, round)
    x, y = run.population.images.plain(data.index), data.y
    z = torch.relu(F.linear(x.flatten(1), *tree.flatten(server["body"]).values()))
    entropy = F.cross_entropy(F.linear(z, *server["head"].values()), y, reduction="none").double().numpy()
    return np.bincount(y, entropy, minlength=6), np.bincount(y, minlength=6)


def pair_by_pair(v: Tensor, y: list[int], share: Any) -> Tensor:
    """Each example against all others, at temperatures of pairs."""
    total = torch.zeros(())
    for i in range(len(y)):
        scores = {j: v[i] @ v[j] / max((share[y[i]] * share[y[j]]) ** 0.5, 0.07) for j in range(len(y)) if j != i}
        everyone = torch.stack(list(scores.values())).logsumexp(0)
        same = [everyone - s for j, s in scores.items() if y[j] == y[i]]
        total = total + torch.stack(same).mean()
    return total / len(y)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_round_is_the_papers(engine: str) -> None:
    run = run_of(f"fediic(within=0.7, between=0.4, difficult=0.5, {CHEAP})", engine, replace(SETTING, augment="crop"))
    run.step()
    before, cohort = run.progress.server, run.population.cohort(1)
    found = [losses_of(run, before, k, 1) for k in cohort]
    lost, counts = (sum(each[place] for each in found) for place in (0, 1))
    there = counts > 0
    assert not there.all()
    difficulty = np.where(there, lost / (counts + 1e-5), before["difficulty"].numpy())
    first, second = before["projector"]["first"], before["projector"]["second"]
    anchors = F.linear(F.linear(before["head"]["weight"], *first.values()), *second.values()).requires_grad_()
    for _ in range(20):
        length = anchors / anchors.norm(dim=1, keepdim=True)
        rows = [torch.stack([length[i] @ length[j] for j in range(6) if j != i]).max() for i in range(6)]
        (slope,) = torch.autograd.grad(torch.stack(rows).sum(), anchors)
        anchors = (anchors - 0.1 * slope).detach().requires_grad_()
    anchors = anchors.detach()
    models = []
    for k in cohort:
        data = data_of(run, k, 1)
        mine = np.bincount(data.y, minlength=6)
        share = mine / max(mine.sum(), 1)
        with np.errstate(divide="ignore"):
            shift = torch.from_numpy(np.log(share / (difficulty**0.5 + 1e-5))).float()
        w = [torch.nn.Parameter(leaf.clone()) for part in PARTS for leaf in tree.flatten(before[part]).values()]
        optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
        for batch in data.batches(2, views=2):
            z, n = torch.relu(F.linear(batch.x.flatten(1), *w[:2])), len(batch.y) // 2
            v = F.normalize(F.linear(F.linear(z, *w[4:6]), *w[6:8]), dim=1)
            loss = F.cross_entropy(F.linear(z[:n], *w[2:4]) + shift, batch.y[:n])
            loss = loss + 0.7 * pair_by_pair(v, batch.y.tolist(), share)
            loss = loss + 0.4 * F.cross_entropy(v @ F.normalize(anchors, dim=1).T / 0.1, batch.y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        paths = [path for part in PARTS for path in tree.flatten({part: before[part]})]
        models.append(tree.unflatten(dict(zip(paths, (p.detach() for p in w), strict=True))))
    run.step()
    after = run.progress.server
    assert np.abs(after["difficulty"].numpy() - difficulty).max() < 1e-4
    assert float((after["anchors"] - anchors).abs().max()) < 1e-3
    assert largest_difference(part_of(run, *PARTS), mean_by_size(run, cohort, models)) < 2e-4


def test_anchors_are_driven_apart() -> None:
    run = run_of("fediic")
    run.step()
    angles = []
    for anchors in (run_of("fediic").progress.server["anchors"], run.progress.server["anchors"]):
        length = F.normalize(anchors, dim=1)
        angles.append(max(float(length[i] @ length[j]) for i, j in combinations(range(6), 2)))
    assert angles[1] < 0 < angles[0] or angles[1] < angles[0] - 0.05


def test_a_class_that_is_hard_is_expected_less_and_so_taught_more() -> None:
    """Its logit is lowered in training."""
    run = run_of(f"fediic(within=0, between=0, difficult=1, {CHEAP})")
    exchange = run.algorithm.exchanges(run.task)[1]
    data = data_of(run, 1)
    c = int(data.class_counts.argmax())
    start, biases = run.progress.server, []
    for hard in (1.0, 8.0):
        difficulty = torch.ones(6)
        difficulty[c] = hard
        run.progress.server = {**start, "difficulty": difficulty}
        biases.append(float(toy.upload_once(run, 1, exchange=exchange)[0]["head"]["bias"][c]))
    assert biases[1] > biases[0] + 0.01


def test_padding_contrasts_with_nothing() -> None:
    """And of a rare class the temperature is 0.07."""
    draw = torch.Generator().manual_seed(0)
    v, y = F.normalize(torch.randn(8, 5, generator=draw), dim=1), torch.tensor([0, 1, 1, 3, 0, 1, 1, 3])
    share = torch.tensor([0.2, 0.001, 0.0, 0.3, 0.0, 0.0])
    weight = torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 0])
    found = fediic.contrast(v, Batch(torch.zeros(8, 1), y, weight, views=2), share)
    real = weight > 0
    alone = pair_by_pair(v[real], y[real].tolist(), share.numpy())
    assert torch.allclose((found * weight).sum() / 6, alone.float(), atol=1e-5)
    assert bool(found.isfinite().all())


def test_a_class_without_examples_stays_as_difficult_as_it_was() -> None:
    run = run_of(f"fediic({CHEAP})")
    server = {**run.progress.server, "difficulty": torch.arange(6.0) + 3}
    sent = [{"losses": torch.tensor([2.0, 0, 0, 0, 0, 1]), "counts": torch.tensor([4.0, 0, 0, 0, 0, 1])}] * 2
    algorithm: Any = run.algorithm
    after = algorithm.prepare(run.task, server, Uploads(sent, torch.ones(2)))
    assert after["difficulty"].tolist() == pytest.approx([0.5, 4, 5, 6, 7, 1], abs=1e-4)


def test_bytes_are_two_trips_with_a_projector_anchors_and_losses() -> None:
    run = run_of(f"fediic({CHEAP})", setting=replace(SETTING, rounds=1))
    n, model = len(run.population.cohort(0)), tree.nbytes(part_of(run, *PARTS))
    assert tree.nbytes(part_of(run, "projector")) == 4 * (64 * 64 + 64 + 16 * 64 + 16)
    toy.finish(run)
    assert run.progress.cost["bytes_down"] == 2 * n * (model + 4 * (6 * 16 + 6))
    assert run.progress.cost["bytes_up"] == n * (4 * 2 * 6 + model)


def test_engines_agree_under_batch_norm() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, participation=1.0)
    sizes = (20, 9, 0, 0, 0, 0, 0, 0)
    runs = [toy.finish(run_of(f"fediic({CHEAP})", engine, setting, sizes=sizes)) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(run) for run in runs)) < 1e-3


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of(f"fediic({CHEAP})", engine, setting)), "unseen") > 0.8


def test_the_defaults_are_the_papers() -> None:
    method = ALGORITHMS["fediic"]()
    assert (method.within, method.between, method.difficult, method.spread_steps) == (2.0, 2.0, 0.25, 1000)
