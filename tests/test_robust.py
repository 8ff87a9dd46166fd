"""Rules that bound what one client can do: the card's numbers, what attackers move, and what noise hides."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Aggregation, LocalData, Task, Tree, Uploads, keys, tree
from bench.algorithm import Algorithm, Exchange
from bench.contract import toy
from bench.plugins.registry import PARTS, label
from bench.protocol.composed import Composed
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import parse_algorithms
from bench.training import engine as engines
from bench.training import rounds
from tests import virtual

POINTS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1), (5.0, 5.0), (0.05, 0.05), (0.02, 0.0)]
"""The fifth is the attacker's."""
ROBUST = ("median", "krum", "krum(keep=1)", "trimmed_mean")
"""What is left of their results is a mean of values that honest clients sent, or lies between them."""


def rule(text: str) -> Aggregation:
    part = made(f"fedavg+{text}").pieces[-1]
    assert isinstance(part, Aggregation)
    return part


def made(text: str) -> Algorithm:
    (algorithm,) = parse_algorithms(text)
    return algorithm


@cache
def a_task() -> Task:
    return toy.task(toy.Host())


def combined(part: Aggregation, rows: Any, weights: Any = None) -> np.ndarray[Any, Any]:
    """What a rule makes of the rows of a table, whose first half lies in the body and whose second in the head."""
    table = torch.as_tensor(np.asarray(rows), dtype=torch.float32)
    middle = table.shape[1] // 2
    updates = [{"body": {"w": row[:middle].reshape(1, -1)}, "head": {"w": row[middle:]}} for row in table]
    shares = torch.ones(len(table)).double() if weights is None else torch.as_tensor(weights).double()
    found = part.combine(a_task(), updates, shares / shares.sum())
    return torch.cat([found["body"]["w"].flatten(), found["head"]["w"]]).double().numpy()


def table(rows: int, columns: int = 40, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


# The numbers of seven points ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("median", (0.05, 0.05)),
        ("krum(keep=1)", (0.05, 0.05)),
        ("krum(keep=3)", (0.023333, 0.016667)),
        ("krum(keep=7)", (0.752857, 0.75)),
        ("norm_bound", (0.139587, 0.136730)),
        ("norm_bound(bound=1e6)", (0.752857, 0.75)),
        ("geometric_median(steps=1)", (0.180151, 0.177053)),
        ("geometric_median", (0.062926, 0.060272)),
        ("geometric_median(steps=300)", (0.05, 0.05)),
    ],
)
def test_the_rules_of_seven_points(text: str, wanted: tuple[float, float]) -> None:
    assert combined(rule(text), POINTS).tolist() == pytest.approx(wanted, abs=2e-6)


def test_krum_ranks_by_the_scores_of_the_card() -> None:
    scores = [0.0254, 0.0314, 0.0354, 0.0414, 195.045, 0.0184, 0.0206]
    order = np.argsort(scores)
    for keep in range(1, 8):
        found = combined(rule(f"krum(keep={keep})"), POINTS)
        assert found == pytest.approx(np.mean(np.array(POINTS)[order[:keep]], axis=0), abs=1e-6)


# Of numbers at random, by other arithmetic ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 6, 9])
def test_the_median_is_that_of_each_coordinate(count: int) -> None:
    rows = table(count)
    assert combined(rule("median"), rows, range(1, count + 1)) == pytest.approx(np.median(rows, axis=0), abs=1e-6)


@pytest.mark.parametrize(
    ("count", "attackers", "seed"),
    [(1, 0, 0), (2, 0, 0), (4, 1, 0), (11, 4, 95), (11, 4, 165), (7, 1, 22)],  # one neighbour more or less tells
)
def test_krum_gives_an_update_whole_the_nearest_to_the_others_in_body_and_head(
    count: int, attackers: int, seed: int
) -> None:
    rows = table(count, seed=seed)
    apart = ((rows[:, None].astype(np.float64) - rows[None]) ** 2).sum(-1)
    near = max(count - attackers - 2, 1)
    scores = np.sort(apart, axis=1)[:, 1 : 1 + near].sum(1)
    part = rule(f"krum(share={(attackers + 0.5) / count if attackers else 0}, keep=1)")
    assert np.array_equal(combined(part, rows), rows[np.argmin(scores)])  # to the bit
    large = rows * np.float32(2.0**80)  # whose squares float32 does not hold
    assert np.array_equal(combined(part, large), large[np.argmin(scores)])


