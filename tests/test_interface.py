"""What algorithms can say of who takes part, of a step, of a teacher: each against arithmetic by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bench import Algorithm, Batch, Exchange, LocalData, Task, Tree, Uploads, evaluating, tree
from bench.contract import toy
from bench.losses import cross_entropy
from bench.optim import Adam, Rule, Sgd
from bench.training import engine as engines
from bench.training.job import Job
from bench.training.rounds import BadCohort, Run

ENGINES = ("serial", "stacked")


@dataclass(frozen=True, kw_only=True)
class Average(Algorithm):
    """FedAvg, its client half in the hands of a test."""

    train: Callable[[Task, Tree, LocalData], Tree] = lambda task, w, data: task.sgd(
        task.loss, w, data.batches(task.epochs)
    )

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return self.train(task, shared, data), private


SETTING = replace(toy.SETTING, rounds=1, participation=1.0, weight_decay=1e-2, clip=1.0)


def trained(train: Callable[[Task, Tree, LocalData], Tree], engine: str = "serial", **fields: Any) -> Tree:
    setting = replace(SETTING, **fields)
    sizes = toy.SIZES if setting.model == "mlp" else (20, 9, 0, 0, 0, 0, 0, 0)
    return toy.finish(toy.run(Average(train=train), engine, setting=setting, sizes=sizes)).progress.server


def usual(task: Task, w: Tree, data: LocalData) -> Tree:
    return task.sgd(task.loss, w, data.batches(task.epochs))


# A step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_that_changes_nothing_is_not_there(engine: str) -> None:
    def edited(task: Task, w: Tree, data: LocalData) -> Tree:
        return task.sgd(task.loss, w, data.batches(task.epochs), edit=lambda gradient, w, batch: gradient)

    assert tree.largest_difference(trained(usual, engine), trained(edited, engine)) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_comes_before_clipping_decay_and_momentum(engine: str) -> None:
    """A clip that always binds undoes a factor of 1,000, and the decay comes after both."""

    def edited(task: Task, w: Tree, data: LocalData) -> Tree:
        return task.sgd(task.loss, w, data.batches(task.epochs), edit=lambda g, w, batch: tree.scale(g, 1e3))

    def scaled(task: Task, w: Tree, data: LocalData) -> Tree:
        return task.sgd(lambda w, batch: 1e3 * task.loss(w, batch), w, data.batches(task.epochs))

    assert tree.largest_difference(trained(edited, engine, clip=0.1), trained(scaled, engine, clip=0.1)) < 1e-6
    assert tree.largest_difference(trained(edited, engine, clip=0.1), trained(usual, engine, clip=0.1)) < 1e-6


def test_an_edit_may_answer_with_memory_that_is_not_its_own() -> None:
    """Clipping happens in place, and must not reach what the server sent."""
    direction = tree.map(torch.ones_like, toy.run(Average()).task.init())
    before = tree.clone(direction)

    def edited(task: Task, w: Tree, data: LocalData) -> Tree:
        return task.sgd(task.loss, w, data.batches(1), edit=lambda gradient, w, batch: direction)

    trained(edited)
    assert tree.largest_difference(before, direction) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_sharpness_aware_steps_by_edit_are_those_of_a_loop_of_ones_own(engine: str, norm: str) -> None:
    def at_the_worst(task: Task, gradient: Tree, w: Tree, batch: Batch) -> Tree:
        length = tree.dot(gradient, gradient).sqrt()
        near = tree.merge(w, tree.add(tree.parameters(w), gradient, 0.05 / (length + 1e-12)))
        return task.gradient(task.loss, near, batch)[1]

    def edited(task: Task, w: Tree, data: LocalData) -> Tree:
        return task.sgd(
            task.loss, w, data.batches(1), edit=lambda gradient, w, batch: at_the_worst(task, gradient, w, batch)
        )

    def looped(task: Task, w: Tree, data: LocalData) -> Tree:
        kept = None
        for batch in data.batches(1):
            _, gradient, following = task.gradient(task.loss, w, batch)
            # the statistics are those of the first pass
            w = tree.merge(w, tree.where(batch.real, tree.split(following, tree.is_statistic)[0], w))
            w, kept = task.step(task.optimiser(), w, at_the_worst(task, gradient, w, batch), kept, batch)
        return w

    fields = {"model": "resnet8", "norm": norm} if norm == "batch" else {}
    apart = tree.largest_difference(trained(edited, engine, **fields), trained(looped, engine, **fields))
    other = tree.largest_difference(trained(edited, engine, **fields), trained(usual, engine, epochs=1, **fields))
    assert apart < other / 20, (apart, other)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_of_gradients_and_steps_is_sgd(engine: str) -> None:
    def looped(task: Task, w: Tree, data: LocalData) -> Tree:
        kept = None
        for batch in data.batches(task.epochs):
            _, gradient, w = task.gradient(task.loss, w, batch)
            w, kept = task.step(task.optimiser(), w, gradient, kept, batch)
        return w

    assert tree.largest_difference(trained(usual, engine), trained(looped, engine)) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_any_rule_trains_and_leaves_clients_alone_that_have_run_out_of_batches(engine: str) -> None:
    """With a decay, a step on padding would move the parameters of a client that has none left."""

    def by_adam(task: Task, w: Tree, data: LocalData) -> Tree:
        return task.train(Adam(1e-2, weight_decay=0.5), task.loss, w, data.batches(task.epochs))[0]

    assert tree.largest_difference(trained(by_adam, "serial"), trained(by_adam, "stacked")) < 1e-5


RULES: list[tuple[Rule, Callable[[Sequence[Tensor]], torch.optim.Optimizer]]] = [
    (Sgd(0.1, 0.9, 1e-2), lambda w: torch.optim.SGD(w, 0.1, 0.9, weight_decay=1e-2)),
    (Sgd(0.1), lambda w: torch.optim.SGD(w, 0.1)),
    (Adam(0.01), lambda w: torch.optim.Adam(w, 0.01)),
    (Adam(0.01, (0.8, 0.95), 1e-2, 0.1), lambda w: torch.optim.AdamW(w, 0.01, (0.8, 0.95), 1e-2, 0.1)),
]


@pytest.mark.parametrize(("rule", "torchs"), RULES)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_rules_are_torchs(
    rule: Rule, torchs: Callable[[Sequence[Tensor]], torch.optim.Optimizer], clip: float | None
) -> None:
    if clip is not None and isinstance(rule, Sgd):
        rule = replace(rule, clip=clip)
    w: Tree = {"a": torch.linspace(-1, 1, 6).reshape(2, 3), "b": {"c": torch.tensor([2.0])}}
    leaves = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(w).values()]
    optimiser, kept = torchs(leaves), rule.start(w)
    for step in range(1, 8):
        gradient = tree.map(lambda leaf, step=step: torch.sin(step * leaf) + 0.1, w)
        w, kept = rule.step(w, gradient, kept)
        for leaf in leaves:
            leaf.grad = torch.sin(step * leaf.detach()) + 0.1
        if clip is not None and isinstance(rule, Sgd):
            torch.nn.utils.clip_grad_norm_(leaves, clip)
        optimiser.step()
    assert all(
        torch.allclose(mine, theirs, atol=2e-6) for mine, theirs in zip(tree.flatten(w).values(), leaves, strict=True)
    )


def test_sgd_without_momentum_keeps_nothing() -> None:
    assert Sgd(0.1).start({"a": torch.ones(3)}) == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_clipped_apart_is_not_clipped_by_another(engine: str) -> None:
    """A second head with 50 times the loss takes all of a common clip, and nothing of one of its own."""

    def train(factor: float, apart: tuple[str, ...]) -> Tree:
        def two(task: Task, w: Tree, data: LocalData) -> Tree:
            def loss(w: Tree, batch: Batch) -> Tensor:
                z = task.model.features(w["body"], batch.x)
                other = cross_entropy(task.model.logits(w["other"], z.detach()), batch)
                return cross_entropy(task.model.logits(w["head"], z), batch) + factor * other

            return task.sgd(loss, {**w, "other": w["head"]}, data.batches(1), clip_apart=apart)

        return trained(two, engine, clip=0.2)

    def apart(a: Tree, b: Tree) -> list[float]:
        return [tree.largest_difference(a[part], b[part]) for part in ("body", "head", "other")]

    mine = apart(train(50.0, ("other",)), train(5000.0, ("other",)))
    assert mine[:2] == [0, 0] and mine[2] < 1e-6  # clipped by itself
    assert min(apart(train(50.0, ()), train(5000.0, ()))[:2]) > 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_carried_value_is_in_no_norm_and_moves_no_parameter(engine: str) -> None:
    def carrying(task: Task, w: Tree, data: LocalData) -> Tree:
        def loss(w: Tree, batch: Batch) -> tuple[Tensor, Tree]:
            return task.loss(w, batch), {"stats": {"steps": w["stats"]["steps"] + 1.0}}

        moved = task.sgd(loss, {**w, "stats": {"steps": torch.zeros(())}}, data.batches(task.epochs))
        return {"body": moved["body"], "head": moved["head"]}

    assert tree.largest_difference(trained(usual, engine), trained(carrying, engine)) == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_carried_value_is_carried_through_every_real_step(engine: str, precision: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counts(Average):
        def init_client(self, task: Task) -> Tree:
            return {"stats": {"steps": torch.zeros(()), "mean": torch.zeros(task.model.feature_size)}}

        def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
            def loss(w: Tree, batch: Batch) -> tuple[Tensor, Tree]:
                z = task.model.features(w["body"], batch.x)
                kept = w["stats"]
                following = {"steps": kept["steps"] + 1.0, "mean": torch.lerp(kept["mean"].to(z.dtype), z.mean(0), 0.1)}
                return cross_entropy(task.model.logits(w["head"], z), batch), {"stats": following}

            moved = task.sgd(loss, {**shared, **private}, data.batches(task.epochs))
            return {"body": moved["body"], "head": moved["head"]}, {"stats": moved["stats"]}

    dataset = toy.Toy()
    splits = dataset.load()
    run = Run(Job(Counts(), dataset, splits, toy.split(splits), SETTING, 0, engine, precision))
    run.step()
    steps = [float(run.store[k]["stats"]["steps"]) for k in range(8)]
    assert steps == [SETTING.epochs * math.ceil(n / SETTING.batch_size) for n in toy.SIZES]
    assert all(leaf.dtype == torch.float32 for leaf in tree.flatten(toy.states(run)).values())


# A teacher ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_teacher_uses_its_running_statistics_and_moves_none(engine: str) -> None:
    """Under batch norm a loss that adds nothing but a teacher's look changes neither weights nor statistics."""

    def taught(manner: Any) -> Callable[[Task, Tree, LocalData], Tree]:
        def train(task: Task, w: Tree, data: LocalData) -> Tree:
            def loss(params: Tree, batch: Batch) -> Tensor:
                with manner():
                    looked = task.logits(params, batch.x)
                return task.loss(params, batch) + 0.0 * looked.sum()

            return task.sgd(loss, w, data.batches(1))

        return train

    fields = {"model": "resnet8", "norm": "batch", "epochs": 1}
    assert (
        tree.largest_difference(trained(usual, engine, **fields), trained(taught(evaluating), engine, **fields)) < 1e-6
    )


