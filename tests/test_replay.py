"""Work of stacked clients that is written down and done again: the bits are those of doing it as ever."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.algorithm import Algorithm
from bench.contract import toy
from bench.data import Batch, LocalData
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.task import Task
from bench.training import engine, replay
from bench.training.rounds import Run
from bench.tree import Tree

STACKABLE = [name for name in ALGORITHMS if ALGORITHMS[name]().stackable]
WITH_LOSSES = ["fedavg+focal(gamma=1)", "fedavg+logit_adjustment", "fedavg+calibrated", "fedavg+lade"]
WITH_PARTS = [*WITH_LOSSES, "fedrep+topk", "fedrep+sign", "fedavg+qsgd"]
BY_ROUND = {"fed3r", "fedproc", "fedrela", "unfreeze"}
"""Methods whose clients look at the round, or work once."""
ALIKE = {"fedncm": "fedncm(finetune=True)", "gbme": "gbme(together=1)"}
"""Methods that do otherwise in late rounds, doing in all the same."""
EVERYBODY = replace(toy.SETTING, participation=1.0, rounds=5, epochs=1, eval_every=5)
"""The same groups of clients in every round."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write down whatever comes a second time."""
    monkeypatch.setattr(replay, "WORTH", 0)
    monkeypatch.setattr(replay, "TIMES", 1)
    monkeypatch.setattr(engine, "_RECORDINGS", type(engine._RECORDINGS)())


def recordings(run: Run) -> list[replay._Recording]:
    """What a run has met."""
    return list(engine._RECORDINGS[run.population.images]._known.values())


def played(run: Run) -> bool:
    """Whether a run has done something by a recording that was tried before."""
    return any(each.play is not None and each.tried and each.uses > 3 for each in recordings(run))


def digest(algorithm: Algorithm, setting: Any = EVERYBODY) -> str:
    """Digest of a stacked run, as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "WORTH", 1e9)
        run = toy.finish(toy.run(algorithm, "stacked", setting=setting))
        assert not any(each.play for each in recordings(run))
        return run.outcome().digest


@pytest.mark.parametrize("name", [*STACKABLE, *WITH_PARTS])
def test_every_algorithm_ends_with_the_same_bits(name: str) -> None:
    (algorithm,) = parse_algorithms(ALIKE.get(name, name))
    run = toy.finish(toy.run(algorithm, "stacked", setting=EVERYBODY))
    assert run.outcome().digest == digest(algorithm)
    assert (played(run) or bool({"public", "pooled"} & algorithm.needs)) == (name not in BY_ROUND)


@pytest.mark.parametrize(
    "change",
    [
        {"lr_steps": ((0.5, 0.1),)},
        {"participation": 0.4},
        {"clip": 0.5, "weight_decay": 0.1},
        {"norm": "batch"},
        {"model": "small_cnn"},  # of a convolution's two gradients nobody wants that of the images
    ],
)
def test_whatever_changes_between_rounds_or_is_set(change: dict[str, Any]) -> None:
    setting = replace(EVERYBODY, **change)
    (algorithm,) = parse_algorithms("fedrep")
    run = toy.finish(toy.run(algorithm, "stacked", setting=setting))
    assert run.outcome().digest == digest(algorithm, setting)


def test_in_bf16_too() -> None:
    (algorithm,) = parse_algorithms("fedavg")
    run, other = (toy.run(algorithm, "stacked", setting=EVERYBODY, precision="bf16") for _ in range(2))
    toy.finish(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "WORTH", 1e9)
        assert toy.finish(other).outcome().digest == run.outcome().digest
    assert played(run)


# What is not written down -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ByRound(toy.Host):
    """Its loss depends on the round."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train with a loss that grows."""

        def loss(params: Tree, batch: Batch) -> Tensor:
            return task.loss(params, batch) * (1 if task.round < 3 else 2)

        return task.sgd(loss, shared, data.batches(task.epochs)), private


