"""FedNCM and Fed3R: heads that are computed, by numbers worked out by hand, and the same whoever holds what."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from bench import Batch, Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

SETTING = replace(toy.SETTING, participation=1.0, rounds=2)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
SPLITS = (toy.SIZES, (192, 0, 0, 0, 0, 0, 0, 0), (24,) * 8)
"""The same examples at clients that are unlike, at one, and at equal ones."""
C, D = 6, 64


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, sizes: Any = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def head(run: Run) -> Tree:
    found: Tree = toy.finish(run).progress.server["head"]
    return found


def pooled(run: Run) -> tuple[Any, Any]:
    """Features of all training examples under the initial body, and their labels."""
    rows = torch.cat([run.population.index[k] for k in range(run.population.training)])
    images = run.population.images
    z = run.task.model.features(run.task.init()["body"], images.plain(rows))
    return z.double().numpy(), images.y[rows].numpy()


# FedNCM ---------------------------------------------------------------------------------------------------------------


@ENGINES
def test_rows_are_directions_of_class_means_over_all_examples(engine: str) -> None:
    run = run_of("fedncm", engine)
    z, y = pooled(run)
    found = head(run)
    means = np.stack([z[y == c].mean(0) for c in range(C)])
    wanted = means / np.linalg.norm(means, axis=1, keepdims=True)
    assert found["weight"].numpy() == pytest.approx(wanted, abs=1e-5)
    assert found["bias"].eq(0).all()
    assert largest_difference(run.progress.server["body"], run.task.init()["body"]) == 0.0


def test_class_means_by_hand_and_a_class_without_examples_has_zeros() -> None:
    """Two clients, of 3 and 1 examples of class 0: (3 · (1, 0) + (1, 4)) / 4 = (1, 1)."""
    run = run_of("fedncm")
    sent = []
    for mean, count in (((1.0, 0.0), 3.0), ((1.0, 4.0), 1.0)):
        means, counts = torch.zeros(C, D), torch.zeros(C)
        means[0, :2], counts[0] = torch.tensor(mean), count
        sent.append({"means": means, "counts": counts})
    sent[1]["means"][2, 5], sent[1]["counts"][2] = 7.0, 2.0
    found = run.algorithm.server_verb("settle")(run.task, run.progress.server, Uploads(sent, torch.tensor([3.0, 3])))
    weight = torch.zeros(C, D)
    weight[0, :2], weight[2, 5] = 0.5**0.5, 1.0
    assert torch.allclose(found["head"]["weight"], weight, atol=1e-6)
    assert found["head"]["weight"][[1, 3, 4, 5]].eq(0).all() and found["head"]["bias"].eq(0).all()


def test_all_clients_are_asked_once() -> None:
    run = toy.finish(run_of("fedncm", setting=replace(SETTING, participation=0.25, rounds=3)))
    model = tree.nbytes({key: run.progress.server[key] for key in ("body", "head")})
    assert run.progress.cost["bytes_up"] == 8 * 4 * (C * D + C)
    assert run.progress.cost["bytes_down"] == 8 * model
    assert run.progress.cost["train_samples"] == pytest.approx(sum(toy.SIZES) / 3)


@pytest.mark.equivalence
@ENGINES
def test_tuned_it_is_fedavg_from_that_head(engine: str) -> None:
    run, fedavg = (run_of(name, engine, **fields) for name, fields in (("fedncm", {"finetune": True}), ("fedavg", {})))
    first = toy.finish(run_of("fedncm", engine)).progress.server
    fedavg.progress.server = {"body": first["body"], "head": first["head"]}
    assert largest_difference(toy.finish(run).progress.server, toy.finish(fedavg).progress.server) == 0.0
    assert largest_difference(run.progress.server["body"], first["body"]) > 1e-3


def test_parts_that_act_on_training_are_refused_where_there_is_none() -> None:
    for text in ("fedncm+focal", "fedncm+topk", "fedncm+median", "fed3r+focal"):
        with pytest.raises(ValueError, match="nothing is trained"):
            parse_algorithms(text)
    assert len(parse_algorithms("fedncm(finetune=True)+focal+topk,fedncm+tau_norm,fed3r+tau_norm")) == 3


# Fed3R ----------------------------------------------------------------------------------------------------------------


def regression(z: Any, y: Any, ridge: float) -> tuple[Any, Any]:
    """By the normal equations of numpy, each class's weights of length one."""
    z = np.concatenate([z, np.ones((len(z), 1))], 1)
    w = np.linalg.solve(z.T @ z + ridge * np.eye(z.shape[1]), z.T @ np.eye(C)[y])
    w = w / np.maximum(np.linalg.norm(w[:-1], axis=0), 1e-12)
    return w[:-1].T, w[-1]


