"""Trips that send something of their own, and what norm layers are given of a batch alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from bench import Batch, Exchange, Task, Tree, keys, models, tree
from bench.contract import toy
from bench.part import Channel
from bench.protocol.composed import Composed
from bench.tree import largest_difference
from tests.by_hand import method

SETTING = replace(toy.SETTING, rounds=2)


@dataclass(frozen=True, kw_only=True)
class Halves(toy.Host):
    """Clients start from half a body, which travels under the usual names."""

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        return (Exchange(broadcast="half"),)

    def half(self, task: Task, server: Tree) -> Tree:
        return {"body": tree.scale(server["body"], 0.5), "head": server["head"]}


@dataclass(frozen=True)
class Whole(Channel):
    """What is sent arrives."""

    def send(self, task: Task, update: Tree, kept: Tree, key: torch.Tensor) -> tuple[Tree, Tree]:
        return update, {}

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        return sent


def test_a_trip_may_send_what_is_not_the_usual() -> None:
    run = toy.run(Halves(), setting=SETTING)
    (trip,) = run.algorithm.exchanges(run.task_at(0))
    sent, server = toy.received(run, 0, 0, trip), run.progress.server
    assert largest_difference(sent, method(run).half(run.task, server)) == 0.0
    assert largest_difference(toy.received(run, 0), server) == 0.0  # other trips, and tests
    other = toy.finish(toy.run(toy.Host(), setting=SETTING))
    assert largest_difference(toy.finish(run).progress.server, other.progress.server) > 1e-2


def test_channels_carry_what_changed_of_what_that_trip_sent() -> None:
    plain = toy.finish(toy.run(Halves(), setting=SETTING))
    carried = toy.finish(toy.run(Composed(Halves(), (Whole(),)), setting=SETTING))
    assert largest_difference(carried.progress.server, plain.progress.server) < 1e-5


@pytest.mark.parametrize("stacked", [False, True])
def test_statistics_of_a_batch_are_its_own_and_nothing_moves(stacked: bool) -> None:
    model = models.build("resnet8", 6, (1, 8, 8), "batch")
    params = model.init(keys.key(1))
    params["body"]["whiten"] = {"stats": {"weight": torch.ones(3)}}  # fixed, and no statistic of a norm layer
    task = replace(toy.run(toy.Host()).task, model=model, stacked=stacked)
    x, before = keys.normal(keys.key(2), 5, 1, 8, 8), tree.clone(params)
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0 if stacked else 1.0])
    found = task.batch_statistics(params, Batch(x, torch.arange(5) % 6, weight))["body"]
    assert largest_difference(params, before) == 0.0
    assert torch.equal(found["whiten"]["stats"]["weight"], torch.ones(3)) and list(found["stem"]) == ["norm"]
    seen = torch.nn.functional.conv2d(x, params["body"]["stem"]["conv"]["weight"], padding=1)[weight > 0]
    stats = found["stem"]["norm"]["stats"]
    torch.testing.assert_close(stats["mean"], seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stats["var"], seen.var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not stats["mean"].requires_grad
