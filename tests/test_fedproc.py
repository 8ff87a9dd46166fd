"""FedProc: the contrast by hand, a client's steps against a loop written out, FedAvg without contrast."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Exchange, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of, done

SETTING = replace(toy.SETTING, rounds=4, weight_decay=1e-2, clip=1.0)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, participation=1.0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
C, D = 6, 64


def run_of(name: str = "fedproc", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def contrast(z: Tensor, prototypes: Tensor, y: Tensor) -> Tensor:
    ALGORITHMS["fedproc"]()
    found: Tensor = import_module("bench.algorithms.fedproc").contrast(z, prototypes, y)
    return found


def model_of(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


def told(run: Run, classes: tuple[int, ...]) -> Tensor:
    """Give the server prototypes of some classes: (6, 64), rows of zeros for the others."""
    known = torch.zeros(C, 1)
    known[list(classes)] = 1.0
    prototypes = torch.linspace(0, 40, C * D).reshape(C, D).sin().abs() * known
    run.progress.server = {**run.progress.server, "prototypes": prototypes}
    return prototypes


def test_the_contrast_is_that_of_inner_products_with_directions() -> None:
    """-log(e / (e + e + 1)), whatever the prototypes' length; a class without one has no part in it, and none of it."""
    z, y = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])
    assert float(contrast(z, torch.eye(3), y)) == pytest.approx(math.log(2 + math.exp(-1)), abs=1e-6)
    assert float(contrast(z, torch.eye(3) * 7, y)) == pytest.approx(math.log(2 + math.exp(-1)), abs=1e-6)
    assert float(contrast(2 * z, torch.eye(3), y)) == pytest.approx(math.log(2 + math.exp(-2)), abs=1e-6)
    two = torch.diag(torch.tensor([1.0, 0.0, 1.0]))
    assert float(contrast(z, two, y)) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    assert float(contrast(z, two, torch.tensor([1]))) == 0.0
    w = z.clone().requires_grad_()
    (slope,) = torch.autograd.grad(contrast(w, two, y).sum() + contrast(w, two, torch.tensor([1])).sum(), w)
    assert slope[0, 1] == 0 and slope[0, 0] < 0 < slope[0, 2]
    assert contrast(z, torch.zeros(3, 3), y).eq(0).all()


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [SETTING, BATCH_NORM], ids=["mlp", "batch norm"])
@ENGINES
def test_without_contrast_it_is_fedavg(engine: str, setting: Any) -> None:
    off, fedavg, on = (model_of(done(run_of(name, engine, setting, **fields))) for name, fields in
                       (("fedproc", {"contrast": 0.0}), ("fedavg", {}), ("fedproc", {})))  # fmt: skip
    assert largest_difference(off, fedavg) == 0.0
    assert setting is BATCH_NORM or largest_difference(on, fedavg) > 1e-4  # there all clients hold one class


@pytest.mark.equivalence
@ENGINES
def test_the_first_round_has_no_prototypes_and_is_fedavgs(engine: str) -> None:
    runs = [run_of(name, engine) for name in ("fedproc", "fedavg")]
    for run in runs:
        run.exchange(run.task_at(0), Exchange())
    assert largest_difference(*map(model_of, runs)) == 0.0


