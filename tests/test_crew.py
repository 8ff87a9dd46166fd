"""One run in several processes: the same bits as in one, whoever does what, and whoever dies.

Most of it runs on a stand-in for Ray, in this process and in a drawn order; what is said to be real runs on Ray, in
processes of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Algorithm, LocalData, Task, Tree, keys, tree
from bench.contract import toy
from bench.dataset import DataMissing
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import BadConfig, Setting
from bench.sweep import actors, cluster, config, on_ray
from bench.sweep.actors import OnActors
from bench.sweep.cluster import Session, WorkersDied
from bench.sweep.run import Run as Cell
from bench.sweep.schedule import Schedule
from bench.training import crew, engine
from bench.training.crew import Surroundings
from bench.training.job import Job, surroundings
from bench.training.parcel import Parcel, addresses, pack, unpack
from bench.training.rounds import Run
from bench.training.visit import Visit
from tests.by_hand import short
from tests.processes import digests, finish, start, wait

ROOT = Path(__file__).parents[1]
SETTING = replace(toy.SETTING, rounds=2, participation=0.75, unseen=1)
SHAPES = ("fedavg", "scaffold", "fedrep", "creff", "ditto", "fedloge", "fedavg_ft", "centralised", "local")
"""Algorithms that differ in what is kept, sent and tested, and in the exchanges of a round."""


# Ray's stand-in


class Gone(Exception):
    """An actor has died."""


class Raised(Gone):
    """A method of an actor has raised something."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Errors:
    RayError, RayTaskError = Gone, Raised


@dataclass(eq=False)
class Reference:
    call: Callable[[], object]


@dataclass(eq=False)
class Actor:
    """An actor that works when somebody takes an answer; what it is given and gives is pickled on the way."""

    ray: StandIn
    worker: actors._Worker
    dead: bool = False
    calls: list[tuple[Reference, str, bytes]] = field(default_factory=list)
    answers: dict[Reference, object] = field(default_factory=dict)

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=partial(self.call, method))

    def call(self, method: str, *given: object) -> Reference:
        reference = Reference(lambda: self.answer(reference))
        self.calls.append((reference, method, pickle.dumps([_resolved(each) for each in given])))
        return reference

    def answer(self, wanted: Reference) -> object:
        while wanted not in self.answers:  # one call after the other, as they came
            reference, method, given = self.calls.pop(0)
            self.answers[reference] = self.work(method, pickle.loads(given))
        answer = self.answers.pop(wanted)
        if isinstance(answer, Gone):
            raise answer
        return answer

    def work(self, method: str, given: list[Any]) -> object:
        if method == "do" and not self.dead:
            self.ray.handed_out += 1
            self.ray.given.append(given[-1])
            work = pickle.loads(given[0])
            self.ray.did.add((work.func if isinstance(work, partial) else work).__name__)
            if self.ray.deaths and self.ray.deaths[0] <= self.ray.handed_out:
                self.ray.deaths.pop(0)
                self.dead = True
        if self.dead:
            return Gone()
        try:
            return pickle.loads(pickle.dumps(getattr(self.worker, method)(*given)))
        except Exception as error:
            return Raised(error)


@dataclass
class StandIn:
    """Does in this process what Ray does in several."""

    seed: int = 0
    deaths: list[int] = field(default_factory=list)
    """After so many items an actor dies with what it has in hand."""
    exceptions: type = Errors
    puts: list[Any] = field(default_factory=list)
    actors: list[Actor] = field(default_factory=list)
    handed_out: int = 0
    given: list[Parcel] = field(default_factory=list)
    did: set[str] = field(default_factory=set)
    random: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.random.seed(self.seed)

    def remote(self, **resources: float) -> Any:
        assert resources == {"num_cpus": 1, "num_gpus": 0.0}

        class Remote:
            @staticmethod
            def remote(card: str | None) -> Actor:
                self.actors.append(Actor(self, actors._Worker(card)))
                return self.actors[-1]

        return lambda _: Remote

    def put(self, value: object) -> Reference:
        self.puts.append(value)
        return Reference(lambda: value)

    def wait(self, references: list[Reference], num_returns: int, timeout: float | None) -> tuple[list[Reference], Any]:
        least = 1 if timeout is None else 0
        done = self.random.sample(references, self.random.randint(least, max(num_returns, least)))
        return done, []

    def get(self, reference: Reference) -> object:
        return reference.call()

    def kill(self, actor: Actor) -> None:
        actor.dead = True