def test_a_teachers_logits_are_those_of_the_tested_model() -> None:
    run = toy.run(Average(), setting=replace(SETTING, model="resnet8", norm="batch"))
    task, images = run.task, run.population.images
    w = tree.map(lambda leaf: leaf + 0.3, task.init())
    batch = Batch(images.plain(torch.arange(6)), images.y[:6], torch.ones(6))
    seen: list[Tensor] = []

    def loss(params: Tree, batch: Batch) -> Tensor:
        with evaluating():
            seen.append(task.logits(params, batch.x).detach())
        return task.loss(params, batch)

    task.gradient(loss, w, batch)
    assert torch.equal(seen[0], task.logits(w, batch.x))

    def through(params: Tree, batch: Batch) -> Tensor:
        with evaluating():
            return cross_entropy(task.logits(params, batch.x), batch)

    assert float(tree.dot(*[task.gradient(through, w, batch)[1]] * 2)) > 0  # gradients pass


# Who ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rows(Average):
    """Sends each client a number of its own, and keeps what came back by client."""

    asked: ClassVar[list[int | None]] = []

    def init_server(self, task: Task) -> Tree:
        return {**task.init(), "heard": {"it": torch.full((task.num_clients,), -1.0)}}

    def broadcast(self, task: Task, server: Tree) -> Tree:
        return {"body": server["body"], "head": server["head"]}

    def send(self, task: Task, server: Tree, client: int | None) -> Tree:
        self.asked.append(client)
        return {"number": torch.tensor(-5.0 if client is None else 10.0 * client)}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return {"it": shared["number"] + data.n}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        heard = tree.put(server["heard"], uploads.clients, {"it": uploads.tensor("it")})
        return {**server, "heard": heard}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_is_sent_its_own_and_its_answer_comes_back_under_its_id(engine: str) -> None:
    run = toy.run(Rows(), engine, setting=replace(toy.SETTING, participation=0.5, unseen=1, eval_every=100))
    Rows.asked.clear()
    cohort = run.population.cohort(0)
    run.step()
    expected = [10.0 * k + toy.SIZES[k] if k in cohort else -1.0 for k in range(7)]
    assert run.progress.server["heard"]["it"].tolist() == expected
    assert Rows.asked == list(cohort)  # made for the cohort, not for all
    toy.finish(run)
    assert None in Rows.asked and 7 not in Rows.asked  # a held-out client is tested with what is nobody's


