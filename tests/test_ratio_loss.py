"""Ratio Loss: ratios by hand and against the search written out, FedAvg without them, what the server's probes say."""

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

from bench import Algorithm, LocalData, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import BadConfig, Setting
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2, weight_decay=1e-2, clip=1.0)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch", rounds=2, epochs=1)
FEW = (20, 9, 0, 0, 0, 0, 0, 0)
LOPSIDED = 1
"""A client with 20, 20 and 4 examples of three classes."""
WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 2.0, 4.0, 1.5])

ratio_loss = importlib.import_module("bench.algorithms.ratio_loss")


def run_of(name: str, engine: str = "serial", setting: Setting = SETTING, **fields: Any) -> Run:
    (algorithm,) = parse_algorithms(name)
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    made: Algorithm = replace(algorithm, **fields) if fields else algorithm  # type: ignore[type-var]
    return toy.run(made, engine, setting=setting, sizes=sizes)


def model(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


def auxiliary(run: Run, round: int = 0) -> LocalData:
    data = run.task_at(round).auxiliary
    assert data is not None
    return data


def score(w: Tree, x: Tensor) -> Tensor:
    z = torch.relu(x.flatten(1) @ w["body"]["hidden"]["weight"].T + w["body"]["hidden"]["bias"])
    logits: Tensor = z @ w["head"]["weight"].T + w["head"]["bias"]
    return logits


@lru_cache
def uploads() -> Uploads:
    run = run_of("fedavg")
    return Uploads([toy.upload_once(run, k)[0] for k in (0, 1, 3)], torch.tensor([60.0, 44.0, 17.0]))


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_where_ratios_count_for_nothing_it_is_fedavg(engine: str) -> None:
    runs = run_of("ratio_loss", engine, beta=0.0), run_of("fedavg", engine)
    assert largest_difference(*(model(toy.finish(run)) for run in runs)) == 0.0
    assert runs[0].progress.server["weights"].eq(1).all()


@pytest.mark.equivalence
def test_the_first_round_is_fedavgs_and_the_second_is_not() -> None:
    run, fedavg = run_of("ratio_loss"), run_of("fedavg")
    for same in (True, False):
        run.step()
        fedavg.step()
        assert (largest_difference(model(run), model(fedavg)) == 0.0) == same
    assert run.progress.server["weights"].min() >= 1 and run.progress.server["weights"].max() > 1.01


def test_ratios_by_hand() -> None:
    """Positions: 0's; 1's; nobody's, as class 0 moves too much; nobody's, as class 2 moves too much, the other way;
    0's again; nobody's.
    """
    moved = torch.tensor(
        [
            [4.0, 1.0, 9.0, 0.5, 6.0, 0.0],
            [1.0, 5.0, 10.0, 2.0, -2.0, 0.0],
            [-3.0, 0.0, 1.0, -1.9, 0.0, 0.0],
        ]
    )
    found = ratio_loss.ratios(moved, 0.8)
    zero = abs(4 + 6) / abs((1 - 3) / 2 + (-2 + 0) / 2)
    one = 5 / ((1 + 0) / 2)
    assert found.tolist() == pytest.approx([zero, one, 10.0])
    assert ratio_loss.ratios(torch.tensor([[1.0], [1e-6]]), 0.8).tolist() == [5000.0, 10.0]


def searched(moved: Any, rivals: float) -> list[float]:
    """Position by position, class by class, as the reference does."""
    classes = len(moved)
    own: list[list[Any]] = [[] for _ in range(classes)]
    for where in np.ndindex(moved.shape[1:]):
        here = [moved[(p, *where)] for p in range(classes)]
        first = int(np.argmax(here))
        if sum(abs(each) / abs(here[first]) > rivals for each in here) < 2:
            own[first].append(where)
    found = []
    for p in range(classes):
        mine = sum(moved[(p, *where)] for where in own[p])
        others = sum(np.mean([moved[(q, *where)] for q in range(classes) if q != p]) for where in own[p])
        found.append(min(abs(mine) / abs(others), 5000.0) if others else 10.0)
    return found


@pytest.mark.parametrize("rivals", [0.3, 0.8])
def test_ratios_are_those_of_a_search(rivals: float) -> None:
    moved = np.random.default_rng(4).normal(size=(4, 4, 30)) + 2 * np.eye(4)[:, :, None]
    found = ratio_loss.ratios(torch.from_numpy(moved), rivals)
    assert found.tolist() == pytest.approx(searched(moved, rivals), rel=1e-5)


def test_probes_train_on_one_class_at_a_time_from_what_the_round_began_with() -> None:
    run = run_of("ratio_loss", setting=replace(SETTING, batch_size=4))
    run.step()
    server = {**run.progress.server, "weights": WEIGHTS}  # which are no matter to the server
    algorithm: Any = run.algorithm
    found = algorithm._probe(run.task_at(1), server)
    data = auxiliary(run, 1)
    assert data.class_counts.tolist() == [10] * 6
    for c in range(6):
        leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(model(run)).items()}
        w = tree.unflatten(dict(leaves))
        optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.5, weight_decay=1e-2)
        stream = list(data.batches(steps=6, salt=f"probe {c}", weights=(data.y == c).float()))  # 2 epochs of 3
        for batch in stream:
            assert batch.y.eq(c).all()
            optimiser.zero_grad()
            F.cross_entropy(score(w, batch.x), batch.y).backward()
            torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
            optimiser.step()
        moved = w["head"]["weight"].detach() - server["head"]["weight"]
        assert torch.allclose(found[c], moved, atol=1e-5) and moved[c].mean() > 0