@dataclass(frozen=True, kw_only=True)
class ByValue(toy.Host):
    """Its step depends on a number of the broadcast, as Python has it."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train with a learning rate from the model's norm."""
        norm = float(shared["head"]["weight"].norm())
        return task.sgd(task.loss, shared, data.batches(task.epochs), lr=0.01 * norm), private


@dataclass(frozen=True, kw_only=True)
class ByMask(toy.Host):
    """It picks numbers of the broadcast by what they are."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        """Train with a loss weighted by the share of positive weights."""
        weights = shared["head"]["weight"]
        share = weights[weights > 0].sum()
        return task.sgd(lambda w, batch: task.loss(w, batch) * share, shared, data.batches(task.epochs)), private


@pytest.mark.parametrize("algorithm", [ByRound(), ByValue(), ByMask()])
def test_what_depends_on_the_round_or_on_values_is_done_as_ever(algorithm: Algorithm) -> None:
    run = toy.finish(toy.run(algorithm, "stacked", setting=EVERYBODY))
    mine = recordings(run)[0]
    assert mine.refused and not mine.tried
    assert run.outcome().digest == digest(algorithm)


def test_a_loss_part_hands_the_round_on_without_reading_it() -> None:
    (algorithm,) = parse_algorithms("fedavg+focal(gamma=1)")
    assert played(toy.finish(toy.run(algorithm, "stacked", setting=EVERYBODY)))


# One piece of work --------------------------------------------------------------------------------


@pytest.fixture
def task() -> Task:
    """Of the first of ten rounds."""
    return replace(toy.task(toy.Host()), rounds=10)


def do(work: replay.Work, task: Task, *given: Tree) -> Iterator[tuple[Tree, replay._Recording]]:
    """Do some work to one thing after the other: what comes out, and what is known by then."""
    known = replay.Recordings()
    for round, each in enumerate(given):
        result = known.do(work, "some work", replace(task, round=round), each)
        yield result, next(iter(known._known.values()))


def test_two_inputs_that_are_one_tensor_once_are_two_the_next_time(task: Task) -> None:
    one, other = torch.ones(2), torch.full((2,), 3.0)
    given = [{"a": one, "b": one}] * 2 + [{"a": one, "b": other}] * 2
    found = list(do(lambda _, x: {"sum": x["a"] + 2 * x["b"]}, task, *given))
    assert [float(result["sum"][0]) for result, _ in found] == [3.0, 3.0, 7.0, 7.0]
    assert not found[-1][1].refused


def test_operations_in_place_and_of_several_results(task: Task) -> None:
    table = torch.arange(6.0)

    def work(_: Task, x: Tree) -> Tree:
        made = x["a"].clone()
        left, right = made.split(3)
        left.add_(1).mul_(right)
        torch.add(left, right, out=right)
        values, places = torch.sort(x["a"], descending=True)
        return {
            "made": made,
            "sorted": (values, places),
            "given": x["a"],
            "constant": table[places] + torch.tensor(2.0),
        }

    given = [{"a": torch.rand(6, generator=torch.Generator().manual_seed(seed))} for seed in range(5)]
    found = list(do(work, task, *given))
    for (result, _), each in zip(found, given, strict=True):
        assert all(x.equal(y) for x, y in zip(leaves(result), leaves(work(task, each)), strict=True))
    mine = found[-1][1]
    assert mine.play is not None and mine.tried and not mine.refused


def leaves(result: Any) -> list[Tensor]:
    """Tensors of a result."""
    return tree_leaves(result)


def test_work_that_hides_what_it_depends_on_is_found_out(task: Task) -> None:
    hidden = iter(torch.arange(10.0))
    given = [{"a": torch.ones(2)}] * 6
    found = [
        (float(result["sum"][0]), mine.refused)
        for result, mine in do(lambda _, x: {"sum": x["a"] + next(hidden)}, task, *given)
    ]
    assert [value for value, _ in found] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [refused for _, refused in found] == [False, False, True, True, True, True]


@pytest.mark.parametrize(
    "other",
    [{"a": torch.ones(3)}, {"a": torch.ones(2, dtype=torch.float64)}, {"b": torch.ones(2)}, {"a": torch.ones(4)[::2]}],
)
def test_other_shapes_types_or_names_are_other_work(task: Task, other: Tree) -> None:
    def double(_: Task, x: Tree) -> Tree:
        return {name: 2 * leaf for name, leaf in x.items()}

    known = replay.Recordings()
    for given in [{"a": torch.ones(2)}] * 3 + [other]:
        result = known.do(double, "double", task, given)
    assert result.keys() == other.keys() and leaves(result)[0].equal(2 * leaves(other)[0])
    assert len(known._known) == 2


@pytest.mark.parametrize("change", [{"lr": 0.3}, {"momentum": 0.25}, {"batch_size": 3}])
def test_other_settings_are_other_work_and_another_round_is_not(task: Task, change: dict[str, Any]) -> None:
    known = replay.Recordings()
    for asked in (task, replace(task, round=3), replace(task, **change)):
        known.do(lambda task, x: {"a": x["a"] * task.lr}, "by lr", asked, {"a": torch.ones(2)})
    assert len(known._known) == 2


def test_nothing_is_written_down_that_cannot_be_named_or_would_not_pay(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def double(_: Task, x: Tree) -> Tree:
        return {"a": 2 * x["a"]}

    def after(rounds: int, name: object = "double") -> replay._Recording | None:
        known = replay.Recordings()
        for round in range(rounds):
            known.do(double, name, replace(task, round=round, rounds=100), {"a": torch.ones(2)})
        return next(iter(known._known.values()), None)

    assert after(3, lambda: None) is None
    monkeypatch.setattr(replay, "WORTH", 96)
    assert played_by(after(3)) and not played_by(after(1))
    monkeypatch.setattr(replay, "TIMES", 3)
    assert played_by(after(4)) and not played_by(after(3))
    monkeypatch.setattr(replay, "TIMES", 1)
    monkeypatch.setattr(replay, "WORTH", 99)
    assert not played_by(after(3))
    monkeypatch.setattr(replay, "WORTH", 0)
    monkeypatch.setattr(replay, "_OPERATIONS", 0)
    assert not played_by(after(3))
    monkeypatch.setattr(replay, "_KINDS", 0)
    assert after(3) is None


def played_by(mine: replay._Recording | None) -> bool:
    """Whether it is written down."""
    return mine is not None and mine.play is not None


def test_what_was_written_down_goes_with_its_run() -> None:
    kept: Any = torch.jit._state._python_cu  # for as long as the process lasts
    before = len(kept.get_functions())
    run = toy.finish(toy.run(toy.Host(), "stacked", setting=EVERYBODY))
    assert played(run) and len(engine._RECORDINGS) == 1
    plays = [weakref.ref(each.play) for each in recordings(run) if each.play is not None]
    del run
    gc.collect()
    assert not engine._RECORDINGS and plays and not any(play() for play in plays)
    assert len(kept.get_functions()) == before


def unable(*_: Any, **__: Any) -> Callable[..., Any]:
    """As an interpreter that does not know an operation."""
    raise RuntimeError("unknown operation")


def wrong(*_: Any, **__: Any) -> Callable[..., Any]:
    """As one that does another one."""
    return lambda *tensors: [3 * tensors[0]]


@pytest.mark.parametrize("interpreter", [unable, wrong])
def test_what_the_interpreter_does_otherwise_or_not_at_all_is_done_as_ever(
    interpreter: Callable[..., Any], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C, "_create_function_from_graph", interpreter)
    found = list(do(lambda _, x: {"a": 2 * x["a"]}, task, *[{"a": torch.ones(2)}] * 3))
    assert [float(result["a"][0]) for result, _ in found] == [2.0] * 3
    assert found[1][1].refused and not found[-1][1].tried
