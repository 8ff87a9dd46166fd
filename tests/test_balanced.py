"""Balanced running statistics: a momentum that falls over a client's steps and over rounds, classes of a batch that are
weighed, and a penalty; and that with none of these nothing differs from shared ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Batch, Tree, keys, models, tree
from bench.contract import toy
from bench.models import layers
from bench.models.balanced import Balanced, at_rest, class_weights, is_count
from bench.models.weights import read
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import OF_BALANCED, BadConfig
from bench.sweep.config import Sweep, parse_dataset
from bench.training.engine import TOLERANCE
from bench.training.rounds import Run
from bench.training.statistics import taken_up
from tests.test_command import Bench
from tests.test_command import bench as bench

ENGINES = ("serial", "stacked")
ALL: dict[str, Any] = {"kappa": 0.4, "server_momentum": 0.3, "balance": True, "penalty": 0.1}
SETTING = replace(toy.SETTING, model="resnet8", norm="batch", rounds=1, epochs=1, batch_size=4, participation=1.0)
FEW = (6, 0, 0, 0, 0, 0, 0, 3)
"""Examples of clients: batches of 4, 2 and 3, which stacked clients have padded."""
SHOWN = toy.Toy(test=30)
"""Test images are dear to a network with batch norm."""


@cache
def run_of(name: str, engine: str, **changed: Any) -> Run:
    setting = replace(SETTING, **{"statistics": "balanced", **changed})
    return toy.finish(toy.run(ALGORITHMS[name](), engine, setting=setting, sizes=FEW, dataset=SHOWN))


def layer_of(channels: int, balanced: Balanced, classes: int = 3) -> Tree:
    made = {"norm": layers.norm_layer("batch", channels, torch.device("cpu"))}
    layer: Tree = balanced.prepared(made, classes)["norm"]
    return layer


def step(layer: Tree, x: Tensor, balanced: Balanced | None, padded: bool = False, y: Tensor | None = None) -> Tree:
    """Give the layer after a step of training."""
    recorder = layers.Recorder(torch.ones(len(x)), padded, frozen=False, balanced=balanced, y=y)
    with layers.training(recorder):
        layers.norm("batch", layer, x)
    return {**layer, "stats": recorder.following({"stats": layer["stats"]})["stats"]}


def batches(count: int, size: int = 6) -> list[Tensor]:
    return [keys.normal(keys.key(k), size, 2, 3, 3) * (k + 1) + k for k in range(count)]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3))


# How much of the way ----------------------------------------------------------------------------------------


def test_the_momentum_falls_as_in_the_card() -> None:
    wanted = {
        0.5: [0.316228, 0.25, 0.208562, 0.180223, 0.159644, 0.14404],
        0.0: [1, 0.5, 1 / 3, 0.25],
        1.0: [0.1] * 5,
    }
    for kappa, values in wanted.items():
        rule = Balanced(kappa)
        assert [rule.rate(0.1, float(n + 1)) for n in range(len(values))] == pytest.approx(values, abs=1e-6)
        tensors = [float(rule.rate(0.1, torch.tensor(n + 1.0))) for n in range(len(values))]
        assert tensors == pytest.approx(values, abs=1e-6)
    assert Balanced(0.5).rate(0.1, 1e6) == pytest.approx(0.051317, abs=1e-6)
    assert Balanced(0.4).rate(0.3, 1.0) == pytest.approx(0.618, abs=5e-4)
    assert Balanced(0.4).rate(0.3, 1e6) == pytest.approx(1 - 0.7**0.4)


def test_each_is_what_the_recursion_makes_of_the_one_before() -> None:
    for kappa, momentum in ((0.1, 0.1), (0.7, 0.4), (0.4, 0.9)):
        rate = momentum**kappa
        for n in range(1, 9):
            assert Balanced(kappa).rate(momentum, float(n)) == pytest.approx(rate)
            rate = rate / (rate + (1 - momentum) ** kappa)


def test_a_server_takes_up_all_or_the_mean_over_rounds() -> None:
    before, after = ({"a": {"norm": {"stats": {"mean": torch.tensor(x)}}}} for x in (1.0, 4.0))
    mean = [
        float(taken_up(Balanced(*rule), before, after, r)["a"]["norm"]["stats"]["mean"])
        for rule in ((0.0, 1.0), (0.0, 0.2), (1.0, 0.2), (0.5, 1.0))
        for r in (0, 2)
    ]
    assert mean == pytest.approx([4, 2, 4, 2, 1.6, 1.6, 4, 4])
    assert taken_up(Balanced(0.5, 1.0), before, after, 3) is after


# Over steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_without_kappa_running_statistics_are_the_plain_mean_of_all_steps_in_any_order(padded: bool) -> None:
    seen, rule = batches(5), Balanced(0.0)
    ends = []
    for order in (seen, seen[::-1]):
        layer = layer_of(2, rule)
        for x in order:
            layer = step(layer, x, rule, padded)
        ends.append(layer["stats"])
    assert float(ends[0]["steps"]) == 5
    means, variances = (torch.stack(each).mean(0) for each in zip(*(moments(x) for x in seen), strict=True))
    for end in ends:
        torch.testing.assert_close(end["mean"], means, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(end["var"], variances, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_between_the_two_the_first_step_goes_most_of_the_way(padded: bool) -> None:
    rule, layer, found = Balanced(0.5), layer_of(1, Balanced(0.5)), []
    for _ in range(4):  # a batch whose mean is 1: what is left of 0 tells the momentum
        before = float(layer["stats"]["mean"])
        layer = step(layer, torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1), rule, padded)
        found.append((float(layer["stats"]["mean"]) - before) / (1 - before))
    assert found == pytest.approx([0.316228, 0.25, 0.208562, 0.180223], abs=1e-5)


def test_alternating_cohorts_do_not_drag_the_running_mean_with_them() -> None:
    """Activations around -1 and +1 by turns, ten steps a round: one momentum swings to (1 - .9^10)/(1 + .9^10)."""
    ends = {}
    for rule in (Balanced(), Balanced(0.0)):
        layer, means = layer_of(1, rule), []
        for round in range(20):
            before = {"norm": {"stats": at_rest({"norm": layer})["norm"]["stats"]}}
            layer = {**layer, "stats": before["norm"]["stats"]}
            sign = (-1.0) ** round
            for _ in range(10):
                layer = step(layer, torch.tensor([sign - 0.5, sign + 0.5]).reshape(2, 1, 1, 1), rule)
            layer = {**layer, "stats": taken_up(rule, before, {"norm": layer}, round)["norm"]["stats"]}
            means.append(float(layer["stats"]["mean"]))
        ends[rule.kappa] = means
    swing = (1 - 0.9**10) / (1 + 0.9**10)
    assert [abs(x) for x in ends[1.0][-2:]] == pytest.approx([swing, swing], abs=1e-3) and swing > 0.48
    assert ends[1.0][-1] < 0 < ends[1.0][-2]
    assert max(map(abs, ends[0.0][-2:])) < 0.06


@pytest.mark.parametrize("padded", [False, True])
def test_what_moves_no_statistics_counts_no_steps(padded: bool) -> None:
    rule = Balanced(0.5, penalty=1.0)
    layer = layer_of(1, rule)
    assert float(step(layer, torch.ones(1, 1, 1, 1), rule, padded)["stats"]["steps"]) == 0  # one value: no variance
    still = layers.Recorder(torch.ones(4), padded, frozen=True, balanced=rule)
    with layers.training(still):
        layers.norm("batch", layer, torch.ones(4, 1, 1, 1))
    assert not still.seen and float(still.penalty) == 0
    nothing = layers.Recorder(torch.zeros(4), True, frozen=False, balanced=rule)
    with layers.training(nothing):
        layers.norm("batch", layer, torch.ones(4, 1, 1, 1))
    kept = nothing.following(layer["stats"])
    assert tree.largest_difference(kept, layer["stats"]) == 0 and float(nothing.penalty) == 0


# Classes ----------------------------------------------------------------------------------------------------


def shares(psi: list[float], y: list[int], weight: list[float] | None = None) -> list[float]:
    """Give the share of each example."""
    one = torch.ones(len(y)) if weight is None else torch.tensor(weight)
    return (class_weights(torch.tensor(psi), torch.tensor(y), one) / one.sum().clamp(min=1)).tolist()


def test_classes_weigh_as_in_the_card() -> None:
    y = [0] * 6 + [1] * 2
    for psi, wanted in ((0.0, (0.7, 0.3)), (5.0, (0.506561, 0.493439)), (-60.0, (0.75, 0.25)), (60.0, (0.5, 0.5))):
        found = shares([psi, psi], y)
        assert (sum(found[:6]), sum(found[6:])) == pytest.approx(wanted, abs=1e-6)
        assert found[0] == pytest.approx(wanted[0] / 6, abs=1e-6)  # evenly within a class


def test_a_class_that_is_not_there_takes_no_share() -> None:
    """With its share left in the denominator the weights would add up to less than one, and the mean would shrink."""
    y = [0] * 6 + [2] * 2
    assert shares([0.0, 9.0, 0.0], y) == pytest.approx(shares([0.0, 0.0], [0] * 6 + [1] * 2))
    assert sum(shares([0.0, 9.0, 0.0], y)) == pytest.approx(1)


def test_padding_and_examples_without_labels_weigh_what_they_should() -> None:
    padded = shares([1.0, 0.0], [0, 0, 1, 1], [1, 1, 1, 0])
    assert padded[3] == 0 and padded[:3] == pytest.approx(shares([1.0, 0.0], [0, 0, 1]))
    assert shares([1.0, 0.0], [-1, -1, -1, -1]) == pytest.approx([0.25] * 4)
    assert shares([1.0, 0.0], [-1, -1, -1, 0])[3] == pytest.approx((math.e + 1) / (math.e + 4))
    assert shares([1.0, 0.0], [0, 1], [0, 0]) == [0, 0]


@pytest.mark.parametrize("padded", [False, True])
def test_statistics_of_a_batch_with_a_tail_are_those_of_its_classes(padded: bool) -> None:
    x = torch.cat([torch.zeros(30), torch.ones(2)]).reshape(-1, 1, 1, 1)
    y = torch.tensor([0] * 30 + [1] * 2)
    found = {}
    for balance, psi in ((False, 0.0), (True, -60.0), (True, 60.0)):
        rule = Balanced(0.0, balance=balance)
        layer = layer_of(1, rule, 2)
        layer = {**layer, "balance": torch.full((2,), psi)} if balance else layer
        stats = step(layer, x, rule, padded, y)["stats"]
        found[balance, psi] = float(stats["mean"]), float(stats["var"])
    assert found[False, 0.0] == pytest.approx((0.0625, x.var().item()))
    assert found[True, -60.0] == pytest.approx((0.0625, x.var().item()))
    assert found[True, 60.0] == pytest.approx((0.5, 0.25 * 32 / 31))


def test_other_images_than_the_batchs_count_alike() -> None:
    rule = Balanced(0.0, balance=True)
    layer = {**layer_of(1, rule, 2), "balance": torch.full((2,), 60.0)}
    recorder = layers.Recorder(torch.ones(2), False, frozen=False, balanced=rule, y=torch.tensor([0, 1]))
    with layers.training(recorder):
        layers.norm("batch", layer, torch.tensor([0.0, 0, 0, 4]).reshape(4, 1, 1, 1))
    assert float(recorder.following(layer["stats"])["mean"]) == 1


def test_weights_of_classes_are_trained_where_a_batch_has_several() -> None:
    task = toy.run(ALGORITHMS["fedavg"](), setting=replace(SETTING, statistics="balanced", balance=True)).task
    model, x = task.init(), keys.normal(keys.key(1), 6, 1, 8, 8)
    for y, moves in (([0, 0, 0, 0, 1, 2], True), ([3] * 6, False)):
        batch = Batch(x, torch.tensor(y), torch.ones(6), torch.zeros(6, dtype=torch.int64), torch.tensor(True))
        _, gradient, _ = task.gradient(task.loss, model, batch)
        found = gradient["body"]["stem"]["norm"]["balance"]
        assert found.shape == (6,) and (float(found.abs().max()) > 1e-5) == moves
        assert float(found[[4, 5]].abs().max()) < 1e-7  # of classes that are not there


# The penalty ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_the_penalty_is_the_distance_from_the_next_running_statistics_by_the_batchs_side_alone(padded: bool) -> None:
    rule = Balanced(penalty=3.0)
    x = batches(1)[0].requires_grad_()
    layer = layer_of(2, rule)
    recorder = layers.Recorder(torch.ones(len(x)), padded, frozen=False, balanced=rule)
    with layers.training(recorder):
        layers.norm("batch", layer, x)
    mean, var = moments(x)
    running = [0.1 * mean.detach(), 0.9 + 0.1 * var.detach()]
    wanted = (mean - running[0]).square().mean() + (var - running[1]).square().mean()
    assert isinstance(recorder.penalty, Tensor)
    torch.testing.assert_close(recorder.penalty, wanted)
    slopes = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (recorder.penalty, wanted)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_added_to_any_loss_as_often_as_is_asked(engine: str) -> None:
    batch = Batch(
        keys.normal(keys.key(1), 6, 1, 8, 8), torch.arange(6), torch.ones(6), torch.zeros(6, dtype=torch.int64),
        torch.tensor(True),
    )  # fmt: skip
    losses = []
    for penalty in (0.0, 0.5, 1.0):
        setting = replace(SETTING, statistics="balanced", penalty=penalty)
        task = replace(toy.run(ALGORITHMS["fedavg"](), setting=setting).task, stacked=engine == "stacked")
        losses.append(float(task.gradient(task.loss, task.init(), batch)[0]))
    assert losses[1] - losses[0] > 0.1 and losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)


# Runs -------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_with_one_momentum_and_nothing_else_a_run_has_the_bits_of_shared_statistics(engine: str) -> None:
    mine, shared = run_of("fedavg", engine), run_of("fedavg", engine, statistics="shared")
    assert mine.outcome().digest == shared.outcome().digest
    assert mine.progress.cost["bytes_up"] == shared.progress.cost["bytes_up"]


def test_engines_agree_with_all_of_it_and_padding_counts_for_nothing() -> None:
    for name in ("fedavg", "fedbn"):
        runs = [run_of(name, engine, **ALL) for engine in ENGINES]
        assert tree.largest_difference(*map(toy.states, runs)) < TOLERANCE
    plain = run_of("fedavg", "serial")
    assert (
        tree.largest_difference(tree.merge(runs[0].progress.server, plain.progress.server), plain.progress.server) == 0
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_keeps_some_of_its_statistics_and_nothing_else(engine: str) -> None:
    mine, all_of_it = (run_of("fedavg", engine, kappa=0.4, server_momentum=m) for m in (0.3, 1.0))
    before, found, whole = (
        tree.flatten(each) for each in (mine.task.init(), mine.progress.server, all_of_it.progress.server)
    )
    for path, leaf in found.items():
        moves = layers.is_norm_statistic(path) and not is_count(path)
        assert torch.equal(leaf, torch.lerp(before[path], whole[path], 0.3**0.4) if moves else whole[path])
    assert any(map(layers.is_norm_statistic, found))


def leaves_of(state: Tree, name: str) -> Iterator[Tensor]:
    return (leaf for path, leaf in tree.flatten(state).items() if path.endswith(f"norm/{name}"))


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_are_counted_within_a_visit_and_none_between_two(engine: str) -> None:
    run = run_of("fedavg", engine, **ALL)
    upload, _ = toy.upload_once(run, task=replace(run.task_at(0), epochs=3))
    assert {float(leaf) for leaf in leaves_of(upload, "stats/steps")} == {6.0}  # batches of 4 and 2
    kept = run_of("fedbn", engine, **ALL)
    for state in (run.progress.server, *map(kept.store.__getitem__, (0, 7))):
        counts = list(leaves_of(state, "stats/steps"))
        assert len(counts) == 9 and all(float(leaf) == 0 for leaf in counts)


def test_what_is_sent_more_is_counted() -> None:
    """Of nine norm layers: a count, and a number for each of six classes."""
    cost, plain = (run_of("fedavg", "serial", **more).progress.cost for more in (ALL, {}))
    for way in ("bytes_up", "bytes_down"):
        assert cost[way] - plain[way] == 8 * 9 * 4 * (1 + 6)
    one = run_of("fedavg", "serial", kappa=0.5).progress.cost
    assert one["bytes_up"] - plain["bytes_up"] == 8 * 9 * 4
    sized = run_of("fedavg", "serial", **ALL).outcome().cost, run_of("fedavg", "serial").outcome().cost
    assert (sized[0]["parameters"] or 0) - (sized[1]["parameters"] or 0) == 9 * 6


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    setting = replace(SETTING, statistics="balanced", rounds=2, **ALL)
    whole = toy.finish(toy.run(ALGORITHMS["fedavg"](), setting=setting, sizes=FEW, dataset=SHOWN)).outcome()
    for _ in range(2):
        part = toy.run(
            ALGORITHMS["fedavg"](), setting=setting, sizes=FEW, dataset=SHOWN, checkpoint=tmp_path / "checkpoint"
        )
        part.step()
        part._save(last=True)
    assert part.resumed and part.outcome().digest == whole.digest


def test_weights_trained_elsewhere_begin_with_no_steps_and_no_weights_of_classes(tmp_path: Path) -> None:
    plain = models.build("resnet8", 6, (1, 8, 8), "batch")
    torch.save(tree.flatten({"body": plain.init(keys.key(7))["body"]}), tmp_path / "weights.pth")
    body = read(tmp_path / "weights.pth", plain)
    task = toy.run(ALGORITHMS["fedavg"](), setting=replace(SETTING, statistics="balanced", **ALL)).task
    begun = replace(task, weights=body).init()
    assert tree.flatten(begun).keys() == tree.flatten(task.init()).keys()
    assert tree.largest_difference(tree.merge(begun["body"], body), begun["body"]) == 0


def test_a_second_network_has_what_the_first_has() -> None:
    task = toy.run(ALGORITHMS["fedavg"](), setting=replace(SETTING, statistics="balanced", **ALL)).task
    drawn = task.network("resnet20").init(keys.key(1, "meta"))
    assert len(list(leaves_of(drawn, "balance"))) == len(list(leaves_of(drawn, "stats/steps"))) == 21


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_what_has_no_running_statistics_stays_as_it_is(norm: str) -> None:
    mine, plain = (models.build("resnet8", 6, (1, 8, 8), norm, rule) for rule in (Balanced(0.4, 0.3, True, 0.1), None))
    assert tree.largest_difference(mine.init(keys.key(1)), plain.init(keys.key(1))) == 0


# What is said -----------------------------------------------------------------------------------------------


def sweep(**overrides: Any) -> Sweep:
    return Sweep(
        algorithms=(ALGORITHMS["fedavg"](),), datasets=(parse_dataset("digits"),), overrides=overrides,
        data_root=Path("."),
    )  # fmt: skip


def test_its_fields_belong_to_it_and_say_where_they_are_read() -> None:
    assert {key: getattr(Balanced(), key) for key in OF_BALANCED} == OF_BALANCED
    for field, value in ALL.items():
        said = f"{field} = {value}: statistics = shared does not read it; leave it out, or choose"
        with pytest.raises(BadConfig) as caught:
            sweep(**{field: value}).expand()
        assert str(caught.value) == f"{said} --set statistics=balanced"
    (run,) = sweep(model="resnet8", norm="batch", statistics="balanced", **ALL).expand()
    assert run.setting.balanced == Balanced(**ALL)
    (plain,) = sweep(model="resnet8", norm="batch", statistics="balanced").expand()
    assert plain.id != run.id and plain.setting.balanced == Balanced()
    assert not OF_BALANCED.keys() & plain.identity()["setting"].keys()
    beyond: dict[str, Any] = {"kappa": 1.5, "server_momentum": 0.0, "penalty": math.inf}
    for field, value in beyond.items():
        with pytest.raises(BadConfig, match=f"{field} must be"):
            replace(SETTING, **{field: value})


def test_a_network_without_running_statistics_says_so(bench: Bench) -> None:
    said = "has no running statistics here, so this changes no number; networks with norm layers have some"
    for model, norm in (("mlp", "batch"), ("resnet8", "layer")):
        for policy in ("balanced", "personal"):
            given = sweep(model=model, statistics=policy)
            if model == "resnet8":
                given = sweep(model=model, statistics=policy, norm=norm)
            assert given.unread() == [f"statistics = {policy}: {model} {said} with --set norm=batch"]
    assert sweep(model="resnet8", norm="batch", statistics="balanced").unread() == []
    assert sweep(model="mlp", statistics="shared").unread() == []
    asked = ("run", "--algos", "fedavg", "--set", "statistics=balanced", "--set", "kappa=0", "--dry-run", "--no-probe")
    assert bench(*asked).err.count(said) == 1
