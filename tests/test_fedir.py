"""FedIR: weights by hand and against a loop written out, FedAvg where all clients are alike, virtual clients."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, weight_decay=1e-2, clip=1.0)
EVERY_CLASS = (120, 120, 120, 120)
"""Clients that have twenty examples of each class: their distribution is that of all."""
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
LOPSIDED = 1
"""A client with 20, 20 and 4 examples of three classes."""

fedir = importlib.import_module("bench.algorithms.fedir")


def run_of(
    name: str, engine: str = "serial", setting: Setting = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any
) -> Run:
    (algorithm,) = parse_algorithms(name)
    setting = replace(setting, clients=len(sizes))
    made: Algorithm = replace(algorithm, **fields) if fields else algorithm  # type: ignore[type-var]
    return toy.run(made, engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


def counted(**fields: Any) -> Run:
    """A run whose server knows the target, before the first round of training."""
    run = run_of("fedir", **fields)
    task = run.task_at(0)
    run.exchange(task, run.algorithm.exchanges(task)[0])
    return run


def trained(run: Run, client: int) -> Tree:
    task = run.task_at(0)
    return toy.upload_once(run, client, task, run.algorithm.exchanges(task)[-1])[0]


def score(w: Tree, x: Tensor) -> Tensor:
    z = torch.relu(x.flatten(1) @ w["body"]["hidden"]["weight"].T + w["body"]["hidden"]["bias"])
    logits: Tensor = z @ w["head"]["weight"].T + w["head"]["bias"]
    return logits


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_where_clients_are_as_all_together_it_is_fedavg(engine: str) -> None:
    runs = [run_of(name, engine, sizes=EVERY_CLASS) for name in ("fedir", "fedavg")]
    assert largest_difference(*(model(toy.finish(run)) for run in runs)) == 0.0


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_virtual_clients_of_the_clients_size_are_fedavgs(engine: str) -> None:
    runs = run_of("fedir", engine, sizes=EVERY_CLASS, virtual_size=120), run_of("fedavg", engine, sizes=EVERY_CLASS)
    assert largest_difference(*(model(toy.finish(run)) for run in runs)) == 0.0


def test_where_they_are_not_it_is_another() -> None:
    plain, whole, virtual = run_of("fedavg"), run_of("fedir"), run_of("fedir", virtual_size=16)
    states = [model(toy.finish(run)) for run in (plain, whole, virtual)]
    assert all(largest_difference(a, b) > 1e-3 for a, b in ((states[0], states[1]), (states[1], states[2])))


def test_weights_of_the_card() -> None:
    """Counts of 70, 20, 10 and an even target; in a batch by itself an example weighs 1, whatever its class."""
    ratio = torch.tensor([1 / 3] * 3) / torch.tensor([0.7, 0.2, 0.1])
    assert ratio.tolist() == pytest.approx([0.476190, 1.666667, 3.333333], abs=1e-6)
    y = torch.tensor([0, 1, 2, 2, 0])
    batch = fedir.weighted(Batch(torch.zeros(5, 1), y, torch.tensor([1.0, 1, 1, 1, 0])), ratio)
    each = np.array([0.476190, 1.666667, 3.333333, 3.333333, 0])
    assert batch.weight.tolist() == pytest.approx((4 * each / each.sum()).tolist(), abs=1e-5)
    for c in range(3):
        alone = fedir.weighted(Batch(torch.zeros(1, 1), torch.tensor([c]), torch.ones(1)), ratio)
        assert alone.weight.tolist() == pytest.approx([1.0])
    nobody = fedir.weighted(Batch(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), torch.zeros(2)), ratio)
    assert nobody.weight.tolist() == [0.0, 0.0]


def test_the_target_is_the_distribution_of_all_examples() -> None:
    run = counted()
    y = run.population.images.y[torch.cat(run.population.index)].numpy()
    expected = np.bincount(y, minlength=6) / len(y)
    assert run.progress.server["target"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert run.progress.server["sizes"].tolist() == list(toy.SIZES)
    before = run.progress.server
    toy.finish(run)
    for key in ("target", "sizes"):
        assert torch.equal(before[key], run.progress.server[key])


@pytest.mark.parametrize("virtual_size", [None, 70])
def test_steps_are_those_of_the_papers_loss(virtual_size: int | None) -> None:
    """Self-normalised in each batch; a virtual client takes the first so many batches of an endless stream."""
    run = counted(setting=replace(SETTING, clip=None, momentum=0.9, batch_size=8), virtual_size=virtual_size)
    data, server = data_of(run, LOPSIDED), run.progress.server
    own = np.bincount(data.y.numpy(), minlength=6) / len(data.y)
    target = server["target"].double().numpy()
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(model(run)).items()}
    w = tree.unflatten(dict(leaves))
    optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.9, weight_decay=1e-2)
    batches = list(data.batches(4))[: 12 if virtual_size is None else 18]  # 2 · 6, and 2 · 9 batches of eight
    assert virtual_size is not None or len(batches) == 2 * 6
    for batch in batches:
        weight = torch.tensor([target[y] / own[y] for y in batch.y.tolist()]).float()
        loss = (weight * F.cross_entropy(score(w, batch.x), batch.y, reduction="none")).sum() / weight.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    upload = trained(run, LOPSIDED)
    assert largest_difference(upload, tree.map(torch.Tensor.detach, w)) < 2e-5
    assert largest_difference(upload, model(run)) > 1e-2


def test_a_class_that_is_rare_here_and_not_elsewhere_is_learnt_better() -> None:
    run, fedavg = counted(), run_of("fedavg")
    fedavg.progress.server = model(run)
    data = data_of(run, LOPSIDED)
    rare = int(torch.where(data.class_counts > 0, data.class_counts, 1000).argmin())
    assert data.class_counts[rare] == 4
    x = data.images.plain(data.index)[data.y == rare]
    losses = [
        float(F.cross_entropy(score(each, x), torch.full((len(x),), rare)))
        for each in (trained(run, LOPSIDED), toy.upload_once(fedavg, LOPSIDED)[0])
    ]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_virtual_clients_do_the_same_work_and_count_alike(engine: str) -> None:
    run = run_of("fedir", engine, replace(SETTING, rounds=1), virtual_size=32)
    toy.finish(run)
    steps = 2 * 2
    expected = sum(min(steps * 16, _seen(n, steps)) for n in toy.SIZES)
    assert run.progress.cost["train_samples"] == expected
    algorithm: Any = run.algorithm
    sent = [tree.map(lambda leaf, by=by: leaf + by, model(run)) for by in (0.0, 1.0, 5.0)]
    found = algorithm.aggregate(run.task, run.progress.server, Uploads(sent, torch.tensor([900.0, 100.0, 0.0])))
    expected_model = tree.map(lambda leaf: leaf + 0.5, model(run))
    assert largest_difference({key: found[key] for key in ("body", "head")}, expected_model) < 1e-6


def _seen(n: int, steps: int) -> int:
    """Count the examples of so many batches of 16 out of an endless stream of passes over n."""
    sizes = [min(16, n - start) for start in range(0, n, 16)]
    return sum(sizes[k % len(sizes)] for k in range(steps)) if n else 0


def test_clients_are_drawn_by_their_size() -> None:
    """The first of a cohort of one is client k with probability n_k / n; an empty client is never drawn."""
    run = counted(virtual_size=16)
    algorithm: Any = run.algorithm
    rounds = 4000
    drawn = Counter(algorithm.by_size(replace(run.task, round=r), run.progress.server, (3,))[0] for r in range(rounds))
    shares = np.array([drawn[k] / rounds for k in range(8)])
    expected = np.array(toy.SIZES) / sum(toy.SIZES)
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / rounds) and drawn[toy.SIZES.index(0)] == 0
    several = algorithm.by_size(run.task, run.progress.server, (0, 3, 4, 5, 6))
    assert len(set(several)) == 5 and algorithm.by_size(run.task, run.progress.server, ()) == []


def test_plain_fedir_leaves_cohorts_and_weights_to_the_setting() -> None:
    run = run_of("fedir", setting=replace(SETTING, participation=0.5))
    assert [each.cohort for each in run.algorithm.exchanges(run.task_at(0))] == [None, None]
    task = run.task_at(1)
    assert [each.cohort for each in run.algorithm.exchanges(task)] == [None]
    virtual = run_of("fedir", virtual_size=16)
    assert [each.cohort for each in virtual.algorithm.exchanges(task)] == ["by_size"]


def test_counts_are_sent_once_and_the_target_each_time() -> None:
    run, fedavg = toy.finish(run_of("fedir")), toy.finish(run_of("fedavg"))
    down, up = (run.progress.cost[way] - fedavg.progress.cost[way] for way in ("bytes_down", "bytes_up"))
    assert up == 8 * 4 * 6
    assert down == 8 * tree.nbytes(model(run)) + 3 * 8 * 4 * 6  # of one exchange and two rounds
    assert ALGORITHMS["fedir"].tier == "L"


def test_a_loss_part_is_weighted_too() -> None:
    names = "fedir+focal", "fedavg+focal", "fedir"
    states = [model(toy.finish(run_of(name))) for name in names]
    assert largest_difference(states[0], states[1]) > 1e-3 < largest_difference(states[0], states[2])
    alike = [model(toy.finish(run_of(name, sizes=EVERY_CLASS))) for name in names[:2]]
    assert largest_difference(*alike) == 0.0


def test_engines_agree_under_batch_norm_and_padding_counts_for_nothing() -> None:
    for setting, sizes, most in ((BATCH_NORM, FEW, 1e-4), (replace(SETTING, rounds=1, clip=None), toy.SIZES, 1e-5)):
        for virtual_size in (None, 24):
            runs = [run_of("fedir", each, setting, sizes, virtual_size=virtual_size) for each in ("serial", "stacked")]
            assert largest_difference(*(toy.states(toy.finish(run)) for run in runs)) < most


@pytest.mark.parametrize("virtual_size", [None, 32])
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str, virtual_size: int | None) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    run = toy.finish(run_of("fedir", engine, setting, virtual_size=virtual_size))
    assert measured(run, "unseen") > 0.8
