"""FedLF: its factors and terms against published numbers and a loop written out, FedAvg without a bias where it is
off.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, LocalData, Task, Tree, losses, tree
from bench.contract import toy
from bench.losses import cross_entropy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.composed import Composed
from bench.protocol.settings import Setting
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, weight_decay=1e-2, clip=1.0)
EVERY_CLASS = (120, 120, 120, 120)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
OFF: dict[str, Any] = {"floor": 1.0, "centre": 0.0, "decorrelate": 0.0}
LOPSIDED = 1
"""A client with 20, 20 and 4 examples of three classes."""
ROWS = torch.tensor([[1.0, 2, 0], [2, 1, 1], [3, 4, 1], [4, 3, 0]])
"""Features whose correlations are 0.6, 0 and 0."""

fedlf = importlib.import_module("bench.algorithms.fedlf")


@dataclass(frozen=True, kw_only=True)
class Biasless(Algorithm):
    """FedAvg of a head without a bias."""

    def init_server(self, task: Task) -> Tree:
        model = task.init()
        return {**model, "head": {**model["head"], "bias": torch.zeros(task.num_classes)}}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        def loss(w: Tree, batch: Batch) -> Tensor:
            z = task.model.features(w["body"], batch.x)
            return cross_entropy(F.linear(z, w["head"]["weight"], torch.zeros(task.num_classes)), batch)

        return task.sgd(loss, shared, data.batches(task.epochs)), private


def run_of(
    algorithm: str | Algorithm, engine: str = "serial", setting: Setting = SETTING,
    sizes: tuple[int, ...] = toy.SIZES, **fields: Any
) -> Run:  # fmt: skip
    made = ALGORITHMS[algorithm](**fields) if isinstance(algorithm, str) else algorithm
    return toy.run(made, engine, setting=replace(setting, clients=len(sizes)), sizes=sizes)


def hidden(body: Tree, x: Tensor) -> Tensor:
    return torch.relu(x.flatten(1) @ body["hidden"]["weight"].T + body["hidden"]["bias"])


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_switched_off_it_is_fedavg_of_a_head_without_a_bias(engine: str) -> None:
    runs = run_of("fedlf", engine, **OFF), run_of(Biasless(), engine), run_of("fedavg", engine)
    off, biasless, fedavg = (toy.finish(run).progress.server for run in runs)
    assert largest_difference(off, biasless) == 0.0
    assert largest_difference(off, fedavg) > 1e-3
    assert off["head"]["bias"].eq(0).all()


@pytest.mark.parametrize("on", [{"floor": 0.25}, {"centre": 0.01}, {"decorrelate": 0.01}])
def test_each_term_changes_something_at_its_default(on: dict[str, float]) -> None:
    states = [toy.finish(run_of("fedlf", **{**OFF, **fields})).progress.server for fields in (on, {})]
    assert largest_difference(*states) > 1e-5


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_balanced_clients_scale_nothing(engine: str) -> None:
    runs = [run_of("fedlf", engine, sizes=EVERY_CLASS, **{**OFF, "floor": floor}) for floor in (0.25, 1.0)]
    assert largest_difference(*(toy.finish(run).progress.server for run in runs)) == 0.0


def test_factors_of_cifar10_lt_are_the_published_ones() -> None:
    counts = torch.tensor([5000.0, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    published = [1, 0.6995, 0.5194, 0.4116, 0.3468, 0.3080, 0.2848, 0.2708, 0.2624, 0.2575]
    assert fedlf.factors(counts, 0.25).tolist() == pytest.approx(published, abs=1e-4)
    assert fedlf.factors(torch.tensor([4.0, 0.0]), 0.25).tolist() == [1.0, 0.25]
    assert fedlf.factors(counts, 1.0).eq(1).all() and fedlf.factors(0 * counts, 0.25).eq(0.25).all()


def test_correlation_is_the_published_one_and_grows_with_the_batch() -> None:
    ones = torch.ones(4)
    assert float(losses.correlation(ROWS, ones)) == pytest.approx(0.27, abs=1e-6)
    assert float(losses.correlation(ROWS.repeat(4, 1), torch.ones(16))) == pytest.approx(1.6875, abs=1e-5)
    assert float(losses.correlation(ROWS[:1], ones[:1])) == 0.0
    padded = torch.cat([ROWS, torch.full((3, 3), 7.0)]).requires_grad_()
    value = losses.correlation(padded, torch.tensor([1.0] * 4 + [0.0] * 3))
    value.backward()
    assert value.item() == pytest.approx(0.27, abs=1e-6) and padded.grad is not None
    assert padded.grad[4:].eq(0).all() and padded.grad[:4].abs().max() > 0
    assert padded.grad[:4].sum(0).abs().max() < 1e-6  # a shift of a feature changes nothing
    assert (padded.grad * padded.detach())[:4].sum(0).abs().max() < 1e-5  # nor does its scale


def test_distances_have_a_gradient_where_there_is_none_to_be_had() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    apart = fedlf.distances(a, torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    assert apart.tolist() == [[pytest.approx(5), pytest.approx(4)], [pytest.approx(0, abs=1e-5), pytest.approx(3)]]
    apart.sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [[pytest.approx(0.6), pytest.approx(1.8)], [pytest.approx(-1.0), pytest.approx(0.0)]]


@pytest.mark.parametrize("fields", [{}, {"floor": 0.5, "centre": 0.3, "decorrelate": 0.2, "margin": 0.7}])
def test_steps_are_those_of_the_papers_loss(fields: dict[str, Any]) -> None:
    run = run_of("fedlf", setting=replace(SETTING, clip=None, momentum=0.9, batch_size=8), **fields)
    algorithm: Any = run.algorithm
    data, received = data_of(run, LOPSIDED), run.progress.server
    counts = np.bincount(data.y.numpy(), minlength=6)
    z = hidden(received["body"], data.images.plain(data.index))
    centres = torch.stack([z[data.y == c].mean(0) if counts[c] else torch.zeros(64) for c in range(6)])
    gap = min(max(float((a - b).norm()) for a in centres for b in centres), algorithm.margin)
    factor = torch.tensor(algorithm.floor + (1 - algorithm.floor) * counts / counts.max()).float()
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(received).items()}
    w = tree.unflatten(dict(leaves))
    optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.9, weight_decay=1e-2)
    for batch in data.batches(2):
        z = hidden(w["body"], batch.x)
        loss = F.cross_entropy(factor * (z @ w["head"]["weight"].T), batch.y)
        d = torch.stack([(z - centre).norm(dim=1) for centre in centres], 1)
        loss = loss + algorithm.centre * F.cross_entropy(-(d + gap * F.one_hot(batch.y, 6)), batch.y)
        standard = (z - z.mean(0)) / (z.var(0) + 1e-8).sqrt()
        products = standard.T @ standard
        off = ~torch.eye(64, dtype=torch.bool)
        loss = loss + algorithm.decorrelate * products[off].square().mean() / len(z)
        optimiser.zero_grad()
        loss.backward()
        leaves["head/bias"].grad = torch.zeros(6)
        optimiser.step()
    upload, _ = toy.upload_once(run, LOPSIDED)
    assert largest_difference(upload, tree.map(torch.Tensor.detach, w)) < 5e-5
    assert largest_difference(upload, received) > 1e-2 and gap > 0


def terms_after(**fields: Any) -> tuple[float, float]:
    """How far features are from their own centre, by how far the next one is, and how correlated they are."""
    run = run_of("fedlf", setting=replace(SETTING, clip=None, epochs=10), **{**OFF, **fields})
    data, received = data_of(run, LOPSIDED), run.progress.server
    x = data.images.plain(data.index)
    centres = data.class_means(lambda x: hidden(received["body"], x))
    z = hidden(toy.upload_once(run, LOPSIDED)[0]["body"], x)
    d = torch.cdist(z, centres)
    own = F.one_hot(data.y, 6).bool()
    apart = d[own].mean() - d.masked_fill(own, torch.inf).min(1).values.mean()
    correlated = np.nan_to_num(np.corrcoef(z[:, z.std(0) > 1e-3].numpy().T))
    return float(apart), float((correlated**2).mean())


def test_features_come_to_their_centre_and_correlate_less() -> None:
    (apart, correlated), (pulled, _), (_, spread) = (
        terms_after(**({name: 0.3} if name else {})) for name in ("", "centre", "decorrelate")
    )
    assert pulled < apart - 0.05
    assert spread < 0.9 * correlated


def test_what_a_loss_part_is_given_are_logits_without_a_factor() -> None:
    (composed,) = parse_algorithms("fedlf(floor=0.25, centre=0, decorrelate=0)+cross_entropy")
    assert isinstance(composed, Composed)
    states = [toy.finish(run_of(each)).progress.server for each in (composed, Biasless())]
    assert largest_difference(*states) == 0.0


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_body_whose_units_are_all_dead_leaves_everything_finite(engine: str) -> None:
    run = run_of("fedlf", engine, replace(SETTING, clip=None))
    dead = tree.map(lambda leaf: leaf - 100.0, run.task.init()["body"])
    run.progress.server = {**run.progress.server, "body": dead}
    run.step()
    assert tree.is_finite(toy.states(run))


def test_engines_agree_under_batch_norm_and_padding_counts_for_nothing() -> None:
    for setting, sizes, most in ((BATCH_NORM, FEW, 2e-4), (replace(SETTING, rounds=1, clip=None), toy.SIZES, 2e-5)):
        runs = [run_of("fedlf", engine, setting, sizes) for engine in ("serial", "stacked")]
        assert largest_difference(*(toy.states(toy.finish(run)) for run in runs)) < most


def test_nothing_is_sent_that_fedavg_does_not_send() -> None:
    costs = [toy.finish(run_of(name)).outcome().cost for name in ("fedlf", "fedavg")]
    assert all(costs[0][way] == costs[1][way] for way in ("bytes_up", "bytes_down"))


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("fedlf", engine, setting)), "unseen") > 0.8
