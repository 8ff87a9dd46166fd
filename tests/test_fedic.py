"""FEDIC: a round against one written out, FedAvg without steps, a control without an ensemble, what calibration is."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import LocalData, Tree, Uploads, tree
from bench.contract import toy
from bench.losses import cross_entropy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import BadConfig, Setting
from bench.training.job import Job, surroundings
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import method

SETTING = replace(toy.SETTING, participation=1.0, rounds=2)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
LARGE = 0.02
"""A learning rate at which few steps are long ones."""

fedic = importlib.import_module("bench.algorithms.fedic")


def run_of(name: str, engine: str = "serial", setting: Setting = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def auxiliary(run: Run) -> LocalData:
    data = run.task_at(0).auxiliary
    assert data is not None
    return data


@lru_cache
def uploads() -> Uploads:
    """What three clients of different classes send in the first round."""
    run = run_of("fedavg")
    return Uploads([toy.upload_once(run, k)[0] for k in (0, 1, 3)], torch.tensor([60.0, 44.0, 17.0]))


def started() -> Tree:
    """A calibrator that is not at its start: everything in it matters."""
    calibrator: Tree = run_of("fedic").progress.server["calibrator"]
    return tree.map(
        lambda leaf: leaf + 0.1 * torch.sin(1.7 + torch.arange(leaf.numel())).reshape(leaf.shape), calibrator
    )


def hidden(body: Tree, x: Tensor) -> Tensor:
    return torch.relu(x.flatten(1) @ body["hidden"]["weight"].T + body["hidden"]["bias"])


def score(model: Tree, x: Tensor) -> Tensor:
    logits: Tensor = hidden(model["body"], x) @ model["head"]["weight"].T + model["head"]["bias"]
    return logits


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def calibrated_by_hand(calibrator: Tree, z: Any, logits: Any, tuned: Any) -> Any:
    """Image by image, client by client."""
    c = {path: leaf.double().numpy() for path, leaf in tree.flatten(calibrator).items()}
    rows = []
    for b in range(tuned.shape[0]):
        trust = [sigmoid(client[b] @ c["clients/weight"] + c["clients/bias"]) for client in logits]
        ensemble = sum(u * client[b] for u, client in zip(trust, logits, strict=True)) / sum(trust)
        g = sigmoid(sum(client[b] for client in z) / len(z) @ c["gate/weight"] + c["gate/bias"])
        rows.append(g * (c["classes/weight"] * ensemble + c["classes/bias"]) + (1 - g) * tuned[b])
    return np.stack(rows)


def draws(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape)


def calibrated(calibrator: Tree, z: Any, logits: Any, tuned: Any) -> Any:
    return fedic.calibrated(calibrator, *(torch.from_numpy(each).float() for each in (z, logits, tuned))).numpy()


def test_calibration_is_the_papers_image_by_image() -> None:
    given = draws(1, 3, 5, 64), 2 * draws(2, 3, 5, 6), 2 * draws(3, 5, 6)
    assert np.abs(calibrated(started(), *given) - calibrated_by_hand(started(), *given)).max() < 1e-5


def test_equal_clients_are_an_ensemble_that_is_any_of_them() -> None:
    one, z = 2 * draws(2, 5, 6), draws(1, 4, 5, 64)
    start = run_of("fedic").progress.server["calibrator"]
    open_gate = {**start, "gate": {**start["gate"], "bias": torch.tensor(50.0)}}
    assert np.abs(calibrated(open_gate, z, np.stack([one] * 4), 9 + one) - one).max() < 1e-5
    assert np.abs(calibrated(start, z, np.stack([one] * 4), 9 + one) - one - 4.5).max() < 1e-5  # half open


def test_a_client_sure_of_its_logits_is_trusted_more() -> None:
    start = run_of("fedic").progress.server["calibrator"]
    wide = {**start, "gate": {**start["gate"], "bias": torch.tensor(50.0)}}
    high, low = np.full((1, 6), 2.0), np.full((1, 6), -2.0)
    found = calibrated(wide, np.zeros((2, 1, 64)), np.stack([high, low]), 0 * high)
    u, v = sigmoid(12.0), sigmoid(-12.0)
    assert found == pytest.approx(np.full((1, 6), (2 * u - 2 * v) / (u + v)), abs=1e-5) and found.min() > 1.99


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_without_steps_it_is_fedavg(engine: str) -> None:
    runs = run_of("fedic", engine, steps=0), run_of("fedavg", engine)
    still, fedavg = (toy.finish(run).progress.server for run in runs)
    assert largest_difference({key: still[key] for key in fedavg}, fedavg) == 0.0
    assert largest_difference(still["calibrator"], run_of("fedic").progress.server["calibrator"]) == 0.0


def test_a_round_at_the_server_is_that_written_out() -> None:
    """Three trainings by torch's own Adam, with its own weight decay, on the same batches."""
    run = run_of("fedic", steps=6, batch_size=13, lr=LARGE, weight_decay=0.1, distil=0.3, temperature=3.0)
    run.progress.server["calibrator"] = started()
    server = run.algorithm.aggregate(run.task_at(0), run.progress.server, uploads())
    clients, average = uploads().trees, uploads().mean()

    def trained(params: Tree, salt: str, decay: float, loss: Any) -> Tree:
        leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(params).items()}
        optimiser = torch.optim.Adam(leaves.values(), LARGE, weight_decay=decay)
        batches = list(auxiliary(run).batches(steps=6, salt=salt, batch_size=13))
        assert sorted(len(batch.y) for batch in batches) == [8, *[13] * 5]  # sixty images
        for batch in batches:
            optimiser.zero_grad()
            loss(tree.unflatten(dict(leaves)), batch.x, batch.y).backward()
            optimiser.step()
        return tree.unflatten({path: leaf.detach() for path, leaf in leaves.items()})

    tuned = trained(average, "tune", 0.1, lambda w, x, y: F.cross_entropy(score(w, x), y))

    def teacher(c: Tree, x: Tensor) -> Tensor:
        logits = torch.stack([score(client, x) for client in clients])
        trust = (logits * c["clients"]["weight"]).sum(2).add(c["clients"]["bias"]).sigmoid()
        mixed = torch.einsum("kb,kbc->bc", trust / trust.sum(0), logits)
        z = torch.stack([hidden(client["body"], x) for client in clients]).mean(0)
        g = (z * c["gate"]["weight"]).sum(1, keepdim=True).add(c["gate"]["bias"]).sigmoid()
        answer: Tensor = g * (mixed * c["classes"]["weight"] + c["classes"]["bias"]) + (1 - g) * score(tuned, x)
        return answer

    calibrator = trained(started(), "calibrate", 0.0, lambda c, x, y: F.cross_entropy(teacher(c, x), y))

    def lesson(w: Tree, x: Tensor, y: Tensor) -> Tensor:
        said, wanted = score(w, x), teacher(calibrator, x)
        apart = F.kl_div((said / 3).log_softmax(1), (wanted / 3).softmax(1), reduction="batchmean")
        loss: Tensor = 0.3 * apart + 0.7 * F.cross_entropy(said, y)
        return loss

    student = trained(average, "distil", 0.1, lesson)
    assert largest_difference(server["calibrator"], calibrator) < 1e-4
    assert largest_difference({key: server[key] for key in student}, student) < 1e-4
    for other in (average, tuned):
        assert largest_difference({key: server[key] for key in other}, other) > 1e-2
    assert largest_difference(calibrator, started()) > 1e-2