def test_weights_of_the_next_round_are_those_of_the_probes() -> None:
    """At the model that the round began with, not at the average; who sent what is no matter."""
    run = run_of("ratio_loss", beta=0.3, rivals=0.6)
    task, server = run.task_at(0), run.progress.server
    algorithm: Any = run.algorithm
    expected = 1 + 0.3 * np.array(searched(algorithm._probe(task, server).double().numpy(), 0.6))
    found = algorithm.aggregate(run.task_at(0), server, uploads())
    assert found["weights"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert largest_difference({key: found[key] for key in ("body", "head")}, uploads().mean()) == 0.0
    other = algorithm.aggregate(run.task_at(0), server, Uploads(uploads().trees[:1], torch.ones(1)))
    assert torch.equal(other["weights"], found["weights"])


def test_steps_are_those_of_the_papers_loss() -> None:
    """Each example's cross-entropy times its class's weight, divided by their number and not by the weights' sum."""
    run = run_of("ratio_loss", setting=replace(SETTING, clip=None, momentum=0.9, batch_size=8))
    run.progress.server["weights"] = WEIGHTS
    data = data_of(run, LOPSIDED)
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(model(run)).items()}
    w = tree.unflatten(dict(leaves))
    optimiser = torch.optim.SGD(leaves.values(), 0.05, 0.9, weight_decay=1e-2)
    for batch in data.batches(2):
        each = F.cross_entropy(score(w, batch.x), batch.y, reduction="none")
        optimiser.zero_grad()
        (WEIGHTS[batch.y] * each).mean().backward()
        optimiser.step()
    upload, _ = toy.upload_once(run, LOPSIDED)
    assert largest_difference(upload, tree.map(torch.Tensor.detach, w)) < 2e-5
    assert largest_difference(upload, model(run)) > 1e-2


def test_a_class_that_weighs_more_is_learnt_better() -> None:
    data, lost = data_of(run_of("ratio_loss"), LOPSIDED), []
    rare = int(torch.where(data.class_counts > 0, data.class_counts, 1000).argmin())
    x = data.images.plain(data.index)[data.y == rare]
    for weight in (1.0, 3.0, 9.0):
        run = run_of("ratio_loss")
        run.progress.server["weights"] = torch.ones(6).index_fill(0, torch.tensor([rare]), weight)
        upload, _ = toy.upload_once(run, LOPSIDED)
        lost.append(float(F.cross_entropy(score(upload, x), torch.full((len(x),), rare))))
    assert lost == sorted(lost, reverse=True) and lost[2] < 0.8 * lost[0]


def test_a_loss_in_its_place_is_refused_for_it_would_be_fedavgs() -> None:
    with pytest.raises(BadConfig, match="nothing left of it but FedAvg"):
        parse_algorithms("ratio_loss+focal")
    assert parse_algorithms("ratio_loss+topk+tau_norm")


def test_probes_are_counted_and_weights_are_sent() -> None:
    run, fedavg = toy.finish(run_of("ratio_loss")), toy.finish(run_of("fedavg"))
    assert run.outcome().cost["server_samples"] == 2 * 6 * 2 * 16  # rounds, classes, epochs of one batch
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"]
    assert run.progress.cost["bytes_down"] - fedavg.progress.cost["bytes_down"] == 2 * 8 * 4 * 6
    assert ALGORITHMS["ratio_loss"].tier == "A"


@pytest.mark.parametrize("statistics", ["shared", "personal"])
def test_engines_agree_under_batch_norm(statistics: str) -> None:
    """At the first round's weights: a position that two classes move alike is one's or nobody's by rounding."""
    setting = replace(BATCH_NORM, statistics=statistics, rounds=1)
    runs = [toy.finish(run_of("ratio_loss", engine, setting)) for engine in ("serial", "stacked")]
    assert largest_difference(*(model(run) for run in runs)) < 2e-4
    assert all(tree.is_finite(run.progress.server) for run in runs)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("ratio_loss", engine, setting)), "unseen") > 0.8