def test_body_and_head_are_near_together_or_not_at_all() -> None:
    rows = table(7, 2)
    found = combined(rule("krum(keep=1)"), rows)
    body, head = ((np.subtract.outer(column, column) ** 2) for column in rows.T)
    best = [int(np.sort(far, axis=1)[:, 1:5].sum(1).argmin()) for far in (body, head, body + head)]
    assert len(set(best)) == 3  # the example tells them apart
    assert np.array_equal(found, rows[best[2]])


def test_of_equals_krum_takes_the_first() -> None:
    rows = table(3)
    assert np.array_equal(combined(rule("krum(share=0, keep=1)"), rows[[1, 0, 1, 0]]), rows[1])


@pytest.mark.parametrize("bound", [0.5, 6.0, 1e3])
def test_a_norm_is_bounded_over_all_of_an_update(bound: float) -> None:
    rows, weights = table(5) * np.array([[0.1], [0.5], [1.0], [2.0], [50.0]]), np.array([1, 2, 3, 4, 5]) / 15
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    wanted = weights @ (rows * np.minimum(1, bound / length))
    assert combined(rule(f"norm_bound(bound={bound})"), rows, weights) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_nobody_moves_the_model_by_more_than_the_bound_times_its_weight() -> None:
    honest = table(9)
    for size in (1e3, 1e20, 1e30):
        found = combined(rule("norm_bound(bound=2)"), np.vstack([honest, size * table(1)]), [1] * 9 + [3])
        without = combined(rule("norm_bound(bound=2)"), np.vstack([honest, 0 * table(1)]), [1] * 9 + [3])
        assert np.linalg.norm(found - without) == pytest.approx(2 * 3 / 12, rel=1e-4)


def test_an_update_of_nothing_is_not_divided_by_its_length() -> None:
    assert combined(rule("norm_bound"), [[0.0, 0.0]]).tolist() == [0.0, 0.0]
    assert combined(rule("dp(noise=0)"), [[0.0, 0.0]]).tolist() == [0.0, 0.0]


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    rows, weights = table(6), np.array([3.0, 1, 1, 2, 1, 1])

    def total(point: np.ndarray[Any, Any]) -> float:
        return float((weights * np.linalg.norm(rows - point, axis=1)).sum())

    best = combined(rule("geometric_median(steps=300)"), rows, weights)
    step = np.random.default_rng(1).normal(size=(50, rows.shape[1])) * 1e-2
    assert all(total(best) <= total(best + each) for each in step)
    totals = [total(combined(rule(f"geometric_median(steps={steps})"), rows, weights)) for steps in (1, 2, 3, 10)]
    assert totals == sorted(totals, reverse=True) and total(weights @ rows / weights.sum()) > totals[0]


def test_far_away_counts_by_its_distance_and_near_no_more_than_smoothing_allows() -> None:
    rows, weights = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0]]), np.array([0.5, 0.25, 0.25])
    mean = weights @ rows
    for smoothing in (1e-6, 2.0):
        share = weights / np.maximum(np.linalg.norm(rows - mean, axis=1), smoothing)
        found = combined(rule(f"geometric_median(steps=1, smoothing={smoothing})"), rows, weights)
        assert found == pytest.approx(share @ rows / share.sum(), abs=1e-6)


# Attackers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e6, -1e6, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("text", ROBUST)
def test_a_fifth_of_attackers_moves_the_mean_and_not_the_rule(text: str, value: float) -> None:
    honest = table(8)
    rows = np.vstack([honest, np.full((2, honest.shape[1]), value)])
    found = combined(rule(text), rows)
    assert (found >= honest.min(0)).all() and (found <= honest.max(0)).all()
    mean = combined(rule("norm_bound(bound=1e6)"), np.vstack([honest, np.full((2, honest.shape[1]), 1e6)]))
    assert (np.abs(mean) > 1e4).all()


def test_the_geometric_median_holds_against_less_than_half_of_the_weight() -> None:
    honest = table(8)
    for size in (1e2, 1e4, 1e6):
        rows = np.vstack([honest, np.full((3, honest.shape[1]), size)])
        found = combined(rule("geometric_median(steps=100)"), rows)
        assert np.linalg.norm(found - honest.mean(0)) < 4 * np.linalg.norm(honest - honest.mean(0), axis=1).mean()
        lost = combined(rule("geometric_median(steps=100)"), rows, [1] * 8 + [4] * 3)  # of more than half
        assert np.linalg.norm(lost - size) < 1e-2 * size


@pytest.mark.parametrize("text", ["median", "krum", "dp(noise=0)"])
def test_whom_nobody_believes_the_size_of_weighs_no_more(text: str) -> None:
    rows = table(7)
    assert np.array_equal(combined(rule(text), rows), combined(rule(text), rows, [1, 1, 1, 1, 1, 1, 1e6]))