def test_the_server_knows_the_cohort_and_clients_do_not() -> None:
    told: list[tuple[str, object]] = []

    class Asks(Rows):
        def broadcast(self, task: Task, server: Tree) -> Tree:
            told.append(("broadcast", task.cohort))
            return super().broadcast(task, server)

        def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
            told.append(("client", task.cohort))
            return super().local_update(task, shared, private, data)

        def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
            told.append(("aggregate", task.cohort))
            return super().aggregate(task, server, uploads)

    run = toy.run(Asks(), setting=replace(toy.SETTING, participation=0.25))
    run.exchange(run.task, Exchange())
    cohort = run.population.cohort(0)
    assert told == [("broadcast", cohort), ("client", None), ("client", None), ("aggregate", cohort)]


def test_what_one_client_is_sent_is_counted() -> None:
    run = toy.run(Rows(), setting=replace(toy.SETTING, participation=0.5, rounds=1))
    each = tree.nbytes(run.task.init()) + 4
    assert toy.finish(run).progress.cost["bytes_down"] == 4 * each


class Chooses(Rows):
    chosen: ClassVar[Sequence[int] | None] = None
    """None: every other one of those drawn."""

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        return (Exchange(cohort="choose"),)

    def choose(self, task: Task, server: Tree, drawn: Sequence[int]) -> Sequence[int]:
        return drawn[::2] if self.chosen is None else self.chosen