def _resolved(value: object) -> object:
    """Do what Ray does with references among arguments."""
    return value.call() if isinstance(value, Reference) else value


def hired(make: Callable[[], Surroundings], size: int = 3, **how: Any) -> tuple[OnActors, StandIn]:
    ray = StandIn(**how)
    crew = OnActors(Session(ray), size, "cpu")
    crew.brief(make)
    return crew, ray


def toys(plugin: str | type[Algorithm], engine: str, setting: Setting) -> Surroundings:
    """Set up another process of a run of the toy problem."""
    return surroundings(_job(plugin, engine, setting))


def _job(plugin: str | type[Algorithm], engine: str, setting: Setting) -> Job:
    algorithm = short(plugin) if isinstance(plugin, str) else plugin()
    splits = toy.Toy().load()
    split = toy.split(splits)
    return Job(
        algorithm, toy.Toy(), splits, split, setting, 0, engine,
        reserve=toy.reserve(splits, split, algorithm), teacher=toy.teacher(splits, algorithm),
    )  # fmt: skip


def toy_run(
    plugin: str | type[Algorithm], engine: str = "serial", setting: Setting = SETTING, crew: OnActors | None = None
) -> Run:
    return Run(_job(plugin, engine, setting), crew=crew)


def left(run: Run) -> tuple[object, ...]:
    """Give all that a finished run leaves and that is no measurement of time or memory."""
    outcome = toy.finish(run).outcome()
    cost = {k: v for k, v in outcome.cost.items() if "seconds" not in k and k != "peak_memory_bytes"}
    counts = [(tally.round, tally.model, tally.rows.tolist()) for tally in outcome.counts]
    return outcome.digest, outcome.metrics, outcome.rounds, counts, cost


