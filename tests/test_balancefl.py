"""BalanceFL: its steps against a loop written out, FedAvg where no class is scarce or missing, what each term does."""

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

from bench import Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, weight_decay=1e-2, clip=1.0)
EVERY_CLASS = (120, 120, 120, 120)
"""Clients that have twenty examples of each class."""
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
OFF: dict[str, Any] = {"balanced": False, "noise": 0.0, "inherit": 0.0, "smooth": 0.0}
LOPSIDED = 1
"""A client with 20, 20 and 4 examples of three classes."""
ONE_CLASS = 5

balancefl = importlib.import_module("bench.algorithms.balancefl")


def run_of(
    name: str, engine: str = "serial", setting: Setting = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any
) -> Run:
    setting = replace(setting, clients=len(sizes))
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


@lru_cache
def known() -> Tree:
    """A model that knows all classes."""
    return toy.finish(run_of("fedavg", setting=replace(SETTING, rounds=4), sizes=EVERY_CLASS)).progress.server


def taught(setting: Setting = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    """A run whose server sends that model."""
    run = run_of("balancefl", setting=setting, sizes=sizes, **fields)
    run.progress.server = known()
    return run


def hidden(body: Tree, x: Tensor) -> Tensor:
    return torch.relu(x.flatten(1) @ body["hidden"]["weight"].T + body["hidden"]["bias"])


def score(head: Tree, z: Tensor) -> Tensor:
    logits: Tensor = z @ head["weight"].T + head["bias"]
    return logits


def covariance(run: Run, body: Tree, client: int) -> np.ndarray[Any, Any]:
    """Of the classes' features, averaged by their size."""
    data = data_of(run, client)
    z, y = hidden(body, data.images.plain(data.index)).double().numpy(), data.y.numpy()
    total = np.zeros((z.shape[1], z.shape[1]))
    for c in np.unique(y):
        if (y == c).sum() > 1:
            total += (y == c).mean() * np.cov(z[y == c].T)
    return total


def root(matrix: np.ndarray[Any, Any]) -> Tensor:
    left, values, _ = np.linalg.svd(matrix, hermitian=True)
    return torch.from_numpy(left * np.sqrt(values) @ left.T).float()


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_switched_off_it_is_fedavg_where_no_class_is_missing(engine: str) -> None:
    runs = [run_of(name, engine, sizes=EVERY_CLASS, **fields) for name, fields in (("balancefl", OFF), ("fedavg", {}))]
    off, fedavg = (toy.finish(run).progress.server for run in runs)
    assert largest_difference(off, fedavg) == 0.0


@pytest.mark.parametrize(
    "on", [{}, {"balanced": True}, {"noise": 1.0}, {"inherit": 1.0}, {"smooth": 0.002}, {"missing": "batch"}]
)
def test_each_term_changes_something_and_so_does_a_missing_class(on: dict[str, Any]) -> None:
    """With nothing switched on, only that missing classes leave the softmax."""
    baseline = run_of("balancefl", **OFF) if on else run_of("fedavg")
    states = [toy.finish(run).progress.server for run in (run_of("balancefl", **{**OFF, **on}), baseline)]
    assert largest_difference(*states) > 1e-5


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("on", [{"inherit": 5.0}, {"noise": 5.0}])
def test_where_all_classes_are_there_and_even_nothing_is_inherited_and_nothing_noisy(
    on: dict[str, Any], engine: str
) -> None:
    runs = [run_of("balancefl", engine, sizes=EVERY_CLASS, **{**OFF, **fields}) for fields in (on, {})]
    states = [toy.finish(run).progress.server for run in runs]
    assert largest_difference(*states) == 0.0


@pytest.mark.parametrize("missing", ["client", "batch"])
@pytest.mark.parametrize("inherit", [1.0, 3.0])
def test_steps_are_those_of_the_papers_loss(missing: str, inherit: float) -> None:
    """Columns are picked by number, and the noise is made from the covariance that numpy gives."""
    setting = replace(SETTING, clip=None, momentum=0.9, batch_size=8)
    run = taught(setting, missing=missing, inherit=inherit, noise=0.7, smooth=0.01, temperature=3.0)
    data, received = data_of(run, LOPSIDED), run.progress.server
    counts = np.bincount(data.y.numpy(), minlength=6)
    assert sorted(counts) == [0, 0, 0, 4, 20, 20]
    spread = root(covariance(run, received["body"], LOPSIDED))
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(received).items()}
    w = tree.unflatten(dict(leaves))
    optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.9, weight_decay=1e-2)
    noisy = small = 0
    for batch in data.batches(2, weights=torch.tensor([1.0 / counts[y] for y in data.y.tolist()])):
        there = np.flatnonzero(counts).tolist() if missing == "client" else sorted(set(batch.y.tolist()))
        gone = [c for c in range(6) if c not in there]
        small += len(there) < 3
        z = hidden(w["body"], batch.x)
        rows = []
        for row, key, y in zip(z, batch.keys, batch.y.tolist(), strict=True):
            scarce = keys.uniform(keys.fold(key, "whether"), 1).item() < 1 - counts[y] / counts.max()
            noisy += scarce
            rows.append(row + 0.7 * scarce * (spread @ keys.normal(keys.fold(key, "noise"), 64)))
        labels = torch.tensor([there.index(y) for y in batch.y.tolist()])
        logits, teacher = score(w["head"], z), score(received["head"], hidden(received["body"], batch.x))
        loss = F.cross_entropy(score(w["head"], torch.stack(rows))[:, there], labels)
        loss = loss + inherit * F.cross_entropy(logits[:, gone] / 3, (teacher[:, gone] / 3).softmax(1))
        loss = loss - 0.01 * torch.distributions.Categorical(logits=logits[:, there]).entropy().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert noisy > 5 and (small > 0) == (missing == "batch")
    upload, _ = toy.upload_once(run, LOPSIDED)
    assert largest_difference(upload, tree.map(torch.Tensor.detach, w)) < 2e-5
    assert largest_difference(upload, received) > 1e-2


