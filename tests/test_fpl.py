"""FPL: contrast and clusters by hand, a client's steps against a loop written out, FedAvg without both terms."""

from __future__ import annotations

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

SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, participation=1.0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
C, D = 6, 64


def run_of(name: str = "fpl", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def module() -> Any:
    ALGORITHMS["fpl"]()
    return import_module("bench.algorithms.fpl")


def model_of(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


def told(run: Run, classes: dict[int, int]) -> Tensor:
    """Give the server so many clusters of some classes: (6, most, 64)."""
    clusters = torch.linspace(0, 900, run.progress.server["clusters"].numel()).reshape(C, -1, D).sin().abs()
    for c in range(C):
        clusters[c, classes.get(c, 0) :] = 0.0
    run.progress.server = {**run.progress.server, "clusters": clusters}
    return clusters


@pytest.mark.parametrize(("temperature", "wanted"), [(1.0, 0.913514), (0.5, 0.807866), (0.02, 0.693147)])
def test_the_contrast_is_that_of_cosines(temperature: float, wanted: float) -> None:
    z, y = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0])
    for scale in (1.0, 5.0):
        clusters = scale * torch.eye(3)[:, None]
        assert float(module().contrast(z * scale, clusters, y, temperature)) == pytest.approx(wanted, abs=1e-5)
        padded = F.pad(clusters, (0, 0, 0, 4))
        assert float(module().contrast(z, padded, y, temperature)) == pytest.approx(wanted, abs=1e-5)


def test_all_clusters_of_the_own_class_are_wanted() -> None:
    """-log of (e^a + e^b) / (e^a + e^b + e^c)."""
    clusters = torch.tensor([[[1.0, 0, 0], [0.0, 1, 0]], [[0.0, 0, 1], [0.0, 0, 0]]])
    z = torch.tensor([[0.6, 0.0, 0.8]])
    e = torch.tensor([0.6, 0.0, 0.8]).exp()
    for y, own in ((0, e[0] + e[1]), (1, e[2])):
        found = module().contrast(z, clusters, torch.tensor([y]), 1.0)
        assert float(found) == pytest.approx(float(-(own / e.sum()).log()), abs=1e-6)


def at(*degrees: float) -> Tensor:
    """Points of length 2 in a plane, at angles."""
    angle = torch.tensor(degrees).deg2rad()
    return 2 * torch.stack([angle.cos(), angle.sin()], 1)


def test_clusters_are_those_of_first_neighbours() -> None:
    """Two groups stay two, though a next step would join them; of one, two or three points there is one; a chain of
    nearest neighbours is a cluster."""
    clustered = module().clustered
    two = at(0, 3, 5, 80, 84)
    wanted = torch.stack([two[:3].mean(0), two[3:].mean(0)])
    assert torch.allclose(clustered(two, 10), wanted, atol=1e-6)
    assert torch.allclose(clustered(two, 1), two.mean(0, keepdim=True), atol=1e-6)
    for n in (1, 2, 3):
        assert torch.allclose(clustered(two[:n], 10), two[:n].mean(0, keepdim=True), atol=1e-6)
    chain = at(0, 10, 19, 27, 34, 40)
    assert torch.allclose(clustered(chain, 10), chain.mean(0, keepdim=True), atol=1e-6)


def test_clusters_of_clusters_are_means_of_all_their_points() -> None:
    """Eight points are four pairs, of which the nearer ones are joined: by 3 and 1 into a pair of unequal size."""
    points = at(0, 2, 4, 12, 14, 80, 82, 90, 92)
    four = [points[:3], points[3:5], points[5:7], points[7:]]
    halves = torch.stack([points[:5].mean(0), points[5:].mean(0)])
    assert torch.allclose(module().clustered(points, 10), halves, atol=1e-6)
    assert len(four) == 4 and torch.allclose(module().clustered(points, 2), halves, atol=1e-6)
    longer = torch.cat([points[:5], 10 * points[5:]])
    found = module().clustered(longer, 10)
    assert torch.allclose(found, torch.stack([longer[:5].mean(0), longer[5:].mean(0)]), atol=1e-5)


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [SETTING, BATCH_NORM], ids=["mlp", "batch norm"])
@ENGINES
def test_without_both_terms_it_is_fedavg(engine: str, setting: Any) -> None:
    off, fedavg = (model_of(done(run_of(name, engine, setting, **fields))) for name, fields in
                   (("fpl", {"contrast": 0.0, "pull": 0.0}), ("fedavg", {})))  # fmt: skip
    assert largest_difference(off, fedavg) == 0.0


@pytest.mark.parametrize("fields", [{}, {"contrast": 0.0}, {"pull": 0.0}])
@ENGINES
def test_each_of_them_matters(engine: str, fields: Any) -> None:
    one, other = (model_of(done(run_of(name, engine, **more))) for name, more in (("fpl", fields), ("fedavg", {})))
    assert largest_difference(one, other) > 1e-4


@pytest.mark.equivalence
@ENGINES
def test_the_first_round_knows_no_clusters_and_is_fedavgs(engine: str) -> None:
    runs = [run_of(name, engine) for name in ("fpl", "fedavg")]
    for run in runs:
        run.exchange(run.task_at(0), Exchange())
    assert largest_difference(*map(model_of, runs)) == 0.0