# The same bits


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have at most two clients in a stack, so that there are several."""
    monkeypatch.setattr(engine, "_width", lambda shared, visits: 2)


@pytest.mark.parametrize("kind", ["serial", "stacked"])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_crew_leaves_what_one_process_leaves(name: str, kind: str, narrow: None) -> None:
    expected = left(toy_run(name, kind))
    crew, ray = hired(partial(toys, name, kind, SETTING), size=2 if kind == "serial" else 3)
    assert left(toy_run(name, kind, crew=crew)) == expected
    assert ray.handed_out > 0


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "ditto", "creff"])
@pytest.mark.parametrize("statistics", ["shared", "personal", "frozen"])
def test_statistics_of_norm_layers_stay_where_they_belong(name: str, statistics: str) -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", statistics=statistics, rounds=2, epochs=1)
    crew, _ = hired(partial(toys, name, "serial", setting), 2)
    assert left(toy_run(name, setting=setting, crew=crew)) == left(toy_run(name, setting=setting))


@pytest.mark.parametrize(
    ("weights", "private", "device", "widths"),
    [
        (100, 0, "cpu", [128, 128, 44]),
        (50_000, 0, "cpu", [41] * 7 + [13]),  # 8 MiB of them
        (25_000, 25_000, "cpu", [41] * 7 + [13]),
        (3_000_000, 0, "cpu", [1] * 300),
        (50_000, 0, "meta", [128, 128, 44]),
        (1_000_000, 0, "meta", [67] * 4 + [32]),  # a quarter of a gibibyte
    ],
)
def test_a_stack_stays_in_the_cache_or_takes_a_bounded_memory(
    weights: int, private: int, device: str, widths: list[int]
) -> None:
    key = keys.key(0)
    visit = Visit({"w": torch.empty(private)}, torch.arange(3, device=device), key, key, key)
    groups = engine.stacked.groups({"w": torch.empty(weights)}, [visit] * 300)
    assert [len(group) for group in groups] == widths


@pytest.mark.parametrize(("sizes", "length"), [([3, 7], 7), ([10, 4], 10), ([3, 11], 20), ([20, 0], 20), ([5, 21], 30)])
def test_from_a_batch_on_a_stack_is_padded_to_whole_batches(sizes: list[int], length: int) -> None:
    """So that few shapes come, each of which is written down by itself (test_replay)."""
    rows = [torch.arange(1, n + 1) for n in sizes]
    padded = engine._padded(rows, 10)
    assert padded.shape == (len(sizes), length)
    assert all(
        mine[: len(own)].equal(own) and not mine[len(own) :].any() for mine, own in zip(padded, rows, strict=True)
    )


def test_many_orders_of_who_does_what_give_one_digest() -> None:
    expected = left(toy_run("ditto"))
    for seed in range(6):
        crew, _ = hired(partial(toys, "ditto", "serial", SETTING), 2 + seed % 3, seed=seed)
        assert left(toy_run("ditto", crew=crew)) == expected


def test_a_crew_may_be_larger_than_the_cohort() -> None:
    crew, _ = hired(partial(toys, "scaffold", "serial", SETTING), 40)
    assert left(toy_run("scaffold", crew=crew)) == left(toy_run("scaffold"))


def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    whole = left(toy_run("scaffold"))
    splits = toy.Toy().load()
    job = Job(ALGORITHMS["scaffold"](), toy.Toy(), splits, toy.split(splits), SETTING, 0, "serial")
    run = Run(job, tmp_path / "checkpoint.pt")
    run._is_due = lambda: True  # type: ignore[method-assign]
    run.step()
    crew, _ = hired(partial(toys, "scaffold", "serial", SETTING))
    again = Run(job, tmp_path / "checkpoint.pt", crew)
    assert again.progress.round == 1
    assert left(again) == whole


def test_a_result_depends_on_its_stack_so_stacks_stay_whole() -> None:
    """The reason why clients of one stack are not shared out."""
    run = toy_run("fedavg", "stacked", replace(SETTING, model="small_cnn"))
    task = run.task_at(0)
    visits = [run.population.visit(k, 0, run.store[k]) for k in range(run.population.training)]
    ask = partial(run.here.engine, run.algorithm.local_update, task, run.progress.server, run.population.images)
    together, _ = ask(visits)
    apart = [ask([visit])[0][0] for visit in visits]
    differences = [tree.largest_difference(a[0], b[0]) for a, b in zip(together, apart, strict=True)]
    assert 0 < max(differences) < 1e-6
    noted: list[int] = []

    class Noting(crew.Alone):
        def map(self, work: Any, shared: Tree, items: Any, sizes: Any) -> Any:
            noted.extend(map(len, items))
            return super().map(work, shared, items, sizes)

    mine = Noting()
    mine.join(toys("fedavg", "stacked", replace(SETTING, model="small_cnn")))
    crew.visit_all(run.here, mine, run.algorithm.local_update, task, run.progress.server, visits)
    assert noted == [len(visits)]


def test_the_largest_items_are_handed_out_and_the_smallest_are_done_here() -> None:
    crew, ray = hired(partial(toys, "fedavg", "serial", SETTING), 2)
    crew.join(toys("fedavg", "serial", SETTING))
    ray.wait = lambda references, num_returns, timeout: (references if timeout else [], [])  # type: ignore[method-assign]
    mine: list[int] = []
    sizes = [3.0, 9.0, 1.0, 7.0, 5.0]
    assert crew.map(partial(_note, mine), {}, [3, 9, 1, 7, 5], sizes) == [6, 18, 2, 14, 10]
    assert mine == [1, 3, 5]  # the actor has 9 and 7 in hand, and does not answer before


def _note(mine: list[int], here: Surroundings, shared: Tree, item: int) -> int:
    mine.append(item)
    return 2 * item


@dataclass(frozen=True, kw_only=True)
class Tells(Algorithm):
    """Uploads what it is told of the round."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return {"told": torch.tensor([task.round, task.lr, len(data.index)], dtype=torch.float64)}, private


@pytest.mark.parametrize("size", [1, 3])
def test_every_client_is_told_the_round_and_its_learning_rate(size: int) -> None:
    many, _ = hired(partial(toys, Tells, "serial", SETTING), 3)
    run = toy_run(Tells, crew=None if size == 1 else many)
    task = run.task.at(1, 0.625)
    visits = [run.population.visit(k, 1, {}) for k in range(run.population.training)]
    told, _ = crew.visit_all(run.here, run.crew, run.algorithm.local_update, task, {}, visits)
    assert [upload["told"].tolist() for upload, _ in told] == [[1, 0.625, len(visit.index)] for visit in visits]