@pytest.mark.parametrize("ridge", [0.01, 10.0])
@ENGINES
def test_the_head_is_the_ridge_regression_on_all_examples(ridge: float, engine: str) -> None:
    run = run_of("fed3r", engine, ridge=ridge)
    found, (weight, bias) = head(run), regression(*pooled(run), ridge)
    assert found["weight"].numpy() == pytest.approx(weight, abs=1e-5)
    assert found["bias"].numpy() == pytest.approx(bias, abs=1e-5)


def test_four_examples_by_hand() -> None:
    """Of (1, 0), (1, 1) and of (0, 1), (2, 1), with 0.01 on the diagonal."""
    ALGORITHMS["fed3r"]()
    solved = import_module("bench.algorithms.fed3r").solved
    z = torch.tensor([[1.0, 0, 1], [1.0, 1, 1], [0.0, 1, 1], [2.0, 1, 1]], dtype=torch.float64)
    square, y = z.T @ z, torch.tensor([[1.0, 1, 0, 0], [0.0, 0, 1, 1], [0.0, 0, 0, 0]], dtype=torch.float64)
    found = solved(square[tuple(torch.triu_indices(3, 3))], y @ z, 0.01)
    raw = torch.linalg.solve(square + 0.01 * torch.eye(3), z.T @ y.T)  # (0.00487, -0.648235, 0.978859), (3.2e-5, ...)
    assert raw[:, 0].tolist() == pytest.approx([0.004870, -0.648235, 0.978859], abs=1e-6)
    assert raw[:, 1].tolist() == pytest.approx([0.000032, 0.657959, 0.006483], abs=1e-6)
    for c in (0, 1):
        length = raw[:2, c].norm()
        assert torch.allclose(found["weight"][c], raw[:2, c] / length, atol=1e-9)
        assert torch.allclose(found["bias"][c], raw[2, c] / length, atol=1e-9)
    assert found["weight"][2].eq(0).all() and found["bias"][2] == 0


@pytest.mark.parametrize("name", ["fed3r", "fedncm"])
def test_the_head_is_the_same_whoever_holds_what(name: str) -> None:
    heads = [head(run_of(name, sizes=sizes)) for sizes in SPLITS]
    assert all(largest_difference(heads[0], other) < 2e-6 for other in heads[1:])


def test_sums_are_the_same_as_far_as_features_are() -> None:
    runs = [toy.finish(run_of("fed3r", sizes=sizes)) for sizes in SPLITS]
    for key in ("products", "targets"):
        sums = [run.progress.server[key] for run in runs]
        assert sums[0].dtype == torch.float64
        assert all(torch.allclose(sums[0], other, rtol=1e-5, atol=1e-4) for other in sums[1:])


def test_whoever_was_asked_is_not_asked_again_and_in_the_end_all_were() -> None:
    run = run_of("fed3r", setting=replace(SETTING, participation=0.25, rounds=30, eval_every=30))
    asked: list[int] = []
    while run.progress.round < run.setting.rounds:
        drawn = run.population.cohort(run.progress.round)
        new = [k for k in drawn if k not in asked]
        asked += new
        before = run.progress.server
        run.step()
        assert run.progress.server["seen"].tolist() == [float(k in asked) for k in range(8)]
        if not new:
            assert largest_difference(run.progress.server, before) == 0.0
    assert sorted(asked) == list(range(8))
    assert largest_difference(run.progress.server["head"], head(run_of("fed3r"))) < 2e-6
    size = D + 1
    assert run.progress.cost["bytes_up"] == 8 * 8 * (size * (size + 1) // 2 + size * C)
    assert run.progress.cost["bytes_down"] == 8 * tree.nbytes(run.algorithm.broadcast(run.task, run.progress.server))


def test_who_was_asked_and_did_not_arrive_is_asked_again() -> None:
    run = toy.finish(run_of("fed3r", setting=replace(SETTING, lost=0.5, rounds=12, eval_every=12)))
    assert run.progress.server["seen"].eq(1).all()
    assert largest_difference(run.progress.server["head"], head(run_of("fed3r"))) < 2e-6


@pytest.mark.parametrize("name", ["fed3r", "fedncm"])
@ENGINES
def test_it_tells_classes_apart_on_a_body_that_never_moves(name: str, engine: str) -> None:
    run = toy.finish(run_of(name, engine))
    assert largest_difference(run.progress.server["body"], run.task.init()["body"]) == 0.0
    assert measured(run, "generic") > 0.9


def test_a_client_adds_up_what_it_has() -> None:
    run = run_of("fed3r")
    data, task = data_of(run, 3), run.task
    assert all(run.progress.server[key].dtype == torch.float64 for key in ("products", "targets"))
    batch: Batch = next(iter(data.plain_batches()))
    z = torch.cat([task.model.features(task.init()["body"], batch.x), torch.ones(len(batch.y), 1)], 1).double()
    upload, _ = toy.upload_once(run, 3)
    assert torch.allclose(upload["products"], (z.T @ z)[tuple(torch.triu_indices(D + 1, D + 1))], atol=1e-9)
    for c in range(C):
        assert torch.allclose(upload["targets"][c], z[batch.y == c].sum(0), atol=1e-9)