@pytest.mark.parametrize(("contrast", "pull", "temperature"), [(1.0, 1.0, 0.1), (0.5, 3.0, 0.5)])
def test_steps_are_those_of_the_papers_loss(contrast: float, pull: float, temperature: float) -> None:
    """Cross-entropy + contrast + mean squared difference to the mean of the clusters; an example of a class without
    any has neither, and counts in the mean."""
    setting = replace(SETTING, clip=None, momentum=0.5)
    run = run_of(setting=setting, contrast=contrast, pull=pull, temperature=temperature)
    data = data_of(run, 0)
    held = torch.nonzero(data.class_counts).flatten().tolist()
    assert len(held) > 1
    there = {c: 1 + c % 3 for c in range(C) if c != held[0]}
    clusters = told(run, there)
    rows = [(c, clusters[c, q]) for c, n in there.items() for q in range(n)]
    directions = torch.stack([F.normalize(row, dim=0) for _, row in rows])
    classes = torch.tensor([c for c, _ in rows])
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(model_of(run)).values()]
    optimiser = torch.optim.SGD(w, run.setting.lr, 0.5, weight_decay=1e-2)
    for batch in data.batches(run.setting.epochs):
        z = torch.relu(F.linear(batch.x.flatten(1), *w[:2]))
        total = F.cross_entropy(F.linear(z, *w[2:]), batch.y)
        for row, c in zip(z, batch.y.tolist(), strict=True):
            if c in there:
                e = (directions @ row / row.norm() / temperature).exp()
                centre = clusters[c, : there[c]].mean(0)
                apart = -(e[classes == c].sum() / e.sum()).log()
                total = total + (contrast * apart + pull * F.mse_loss(row, centre)) / len(z)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    expected = tree.unflatten(dict(zip(tree.flatten(model_of(run)), (p.detach() for p in w), strict=True)))
    upload, _ = toy.upload_once(run)
    assert largest_difference({key: upload[key] for key in expected}, expected) < 1e-5


def test_features_come_to_their_class_and_leave_others() -> None:
    run = done(run_of(setting=replace(toy.SETTING, rounds=2)))
    off: dict[str, Any] = {"contrast": 0.0, "pull": 0.0}
    server, found = run.progress.server, []
    for fields in (off, {"temperature": 0.2}):
        run = run_of(setting=replace(toy.SETTING, epochs=10), **fields)
        run.progress.server = server
        data, body = data_of(run, 0, 1), toy.upload_once(run, 0, run.task_at(1))[0]["body"]
        z = run.task.model.features(body, run.population.images.plain(data.index))
        centres = F.normalize(server["clusters"].sum(1), dim=1)
        cosines, own = F.normalize(z, dim=1) @ centres.T, F.one_hot(data.y, C).bool()
        found.append((float(cosines[own].mean()), float(cosines[~own].mean())))
    assert found[1][0] > found[0][0] and found[1][1] < found[0][1]


def test_the_server_clusters_each_class_over_its_holders_and_keeps_the_others() -> None:
    run = run_of(most=3)
    before = told(run, {c: 2 for c in range(C)})
    held = torch.ones(5, C)
    held[:, 4] = 0.0
    held[1:, 2] = 0.0
    prototypes = torch.stack([F.pad(at(0, 3, 5, 80, 84)[k], (0, D - 2)).expand(C, D) for k in range(5)])
    model = model_of(run)
    uploads = Uploads(
        [{**model, "prototypes": p * h[:, None], "held": h} for p, h in zip(prototypes, held, strict=True)],
        torch.arange(1.0, 6),
    )
    after = run.algorithm.aggregate(run.task, run.progress.server, uploads)["clusters"]
    two = torch.stack([prototypes[:3, 0].mean(0), prototypes[3:, 0].mean(0), torch.zeros(D)])
    for c in (0, 1, 3, 5):
        assert torch.allclose(after[c], two, atol=1e-6)
    assert torch.equal(after[2, 0], prototypes[0, 2]) and after[2, 1:].eq(0).all()
    assert torch.equal(after[4], before[4])
    assert run_of(most=1).progress.server["clusters"].shape == (C, 1, D)


def test_what_travels_is_counted_without_padding() -> None:
    run = run_of()
    told(run, {0: 2, 3: 1})
    run.step()
    model, cohort = tree.nbytes(model_of(run)), len(run.population.cohort(0))
    assert run.progress.cost["bytes_down"] == cohort * (model + 4 * 3 * (D + 1))
    assert run.progress.cost["bytes_up"] == cohort * (model + 4 * (C * D + C))


@ENGINES
def test_images_without_features_leave_everything_finite(engine: str) -> None:
    run = run_of("fpl", engine, replace(SETTING, clip=None))
    told(run, {0: 1, 1: 2})
    dead = tree.map(lambda leaf: leaf - 100.0, run.task.init()["body"])
    run.progress.server = {**run.progress.server, "body": dead}
    run.step()
    assert tree.is_finite(toy.states(run))