@pytest.mark.equivalence
def test_without_distillation_it_is_fedavg_tuned_at_the_server() -> None:
    """The control: clients, their ensemble and the calibrator have no say beyond the average."""
    run = run_of("fedic", steps=5, lr=LARGE, distil=0.0)
    task, server = run.task_at(0), run.progress.server
    found = run.algorithm.aggregate(task, server, uploads())
    other = run.algorithm.aggregate(task, {**server, "calibrator": started()}, uploads())
    alone = run.algorithm.aggregate(task, server, Uploads([uploads().mean()], torch.ones(1)))
    for each in (other, alone):
        assert largest_difference(*({key: s[key] for key in ("body", "head")} for s in (found, each))) == 0.0
    distilled = replace(run.algorithm, distil=0.5)  # type: ignore[type-var]
    assert largest_difference(distilled.aggregate(task, server, uploads()), found) > 1e-3


def loss_of(model: Tree, data: LocalData) -> float:
    return float(F.cross_entropy(score(model, data.images.plain(data.index)), data.y))


def test_the_student_knows_classes_that_the_cohort_lacks() -> None:
    run = run_of("fedic", lr=5e-3)
    student = run.algorithm.aggregate(run.task_at(0), run.progress.server, uploads())
    assert loss_of(student, auxiliary(run)) < 0.5 * loss_of(uploads().mean(), auxiliary(run))


def test_the_student_comes_closer_to_the_ensemble_the_more_that_counts() -> None:
    run = run_of("fedic")
    task, x = run.task_at(0), auxiliary(run).images.plain(auxiliary(run).index)
    z = torch.stack([hidden(client["body"], x) for client in uploads().trees])
    logits = torch.stack([score(client, x) for client in uploads().trees])
    apart = []
    for share in (0.0, 0.5, 1.0):
        algorithm: Any = replace(run.algorithm, distil=share)  # type: ignore[type-var]
        server = algorithm.aggregate(task, run.progress.server, uploads())
        tuned = algorithm._train(task, task.loss, uploads().mean(), "tune", algorithm.weight_decay)
        wanted = fedic.calibrated(server["calibrator"], z, logits, score(tuned, x)) / 2
        apart.append(float(F.kl_div((score(server, x) / 2).log_softmax(1), wanted.softmax(1), reduction="batchmean")))
    assert apart == sorted(apart, reverse=True) and apart[2] < 0.8 * apart[0]


