"""FedDisco: weights by hand, how far a client's classes are from equally frequent, FedAvg where neither term counts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW

SETTING = replace(toy.SETTING, rounds=3)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, participation=1.0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = toy.SIZES if setting.model == "mlp" else FEW
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def counted(discrepancies: list[float], sizes: list[float], weights: Any = None, **fields: float) -> list[float]:
    """What each client counts: clients are at the corners of a simplex."""
    corners = torch.eye(len(sizes))
    trees: list[Tree] = [
        {"body": {}, "head": {"w": corner}, "discrepancy": torch.tensor(each)}
        for corner, each in zip(corners, discrepancies, strict=True)
    ]
    server: Tree = {"body": {}, "head": {"w": torch.zeros(len(sizes))}}
    algorithm: Any = ALGORITHMS["feddisco"](**fields)
    uploads = Uploads(trees, torch.tensor(sizes), weights=None if weights is None else torch.tensor(weights))
    found = algorithm.aggregate(None, server, uploads)
    assert found.keys() == server.keys()
    return [float(x) for x in found["head"]["w"]]


def divergence(frequencies: list[float]) -> float:
    return sum(p * math.log(p * len(frequencies)) for p in frequencies if p)


def test_the_weights_by_hand() -> None:
    """Three clients of shares 0.5, 0.3 and 0.2, and two classes."""
    apart = [divergence(each) for each in ([1.0, 0.0], [0.5, 0.5], [0.75, 0.25])]
    assert [each / sum(apart) for each in apart] == pytest.approx([0.841240, 0, 0.158760], abs=1e-6)
    wanted = [0.224225, 0.5, 0.275775]
    assert counted(apart, [5.0, 3.0, 2.0]) == pytest.approx(wanted, abs=1e-6)
    assert counted(apart, [500.0, 300.0, 200.0]) == pytest.approx(wanted, abs=1e-6)
    assert counted(apart, [9.0, 9.0, 9.0], [5.0, 3.0, 2.0]) == pytest.approx(wanted, abs=1e-6)  # the setting's
    assert counted(apart, [5.0, 3.0, 2.0], penalty=0.0, offset=0.0) == pytest.approx([0.5, 0.3, 0.2])


def test_who_would_count_less_than_nothing_counts_nothing() -> None:
    assert counted([8.0, 2.0], [1.0, 1.0], penalty=1.0, offset=0.0) == pytest.approx([0.0, 1.0])
    assert counted([0.8, 0.2], [1.0, 3.0], penalty=50.0, offset=0.0) == pytest.approx([0.25, 0.75])  # nobody would


def test_even_clients_and_such_without_examples() -> None:
    assert counted([0.0, 0.0], [1.0, 3.0], offset=0.0) == pytest.approx([0.25, 0.75])
    assert counted([0.0, 0.3, 0.3], [0.0, 4.0, 4.0]) == pytest.approx([0.0, 0.5, 0.5])
    assert counted([0.0, 0.0], [0.0, 0.0]) == pytest.approx([0.5, 0.5])


def test_a_client_sends_the_divergence_of_its_classes_from_equal_ones() -> None:
    run = run_of("feddisco")
    for client, n in enumerate(toy.SIZES):
        counts = run.population.visit(client, 0, {}).class_counts.tolist()
        wanted = divergence([each / n for each in counts]) if n else 0.0
        assert float(toy.upload_once(run, client)[0]["discrepancy"]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("weights", ["size", "uniform"])
def test_without_both_terms_it_is_fedavg(weights: str, engine: str) -> None:
    setting = replace(SETTING, client_weights=weights)
    runs = run_of("feddisco", engine, setting, penalty=0.0, offset=0.0), run_of("fedavg", engine, setting)
    assert largest_difference(*(toy.finish(run).progress.server for run in runs)) == 0.0


@ENGINES
@pytest.mark.parametrize("one", [{"penalty": 0.0}, {"offset": 0.0}, {}])
def test_each_term_changes_something(one: dict[str, float], engine: str) -> None:
    runs = [toy.finish(run_of(name, engine, **fields)) for name, fields in (("feddisco", one), ("fedavg", {}))]
    assert largest_difference(*(run.progress.server for run in runs)) > 1e-3


def test_statistics_are_averaged_with_the_model() -> None:
    run = run_of("feddisco", setting=BATCH_NORM)
    sent = [{**run.task.init(), "discrepancy": torch.tensor(each)} for each in (0.0, 2.0)]
    sent[1] = {**tree.map(lambda leaf: leaf + 1, sent[1]), "discrepancy": sent[1]["discrepancy"]}
    found = run.algorithm.aggregate(run.task, run.progress.server, Uploads(sent, torch.tensor([1.0, 1.0])))
    moved = tree.sub(found, run.progress.server)
    assert all(torch.allclose(leaf, torch.tensor(0.1 / 0.7), atol=1e-5) for leaf in tree.flatten(moved).values())


def test_one_number_more_comes_up() -> None:
    run, fedavg = toy.finish(run_of("feddisco")), toy.finish(run_of("fedavg"))
    for what in ("bytes_down", "train_samples"):
        assert run.progress.cost[what] == fedavg.progress.cost[what]
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"] + 3 * 6 * 4  # rounds, clients of each