@pytest.mark.parametrize(
    ("text", "engine"), [("median", "serial"), ("krum", "stacked"), ("geometric_median", "stacked")]
)
def test_a_model_goes_on_under_attack(text: str, engine: str) -> None:
    """Two of eight send their update ten times turned round: the mean forgets, the rule learns."""
    accuracy, setting = {}, replace(toy.SETTING, participation=1.0, rounds=8, epochs=1, eval_every=8, lr=0.1)
    for each in ("norm_bound(bound=1e6)", text):
        run = toy.run(made(f"fedavg+{each}"), engine, setting=setting, sizes=(40,) * 8)
        usual = run.algorithm.server_verb

        def attacked(name: str, usual: Any = usual) -> Any:
            def take(task: Task, server: Tree, uploads: Uploads) -> Tree:
                for k in (2, 5):
                    uploads.trees[k] = tree.add(server, tree.sub(uploads.trees[k], server), -10.0)  # type: ignore[index]
                following: Tree = usual(name)(task, server, uploads)
                return following

            return take

        object.__setattr__(run.algorithm, "server_verb", attacked)
        accuracy[each] = toy.finish(run).outcome().metrics["generic"] or 0.0
    assert accuracy[text] > 0.6 > 0.4 > accuracy["norm_bound(bound=1e6)"]


# Off ------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("text", ["norm_bound(bound=None)", "geometric_median(steps=0)"])
def test_off_is_the_method(text: str) -> None:
    assert label(made(f"fedavg+{text}")) == "fedavg" and made(f"fedavg+{text}") == made("fedavg")


def ran(algorithm: Algorithm, engine: str = "serial", **setting: Any) -> rounds.Run:
    shape = replace(toy.SETTING, rounds=2, participation=1.0, **setting)
    return toy.finish(toy.run(algorithm, engine, setting=shape, sizes=(30, 50, 40, 20, 40, 40, 40, 40)))


def apart(one: rounds.Run, other: rounds.Run) -> float:
    return tree.largest_difference(one.progress.server, other.progress.server)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize(
    ("part", "weights"),
    [
        (PARTS["norm_bound"](bound=None), "size"),
        (PARTS["norm_bound"](bound=1e6), "size"),
        (PARTS["geometric_median"](steps=0), "size"),
        (PARTS["geometric_median"](smoothing=1e6), "size"),
        (PARTS["krum"](keep=8), "uniform"),
        (PARTS["dp"](clip=1e6, noise=0), "uniform"),
    ],
)
def test_rules_that_bound_nothing_average(part: Any, weights: str, engine: str) -> None:
    mean = ran(made("fedavg"), engine, client_weights=weights)
    assert apart(ran(Composed(made("fedavg"), (part,)), engine, client_weights=weights), mean) <= engines.TOLERANCE
    assert apart(ran(Composed(made("fedavg"), (type(part)(),)), engine, client_weights=weights), mean) > 1e-3


# Noise ----------------------------------------------------------------------------------------------------------


def test_the_noise_of_a_mean_is_that_of_a_sum_over_its_clients() -> None:
    rows = table(20, 10_000)
    noise = combined(rule("dp(clip=3, noise=0.5)"), rows) - combined(rule("dp(clip=3, noise=0)"), rows)
    assert noise.std() == pytest.approx(0.5 * 3 / 20, rel=0.03)
    assert abs(noise.mean()) < 4 * noise.std() / 100
    body, head = noise[:5000], noise[5000:]
    assert abs(np.corrcoef(body, head)[0, 1]) < 0.06  # no leaf has another's


@pytest.mark.equivalence
def test_what_is_released_without_noise_is_the_plain_mean_of_bounded_updates() -> None:
    rows = table(4) * np.array([[0.01], [0.1], [1.0], [10.0]])
    wanted = (rows * np.minimum(1, 2 / np.linalg.norm(rows, axis=1, keepdims=True))).mean(0)
    assert combined(rule("dp(clip=2, noise=0)"), rows, [1, 5, 9, 2]) == pytest.approx(wanted, abs=1e-6)


def test_one_client_more_moves_the_sum_by_the_bound_at_most() -> None:
    rows, released = table(10), rule("dp(clip=1.5, noise=0)")
    for size in (0.01, 1.0, 1e6):
        other = np.vstack([rows[:-1], size * rows[-1:]])
        with_it, without = 10 * combined(released, other), 9 * combined(released, rows[:-1])
        assert np.linalg.norm(with_it - without) <= 1.5 * (1 + 1e-5)