@pytest.mark.parametrize("client", [0, LOPSIDED, ONE_CLASS, 6])
def test_noise_has_the_mean_covariance_of_the_classes(client: int) -> None:
    run = taught(sizes=(60, 44, 33, 17, 9, 1, 0, 26))
    body, algorithm = run.progress.server["body"], run.algorithm
    found = algorithm._covariance(run.task, body, data_of(run, client))  # type: ignore[attr-defined]
    expected = covariance(run, body, client) if client != 6 else np.zeros((64, 64))
    assert np.abs(found.numpy() - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())
    square = balancefl.symmetric_root(found)
    assert largest_difference({"": square}, {"": square.T}) < 1e-4
    assert largest_difference({"": (square.double() @ square.double()).float()}, {"": found}) < 1e-4
    assert bool(expected.any()) == (client < 2)


def test_a_client_of_one_class_learns_nothing_from_labels() -> None:
    run = taught(replace(SETTING, weight_decay=0.0), inherit=0.0)
    assert int((data_of(run, ONE_CLASS).class_counts > 0).sum()) == 1
    upload, _ = toy.upload_once(run, ONE_CLASS)
    assert largest_difference(upload, run.progress.server) == 0.0


def test_what_is_missing_is_kept_better_the_more_is_inherited() -> None:
    """While weight decay makes a model forget, what it says of missing classes stays that of the received one."""
    lost = []
    for inherit in (0.0, 1.0, 4.0):
        setting = replace(SETTING, clip=None, epochs=20, weight_decay=0.05)
        run = taught(setting, inherit=inherit, smooth=0.0)
        model, received, data = toy.upload_once(run, LOPSIDED)[0], run.progress.server, data_of(run, LOPSIDED)
        x, gone = data.images.plain(data.index), data.class_counts == 0
        now, then = (score(m["head"], hidden(m["body"], x))[:, gone].div(2).log_softmax(1) for m in (model, received))
        lost.append(float((then.exp() * (then - now)).sum(1).mean()))
    assert lost == sorted(lost, reverse=True) and lost[0] > 1.5 * lost[1] > 1.5 * lost[2] > 0


def test_smoothing_makes_predictions_among_present_classes_less_certain() -> None:
    entropies = []
    for smooth in (0.0, 0.01, 0.1):
        run = taught(noise=0.0, smooth=smooth)
        model, data = toy.upload_once(run, LOPSIDED)[0], data_of(run, LOPSIDED)
        logits = score(model["head"], hidden(model["body"], data.images.plain(data.index)))
        there = logits[:, data.class_counts > 0]
        entropies.append(float(torch.distributions.Categorical(logits=there).entropy().mean()))
    assert entropies == sorted(entropies) and entropies[2] > entropies[0] + 0.05


@pytest.mark.parametrize("missing", ["client", "batch"])
def test_padding_counts_for_nothing(missing: str) -> None:
    setting = replace(SETTING, rounds=1, clip=None)
    runs = [
        run_of("balancefl", engine, setting, smooth=0.05, noise=2.0, missing=missing)
        for engine in ("serial", "stacked")
    ]
    assert largest_difference(*(toy.states(toy.finish(run)) for run in runs)) < 1e-5


@pytest.mark.parametrize("missing", ["client", "batch"])
def test_engines_agree_under_batch_norm(missing: str) -> None:
    runs = [run_of("balancefl", engine, BATCH_NORM, FEW, missing=missing) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(toy.finish(run)) for run in runs)) < 1e-4


def test_the_received_model_is_in_evaluation_mode() -> None:
    """A step under batch norm is that of a loss whose teacher was asked beforehand, outside training."""
    setting = replace(BATCH_NORM, batch_size=1000, clip=None, weight_decay=0.0, momentum=0.0)
    run = run_of("balancefl", setting=setting, sizes=FEW, noise=0.0, inherit=20.0, smooth=0.0)
    task, data = run.task, data_of(run, 0)
    model = run.progress.server
    moved = tree.map_paths(lambda path, leaf: leaf + 0.3 * tree.is_statistic(path), model)
    run.progress.server = moved  # with statistics unlike those of a batch
    (batch,) = data.batches(1, weights=(1 / data.class_counts.clamp(min=1))[data.y])
    teacher, there = task.logits(moved, batch.x), data.class_counts > 0

    def loss(w: Tree, batch: Any) -> Tensor:
        logits = task.logits(w, batch.x)
        labels = (there.cumsum(0) - 1)[batch.y]
        inherited = F.cross_entropy(logits[:, ~there] / 2, (teacher[:, ~there] / 2).softmax(1))
        return F.cross_entropy(logits[:, there], labels) + 20 * inherited

    _, gradient, following = task.gradient(loss, moved, batch)
    expected = tree.merge(following, tree.add(tree.parameters(moved), gradient, -0.05))
    assert largest_difference(toy.upload_once(run)[0], expected) < 1e-5


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("balancefl", engine, setting)), "unseen") > 0.8
