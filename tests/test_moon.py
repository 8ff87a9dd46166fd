"""MOON: its steps against a loop written out, FedAvg where there is no contrast, and references that stand still."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, LocalData, Tree, tree
from bench.contract import toy
from bench.losses import cross_entropy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=3, weight_decay=1e-2, clip=1.0)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else (20, 9, 0, 0, 0, 0, 0, 0)
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def shaken(model: Tree, by: float) -> Tree:
    """Move every weight a little, each by another amount."""
    return tree.map(lambda leaf: leaf + by * torch.sin(torch.arange(leaf.numel()) * 2.7).reshape(leaf.shape), model)


def visited(setting: Any = SETTING, **fields: Any) -> Run:
    """A run whose client 0 took part before, and whose server's model is another one since."""
    run = run_of("moon", setting=setting, **fields)
    model = run.task.init()
    run.progress.server = {**model, "body": shaken(model["body"], 0.05)}
    run.store[0] = {"body": shaken(model["body"], -0.05), "trained": torch.ones(())}
    return run


def batches(run: Run) -> list[Batch]:
    """The batches of client 0 in round 0."""
    visit = run.population.visit(0, 0, {})
    n = torch.tensor(len(visit.index))
    data = LocalData(run.population.images, visit.index, n, visit.key, visit.class_counts, run.setting.batch_size)
    return list(data.batches(run.setting.epochs))


def hidden(body: Tree, x: Tensor) -> Tensor:
    return torch.relu(x.flatten(1) @ body["hidden"]["weight"].T + body["hidden"]["bias"])


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def cosines_of(body: Tree, other: Tree, run: Run) -> float:
    x = run.population.images.plain(run.population.index[0])
    return float(cosines(hidden(body, x), hidden(other, x)).mean())


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_without_contrast_it_is_fedavg(engine: str) -> None:
    runs = run_of("moon", engine, mu=0.0), run_of("fedavg", engine), run_of("moon", engine)
    off, fedavg, on = (toy.finish(run).progress.server for run in runs)
    assert largest_difference(off, fedavg) == 0.0
    assert largest_difference(on, fedavg) > 1e-4


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_without_contrast_it_is_fedavg_under_batch_norm_too(engine: str) -> None:
    runs = run_of("moon", engine, BATCH_NORM, mu=0.0), run_of("fedavg", engine, BATCH_NORM)
    assert largest_difference(*(toy.finish(run).progress.server for run in runs)) == 0.0


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_first_visit_has_no_contrast(engine: str) -> None:
    once = replace(SETTING, rounds=1)
    moon, fedavg = (toy.finish(run_of(name, engine, once)) for name in ("moon", "fedavg"))
    assert largest_difference(moon.progress.server, fedavg.progress.server) == 0.0


def test_a_first_visit_in_a_later_round_has_no_contrast_either() -> None:
    run, fedavg = visited(mu=5.0), run_of("fedavg")
    fedavg.progress.server = run.progress.server
    for client, same in ((0, False), (1, True)):
        uploads = [toy.upload_once(one, client, one.task_at(2))[0] for one in (run, fedavg)]
        assert (largest_difference(*uploads) == 0.0) == same


@pytest.mark.parametrize(("mu", "tau"), [(1.0, 0.5), (5.0, 0.1)])
def test_steps_are_those_of_the_papers_loss(mu: float, tau: float) -> None:
    run = visited(replace(SETTING, clip=None, momentum=0.9), mu=mu, temperature=tau)
    received, last = run.progress.server["body"], run.store[0]["body"]
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(run.progress.server).items()}
    w = tree.unflatten(dict(leaves))
    optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.9, weight_decay=1e-2)
    for batch in batches(run):
        z = hidden(w["body"], batch.x)
        towards = (cosines(z, hidden(received, batch.x)) / tau).exp()
        away = (cosines(z, hidden(last, batch.x)) / tau).exp()
        logits = z @ w["head"]["weight"].T + w["head"]["bias"]
        loss = F.cross_entropy(logits, batch.y) - mu * (towards / (towards + away)).log().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    upload, kept = toy.upload_once(run)
    assert largest_difference(upload, tree.map(torch.Tensor.detach, w)) < 2e-6
    assert largest_difference(kept, {"body": upload["body"], "trained": torch.ones(())}) == 0.0


def test_where_the_last_model_is_the_received_one_the_contrast_has_no_gradient() -> None:
    run = visited(mu=5.0)
    fedavg = run_of("fedavg")
    fedavg.progress.server = run.progress.server
    run.store[0] = {"body": run.progress.server["body"], "trained": torch.ones(())}
    assert largest_difference(toy.upload_once(run)[0], toy.upload_once(fedavg)[0]) < 1e-6


def test_features_come_closer_to_the_received_models_and_leave_the_last_ones() -> None:
    towards, away = [], []
    for mu in (0.0, 5.0, 50.0):
        run = visited(mu=mu)
        body = toy.upload_once(run)[0]["body"]
        towards.append(cosines_of(body, run.progress.server["body"], run))
        away.append(cosines_of(body, run.store[0]["body"], run))
    gaps = [t - a for t, a in zip(towards, away, strict=True)]
    assert gaps == sorted(gaps) and gaps[2] > gaps[0] + 0.01
    assert away == sorted(away, reverse=True)


def test_references_are_in_evaluation_mode() -> None:
    """Under batch norm a step is that of a loss whose references were computed beforehand, outside training."""
    run = visited(replace(BATCH_NORM, batch_size=1000, clip=None, weight_decay=0.0, momentum=0.0), mu=20.0)
    (batch,) = batches(run)
    task, server = run.task, run.progress.server
    received, last = (task.model.features(body, batch.x) for body in (server["body"], run.store[0]["body"]))

    def loss(w: Tree, batch: Batch) -> Tensor:
        z = task.model.features(w["body"], batch.x)
        apart = (cosines(z, last) - cosines(z, received)) / 0.5
        entropy = cross_entropy(task.model.logits(w["head"], z), batch)
        return entropy + 20.0 * (1 + apart.exp()).log().mean()

    _, gradient, following = task.gradient(loss, server, batch)
    expected = tree.merge(following, tree.add(tree.parameters(server), gradient, -0.05))
    upload, _ = toy.upload_once(run)
    assert largest_difference(upload, expected) < 1e-5
    fedavg = run_of("fedavg", setting=run.setting)
    fedavg.progress.server = server
    assert largest_difference(upload, toy.upload_once(fedavg)[0]) > 1e-3


def test_a_client_keeps_its_last_body_and_an_empty_one_nothing() -> None:
    run = run_of("moon")
    run.step()
    run.step()
    assert [float(run.store[k]["trained"]) for k in range(8)] == [1.0] * 6 + [0.0, 1.0]
    assert largest_difference(run.store[6], run.store.initial) == 0.0
    assert largest_difference(run.store[0]["body"], run.store[1]["body"]) > 1e-3


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_images_without_features_leave_the_gradient_finite(engine: str) -> None:
    """A body whose units are all dead gives features of zero, which have no angle."""
    run = run_of("moon", engine, replace(SETTING, clip=None), mu=10.0)
    dead = tree.map(lambda leaf: leaf - 100.0, run.task.init()["body"])
    run.progress.server = {**run.progress.server, "body": dead}
    run.store[0] = {"body": dead, "trained": torch.ones(())}
    run.step()
    assert tree.is_finite(toy.states(run))


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("moon", engine, setting)), "unseen") > 0.8
