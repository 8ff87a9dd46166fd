"""FedNH: prototypes at their start, a client's work against a loop written out, and the server's step by hand."""

from __future__ import annotations

import importlib
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
from tests.by_hand import data_of, mean_by_size, measured, method

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, momentum=0.9, weight_decay=1e-2)


def run_of(engine: str = "serial", setting: Any = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fednh"](**fields), engine, setting=setting, sizes=sizes)


def orthogonal(classes: int, d: int, seed: int = 3) -> Tensor:
    found: Tensor = importlib.import_module("bench.algorithms.fednh").orthogonal(keys.key(seed), classes, d)
    return found


def prototypes(run: Run) -> Tensor:
    found: Tensor = run.progress.server["head"]["weight"]
    return found


def directions(body: Tree, x: Tensor) -> Tensor:
    return F.normalize(torch.relu(F.linear(x.flatten(1), body["hidden"]["weight"], body["hidden"]["bias"])))


def centres(run: Run, body: Tree, client: int) -> Tensor:
    """The mean direction of each class that a client has, zero for the others."""
    data = data_of(run, client)
    u = directions(body, run.population.images.plain(data.index))
    means = [u[data.y == c].mean(0) if bool((data.y == c).any()) else torch.zeros(64) for c in range(6)]
    return F.normalize(torch.stack(means))


@pytest.mark.parametrize(("classes", "d"), [(6, 64), (5, 5)])
def test_prototypes_start_at_right_angles(classes: int, d: int) -> None:
    start = orthogonal(classes, d)
    assert torch.allclose(start @ start.T, torch.eye(classes), atol=1e-6)
    assert torch.equal(start, orthogonal(classes, d)) and not torch.equal(start, orthogonal(classes, d, seed=4))


def test_more_classes_than_features_start_with_length_one_in_all_directions() -> None:
    start = orthogonal(40, 4)
    assert torch.allclose(start.norm(dim=1), torch.ones(40), atol=1e-6)
    assert torch.linalg.matrix_rank(start) == 4 and float(start.mean(0).abs().max()) < 0.5


def test_a_client_trains_body_and_scale_and_sends_the_directions_of_its_classes() -> None:
    run = run_of(scale=3.0)
    received, data = run.progress.server, data_of(run, 0)
    w = [leaf.clone().requires_grad_() for leaf in tree.flatten(received["body"]).values()]
    scale, still = torch.tensor(3.0, requires_grad=True), prototypes(run).clone()
    optimiser = torch.optim.SGD([*w, scale], 0.05, 0.9, weight_decay=1e-2)
    for batch in data.batches(2):
        z = torch.relu(F.linear(batch.x.flatten(1), *w))
        optimiser.zero_grad()
        F.cross_entropy(scale * (z @ still.T) / z.norm(dim=1, keepdim=True), batch.y).backward()
        optimiser.step()
    upload, _ = toy.upload_once(run)
    body = tree.unflatten(dict(zip(tree.flatten(received["body"]), (leaf.detach() for leaf in w), strict=True)))
    assert largest_difference(upload["body"], body) < 5e-6
    assert upload["head"].keys() == {"scale"} and abs(float(upload["head"]["scale"]) - 3.0) > 1e-3
    assert float(upload["head"]["scale"]) == pytest.approx(scale.item(), abs=1e-5)
    assert torch.allclose(upload["means"], centres(run, body, 0), atol=1e-5)
    assert upload["counts"].tolist() == torch.bincount(data.y, minlength=6).tolist()


def test_prototypes_go_a_tenth_of_the_way_to_the_mean_by_counts() -> None:
    """Two features: class 0 stands at 0° and two clients say 0° (once) and 90° (three times), class 1 is nobody's."""
    run = run_of(smoothing=0.9)
    still = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    sent = [
        {"body": {}, "head": {"scale": torch.tensor(scale)}, "counts": torch.tensor([count, 0.0]),
         "means": torch.tensor([row, [0.0, 0.0]])}
        for scale, count, row in ((1.0, 1.0, [1.0, 0.0]), (4.0, 3.0, [0.0, 1.0]))
    ]  # fmt: skip
    server = {"body": {}, "head": {"weight": still, "scale": torch.tensor(2.0)}}
    head = run.algorithm.aggregate(run.task, server, Uploads(sent, torch.tensor([10.0, 20.0])))["head"]
    towards = torch.tensor([1.0, 3.0]) / 10**0.5
    expected = 0.9 * still[0] + 0.1 * towards
    assert torch.allclose(head["weight"][0], expected / expected.norm(), atol=1e-6)
    assert torch.equal(head["weight"][1], still[1])
    assert float(head["scale"]) == pytest.approx((10 * 1 + 20 * 4) / 30)


@pytest.mark.parametrize("engine", ENGINES)
def test_rounds_average_bodies_by_size_and_keep_prototypes_on_the_sphere(engine: str) -> None:
    run = run_of(engine)
    for round in range(2):
        task, cohort, before = run.task_at(round), run.population.cohort(round), prototypes(run).clone()
        sent = [toy.upload_once(run, k, task)[0] for k in cohort]
        held = torch.stack([upload["counts"] for upload in sent]).sum(0) > 0
        run.step()
        mean = mean_by_size(run, cohort, [{"body": u["body"], "scale": u["head"]} for u in sent])
        found = {"body": run.progress.server["body"], "scale": {"scale": run.progress.server["head"]["scale"]}}
        assert largest_difference(found, mean) < 2e-5
        assert torch.allclose(prototypes(run).norm(dim=1), torch.ones(6), atol=1e-6)
        assert bool(((prototypes(run) != before).any(1) == held).all())


@pytest.mark.parametrize("engine", ENGINES)
def test_prototypes_come_closer_to_the_classes_and_at_full_smoothing_stay(engine: str) -> None:
    start = prototypes(run_of())
    moving, still = toy.finish(run_of(engine)), toy.finish(run_of(engine, smoothing=1.0))
    assert torch.allclose(prototypes(still), start, atol=1e-6)
    assert largest_difference(moving.progress.server["body"], still.progress.server["body"]) > 1e-4

    def closeness(run: Run) -> float:
        means = F.normalize(torch.stack([centres(run, run.progress.server["body"], k) for k in range(8)]).sum(0))
        return float((means * prototypes(run)).sum(1).mean())

    assert closeness(moving) > closeness(still) + 0.05


@pytest.mark.parametrize("engine", ENGINES)
def test_a_class_that_nobody_holds_keeps_its_prototype(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(SETTING, participation=1.0), sizes=(20, 9, 0)))
    held = torch.stack([run.population.class_counts(k) for k in range(3)]).sum(0) > 0
    assert 0 < int(held.sum()) < 6
    assert bool(((prototypes(run) != prototypes(run_of())).any(1) == held).all())
    assert tree.is_finite(run.progress.server)


def test_an_image_scores_by_its_cosines_whatever_the_length_of_features_and_of_tuned_prototypes() -> None:
    run = toy.finish(run_of())
    server = run.progress.server
    x = run.population.images.plain(run.population.index[0])
    model = method(run).global_model(run.task, server)
    cosines = directions(server["body"], x) @ prototypes(run).T
    assert torch.allclose(method(run).predict(run.task, model, x), server["head"]["scale"] * cosines, atol=1e-4)
    head = {**model["head"], "weight": 2.0 * prototypes(run)}
    longer = {"body": tree.scale(model["body"], 3.0), "head": head}
    assert torch.allclose(method(run).predict(run.task, longer, x), server["head"]["scale"] * cosines, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_body_scale_and_prototypes_go_down_and_class_means_come_up_beside(engine: str) -> None:
    run = run_of(engine)
    run.step()
    visits, body = len(run.population.cohort(0)), 64 * 64 + 64
    assert run.progress.cost["bytes_down"] == 4 * visits * (body + 1 + 6 * 64)
    assert run.progress.cost["bytes_up"] == 4 * visits * (body + 1 + 6 * 64 + 6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of(engine, setting)), "unseen") > 0.8