def test_another_cohort() -> None:
    Chooses.chosen = None
    run = toy.run(Chooses())
    half = run.population.cohort(0)[::2]
    run.step()
    assert run.store.clients() == list(half)
    Chooses.chosen = (6, 2)
    run.step()
    assert set(run.store.clients()) == {*half, 2, 6}


def test_a_trip_without_clients_is_none() -> None:
    Chooses.chosen = ()
    run = toy.run(Chooses())
    before = tree.digest([run.progress.server])
    toy.finish(run)
    assert tree.digest([run.progress.server]) == before
    assert run.progress.cost.get("bytes_down", 0) == run.progress.cost.get("train_samples", 0) == 0


@pytest.mark.parametrize("chosen", [(1, 1), (3, 8), (-1,)])
def test_a_cohort_has_different_clients_that_there_are(chosen: tuple[int, ...]) -> None:
    Chooses.chosen = chosen
    with pytest.raises(BadCohort, match=r"choose chose the clients .*; wanted are different ones of 0\.\.7"):
        toy.run(Chooses()).step()


def test_lost_uploads_are_missing_and_their_clients_do_not_know() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counting(Rows):
        def init_client(self, task: Task) -> Tree:
            return {"times": torch.zeros(())}

        def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
            return {"it": shared["number"]}, {"times": private["times"] + 1}

    run = toy.run(Counting(), setting=replace(toy.SETTING, participation=1.0, lost=0.5))
    run.step()
    arrived = [k for k in range(8) if run.population.arrives(k, 0)]
    assert 0 < len(arrived) < 8
    heard = run.progress.server["heard"]["it"].tolist()
    assert [k for k in range(8) if heard[k] >= 0] == arrived
    assert [float(run.store[k]["times"]) for k in range(8)] == [1.0] * 8
    assert run.progress.cost["bytes_up"] == 4 * len(arrived)
    assert [run.population.arrives(k, 0) for k in range(8)] != [run.population.arrives(k, 1) for k in range(8)]