@pytest.mark.parametrize(("round", "share"), [(0, 1.0), (1, 0.75), (3, 0.25)])
@pytest.mark.parametrize("whole", [True, False])
def test_steps_are_those_of_the_papers_loss(round: int, share: float, whole: bool) -> None:
    """(1 - t / T) contrast + t / T cross-entropy; where a class lacks a prototype cross-entropy has its examples'
    share of the contrast's."""
    run = run_of(setting=replace(SETTING, clip=None, momentum=0.5))
    data = data_of(run, 0, round)
    held = torch.nonzero(data.class_counts).flatten().tolist()
    prototypes = told(run, tuple(range(C)) if whole else tuple(held[1:]))
    met = 1.0 if whole else float((data.y != held[0]).float().mean())
    assert whole or 0 < met < 1
    known = torch.nonzero(prototypes.any(1)).flatten().tolist()
    unit = F.normalize(prototypes[known], dim=1)
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(model_of(run)).values()]
    optimiser = torch.optim.SGD(w, run.setting.lr, 0.5, weight_decay=1e-2)
    for batch in data.batches(run.setting.epochs):
        z = torch.relu(F.linear(batch.x.flatten(1), *w[:2]))
        e = (z @ unit.T).exp()
        losses = [-(row[known.index(c)] / row.sum()).log() if c in known else 0 * row.sum()
                  for row, c in zip(e, batch.y.tolist(), strict=True)]  # fmt: skip
        entropy = F.cross_entropy(F.linear(z, *w[2:]), batch.y)
        optimiser.zero_grad()
        (share * torch.stack(losses).mean() + (1 - share * met) * entropy).backward()
        optimiser.step()
    expected = tree.unflatten(dict(zip(tree.flatten(model_of(run)), (p.detach() for p in w), strict=True)))
    upload, _ = toy.upload_once(run, 0, run.task_at(round))
    assert largest_difference({key: upload[key] for key in expected}, expected) < 1e-5


def test_features_come_closer_to_the_prototype_of_their_class_than_to_others() -> None:
    run = done(run_of("fedproc", setting=replace(toy.SETTING, rounds=2)))
    server, margins = run.progress.server, []
    for share in (0.0, 0.5, 1.0):
        run = run_of(setting=replace(toy.SETTING, rounds=100, epochs=10), contrast=share)
        run.progress.server = server
        data, body = data_of(run, 0, 1), toy.upload_once(run, 0, run.task_at(1))[0]["body"]
        z = run.task.model.features(body, run.population.images.plain(data.index))
        cosines = F.normalize(z, dim=1) @ F.normalize(server["prototypes"], dim=1).T
        own = F.one_hot(data.y, C).bool()
        margins.append(float(cosines[own].mean() - cosines[~own].mean()))
    assert margins[0] < margins[1] < margins[2]


def test_prototypes_are_means_over_examples_and_stay_where_nobody_holds_the_class() -> None:
    run = run_of()
    before = told(run, tuple(range(C)))
    sent = {k: toy.upload_once(run, k)[0] for k in (0, 3, 4)}
    sizes = torch.tensor([toy.SIZES[k] for k in sent], dtype=torch.float64)
    after = run.algorithm.aggregate(run.task, run.progress.server, Uploads(list(sent.values()), sizes))
    data = {k: data_of(run, k) for k in sent}
    x = {k: run.population.images.plain(each.index) for k, each in data.items()}
    z = torch.cat([run.task.model.features(sent[k]["body"], x[k]) for k in sent])
    y = torch.cat([each.y for each in data.values()])
    absent = [c for c in range(C) if not (y == c).any()]
    assert 0 < len(absent) < C
    for c in range(C):
        expected = before[c] if c in absent else z[y == c].mean(0)
        assert torch.allclose(after["prototypes"][c], expected, atol=1e-5)
    assert torch.equal(after["prototypes"][absent], before[absent])
    mean = tree.map(lambda *w: sum(float(n) * leaf for n, leaf in zip(sizes, w, strict=True)) / float(sizes.sum()),
                    *({key: upload[key] for key in ("body", "head")} for upload in sent.values()))  # fmt: skip
    assert largest_difference({key: after[key] for key in ("body", "head")}, mean) < 1e-6


def test_a_model_and_prototypes_travel() -> None:
    run = run_of()
    run.step()
    model, cohort = tree.nbytes(model_of(run)), len(run.population.cohort(0))
    assert run.progress.cost["bytes_down"] == cohort * (model + 4 * C * D)
    assert run.progress.cost["bytes_up"] == cohort * (model + 4 * (C * D + C))


@ENGINES
def test_images_without_features_leave_everything_finite(engine: str) -> None:
    run = run_of("fedproc", engine, replace(SETTING, clip=None))
    told(run, (0, 1))
    dead = tree.map(lambda leaf: leaf - 100.0, run.task.init()["body"])
    run.progress.server = {**run.progress.server, "body": dead}
    run.step()
    assert tree.is_finite(toy.states(run))