@pytest.mark.parametrize("size", [1, 3])
def test_counts_are_of_the_client_whose_model_was_tested(size: int) -> None:
    many, _ = hired(partial(toys, "ditto", "serial", SETTING), 3)
    run = toy.finish(toy_run("ditto", crew=None if size == 1 else many))
    population = run.population
    (personal,) = [tally for tally in run.progress.counts if tally.model == "personal" and tally.round == 2]
    for client in range(population.training):
        rows = personal.rows[:, personal.rows[0] == client]
        counted = torch.zeros(run.task.num_classes, dtype=torch.int64)
        counted[rows[1].long()] = rows[3].long()
        expected = torch.bincount(population.test.y[population.tests[client]], minlength=run.task.num_classes)
        assert torch.equal(counted, expected)


# What travels


def test_the_broadcast_is_sent_once_a_round_and_not_with_every_client() -> None:
    setting = replace(SETTING, rounds=2, participation=1.0, unseen=0, eval_every=2, model="small_cnn")
    crew, ray = hired(partial(toys, "fedavg", "serial", setting), 3)
    run = toy_run("fedavg", setting=setting, crew=crew)
    run.step()
    model = tree.nbytes(run.progress.server)
    assert [put.nbytes() > model for put in ray.puts] == [True]
    assert ray.given and all(parcel.nbytes() < model / 10 for parcel in ray.given)


def test_a_tree_that_is_needed_again_is_not_sent_again() -> None:
    crew, ray = hired(partial(toys, "fedavg", "serial", SETTING), 2)
    crew.join(toys("fedavg", "serial", SETTING))
    first, second = {"a": torch.ones(3)}, {"a": torch.full((3,), 2.0)}
    third = {"a": torch.full((3,), 3.0)}
    for shared, puts in ((first, 1), (second, 2), (first, 2), (third, 3), (first, 4)):
        found = crew.map(_add, shared, [torch.tensor(float(k)) for k in range(6)], [1.0] * 6)
        assert torch.stack(found).tolist() == [k + float(shared["a"].sum()) for k in range(6)]
        assert len(ray.puts) == puts
        assert len(ray.actors[0].worker.shared) <= 2


def _add(here: Surroundings, shared: Tree, item: Tensor) -> Tensor:
    return torch.add(item, shared["a"].sum())


@dataclass(frozen=True, kw_only=True)
class Scores(Algorithm):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        return -task.logits(model, x) * (1 + task.round)


def test_scores_of_its_own_are_the_same_bits() -> None:
    crew, _ = hired(partial(toys, Scores, "serial", SETTING), 3)
    assert left(toy_run(Scores, crew=crew)) == left(toy_run(Scores))


@pytest.mark.parametrize(
    ("name", "last", "what"),
    [
        ("fedavg", False, {"_embed"}),  # one body, whose features all heads share
        ("ditto", False, {"_embed", "_visit", "_try"}),  # models of their own
        ("fedavg_ft", True, {"_embed", "_visit", "_try"}),  # models that are made for the test
        ("scores", False, {"_try"}),  # scored in a way of its own
    ],
)
def test_tests_are_shared_out_too(name: str, last: bool, what: set[str]) -> None:
    setting = replace(SETTING, unseen=0, eval_every=2)
    plugin = Scores if name == "scores" else name
    crew, ray = hired(partial(toys, plugin, "serial", setting), 2)
    run = toy_run(plugin, setting=setting, crew=crew)
    run.step()
    ray.did.clear()
    run.evaluate(run.task_at(0), 1, last)
    assert ray.did >= what


def test_a_model_that_is_handed_back_is_named_and_not_copied() -> None:
    crew, ray = hired(partial(toys, "fedavg", "serial", SETTING), 2)
    here = toys("fedavg", "serial", SETTING)
    crew.join(here)
    ray.wait = lambda references, num_returns, timeout: (references if timeout else [], [])  # type: ignore[method-assign]
    shared = {"body": torch.randn(1000), "head": torch.randn(4, 5)}
    private = [{"own": torch.randn(10, 10).T} for _ in range(4)]
    for found, own in zip(crew.map(_hand_back, shared, private, [1.0] * 4), private, strict=True):
        assert found["body"].data_ptr() == shared["body"].data_ptr()
        assert found["row"].data_ptr() == shared["head"][2].data_ptr() and found["row"].tolist() == [*shared["head"][2]]
        assert found["wide"].shape == (7, 5) and found["wide"].stride() == (0, 1)
        assert found["own"].data_ptr() == own["own"].data_ptr() and found["own"].stride() == (1, 10)
        assert torch.equal(found["new"], own["own"] + 1)


