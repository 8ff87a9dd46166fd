"""kNN-Per: votes and mixture against numpy, the share that each client chooses, and FedAvg where nobody votes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import LocalData, Tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference

SETTING = replace(toy.SETTING, rounds=2, unseen=1)
BOTH = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(engine: str = "serial", setting: Any = SETTING, name: str = "knnper", **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting)


def data_of(run: Run, client: int) -> LocalData:
    visit = run.population.visit(client, run.setting.rounds - 1, {})
    n = torch.tensor(len(visit.index))
    size, images = run.setting.batch_size, run.population.images
    return LocalData(images, visit.index, n, visit.key, visit.class_counts, size, client_key=visit.client_key)


def model_of(run: Run, client: int) -> Tree:
    """A client's model, made together with those of all others: stacked ones are padded."""
    task, server, training = run.task_at(run.setting.rounds - 1), run.progress.server, run.population.training
    name, clients = ("personal", range(training)) if client < training else ("unseen", range(training, 8))
    models = run.evaluator.models(task, server, server, run.store, clients, True)[name]
    return models[clients.index(client)]


def hidden(model: Tree, x: Tensor) -> Tensor:
    layer = model["body"]["hidden"]
    return torch.relu(x.flatten(1) @ layer["weight"].T + layer["bias"])


def probabilities(
    model: Tree, x: Tensor, memory: Tensor, labels: Tensor, share: float, neighbours: int = 10, scale: float = 1.0
) -> Any:
    """The mixture of neighbours and model in double precision, one image at a time."""
    z, stored, y = (t.detach().double().numpy() for t in (hidden(model, x), hidden(model, memory), labels))
    logits = z @ model["head"]["weight"].double().numpy().T + model["head"]["bias"].double().numpy()
    found = np.exp(logits - logits.max(1, keepdims=True))
    found *= (1 - share) / found.sum(1, keepdims=True)
    for row, query in zip(found, z, strict=True):
        distance = ((stored - query) ** 2).sum(1)
        nearest = np.argsort(distance, kind="stable")[:neighbours]
        weight = np.exp(-distance[nearest] / (64 * scale))
        for w, label in zip(weight / weight.sum(), y[nearest], strict=True):
            row[int(label)] += share * w
    return found


@pytest.mark.equivalence
@BOTH
def test_training_is_fedavgs_and_so_are_answers_without_a_vote(engine: str) -> None:
    setting = replace(SETTING, weight_decay=1e-2, clip=1.0, rounds=3)
    mine, silent, fedavg = (
        toy.finish(run)
        for run in (
            run_of(engine, setting),
            run_of(engine, setting, share=0.0),
            run_of(engine, setting, "fedavg"),
        )
    )
    assert mine.outcome().digest == silent.outcome().digest == fedavg.outcome().digest
    voted, quiet, plain = (run.outcome().metrics for run in (mine, silent, fedavg))
    assert voted["generic"] == plain["generic"]
    for metric in ("personal", "personal.masked"):
        assert quiet[metric] == plain[metric]
    assert voted["personal"] > plain["personal"]  # type: ignore[operator]


@BOTH
@pytest.mark.parametrize(("neighbours", "scale", "share"), [(1, 1.0, 0.3), (5, 0.02, 0.7), (1000, 0.5, 0.5)])
def test_scores_are_the_logarithm_of_the_mixture(engine: str, neighbours: int, scale: float, share: float) -> None:
    run = toy.finish(run_of(engine, neighbours=neighbours, scale=scale, share=share))
    x = run.population.test.plain(torch.arange(60))
    for client in (0, 5, 7):
        model, data = model_of(run, client), data_of(run, client)
        memory = run.population.images.plain(data.index)
        scores = run.algorithm.predict(run.task, model, x).exp()
        expected = probabilities(model, x, memory, data.y, share, neighbours, scale)
        assert np.allclose(scores.numpy(), expected, atol=2e-5)
        assert torch.allclose(scores.sum(1), torch.ones(60), atol=1e-5)


def test_alone_the_nearest_example_answers_for_itself() -> None:
    run = toy.finish(run_of(neighbours=1, share=1.0))
    for client in (0, 1, 4):
        data = data_of(run, client)
        x = run.population.images.plain(data.index)
        assert torch.equal(run.algorithm.predict(run.task, model_of(run, client), x).argmax(1), data.y)


def test_neighbours_that_differ_little_beside_their_length_are_told_apart() -> None:
    algorithm: Any = ALGORITHMS["knnper"](neighbours=1)
    features, labels = 1000 + 0.01 * torch.arange(40.0)[:, None].expand(40, 64), torch.arange(40) % 6
    votes = algorithm._votes(run_of().task, features, {"features": features, "labels": labels})
    assert torch.equal(votes.argmax(1), labels)


