"""q-FedAvg: the server's step by hand, whose loss counts, where all comes to rest, FedAvg at q = 0."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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


def stepped(
    q: float, start: list[float], ends: list[list[float]], losses: list[float], weights: Any = None, lr: float = 0.1
) -> list[float]:
    """Where the server goes from one head; clients are of equal size."""
    server: Tree = {"body": {}, "head": {"w": torch.tensor(start)}}
    trees: list[Tree] = [
        {"body": {}, "head": {"w": torch.tensor(end)}, "loss": torch.tensor(loss)}
        for end, loss in zip(ends, losses, strict=True)
    ]
    uploads = Uploads(trees, torch.ones(len(trees)), weights=None if weights is None else torch.tensor(weights))
    algorithm: Any = ALGORITHMS["qfedavg"](q=q)
    found = algorithm.aggregate(SimpleNamespace(lr=lr), server, uploads)
    assert found.keys() == server.keys()
    return [float(x) for x in found["head"]["w"]]


@pytest.mark.parametrize(("q", "wanted"), [(0.0, [0.5, 1.0]), (1.0, [0.009524, 0.076190]), (2.0, [0.001435, 0.045911])])
def test_the_step_by_hand(q: float, wanted: list[float]) -> None:
    """Two clients of losses 0.5 and 2 that went to (1, 0) and (0, 2), at a learning rate of 0.1."""
    ends = [[1.0, 0.0], [0.0, 2.0]]
    found = stepped(q, [0.0, 0.0], ends, [0.5, 2.0])
    assert found == pytest.approx(wanted, abs=1e-6)
    shifted = stepped(q, [5.0, -7.0], [[a + 5, b - 7] for a, b in ends], [0.5, 2.0])
    assert shifted == pytest.approx([wanted[0] + 5, wanted[1] - 7], abs=1e-5)
    assert found[1] / 2 / found[0] == pytest.approx((2.0 / 0.5) ** q, rel=1e-5)  # whose loss is larger counts more


@pytest.mark.parametrize("loss", [0.5, 4.0])
@pytest.mark.parametrize("lr", [0.1, 0.02])
def test_one_client_goes_the_less_far_the_longer_its_update(loss: float, lr: float) -> None:
    for q in (0.5, 3.0):
        (found,) = stepped(q, [1.0], [[1.5]], [loss], lr=lr)
        assert found == pytest.approx(1 + 0.5 / (1 + q * 0.25 / (lr * loss)), abs=1e-6)


def test_clients_count_by_the_settings_weights_besides() -> None:
    thrice = stepped(1.0, [0.0, 0.0], [[1.0, 0.0], [0.0, 2.0]], [0.5, 2.0], [3.0, 1.0])
    copied = stepped(1.0, [0.0, 0.0], [[1.0, 0.0]] * 3 + [[0.0, 2.0]], [0.5] * 3 + [2.0])
    assert thrice == pytest.approx(copied, abs=1e-7)
    ignored = stepped(1.0, [0.0], [[1.0], [9.0]], [0.5, 7.0], [1.0, 0.0])
    assert ignored == pytest.approx(stepped(1.0, [0.0], [[1.0]], [0.5]))


def test_losses_of_nothing_and_of_nobody_are_harmless() -> None:
    assert stepped(2.0, [0.0], [[1.0], [3.0]], [0.0, 0.0]) == pytest.approx([0.0], abs=1e-6)
    assert stepped(0.0, [0.0], [[1.0], [3.0]], [0.0, -1.0]) == [2.0]
    assert stepped(1.0, [4.0], [[4.0], [4.0]], [0.0, 0.0], [0.0, 0.0]) == [4.0]
    assert 0 < stepped(1000.0, [0.0], [[1.0], [1.0]], [1e-3, 1e3])[0] < 1


@pytest.mark.parametrize("q", [0.0, 1.0, 4.0])
def test_it_comes_to_rest_where_the_powers_of_losses_are_least(q: float) -> None:
    """Of (w - 1)² / 2 + 0.1 and (w + 1)² + 0.1, one step of gradient descent each round."""
    w, lr = 0.5, 0.05
    for _ in range(400):
        near, far = (w - 1) ** 2 / 2 + 0.1, (w + 1) ** 2 + 0.1
        (w,) = stepped(q, [w], [[w - lr * (w - 1)], [w - lr * 2 * (w + 1)]], [near, far], lr=lr)
    near, far = (w - 1) ** 2 / 2 + 0.1, (w + 1) ** 2 + 0.1
    assert near**q * (w - 1) + far**q * 2 * (w + 1) == pytest.approx(0.0, abs=2e-3)
    assert near - far > 0 if q == 0 else near - far < 0.5


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize("weights", ["size", "uniform"])
def test_at_q_0_it_is_fedavg(weights: str, engine: str) -> None:
    setting = replace(SETTING, client_weights=weights)
    runs = run_of("qfedavg", engine, setting, q=0.0), run_of("fedavg", engine, setting)
    assert largest_difference(*(toy.finish(run).progress.server for run in runs)) == 0.0


@ENGINES
def test_at_the_default_it_is_not(engine: str) -> None:
    runs = [toy.finish(run_of(name, engine)) for name in ("qfedavg", "fedavg")]
    assert largest_difference(*(run.progress.server for run in runs)) > 1e-2


def test_a_client_sends_the_loss_of_the_received_model_over_all_its_examples() -> None:
    run = run_of("qfedavg")
    received = run.progress.server
    for client, n in enumerate(toy.SIZES):
        rows = run.population.visit(client, 0, {}).index
        x, y = run.population.images.plain(rows).flatten(1), run.population.images.y[rows]
        z = torch.relu(F.linear(x, received["body"]["hidden"]["weight"], received["body"]["hidden"]["bias"]))
        logits = F.linear(z, received["head"]["weight"], received["head"]["bias"])
        wanted = float(F.cross_entropy(logits, y)) if n else 0.0
        assert float(toy.upload_once(run, client)[0]["loss"]) == pytest.approx(wanted, abs=1e-5)


def test_running_statistics_are_averaged_and_are_in_no_norm() -> None:
    run = run_of("qfedavg", setting=BATCH_NORM, q=2.0)
    sent, sizes = [toy.upload_once(run, k)[0] for k in (0, 1)], torch.tensor([9.0, 5.0])
    statistics, _ = tree.split(sent[0], tree.is_statistic)
    other = [tree.merge(sent[0], tree.map(lambda leaf: leaf + 100, statistics)), sent[1]]
    found = [
        run.algorithm.aggregate(run.task_at(0), run.progress.server, Uploads(each, sizes)) for each in (sent, other)
    ]
    (usual, params), (shifted, same) = (tree.split(each, tree.is_statistic) for each in found)
    assert largest_difference(params, same) == 0.0
    mean = Uploads(sent, sizes).mean()
    assert largest_difference(usual, tree.split(mean, tree.is_statistic)[0]) == 0.0
    assert largest_difference(shifted, tree.map(lambda leaf: leaf + 100 * 9 / 14, usual)) < 1e-4


def test_one_number_more_comes_up_after_a_pass_without_gradients() -> None:
    run, fedavg = toy.finish(run_of("qfedavg")), toy.finish(run_of("fedavg"))
    assert run.progress.cost["bytes_down"] == fedavg.progress.cost["bytes_down"]
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"] + 3 * 6 * 4  # rounds, clients of each
    third = fedavg.progress.cost["train_samples"] / 2 / 3  # of one of two epochs
    assert run.progress.cost["train_samples"] == pytest.approx(fedavg.progress.cost["train_samples"] + third)