def _hand_back(here: Surroundings, shared: Tree, private: Tree) -> Tree:
    row = shared["head"][2]
    return {**shared, "row": row, "wide": row.expand(7, 5), **private, "new": private["own"] + 1}


def _through(value: Any) -> Any:
    parcel, _ = pack(value)
    return unpack(pickle.loads(pickle.dumps(parcel)))[0]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 7).T,
        torch.randn(8, 9)[3:5, 2:],
        torch.randn(5)[:, None].expand(5, 4),
        torch.arange(12, dtype=torch.int64).view(3, 4)[:, 1],
        torch.randn(3, 3, dtype=torch.float64),
        torch.randn(5).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.empty(0, 4),
        torch.tensor(2.5),
        torch.randn(3, requires_grad=True),
    ],
    ids=["channels last", "transposed", "window", "expanded", "column", "double", "bfloat", "bool", "empty", "scalar",
         "leaf"],
)  # fmt: skip
def test_a_tensor_arrives_as_it_was_laid_out(tensor: Tensor) -> None:
    arrived = _through({"a": (tensor, "word")})["a"][0]
    assert torch.equal(arrived, tensor.detach()) and arrived.dtype == tensor.dtype
    assert arrived.stride() == tensor.stride() and not arrived.requires_grad
    if tensor.numel():
        assert arrived.data_ptr() % 64 == tensor.data_ptr() % 64  # kernels may sum in another order elsewhere


def test_tensors_of_one_memory_arrive_in_one_memory() -> None:
    stack = torch.randn(4, 1000)
    a, b, again = _through([stack[1], stack[3], stack[1]])
    assert a.data_ptr() == again.data_ptr() and b.data_ptr() - a.data_ptr() == 2 * 4000
    assert torch.equal(a, stack[1]) and torch.equal(b, stack[3])


def test_of_a_large_memory_only_the_part_travels_that_is_used() -> None:
    stack = torch.randn(1000, 16)
    parcel, _ = pack({"row": stack[500], "number": 7})
    assert parcel.nbytes() < 1000
    arrived, _ = unpack(parcel)
    assert torch.equal(arrived["row"], stack[500]) and arrived["number"] == 7


def test_memory_that_the_receiver_has_does_not_travel() -> None:
    whole = torch.randn(100, 100)
    parcel, mine = pack({"part": whole[50:]})
    value, theirs = unpack(parcel)
    answer, _ = pack([value["part"][3, 5:], value["part"] * 2], addresses(item=theirs))
    back = unpack(answer, {"item": mine})[0]
    assert back[0].data_ptr() == whole[53, 5:].data_ptr()
    assert torch.equal(back[1], whole[50:] * 2)
    assert len(answer.memory) == 1


def test_what_arrives_can_be_written_and_the_sender_does_not_see_it() -> None:
    sent = torch.zeros(5)
    parcel, _ = pack(sent)
    arrived = unpack(parcel)[0]
    arrived += 1
    assert sent.sum() == 0 and unpack(parcel)[0].sum() == 0


# Deaths and errors


def test_what_an_actor_had_in_hand_is_done_again() -> None:
    expected = left(toy_run("ditto"))
    for seed in range(4):
        crew, ray = hired(partial(toys, "ditto", "serial", SETTING), 3, seed=seed, deaths=[2, 5, 6, 20])
        assert left(toy_run("ditto", crew=crew)) == expected
        assert ray.deaths == [] and len(ray.actors) == 6


def test_actors_that_die_again_and_again_end_the_run_with_a_sentence() -> None:
    crew, ray = hired(partial(toys, "fedavg", "serial", SETTING), 2, deaths=[1] * 100)
    with pytest.raises(WorkersDied, match=r"died again and again .* fewer --workers-per-run need less memory"):
        for _ in range(100):
            toy.finish(toy_run("fedavg", crew=crew))
    assert len(ray.actors) == actors.DEATHS + 1