def test_of_very_many_alike_neighbours_the_votes_are_label_frequencies() -> None:
    run = toy.finish(run_of(neighbours=1000, scale=1e6, share=1.0))
    counts = run.population.class_counts(0)
    scores = run.algorithm.predict(run.task, model_of(run, 0), run.population.test.plain(torch.arange(30)))
    assert torch.allclose(scores.exp(), (counts / counts.sum()).expand(30, 6), atol=1e-4)


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_the_order_of_the_memory_is_irrelevant_and_padding_is_no_neighbour(far: float) -> None:
    run = toy.finish(run_of(share=0.5, neighbours=7))
    model, x = model_of(run, 4), run.population.test.plain(torch.arange(30)) + far
    order = torch.arange(9).flip(0)
    padded = {
        **model,
        "features": torch.cat([hidden(model, x)[:5], model["features"][order]]),
        "labels": torch.cat([torch.full((5,), -1), model["labels"][order]]),
    }
    scores, again = (run.algorithm.predict(run.task, each, x).exp() for each in (model, padded))
    assert torch.allclose(scores, again, atol=1e-6)
    assert bool(torch.isfinite(scores).all())


@BOTH
@pytest.mark.parametrize(
    ("lr", "louder", "mixed", "fields", "expected"),
    [
        (0.05, 1, False, {}, [0.5, 0.5, 0.5, 0.5, 0.5]),
        (1e-6, 20, False, {}, [0.7, 0.5, 0.5, 0.5, 0.6]),
        (1e-6, 20, False, {"neighbours": 1000}, [1.0, 0.8, 1.0, 0.6, 0.7]),
        (0.05, 1, True, {"neighbours": 5}, [0.5, 0.1, 0.5, 0.5, 0.3]),
    ],
    ids=["of equals a half", "an untrained model, sure of itself", "many neighbours", "labels in disorder"],
)
def test_each_client_chooses_the_share_that_is_best_on_examples_outside_its_memory(
    engine: str, lr: float, louder: float, mixed: bool, fields: dict[str, Any], expected: list[float]
) -> None:
    run = toy.finish(run_of(engine, replace(SETTING, rounds=1, lr=lr), **fields))
    head, images = run.progress.server["head"], run.population.images
    run.progress.server = {**run.progress.server, "head": {key: louder * leaf for key, leaf in head.items()}}
    if mixed:
        images.y = images.y[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    chosen = []
    for client in (0, 1, 2, 3, 7):
        model, data = model_of(run, client), data_of(run, client)
        rest, aside = data.part(0.2, "share of neighbours")
        assert len(rest.index) + len(aside.index) == len(data.index) and len(aside.index)
        x, memory = (run.population.images.plain(part.index) for part in (aside, rest))
        right = {}
        for share in (s / 10 for s in range(11)):
            found = probabilities(model, x, memory, rest.y, share, **fields)
            right[share] = int((found.argmax(1) == aside.y.numpy()).sum())
        best = [share for share, count in right.items() if count == max(right.values())]
        share = round(float(model["share"]), 1)
        assert share in best
        assert abs(share - 0.5) == pytest.approx(min(abs(each - 0.5) for each in best))
        assert int((model["labels"] >= 0).sum()) == len(data.index)  # in the end it remembers all
        chosen.append(share)
    assert chosen == expected


@BOTH
def test_without_examples_or_labels_the_model_answers_alone(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(SETTING, unseen=2, unseen_labels=False), share=1.0))
    x = run.population.test.plain(torch.arange(60))
    for client in (6, 7):
        scores = run.algorithm.predict(run.task, model_of(run, client), x)
        assert torch.allclose(scores, run.task.logits(run.progress.server, x).log_softmax(1), atol=1e-6)


@BOTH
def test_a_client_held_out_remembers_as_others_do_and_takes_no_step(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)))
    metrics = run.outcome().metrics
    assert not any(key.startswith("unseen:") for key in metrics)
    assert metrics["unseen"] > 0.8  # type: ignore[operator]
    model = model_of(run, 7)
    both = {key: model[key] for key in ("body", "head")}
    assert largest_difference(both, run.progress.server) == 0.0
    data = data_of(run, 7)
    assert torch.equal(model["labels"][: len(data.index)], data.y)
    assert torch.allclose(
        model["features"][: len(data.index)], hidden(model, run.population.images.plain(data.index)), atol=1e-5
    )


def test_engines_give_one_answer_under_batch_norm() -> None:
    """Features are those of evaluation mode, in memory and in the test."""
    setting = replace(toy.SETTING, model="resnet8", norm="batch", participation=1.0, rounds=1, epochs=1)
    scores = []
    for engine in ("serial", "stacked"):
        run = toy.run(ALGORITHMS["knnper"](share=0.5), engine, setting=setting, sizes=(20, 9, 0, 0, 0, 0, 0, 0))
        toy.finish(run)
        x = run.population.test.plain(torch.arange(12))
        scores.append(run.algorithm.predict(run.task, model_of(run, 1), x).exp())
    assert torch.allclose(scores[0], scores[1], atol=2e-3)