def test_noise_is_another_each_round_and_run_and_the_same_when_asked_again() -> None:
    updates, part = [{"body": {"w": torch.zeros(50)}}] * 3, rule("dp")
    weights, task = torch.ones(3).double() / 3, a_task()
    first, again, later, elsewhere = (
        part.combine(each, updates, weights)["body"]["w"]
        for each in (task, task, replace(task, round=1), replace(task, key=keys.key(1)))
    )
    assert torch.equal(first, again)
    for other in (later, elsewhere):
        assert not torch.isclose(first, other).any()


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_the_model_that_is_sent_on_is_the_noisy_one(engine: str) -> None:
    quiet, noisy = (ran(made(f"fedavg+dp(noise={noise})"), engine) for noise in (0, 0.1))
    noise = torch.cat(
        [leaf.flatten() for leaf in tree.flatten(tree.sub(noisy.progress.server, quiet.progress.server)).values()]
    )
    assert float(noise.std()) > 0.1 / 8  # two rounds of it, and what follows from the first


@dataclass(frozen=True, kw_only=True)
class Twice(toy.Host):
    """Two trips a round, whose noise would be the same."""

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        return (Exchange(), Exchange())


@dataclass(frozen=True, kw_only=True)
class SendsMore(toy.Host):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        upload, private = super().local_update(task, shared, private, data)
        return {**upload, "seen": data.class_counts.float()}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        mean: Tree = uploads.mean()
        return {key: mean[key] for key in server}


@pytest.mark.parametrize(
    ("method", "others", "said"),
    [
        (toy.Host(), (), None),
        (toy.Host(), ("topk",), None),
        (Twice(), (), "a second update"),
        (SendsMore(), (), "seen"),
        (made("scaffold"), (), "control"),
        (toy.Host(), ("balanced_softmax",), "class counts"),
    ],
)
def test_what_noise_does_not_hide_is_not_sent(method: Algorithm, others: tuple[str, ...], said: str | None) -> None:
    fields: dict[str, dict[str, Any]] = {"balanced_softmax": {"prior": "estimated"}}
    parts = (*(PARTS[each](**fields.get(each, {})) for each in others), PARTS["dp"]())
    run = toy.run(Composed(method, parts), setting=replace(toy.SETTING, rounds=1))
    if said is None:
        toy.finish(run)
    else:
        with pytest.raises(
            BadConfig, match=f"noise hides one update of body and head a round, and .*{said}.* would be"
        ):
            run.step()


def test_statistics_of_batches_are_not_hidden_and_those_that_stay_need_not_be() -> None:
    setting = replace(toy.SETTING, rounds=1, epochs=1, model="resnet8", norm="batch")
    with pytest.raises(BadConfig, match=r"stats.* would be sent in the clear"):
        toy.run(made("fedavg+dp"), setting=setting).step()
    for statistics in ("frozen", "personal"):
        toy.run(made("fedavg+dp"), setting=replace(setting, statistics=statistics)).step()


@pytest.mark.parametrize("text", ["krum", "sign+norm_bound", "topk+qsgd+geometric_median", "median", "dp"])
def test_a_gpu_gives_the_same_numbers(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that refuses what CUDA refuses, and where there is no float64, as on Apple's."""
    algorithm, setting = made(f"fedavg+{text}"), replace(toy.SETTING, rounds=2)
    expected = toy.finish(toy.run(algorithm, "stacked", setting=setting)).outcome()
    with virtual.device() as device:
        assert (
            toy.finish(toy.run(algorithm, "stacked", setting=setting, device=device)).outcome().digest
            == expected.digest
        )
    monkeypatch.setattr(tree, "WITHOUT_FLOAT64", frozenset({"cpu"}))
    assert toy.finish(toy.run(algorithm, "stacked", setting=setting)).outcome().digest == expected.digest


def test_the_norm_of_a_tree_is_that_of_all_its_numbers() -> None:
    leaves: Tree = {"a": torch.tensor([[3e25, 0.0]]), "b": {"c": torch.tensor(4e25)}}
    found: Tensor = tree.norm(leaves)
    assert found.dtype == torch.float64 and float(found) == pytest.approx(5e25)


@pytest.mark.parametrize("call", ["fedavg+dp+crt", "fedavg+ccvr+dp"])
def test_what_a_correction_learns_is_not_hidden(call: str) -> None:
    with pytest.raises(BadConfig, match=r"would have clients send more in the clear; leave one out$"):
        parse_algorithms(call)