def test_an_actor_that_dies_while_it_loads_is_replaced() -> None:
    crew, ray = hired(partial(toys, "fedavg", "serial", SETTING), 2)
    ray.actors[0].dead = True
    assert left(toy_run("fedavg", crew=crew)) == left(toy_run("fedavg"))
    assert len(ray.actors) == 2


@dataclass(frozen=True, kw_only=True)
class Breaks(Algorithm):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        if task.round == 1:
            raise KeyError("no such thing")
        return shared, private


def test_an_error_is_raised_where_the_run_is_with_its_trace() -> None:
    crew, ray = hired(partial(toys, Breaks, "serial", SETTING), 2)
    with pytest.raises(KeyError, match="no such thing") as caught:
        toy.finish(toy_run(Breaks, crew=crew))
    assert caught.traceback[-1].name == "local_update" and ray.handed_out > 0


def test_what_fails_at_an_actor_is_done_by_the_run_itself() -> None:
    crew, ray = hired(partial(toys, "fedavg", "serial", SETTING), 2)
    crew.join(toys("fedavg", "serial", SETTING))
    home.append(crew.here)
    assert crew.map(_only_at_home, {}, [3, 9, 1], [3.0, 9.0, 1.0]) == [6, 18, 2]
    assert ray.handed_out > 0


home: list[Surroundings] = []


def _only_at_home(here: Surroundings, shared: Tree, item: int) -> int:
    if here is not home[0]:
        raise OSError("a full disk, say")
    return 2 * item


def _missing() -> Surroundings:
    raise DataMissing("images are not there; fetch them")


def test_data_that_an_actor_does_not_find_are_an_error_before_the_first_round() -> None:
    crew, _ = hired(_missing, 2)
    with pytest.raises(DataMissing, match="fetch them"):
        toy_run("fedavg", crew=crew)


def test_on_one_machine_nobody_waits_for_actors_that_still_load(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, there = left(toy_run("ditto")), OnActors._is_there
    ray = StandIn()
    alive: Any = SimpleNamespace(is_alive=lambda patience: True)
    crew = OnActors(Session(ray, alive), 3, "cpu")
    crew.brief(partial(toys, "ditto", "serial", SETTING))
    rounds: list[int] = []

    def loading(crew: OnActors, worker: actors._Handle, wait: bool = False) -> bool:
        assert not wait
        return bool(rounds) and there(crew, worker)

    monkeypatch.setattr(OnActors, "_is_there", loading)
    run = toy_run("ditto", crew=crew)
    run.step()
    assert ray.handed_out == 0 and all(worker.loading is not None for worker in crew.workers)
    rounds.append(run.progress.round)
    assert left(run)[:4] == expected[:4] and ray.handed_out > 0


def test_data_that_an_actor_on_this_machine_does_not_find_are_an_error_all_the_same() -> None:
    alive: Any = SimpleNamespace(is_alive=lambda patience: True)
    for make, error in ((_missing, DataMissing), (_others, BadConfig)):
        crew = OnActors(Session(StandIn(), alive), 2, "cpu")
        crew.brief(make)
        run = toy_run("fedavg", crew=crew)
        with pytest.raises(error):
            toy.finish(run)


def _others() -> Surroundings:
    return replace(toys("fedavg", "serial", SETTING), fingerprint="another")


def test_an_actor_with_other_data_is_refused() -> None:
    crew, _ = hired(_others, 2)
    with pytest.raises(BadConfig, match="splits its data into another"):
        toy_run("fedavg", crew=crew)


def test_memory_and_device_time_of_all_processes_count() -> None:
    crew, _ = hired(partial(toys, "fedavg", "serial", SETTING), 3)
    cost = toy.finish(toy_run("fedavg", crew=crew)).outcome().cost
    alone = toy.finish(toy_run("fedavg")).outcome().cost
    assert cost["peak_memory_bytes"] > 2 * alone["peak_memory_bytes"]  # type: ignore[operator]
    assert cost["device_seconds"] > cost["wall_seconds"]  # type: ignore[operator]
    assert alone["device_seconds"] < alone["wall_seconds"]  # type: ignore[operator]


# What a run is


def digits(**more: Any) -> list[Cell]:
    return config.Sweep(
        algorithms=tuple(config.parse_algorithms("fedavg")),
        datasets=tuple(config.parse_datasets("digits")),
        data_root=Path("data"),
        **more,
    ).expand()


def test_the_number_of_workers_is_no_part_of_a_runs_identity() -> None:
    (one,), (two,) = digits(), digits(workers=2)
    assert two.workers == 2 and one.workers == 1
    assert (one.id, one.protocol, one.identity()) == (two.id, two.protocol, two.identity())


def test_a_crew_of_one_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "has_ray", lambda: False)
    with actors.hire(1, "cpu", [], _missing) as crew:
        assert crew.size == 1
    with pytest.raises(BadConfig, match="ray is not installed"), actors.hire(2, "cpu", [], _missing):
        pass


