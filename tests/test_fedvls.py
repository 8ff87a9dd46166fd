"""FedVLS: its steps against a loop written out, FedAvg and balanced softmax where it is off, what each term does."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, weight_decay=1e-2, clip=1.0)
EVERY_CLASS = (120, 120, 120, 120)
"""Clients that have twenty examples of each class."""
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
OFF: dict[str, Any] = {"distil": 0.0, "suppress": 0.0}
LOPSIDED, ONE_CLASS = 1, 5
"""Clients with 20, 20 and 4 examples of three classes, and with 3 of one."""

fedvls = importlib.import_module("bench.algorithms.fedvls")


def run_of(
    name: str, engine: str = "serial", setting: Setting = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any
) -> Run:
    (algorithm,) = parse_algorithms(name)
    setting = replace(setting, clients=len(sizes))
    made: Algorithm = replace(algorithm, **fields) if fields else algorithm  # type: ignore[type-var]
    return toy.run(made, engine, setting=setting, sizes=sizes)


@lru_cache
def known() -> Tree:
    """A model that knows all classes."""
    return toy.finish(run_of("fedavg", setting=replace(SETTING, rounds=4), sizes=EVERY_CLASS)).progress.server


def taught(setting: Setting = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    """A run whose server sends that model."""
    run = run_of("fedvls", setting=setting, sizes=sizes, **fields)
    run.progress.server = known()
    return run


def score(model: Tree, x: Tensor) -> Tensor:
    z = torch.relu(x.flatten(1) @ model["body"]["hidden"]["weight"].T + model["body"]["hidden"]["bias"])
    logits: Tensor = z @ model["head"]["weight"].T + model["head"]["bias"]
    return logits


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_without_its_terms_it_is_fedavg_with_balanced_softmax(engine: str) -> None:
    off, calibrated = (
        toy.finish(run).progress.server
        for run in (run_of("fedvls", engine, **OFF), run_of("fedavg+balanced_softmax", engine))
    )
    assert largest_difference(off, calibrated) == 0.0


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_with_plain_cross_entropy_besides_it_is_fedavg(engine: str) -> None:
    off, fedavg = (
        toy.finish(run_of(name, engine)).progress.server
        for name in ("fedvls(distil=0, suppress=0)+cross_entropy", "fedavg")
    )
    assert largest_difference(off, fedavg) == 0.0


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_where_no_class_is_vacant_nothing_is_distilled(engine: str) -> None:
    """And even classes have no shift that matters: what is left is FedAvg but for rounding."""
    runs = [run_of("fedvls", engine, sizes=EVERY_CLASS, suppress=0.0, distil=distil) for distil in (0.0, 50.0)]
    states = [toy.finish(run).progress.server for run in (*runs, run_of("fedavg", engine, sizes=EVERY_CLASS))]
    assert largest_difference(states[0], states[1]) == 0.0
    assert largest_difference(states[0], states[2]) < 1e-5


@pytest.mark.parametrize("on", [{"distil": 0.1}, {"suppress": 0.005}])
def test_each_term_changes_something_at_its_default(on: dict[str, float]) -> None:
    states = [toy.finish(run_of("fedvls", **{**OFF, **fields})).progress.server for fields in (on, {})]
    assert largest_difference(*states) > 1e-5


def test_the_other_logits_by_hand() -> None:
    """Class 1 is the label of neither of two examples, class 2 that of both of what is no padding."""
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 5.0], [9.0, 9.0, 9.0]])
    y, weight = torch.tensor([2, 2, 0]), torch.tensor([1.0, 1.0, 0.0])
    frequency = torch.tensor([0.5, 0.25, 0.25])
    found = fedvls.of_others(logits, Batch(torch.zeros(3, 1), y, weight), frequency)
    expected = 0.5 * np.log((np.exp(1) + np.exp(0)) / 2) + 0.25 * np.log((np.exp(2) + np.exp(-1)) / 2)
    assert float(found) == pytest.approx(expected, abs=1e-6)
    mixed = Batch(torch.zeros(3, 1), torch.tensor([0, 2, 0]), weight)  # a sum over one, a mean over both
    expected = 0.5 * np.log(1 / 2) + 0.25 * np.log((np.exp(2) + np.exp(-1)) / 2) + 0.25 * np.log(np.exp(3) / 2)
    assert float(fedvls.of_others(logits, mixed, frequency)) == pytest.approx(expected, abs=1e-6)


def test_the_divergence_by_hand() -> None:
    teacher, logits = torch.tensor([[0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.0, -3.0]])
    p, q = (np.exp(each) / np.exp(each).sum() for each in ([0.0, 1.0], [0.5, 0.0]))
    among = torch.tensor([True, True, False])
    assert float(fedvls.divergence(teacher, logits, among)) == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)
    for none in (torch.tensor([False] * 3), torch.tensor([False, False, True])):
        assert float(fedvls.divergence(teacher, logits, none)) == 0.0


@pytest.mark.parametrize(("distil", "suppress"), [(0.1, 0.005), (3.0, 0.4)])
def test_steps_are_those_of_the_papers_loss(distil: float, suppress: float) -> None:
    run = taught(replace(SETTING, clip=None, momentum=0.9, batch_size=8), distil=distil, suppress=suppress)
    data, received = data_of(run, LOPSIDED), run.progress.server
    counts = np.bincount(data.y.numpy(), minlength=6)
    there, gone = np.flatnonzero(counts).tolist(), np.flatnonzero(counts == 0).tolist()
    assert len(there) == len(gone) == 3
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(received).items()}
    w = tree.unflatten(dict(leaves))
    optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.9, weight_decay=1e-2)
    for batch in data.batches(2):
        z, teacher = score(w, batch.x), score(received, batch.x)
        labels = torch.tensor([there.index(y) for y in batch.y.tolist()])
        loss = F.cross_entropy(z[:, there] + torch.tensor(counts[there]).log(), labels)
        said, wanted = z[:, gone].log_softmax(1), teacher[:, gone].softmax(1)
        loss = loss + distil * F.kl_div(said, wanted, reduction="batchmean")
        for c in there:
            others = z[batch.y != c, c]
            if len(others):
                loss = loss + suppress * counts[c] / counts.sum() * (others.exp().sum() / len(z)).log()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    upload, _ = toy.upload_once(run, LOPSIDED)
    assert largest_difference(upload, tree.map(torch.Tensor.detach, w)) < 2e-5
    assert largest_difference(upload, received) > 1e-2


def test_vacant_classes_are_kept_better_the_more_is_distilled() -> None:
    """While weight decay makes a model forget, what it says of them stays that of the received one."""
    lost = []
    for distil in (0.0, 1.0, 10.0):
        run = taught(replace(SETTING, clip=None, epochs=20, weight_decay=0.05), distil=distil, suppress=0.0)
        model, received, data = toy.upload_once(run, LOPSIDED)[0], run.progress.server, data_of(run, LOPSIDED)
        x, gone = data.images.plain(data.index), data.class_counts == 0
        now, then = (score(each, x)[:, gone].log_softmax(1) for each in (model, received))
        lost.append(float((then.exp() * (then - now)).sum(1).mean()))
    assert lost == sorted(lost, reverse=True) and lost[0] > 1.2 * lost[1] > 1.2 * lost[2] > 0


def test_logits_of_other_labels_are_lower_the_more_they_are_held_down() -> None:
    height = []
    for suppress in (0.0, 0.1, 1.0):
        run = taught(distil=0.0, suppress=suppress)
        model, data = toy.upload_once(run, LOPSIDED)[0], data_of(run, LOPSIDED)
        z = score(model, data.images.plain(data.index))
        others = (F.one_hot(data.y, 6) == 0) & (data.class_counts > 0)
        height.append(float(z[others].mean()))
    assert height == sorted(height, reverse=True) and height[0] > height[2] + 0.05


def test_a_client_of_one_class_learns_nothing_from_labels() -> None:
    run = taught(replace(SETTING, weight_decay=0.0), **OFF)
    assert int((data_of(run, ONE_CLASS).class_counts > 0).sum()) == 1
    upload, _ = toy.upload_once(run, ONE_CLASS)
    assert largest_difference(upload, run.progress.server) == 0.0


def test_the_received_model_is_in_evaluation_mode() -> None:
    """A step under batch norm is that of a loss whose teacher was asked beforehand, outside training."""
    setting = replace(BATCH_NORM, batch_size=1000, clip=None, weight_decay=0.0, momentum=0.0)
    run = run_of("fedvls", setting=setting, sizes=FEW, distil=20.0, suppress=0.0)
    task, data = run.task, data_of(run, 0)
    moved = tree.map_paths(lambda path, leaf: leaf + 0.3 * tree.is_statistic(path), run.progress.server)
    run.progress.server = moved  # with statistics unlike those of a batch
    (batch,) = data.batches(1)
    teacher, gone = task.logits(moved, batch.x), data.class_counts == 0

    def loss(w: Tree, batch: Batch) -> Tensor:
        logits = task.logits(w, batch.x)
        labels = ((~gone).cumsum(0) - 1)[batch.y]
        calibrated = F.cross_entropy(logits[:, ~gone] + data.class_counts[~gone].log(), labels)
        said = logits[:, gone].log_softmax(1)
        return calibrated + 20 * F.kl_div(said, teacher[:, gone].softmax(1), reduction="batchmean")

    _, gradient, following = task.gradient(loss, moved, batch)
    expected = tree.merge(following, tree.add(tree.parameters(moved), gradient, -0.05))
    assert largest_difference(toy.upload_once(run)[0], expected) < 1e-5


def test_engines_agree_under_batch_norm_and_padding_counts_for_nothing() -> None:
    for setting, sizes, most in ((BATCH_NORM, FEW, 1e-4), (replace(SETTING, rounds=1, clip=None), toy.SIZES, 1e-5)):
        runs = [run_of("fedvls", engine, setting, sizes, suppress=0.5) for engine in ("serial", "stacked")]
        assert largest_difference(*(toy.states(toy.finish(run)) for run in runs)) < most


def test_nothing_is_sent_that_fedavg_does_not_send() -> None:
    costs = [toy.finish(run_of(name)).outcome().cost for name in ("fedvls", "fedavg")]
    assert all(costs[0][way] == costs[1][way] for way in ("bytes_up", "bytes_down"))
    assert ALGORITHMS["fedvls"].tier == "S"


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("fedvls", engine, setting)), "unseen") > 0.8