def test_where_nothing_arrives_the_server_is_not_called() -> None:
    run = toy.run(Rows(), setting=replace(toy.SETTING, lost=1 - 1e-9))
    before = tree.digest([run.progress.server])
    toy.finish(run)
    assert tree.digest([run.progress.server]) == before and run.progress.cost["bytes_up"] == 0


def test_independent_sampling_gives_cohorts_of_all_sizes_and_none() -> None:
    setting = replace(toy.SETTING, sampling="independent", participation=0.25, rounds=400)
    population = toy.run(Average(), setting=setting).population
    sizes = [len(population.cohort(r)) for r in range(400)]
    assert min(sizes) == 0 and max(sizes) > 4
    assert sum(sizes) / 400 == pytest.approx(2.0, abs=0.25)
    assert population.cohort(3) == population.cohort(3)


def test_a_run_of_random_cohorts_resumes(tmp_path: Path) -> None:
    setting = replace(toy.SETTING, sampling="independent", participation=0.3, lost=0.3, rounds=6)
    whole = toy.finish(toy.run(Average(), setting=setting)).outcome().digest
    first = toy.run(Average(), setting=setting, checkpoint=tmp_path / "checkpoint.pt")
    first.step()
    first.saved = -math.inf
    first.step()
    again = toy.run(Average(), setting=setting, checkpoint=tmp_path / "checkpoint.pt")
    assert again.progress.round == 2 and toy.finish(again).outcome().digest == whole


# Accounts -----------------------------------------------------------------------------------------------------------


class Fixed(Average):
    constant: ClassVar[frozenset[str]] = frozenset({"frame"})

    def init_server(self, task: Task) -> Tree:
        return {**task.init(), "frame": {"it": torch.ones(100)}}

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return {"head": shared["head"]}, private


class Varies(Fixed):
    constant: ClassVar[frozenset[str]] = frozenset()


class Packs(Fixed):
    def payload_bytes(self, task: Task, payload: Tree) -> int:
        return tree.nbytes(payload) // 4


def done(algorithm: Algorithm) -> Run:
    return toy.finish(toy.run(algorithm, setting=replace(toy.SETTING, participation=0.5)))