# Room


@pytest.mark.parametrize(("in_task", "cores", "asked"), [(False, 2, 2), (True, 3, None), (True, 2, None)])
def test_a_ray_of_our_own_is_for_the_others_and_one_that_is_there_has_room_for_all(
    in_task: bool, cores: int, asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    @contextmanager
    def opened(cpus: int, **how: int) -> Iterator[Session]:
        begun.append(cpus)
        yield Session(ray)

    ray: Any = StandIn()
    ray.cluster_resources = lambda: {"CPU": float(cores)}
    ray.is_initialized = lambda: in_task
    monkeypatch.setattr(actors, "import_ray", lambda: ray)
    monkeypatch.setattr(actors, "session", opened)
    expected = nullcontext() if cores >= (asked or 3) else pytest.raises(BadConfig, match="the cluster has 2 cores")
    with expected, actors.hire(3, "cpu", [], partial(toys, "fedavg", "serial", SETTING)) as crew:
        assert crew.size == 3 and len(ray.actors) == 2
    assert begun == [2]


@pytest.mark.parametrize(
    ("jobs", "workers", "runs", "cores"),
    [(2, 3, 5, 6), (2, 3, 1, 3), (None, 2, 9, 8), (None, 3, 9, 6), (None, 50, 9, 50)],
)
def test_ray_is_started_with_room_for_the_workers_of_every_run(
    jobs: int | None, workers: int, runs: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "cores", lambda device: 8)
    assert on_ray.OnRay(jobs=jobs, workers=workers).cpus(runs) == cores


@pytest.mark.parametrize(
    ("jobs", "workers", "cores", "at_once"), [(4, 2, 4, 2), (None, 2, 5, 2), (1, 2, 8, 1), (3, 9, 4, 1), (3, 1, 2, 3)]
)
def test_on_a_cluster_no_run_waits_for_workers_that_other_runs_keep_it_from(
    jobs: int | None, workers: int, cores: int, at_once: int
) -> None:
    ray: Any = SimpleNamespace(
        remote=lambda **options: lambda task: task,
        cluster_resources=lambda: {"CPU": float(cores)},
        nodes=lambda: [],
    )
    nobody: Any = None
    drive = on_ray._Drive(jobs, "cpu", workers, Schedule([]), Path(), nobody, nobody)
    drive.go(Session(ray))
    assert drive.at_once == at_once


# Real


REAL = """
import json, sys
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

from bench.protocol.spelling import label
from bench.sweep import config
from bench.training import engine
from bench.sweep import execution
from bench.sweep.actors import OnActors
from bench.sweep.cluster import MODELS_BYTES, session
from bench.training.rounds import train

engine._width = lambda shared, visits: 3
opened = session(4, shared_bytes=MODELS_BYTES)
ray = opened.__enter__()
crews = {size: OnActors(ray, size, "cpu") for size in (2, 3)}
printed = []
for kind, model in (("serial", "small_cnn"), ("stacked", "mlp")):
    for run in config.Sweep(
        algorithms=tuple(config.parse_algorithms(sys.argv[1])),
        datasets=tuple(config.parse_datasets("digits")),
        overrides={"model": model, "clients": 8, "participation": 0.75, "rounds": 2, "unseen": 1},
        engine=kind,
        data_root=Path("data"),
    ).expand():
        for size in (1, 2 if kind == "serial" else 3):
            crew = crews.get(size)
            if crew is not None:
                crew.brief(partial(execution._surroundings, run))
            outcome = train(execution.job(run), crew=crew)
            counts = [(tally.model, tally.rows.tolist()) for tally in outcome.counts]
            printed.append([kind, label(run.algorithm), size, outcome.digest, outcome.metrics, counts])
for crew in crews.values():
    crew.dismiss()
opened.__exit__(None, None, None)
print(json.dumps(printed))
"""


def test_on_real_actors_every_kind_of_algorithm_gives_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REAL, ",".join(SHAPES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    by_run: dict[tuple[str, str], list[object]] = {}
    for kind, name, _, *found in json.loads(done.stdout):
        by_run.setdefault((kind, name), []).append(found)
    assert len(by_run) == 2 * len(SHAPES)
    for run, found in by_run.items():
        assert len(found) == 2 and found[1] == found[0], run


SLOW = '''
"""Slow: FedAvg that says in which processes it runs, and takes its time until they are as many as it is told."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from bench import Algorithm, register


@register("slow")
@dataclass(frozen=True, kw_only=True)
class Slow(Algorithm):
    def local_update(self, task, shared, private, data):
        if "SLOW" in os.environ:
            folder = Path(os.environ["SLOW"])
            folder.mkdir(exist_ok=True)
            (folder / str(os.getpid())).touch()
            time.sleep(0.5 if len(list(folder.iterdir())) < int(os.environ["PIDS"]) else 0.01)
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private
'''
QUIET = (
    "--plugin",
    "slow.py",
    "--json",
    "--tracking-uri",
    "off",
    "--model",
    "small_cnn",
    "--engine",
    "serial",
    "--clients",
    "8",
)


def begin(*words: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    (cwd / "slow.py").write_text(SLOW)
    return start("run", *words, *QUIET, cwd=cwd, **environment)


def left_by(printed: Any) -> dict[str, str]:
    assert {run["status"] for run in printed["runs"]} == {"done"}, printed
    return digests(printed)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}").exists() else False


def pids(folder: Path) -> set[int]:
    return {int(file.name) for file in folder.glob("*")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Give the digests of two runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return left_by(finish(begin("--algos", "slow,ditto", "--rounds", 30, "--ray", "off", cwd=folder))[0])


def test_a_real_actor_killed_in_mid_run_changes_nothing(tmp_path: Path, alone: dict[str, str]) -> None:
    seen = tmp_path / "pids"
    words = ("--algos", "slow", "--rounds", 30, "--ray", "off", "--workers-per-run", 2)
    process = begin(*words, cwd=tmp_path, SLOW=str(seen), PIDS="3")
    wait(lambda: seen.exists() and len(pids(seen)) == 2)
    (actor,) = pids(seen) - {process.pid}
    os.kill(actor, signal.SIGKILL)
    printed, err = finish(process)
    assert left_by(printed).items() <= alone.items()
    assert re.fullmatch(r"setting quick on digits, with other .*\n", err)
    assert len(pids(seen)) == 3  # another one took its place
    assert not any(map(lives, pids(seen)))


def test_runs_on_ray_have_their_actors_there_too(tmp_path: Path, alone: dict[str, str]) -> None:
    seen = tmp_path / "pids"
    words = ("--algos", "slow,ditto", "--rounds", 30, "--ray", "local", "--jobs", 2, "--workers-per-run", 2)
    printed, _ = finish(begin(*words, cwd=tmp_path, SLOW=str(seen), PIDS="2"))
    assert left_by(printed) == alone
    assert len(pids(seen)) == 2  # of the slow run: its task and its actor


@pytest.mark.parametrize("ray", ["off", "local"])
def test_an_interruption_leaves_no_actor_behind(tmp_path: Path, ray: str) -> None:
    seen = tmp_path / "pids"
    words = ("--algos", "slow", "--rounds", 500, "--ray", ray, "--jobs", 1, "--workers-per-run", 2)
    process = begin(*words, cwd=tmp_path, SLOW=str(seen), PIDS="99")
    wait(lambda: seen.exists() and len(pids(seen)) == 2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = finish(process, status=130)
    assert "interrupted: 0 of 1 runs are done" in err
    wait(lambda: not any(map(lives, pids(seen))), seconds=30)
