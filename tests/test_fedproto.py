"""FedProto: its steps and prototypes against loops written out, Local where nothing pulls, and what travels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of

SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", participation=1.0, rounds=2, epochs=1)


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def private(run: Run) -> Tree:
    return {str(k): run.store[k] for k in run.store.clients()}


def hidden(body: Tree, x: Tensor) -> Tensor:
    return torch.relu(x.flatten(1) @ body["hidden"]["weight"].T + body["hidden"]["bias"])


def known_to(run: Run, classes: tuple[int, ...]) -> None:
    """Give the server prototypes of some classes."""
    known = torch.zeros(6)
    known[list(classes)] = 1.0
    prototypes = torch.linspace(0, 2, 6 * 64).reshape(6, 64).sin().abs() * known[:, None]
    run.progress.server = {"prototypes": prototypes, "known": known}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("setting", [SETTING, BATCH_NORM], ids=["mlp", "batch norm"])
def test_without_pull_it_is_local(engine: str, setting: Any) -> None:
    runs = run_of("fedproto", engine, setting, pull=0.0), run_of("local", engine, setting)
    off, local = (toy.finish(run) for run in runs)
    assert largest_difference(private(off), private(local)) == 0.0
    for metric in ("personal", "personal.masked"):
        assert off.outcome().metrics[metric] == local.outcome().metrics[metric]
    on = toy.finish(run_of("fedproto", engine, setting))
    assert largest_difference(private(on), private(local)) > 1e-4


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_the_first_round_is_local_whatever_the_pull(engine: str) -> None:
    once = replace(SETTING, rounds=1)
    runs = run_of("fedproto", engine, once, pull=50.0), run_of("local", engine, once)
    assert largest_difference(*(private(toy.finish(run)) for run in runs)) == 0.0


def test_steps_are_those_of_the_papers_loss_and_means_those_of_the_trained_model() -> None:
    """Of the classes that client 0 holds some have a prototype and some have not."""
    run = run_of("fedproto", setting=replace(SETTING, clip=None, momentum=0.9), pull=3.0)
    data = data_of(run, 0)
    held = torch.nonzero(data.class_counts).flatten().tolist()
    assert len(held) > 1
    known_to(run, tuple(held[:1]))
    prototypes = run.progress.server["prototypes"]
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(run.task.init()).items()}
    w = tree.unflatten(dict(leaves))
    optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.9, weight_decay=1e-2)
    for batch in data.batches(2):
        z = hidden(w["body"], batch.x)
        target = torch.where((batch.y == held[0])[:, None], prototypes[batch.y], z.detach())
        logits = z @ w["head"]["weight"].T + w["head"]["bias"]
        optimiser.zero_grad()
        (F.cross_entropy(logits, batch.y) + 3.0 * F.mse_loss(z, target)).backward()
        optimiser.step()
    upload, kept = toy.upload_once(run)
    assert largest_difference(kept, tree.map(torch.Tensor.detach, w)) < 5e-6
    z = hidden(kept["body"], run.population.images.plain(data.index))
    for c in range(6):
        mean = z[data.y == c].mean(0) if c in held else torch.zeros(64)
        assert torch.allclose(upload["prototypes"][c], mean, atol=1e-5)
    assert upload["known"].tolist() == [float(c in held) for c in range(6)]


def test_features_come_closer_to_the_prototypes_the_stronger_the_pull() -> None:
    distances = []
    for pull in (0.0, 5.0, 50.0):
        run = run_of("fedproto", setting=replace(SETTING, clip=None), pull=pull)
        known_to(run, tuple(range(6)))
        upload, _ = toy.upload_once(run)
        apart = (upload["prototypes"] - run.progress.server["prototypes"]).square().mean(1)
        distances.append(float((apart * upload["known"]).sum()))
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.5 * distances[0]


def test_a_class_is_averaged_equally_over_those_that_hold_it_and_else_kept() -> None:
    run = run_of("fedproto")
    rows = torch.arange(6.0)[:, None].expand(6, 64)
    server = {"prototypes": rows + 100, "known": torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0])}
    one = {"prototypes": rows + 1, "known": torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])}
    two = {"prototypes": rows + 5, "known": torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])}
    following = run.algorithm.aggregate(run.task, server, Uploads([one, two], torch.tensor([30.0, 10.0])))
    assert following["known"].tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    assert following["prototypes"][:5, 0].tolist() == [1.0, 4.0, 7.0, 6.0, 104.0]


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_only_prototypes_that_there_are_travel(engine: str) -> None:
    run = run_of("fedproto", engine)
    run.step()
    cohort = run.population.cohort(0)
    held = [int((run.population.class_counts(k) > 0).sum()) for k in cohort]
    assert run.progress.cost["bytes_down"] == 0
    assert run.progress.cost["bytes_up"] == sum(held) * (64 * 4 + 4)
    known = int(run.progress.server["known"].sum())
    assert known == int((torch.stack([run.population.class_counts(k) for k in cohort]).sum(0) > 0).sum())
    run.step()
    assert run.progress.cost["bytes_down"] == len(run.population.cohort(1)) * known * (64 * 4 + 4)


def test_the_nearest_known_prototype_decides() -> None:
    run = run_of("fedproto")
    known_to(run, (0, 2, 5))
    x = run.population.images.plain(run.population.index[0])
    body, server = run.task.init()["body"], run.progress.server
    distance = (hidden(body, x)[:, None] - server["prototypes"]).norm(dim=2)
    scores = ALGORITHMS["fedproto"]().nearest(run.task, {"body": body, **server}, x)
    assert torch.allclose(-scores[:, [0, 2, 5]], distance[:, [0, 2, 5]], atol=1e-3)
    assert bool((scores[:, [1, 3, 4]] == -torch.inf).all())


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_the_headline_goes_through_the_head_and_nearest_through_the_distance(engine: str) -> None:
    run = toy.finish(run_of("fedproto", engine, replace(toy.SETTING, rounds=8, eval_every=8)))
    metrics = run.outcome().metrics
    assert metrics["generic"] is None
    assert metrics["personal"] > 0.8 and metrics["personal:nearest"] > 0.8  # type: ignore[operator]
    run.progress.server = {**run.progress.server, "prototypes": -run.progress.server["prototypes"]}
    wrong = run.evaluate(run.task_at(7), 8, True)
    assert wrong["personal"] == metrics["personal"]
    assert wrong["personal:nearest"] < metrics["personal:nearest"]  # type: ignore[operator]


def test_engines_agree_under_batch_norm() -> None:
    once = replace(BATCH_NORM, rounds=1)
    runs = []
    for engine in ("serial", "stacked"):
        run = run_of("fedproto", engine, once)
        run.progress.server = {"prototypes": torch.ones(6, 256), "known": torch.ones(6)}
        runs.append(toy.finish(run))
    assert largest_difference(*(toy.states(run) for run in runs)) < 2e-4


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_trains_the_initial_model_towards_the_prototypes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    distances, reached = [], []
    for pull in (0.0, 10.0):
        run = toy.finish(run_of("fedproto", engine, setting, pull=pull))
        server, task = run.progress.server, run.task_at(7)
        (model,) = run.evaluator.models(task, server, server, run.store, [7], True)["unseen"]
        data = data_of(run, 7)
        z = hidden(model["body"], run.population.images.plain(data.index))
        distances.append(float((z - server["prototypes"][data.y]).square().mean()))
        reached.append(run.outcome().metrics["unseen"])
    assert distances[1] < 0.7 * distances[0]
    assert min(reached) > 0.8  # type: ignore[type-var, operator]


def test_a_client_held_out_without_labels_takes_no_step() -> None:
    run = toy.finish(run_of("fedproto", setting=replace(SETTING, rounds=1, unseen=1, unseen_labels=False)))
    task, server = run.task_at(0), run.progress.server
    (model,) = run.evaluator.models(task, server, server, run.store, [7], True)["unseen"]
    assert largest_difference({key: model[key] for key in ("body", "head")}, task.init()) == 0.0