def test_what_is_constant_is_sent_once() -> None:
    once, always = done(Fixed()), done(Varies())
    visits, clients = 4 * 4, len(once.store.clients())
    saved = always.progress.cost["bytes_down"] - once.progress.cost["bytes_down"]
    assert saved == (visits - clients) * 400 > 0
    assert once.outcome().digest == always.outcome().digest


def test_what_is_packed_counts_as_packed() -> None:
    assert done(Packs()).progress.cost["bytes_up"] * 4 == done(Fixed()).progress.cost["bytes_up"]
    assert done(Packs()).progress.cost["bytes_down"] * 4 == done(Fixed()).progress.cost["bytes_down"]


# What arrived -------------------------------------------------------------------------------------------------------


def uploads() -> Uploads:
    trees = [{"w": {"a": torch.tensor([1.0, 2.0])}, "t": torch.tensor([3.0, 4.0])}]
    trees.append({"w": {"a": torch.tensor([5.0, 6.0])}, "t": torch.tensor([7.0, 8.0])})
    return Uploads(trees, torch.tensor([1.0, 3.0]))


def test_sums_take_weights_as_they_are() -> None:
    assert uploads().sum("t").tolist() == [10.0, 12.0]
    assert uploads().sum("t", torch.tensor([2.0, -1.0])).tolist() == [-1.0, 0.0]
    assert uploads().sum()["w"]["a"].tolist() == [6.0, 8.0]
    assert uploads().sum("t", torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist() == [3.0, 16.0]


def test_leaves_may_have_weights_of_their_own() -> None:
    weights: Tree = {"w": {"a": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, "t": torch.tensor([0.0, 1.0])}
    assert uploads().sum(None, weights)["w"]["a"].tolist() == [6.0, 6.0]
    mean = uploads().mean(None, weights)
    assert (mean["w"]["a"].tolist(), mean["t"].tolist()) == ([3.0, 6.0], [7.0, 8.0])


def test_a_tensor_has_a_mean_too() -> None:
    assert uploads().mean("t").tolist() == [6.0, 7.0]
    assert uploads().clients.tolist() == [0, 1]


# Means of classes, tables by client -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_class_means(engine: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Means(Average):
        def init_client(self, task: Task) -> Tree:
            return {"means": torch.zeros(task.num_classes, 64)}

        def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
            return shared, {"means": data.class_means(lambda x: x.flatten(1))}

    run = toy.run(Means(), engine, setting=SETTING)
    run.step()
    images = run.population.images
    for k, rows in enumerate(run.population.index):
        x, y = images.plain(rows).flatten(1), images.y[rows]
        for c in range(6):
            mean = x[y == c].mean(0) if (y == c).any() else torch.zeros(64)
            assert torch.allclose(run.store[k]["means"][c], mean, atol=1e-5)


def test_rows_are_put_where_they_belong() -> None:
    table: Tree = {"a": torch.zeros(4, 2), "b": torch.arange(4.0)}
    values: Tree = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    put = tree.put(table, torch.tensor([3, 1]), values)
    assert put["a"].tolist() == [[0, 0], [3, 4], [0, 0], [1, 2]] and put["b"].tolist() == [0, 1, 2, 3]
    assert tree.largest_difference(tree.pick({"a": put["a"]}, torch.tensor([3, 1])), values) == 0
    assert table["a"].sum() == 0


def test_engines_know_what_each_client_is_sent() -> None:
    run = toy.run(Rows())
    visits = [run.population.visit(k, 0, {}, Rows().send(run.task, {}, k)) for k in (2, 0, 5)]
    for engine in (engines.serial, engines.stacked):
        results, _ = engine(run.algorithm.local_update, run.task, {}, run.population.images, visits)
        assert [float(upload["it"]) for upload, _ in results] == [20.0 + 33, 0.0 + 60, 50.0 + 3]
