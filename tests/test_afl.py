"""AFL: weights on the simplex by hand, models by weights, where all comes to rest, FedAvg where weights stand still."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference

SETTING = replace(toy.SETTING, rounds=3)
EVERYBODY = replace(SETTING, participation=1.0, client_weights="uniform")
EMPTY = toy.SIZES.index(0)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting)


def model(server: Tree) -> Tree:
    return {"body": server["body"], "head": server["head"]}


def on_simplex(point: list[float]) -> list[float]:
    ALGORITHMS["afl"]()
    found: Tensor = import_module("bench.algorithms.afl").on_simplex(torch.tensor(point))
    return found.tolist()


def followed(
    server: Tree, ends: list[float], losses: list[float], clients: list[int] | None = None, sizes: Any = None,
    round: int = 0, dual_lr: float = 0.1,
) -> Tree:  # fmt: skip
    trees: list[Tree] = [
        {"body": {}, "head": {"w": torch.tensor([end])}, "loss": torch.tensor(loss)}
        for end, loss in zip(ends, losses, strict=True)
    ]
    given = torch.tensor(sizes or [1.0] * len(ends)), None if clients is None else torch.tensor(clients)
    algorithm: Any = ALGORITHMS["afl"](dual_lr=dual_lr)
    found: Tree = algorithm.aggregate(SimpleNamespace(round=round), server, Uploads(trees, *given))
    return found


def at_rest(weights: list[float], start: float = 0.0) -> Tree:
    params: Tree = {"body": {}, "head": {"w": torch.tensor([start])}}
    return {**params, "weights": torch.tensor(weights), "mean": tree.clone(params)}


@pytest.mark.parametrize(
    ("point", "wanted"),
    [
        ([0.3, 0.35, 0.45, 0.65], [0.1125, 0.1625, 0.2625, 0.4625]),
        ([0.35, 0.45, 0.65, 1.05], [0.0, 0.066667, 0.266667, 0.666667]),
        ([0.2, 0.5, 0.3], [0.2, 0.5, 0.3]),
        ([7.0, -3.0, 6.5], [0.75, 0.0, 0.25]),
        ([-5.0, -5.0], [0.5, 0.5]),
        ([4.0, 0.0, -2.0], [1.0, 0.0, 0.0]),
    ],
)
def test_the_nearest_point_of_the_simplex(point: list[float], wanted: list[float]) -> None:
    assert on_simplex(point) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("dual_lr", "wanted"),
    [(0.1, [0.1125, 0.1625, 0.2625, 0.4625]), (0.2, [0.0, 0.066667, 0.266667, 0.666667]), (0.0, [0.25] * 4)],
)
def test_weights_follow_losses_and_models_the_weights_so_far(dual_lr: float, wanted: list[float]) -> None:
    ends, losses = [1.0, 2.0, 4.0, 8.0], [0.5, 1.0, 2.0, 4.0]
    first = followed(at_rest([0.25] * 4), ends, losses, dual_lr=dual_lr)
    assert first["weights"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert float(first["head"]["w"]) == pytest.approx(sum(ends) / 4)  # as gradients of one model are
    second = followed(first, ends, losses, round=1, dual_lr=dual_lr)
    whole = sum(share * end for share, end in zip(wanted, ends, strict=True))
    assert float(second["head"]["w"]) == pytest.approx(whole, abs=1e-5)
    assert float(second["mean"]["head"]["w"]) == pytest.approx((sum(ends) / 4 + whole) / 2, abs=1e-5)


def test_who_has_no_weight_leaves_no_trace() -> None:
    server = at_rest([0.0, 0.5, 0.5])
    found = [followed(server, [end, 1.0, 3.0], [0.1, 1.0, 1.0]) for end in (-99.0, 99.0)]
    assert [float(each["head"]["w"]) for each in found] == [2.0, 2.0]
    alone = followed(at_rest([0.0, 1.0], 5.0), [7.0], [2.0], [0])  # what the other sent is lost
    assert float(alone["head"]["w"]) == 5.0


def test_whose_loss_is_lost_neither_gains_nor_loses_and_who_has_nothing_has_no_weight() -> None:
    found = followed(at_rest([0.25] * 4), [1.0, 1.0, 1.0], [1.0, 3.0, 2.0], [0, 1, 3])
    assert found["weights"].tolist() == pytest.approx([0.15, 0.35, 0.25, 0.25])
    found = followed(at_rest([0.25] * 4), [1.0, 1.0, 9.0], [1.0, 3.0, 0.0], [0, 1, 3], [5.0, 5.0, 0.0])
    assert float(found["head"]["w"]) == 1.0
    assert found["weights"].tolist() == pytest.approx([0.7 / 3, 1.3 / 3, 1 / 3, 0.0], abs=1e-6)
    found = followed(at_rest([0.5, 0.5], 4.0), [4.0, 4.0], [0.0, 0.0], sizes=[0.0, 0.0])
    assert float(found["head"]["w"]) == 4.0 and found["weights"].tolist() == [0.5, 0.5]


def test_the_mean_comes_to_where_the_worst_mixture_is_best() -> None:
    """Of (w - 1)² / 2 and (w + 1)², which are equal at (1 - √2) / (1 + √2), one step of gradient descent each round."""
    server, lr, wanted = at_rest([0.5, 0.5], 1.0), 0.05, (1 - 2**0.5) / (1 + 2**0.5)
    for round in range(1000):
        w = float(server["head"]["w"])
        ends = [w - lr * (w - 1), w - lr * 2 * (w + 1)]
        server = followed(server, ends, [(w - 1) ** 2 / 2, (w + 1) ** 2], round=round, dual_lr=0.02)
    assert float(server["mean"]["head"]["w"]) == pytest.approx(wanted, abs=0.02)
    least = 2 * (wanted + 1) / (1 - wanted + 2 * (wanted + 1))  # whose slopes cancel
    assert float(server["weights"][0]) == pytest.approx(least, abs=0.02)


@pytest.mark.equivalence
@ENGINES
def test_where_weights_stand_still_it_is_fedavg_of_all_alike(engine: str) -> None:
    run = toy.finish(run_of("afl", engine, dual_lr=0.0))
    fedavg = toy.finish(run_of("fedavg", engine, EVERYBODY))
    assert largest_difference(model(run.progress.server), fedavg.progress.server) == 0.0


@ENGINES
def test_at_the_default_it_is_not(engine: str) -> None:
    runs = [toy.finish(run_of(name, engine, EVERYBODY)) for name in ("afl", "fedavg")]
    assert largest_difference(*(model(run.progress.server) for run in runs)) > 1e-4


@ENGINES
def test_weights_stay_on_the_simplex_and_the_worst_served_gain(engine: str) -> None:
    run = run_of("afl", engine, replace(SETTING, rounds=5), dual_lr=0.05)
    models = []
    for round in range(5):
        losses = [float(toy.upload_once(run, k, run.task_at(round))[0]["loss"]) for k in range(8)]
        before = run.progress.server["weights"]
        run.step()
        after, worst = run.progress.server["weights"], max(range(8), key=losses.__getitem__)
        assert float(after.min()) >= 0 and float(after.sum()) == pytest.approx(1.0, abs=1e-6)
        assert after[worst] > before[worst] and after[EMPTY] == 0
        models.append(model(run.progress.server))
    total = models[0]
    for each in models[1:]:
        total = tree.add(total, each)
    averaged = run.algorithm.global_variants(run.task, run.progress.server)["mean"]
    assert largest_difference(averaged, tree.scale(total, 0.2)) < 1e-6


def test_all_take_part_whoever_is_drawn_and_send_a_number_more() -> None:
    run = toy.finish(run_of("afl", setting=replace(SETTING, participation=0.25)))
    fedavg = toy.finish(run_of("fedavg", setting=EVERYBODY))
    assert run.progress.cost["bytes_down"] == fedavg.progress.cost["bytes_down"]
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"] + 3 * 8 * 4
    third = fedavg.progress.cost["train_samples"] / 2 / 3
    assert run.progress.cost["train_samples"] == pytest.approx(fedavg.progress.cost["train_samples"] + third)