def test_the_calibrator_goes_on_and_stays_at_the_server() -> None:
    run = run_of("fedic", steps=3, lr=LARGE)
    seen = [run.progress.server["calibrator"]]
    for _ in range(2):
        run.step()
        seen.append(run.progress.server["calibrator"])
        assert set(toy.received(run, 0)) == {"body", "head"}
    steps = [largest_difference(a, b) for a, b in pairwise(seen)]
    assert all(0.01 < step < 3.5 * LARGE for step in steps)
    assert largest_difference(seen[0], seen[2]) > LARGE


def test_the_order_of_uploads_does_not_matter() -> None:
    run = run_of("fedic")
    back = Uploads(uploads().trees[::-1], uploads().sizes.flip(0))
    states = [run.algorithm.aggregate(run.task_at(0), run.progress.server, each) for each in (uploads(), back)]
    assert largest_difference(*states) < 1e-4


def test_models_of_the_ensemble_are_in_evaluation_mode() -> None:
    """Under batch norm, a training whose teacher was asked beforehand gives the same student, statistics included."""
    run = run_of("fedic", setting=BATCH_NORM, steps=1, batch_size=60, distil=0.6, weight_decay=0.0)
    task, server = run.task_at(0), run.progress.server
    clients = [toy.upload_once(run, k)[0] for k in (0, 1)]
    sent = Uploads(clients, torch.tensor([20.0, 9.0]))
    found = run.algorithm.aggregate(task, server, sent)
    average = sent.mean()
    tuned = method(run)._train(task, task.loss, average, "tune", 0.0)
    (batch,) = auxiliary(run).batches(steps=1, salt="distil", batch_size=60)
    z = torch.stack([task.model.features(client["body"], batch.x) for client in clients])
    logits = torch.stack([task.logits(client, batch.x) for client in clients])
    wanted = fedic.calibrated(found["calibrator"], z, logits, task.logits(tuned, batch.x))

    def lesson(w: Tree, batch: Any) -> Tensor:
        said = task.logits(w, batch.x)
        apart = F.kl_div((said / 2).log_softmax(1), (wanted / 2).softmax(1), reduction="batchmean")
        return 0.6 * apart + 0.4 * cross_entropy(said, batch)

    expected = method(run)._train(task, lesson, average, "distil", 0.0)
    assert largest_difference({key: found[key] for key in expected}, expected) < 1e-4
    assert largest_difference(expected, average) > 9e-4


@pytest.mark.parametrize("statistics", ["shared", "personal"])
def test_engines_agree_under_batch_norm(statistics: str) -> None:
    """At a small rate: a first step of Adam goes by the sign of a gradient, also where that is rounding only."""
    setting = replace(BATCH_NORM, statistics=statistics)
    runs = [run_of("fedic", engine, setting, steps=2, batch_size=8, lr=1e-5) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(toy.finish(run)) for run in runs)) < 2e-4


def test_statistics_that_stay_at_clients_are_those_of_the_server() -> None:
    run = run_of("fedic", setting=BATCH_NORM, steps=2)
    task, server = run.task_at(0), run.progress.server
    statistics = tree.split(run.algorithm.broadcast(task, server), tree.is_statistic)[0]
    without = [tree.parameters(toy.upload_once(run, k)[0]) for k in (0, 1)]
    assert not any(tree.is_statistic(path) for path in tree.flatten(without[0]))
    sent = [Uploads(trees, torch.ones(2)) for trees in (without, [tree.merge(each, statistics) for each in without])]
    found, expected = (run.algorithm.aggregate(task, server, each) for each in sent)
    assert tree.flatten(found).keys() == tree.flatten(server).keys()
    assert largest_difference(found, tree.merge(found, expected)) == 0.0


def test_without_images_at_the_server_it_says_so() -> None:
    splits = toy.Toy().load()
    job = Job(ALGORITHMS["fedic"](), toy.Toy(), splits, toy.split(splits), toy.SETTING, 0, "serial")
    with pytest.raises(BadConfig, match="FedIC needs images at the server, and this run has none"):
        surroundings(job)


def test_images_that_the_server_trains_on_are_counted() -> None:
    run = toy.finish(run_of("fedic", steps=4, batch_size=15))
    assert run.outcome().cost["server_samples"] == 2 * 3 * 4 * 15


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_it_learns_in_mixed_precision(engine: str) -> None:
    dataset, setting = toy.Toy(), replace(toy.SETTING, rounds=6, eval_every=6)
    algorithm, splits = ALGORITHMS["fedic"](steps=20), dataset.load()
    split = toy.split(splits)
    reserve = toy.reserve(splits, split, algorithm)
    job = Job(algorithm, dataset, splits, split, setting, 0, engine, "bf16", reserve=reserve)
    assert (toy.finish(Run(job)).outcome().metrics["generic"] or 0.0) > 0.8


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=6, unseen=1, eval_every=6)
    metrics = toy.finish(run_of("fedic", engine, setting, steps=20)).outcome().metrics
    assert metrics["unseen"] > 0.8 and metrics["generic"] > 0.8  # type: ignore[operator]
