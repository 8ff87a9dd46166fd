"""What happens before a test: stages, clients that never took part, and predictors of variants, in both engines."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Adaptation, Algorithm, Batch, LocalData, Task, Tree, tree
from bench.algorithm import HEAD_EPOCHS, Client, Misnamed, is_usual, stages
from bench.command import catalogue
from bench.contract import checks, toy
from bench.contract.promises import ContractBroken
from bench.losses import cross_entropy
from bench.models import layers
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.training import adaptation as tuning
from bench.training.adaptation import budgets
from bench.training.engine import CannotStack
from bench.training.rounds import Run
from bench.validation import expected
from tests.test_crew import hired, left, toy_run, toys

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
ONE_ROUND = replace(toy.SETTING, rounds=1)
EMPTY, LAST = toy.SIZES.index(0), len(toy.SIZES) - 1


@dataclass(frozen=True, kw_only=True)
class Plain(Algorithm):
    """FedAvg, tuned as it is told."""

    tuned: tuple[Adaptation, ...] = ()

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private

    def adaptation(self, task: Task) -> tuple[Adaptation, ...]:
        return self.tuned


def trained(algorithm: Algorithm, engine: str = "serial", setting: Setting = ONE_ROUND, **more: Any) -> Run:
    return toy.finish(toy.run(algorithm, engine, setting=setting, **more))


def models(run: Run, *clients: int, final: bool = True) -> dict[str, list[Tree]]:
    """The models of clients that are tested after a run, by name."""
    task = run.task_at(run.setting.rounds - 1)
    server = run.progress.server
    shared = run.algorithm.broadcast(task, server)
    found = run.evaluator.models(task, server, shared, run.store, list(clients), final)
    return {name: each for name, each in found.items() if name != "personal:after"}


def data_of(run: Run, client: int) -> LocalData:
    """What a client is handed in the last round of a run."""
    visit = run.population.visit(client, run.setting.rounds - 1, {})
    n = torch.tensor(len(visit.index))
    return LocalData(run.population.images, visit.index, n, visit.key, visit.class_counts, run.task.batch_size)


def apart(a: Tree, b: Tree) -> float:
    return tree.largest_difference(a, b)


def by_hand(
    model: Tree, part: str, lr: float, batches: Iterator[Batch], score: Callable[[Tree, Tensor], Tensor]
) -> Tree:
    """Torch's own SGD on one part of a model, by the toy's momentum, with cross-entropy."""
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(model[part]).items()}
    optimiser = torch.optim.SGD(leaves.values(), lr=lr, momentum=toy.SETTING.momentum)
    tuned = {**model, part: tree.unflatten(leaves)}
    for batch in batches:
        optimiser.zero_grad()
        F.cross_entropy(score(tuned, batch.x), batch.y).backward()
        optimiser.step()
    return tree.map(torch.Tensor.detach, tuned)


# One stage is what it was -----------------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("name", ["fedavg_ft", "fedbabu", "fedavg"])
def test_one_stage_gives_the_golden_numbers(name: str, engine: str) -> None:
    setting = replace(toy.SETTING, rounds=2, unseen=1)
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())[name]["metrics"]
    found = trained(ALGORITHMS[name](), engine, setting).outcome().metrics
    assert {key: found[key] for key in found if "@" not in key} == pytest.approx(
        {key: value for key, value in golden.items() if key != "length of states"}, abs=1e-4
    )


def test_one_stage_is_the_loop_it_was_to_the_bit() -> None:
    setting = replace(ONE_ROUND, weight_decay=1e-3, clip=1.0)
    run = trained(Plain(tuned=(Adaptation(epochs=7, lr_factor=0.5),)), setting=setting)
    task, data, start = run.task_at(0), data_of(run, 1), run.progress.server
    moving, momentum, reached = start, None, 0
    for budget in (1, 5, 7):
        batches = data.batches(budget - reached, salt=f"adapt {reached}")
        moving, momentum = task.resume_sgd(task.loss, moving, batches, momentum, task.lr * 0.5)
        reached = budget
        (found,) = models(run, 1)[f"personal:{budget} epochs"]
        assert apart(found, moving) == 0.0
    named = models(run, 1)
    assert list(named) == [
        "personal:0 epochs",
        "personal:1 epochs",
        "personal:5 epochs",
        "personal:7 epochs",
        "personal",
    ]
    assert apart(named["personal:0 epochs"][0], start) == apart(named["personal"][0], moving) == 0.0
    assert list(models(run, 1, final=False)) == ["personal:0 epochs"]


# Several --------------------------------------------------------------------------------------------------

HEAD = Adaptation(epochs=2, parts=("head",), lr_factor=0.5, curve=())
BODY = Adaptation(epochs=3, parts=("body",), lr=0.02)


@ENGINES
def test_two_stages_are_two_optimisers_after_one_another(engine: str) -> None:
    run = trained(Plain(tuned=(HEAD, BODY)), engine)
    score = run.task.logits
    for client, (found,) in ((k, models(run, k)["personal"]) for k in (0, 3)):
        data = data_of(run, client)
        model = by_hand(run.progress.server, "head", 0.5 * run.task.lr, data.batches(2, "adapt 0"), score)
        model = by_hand(model, "body", 0.02, data.batches(3, "adapt 2"), score)
        assert apart(found, model) < 1e-5
        assert apart(found, models(trained(Plain(tuned=(BODY, HEAD)), engine), client)["personal"][0]) > 1e-3
    assert list(models(run, 0)) == ["personal:5 epochs", "personal"]


@ENGINES
def test_stages_take_turns(engine: str) -> None:
    turn = (replace(HEAD, epochs=1, curve=(0, 1, 5, 10)), replace(BODY, epochs=1))
    run = trained(Plain(tuned=3 * turn), engine)
    model, named = run.progress.server, models(run, 2)
    for number in range(6):
        part, lr = ("body", 0.02) if number % 2 else ("head", 0.5 * run.task.lr)
        model = by_hand(model, part, lr, data_of(run, 2).batches(1, f"adapt {number}"), run.task.logits)
        if number + 1 in (1, 5, 6):
            assert apart(named[f"personal:{number + 1} epochs"][0], model) < 1e-5
    assert apart(named["personal"][0], model) < 1e-5
    assert list(named) == [f"personal:{n} epochs" for n in (0, 1, 5, 6)] + ["personal"]


def test_one_stage_twice_forgets_its_momentum() -> None:
    half = Adaptation(epochs=2, curve=(2,))
    twice, whole = (trained(Plain(tuned=tuned)) for tuned in ((half, half), (Adaptation(epochs=4, curve=(2,)),)))
    assert list(models(twice, 0)) == list(models(whole, 0)) == ["personal:2 epochs", "personal:4 epochs", "personal"]
    assert apart(models(twice, 0)["personal:2 epochs"][0], models(whole, 0)["personal:2 epochs"][0]) == 0.0
    assert apart(models(twice, 0)["personal"][0], models(whole, 0)["personal"][0]) > 1e-3


@pytest.mark.parametrize(
    ("listed", "reported"),
    [
        ((Adaptation(epochs=10),), "0 epochs, 1 epochs, 5 epochs, 10 epochs"),
        ((Adaptation(epochs=5),), "0 epochs, 1 epochs, 5 epochs"),
        ((Adaptation(epochs=0),), "0 epochs"),
        ((HEAD_EPOCHS,), "5 epochs"),
        ((Adaptation(steps=1),), "0 epochs, 1 steps"),
        ((Adaptation(steps=2, curve=()), Adaptation(steps=3)), "2 steps, 5 steps"),
        (
            (Adaptation(epochs=3), Adaptation(steps=4), Adaptation(epochs=6)),
            "0 epochs, 1 epochs, 4 steps, 5 epochs, 9 epochs",
        ),
        ((Adaptation(epochs=5, curve=()), Adaptation(epochs=5)), "10 epochs"),
        (60 * (Adaptation(epochs=1), BODY), "0 epochs, 1 epochs, 5 epochs, 10 epochs, 240 epochs"),
    ],
)  # fmt: skip
def test_budgets_can_be_told_before_a_run(listed: tuple[Adaptation, ...], reported: str) -> None:
    assert ", ".join(budgets(listed)) == reported


# Steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counts(Plain):
    """Its loss has a gradient of 1 by the head's bias: a step of rate 1 takes 1 away."""

    def count(self, task: Task, model: Tree, data: LocalData, batch: Batch) -> Tensor:
        bias: Tensor = model["head"]["bias"]
        return bias.sum()


STEPPED = (0, 1, 16, 17, 60, 5, 33, 26)  # examples; batches are of 16


@ENGINES
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_steps_are_so_many_for_clients_of_any_size(steps: int, engine: str) -> None:
    stage = Adaptation(steps=steps, lr=1.0, loss="count")
    run = trained(Counts(tuned=(stage,)), engine, replace(ONE_ROUND, momentum=0.0), sizes=STEPPED)
    named = models(run, *range(8))
    before = run.progress.server["head"]["bias"]
    taken = [round(float((before - model["head"]["bias"]).mean()), 4) for model in named["personal"]]
    assert taken == [0.0] + 7 * [float(steps)]
    assert list(named) == ["personal:0 epochs", f"personal:{steps} steps", "personal"]


@ENGINES
@pytest.mark.parametrize("client", [1, 2, 3, 4])
def test_steps_are_the_first_of_an_endless_stream(client: int, engine: str) -> None:
    passes = -(-STEPPED[client] // toy.SETTING.batch_size)
    one, other = (
        models(trained(Plain(tuned=(stage,)), engine, sizes=STEPPED), *range(8))["personal"][client]
        for stage in (Adaptation(epochs=3, curve=()), Adaptation(steps=3 * passes))
    )
    assert apart(one, other) == 0.0 if engine == "serial" else apart(one, other) < 1e-6


@ENGINES
def test_stages_of_steps_draw_other_batches_than_those_before(engine: str) -> None:
    stage = Adaptation(steps=1, curve=())
    run = trained(Plain(tuned=(stage, Adaptation(epochs=1), stage)), engine, replace(ONE_ROUND, momentum=0.0))
    data, model = data_of(run, 0), run.progress.server
    assert list(models(run, 0)) == ["personal:1 steps", "personal:2 steps", "personal"]
    for batches in (
        [next(data.batches(1, "adapt 0"))],
        data.batches(1, "adapt 0 1"),
        [next(data.batches(1, "adapt 1 1"))],
    ):
        model = run.task_at(0).sgd(run.task.loss, model, batches)
    assert apart(models(run, 0)["personal"][0], model) < 1e-5


# A loss of its own, and labels ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Looks(Plain):
    """Its losses tell what they see of labels: a slope by the head's bias for each that is known."""

    listed: tuple[Adaptation, ...] | None = ()

    def sees(self, task: Task, model: Tree, data: LocalData, batch: Batch) -> Tensor:
        known = ((batch.y != -1) * batch.weight).sum() + ((data.y != -1) * data.mask).sum() + data.class_counts.sum()
        bias: Tensor = model["head"]["bias"]
        return bias.sum() * known

    def entropy(self, task: Task, model: Tree, data: LocalData, batch: Batch) -> Tensor:
        scores = self.predict(task, model, batch.x).log_softmax(1)
        return -((scores.exp() * scores).sum(1) * batch.weight).sum() / batch.weight.sum().clamp(min=1.0)

    def newcomer_adaptation(self, task: Task) -> tuple[Adaptation, ...] | None:
        return self.listed


SEES = Adaptation(steps=1, lr=1.0, loss="sees", curve=())


@ENGINES
def test_a_loss_of_its_own_takes_the_place_of_cross_entropy(engine: str) -> None:
    run = trained(Looks(tuned=(Adaptation(epochs=2, loss="entropy"),)), engine)
    task, data = run.task_at(0), data_of(run, 0)
    algorithm: Any = run.algorithm
    model = task.sgd(
        lambda p, b: algorithm.entropy(task, p, data, b),
        task.sgd(lambda p, b: algorithm.entropy(task, p, data, b), run.progress.server, data.batches(0)),
        data.batches(1, "adapt 0"),
    )
    assert apart(models(run, 0)["personal:1 epochs"][0], model) < 1e-5
    assert apart(model, run.progress.server) > 1e-3


@ENGINES
@pytest.mark.parametrize("labels", [True, False])
def test_without_labels_none_can_be_seen(labels: bool, engine: str) -> None:
    run = trained(Looks(tuned=(replace(SEES, labels=labels),)), engine)
    (first, second), start = models(run, 0, 1)["personal"], run.progress.server
    for model, n in ((first, toy.SIZES[0]), (second, toy.SIZES[1])):
        bias = start["head"]["bias"] - (16 + 2 * n if labels else 0)
        torch.testing.assert_close(model["head"]["bias"], bias, atol=1e-3, rtol=1e-5)


# Evaluation mode for what does not move ---------------------------------------------------------------------

NORMED = replace(ONE_ROUND, model="resnet8", norm="batch", participation=0.3)


@ENGINES
def test_batch_norm_outside_the_parts_is_in_evaluation_mode(engine: str) -> None:
    run = trained(Plain(), engine, NORMED)
    task, data, start = run.task_at(0), data_of(run, 3), run.progress.server
    statistics = partial(tree.split, chosen=tree.is_statistic)
    assert apart(statistics(start)[0], statistics(task.init())[0]) > 1e-3
    tuned, moved = (
        tuning_of(run, 3, stage) for stage in (replace(HEAD, epochs=1), Adaptation(steps=1, parts=("body",), curve=()))
    )
    assert apart(tuned["body"], start["body"]) == 0.0
    features = partial(task.model.features, start["body"])  # outside of training: by running statistics
    score = lambda model, x: task.model.logits(model["head"], features(x))  # noqa: E731
    assert apart(tuned, by_hand(start, "head", 0.5 * task.lr, data.batches(1, "adapt 0"), score)) < 1e-5
    assert apart(statistics(moved)[0], statistics(start)[0]) > 1e-3
    assert apart(moved["head"], start["head"]) == 0.0


def tuning_of(run: Run, client: int, stage: Adaptation) -> Tree:
    """A client's model after one stage, whatever the run's algorithm lists."""
    run.evaluator.here = replace(run.here, algorithm=Plain(tuned=(stage,)))
    (tuned,) = models(run, client)["personal"]
    return tuned


def test_training_keeps_its_mode() -> None:
    """FedRep's head stage normalises by batches while its body does not move."""
    run = toy.run(ALGORITHMS["fedrep"](head_epochs=1, body_epochs=0), setting=NORMED)
    task, data, head = run.task_at(0), data_of(run, 3), run.store[3]["head"]
    body = run.progress.server["body"]
    assert not task.still
    _, private = run.algorithm.local_update(task, run.progress.server, run.store[3], data)
    in_training, in_evaluation = (
        replace(task, still=still).sgd(lambda h, b: task.loss({"body": body, "head": h}, b), head, data.batches(1))
        for still in (False, True)
    )
    assert apart(private["head"], in_training) == 0.0 and apart(in_training, in_evaluation) > 1e-3


def test_a_recorder_knows_which_statistics_move() -> None:
    layer = layers.norm_layer("batch", 3, torch.device("cpu"))
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    for moving, moves in ((None, True), (frozenset(), False), (frozenset({id(layer["stats"]["mean"])}), True)):
        recorder = layers.Recorder(torch.ones(2), False, False, moving)
        with layers.training(recorder):
            y = layers.batch_norm(layer, x)
        assert bool(recorder.seen) == moves
        assert bool((y - x).abs().max() > 1e-3) == moves


# Newcomers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pulled(Plain):
    """Keeps a model at the client; who never took part starts from the shared one, moved by its class counts."""

    steps: int | None = None

    def init_client(self, task: Task) -> Tree:
        return {"mine": task.init()}

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        head = shared["head"]
        moved = {**head, "bias": head["bias"] + data.class_counts + ((data.y >= 0) * data.mask).sum()}
        return {"mine": {"body": shared["body"], "head": moved}}

    def newcomer_adaptation(self, task: Task) -> Adaptation | None:
        return None if self.steps is None else Adaptation(steps=self.steps, parts=("body",), curve=())

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        mine: Tree = private["mine"]
        return mine


@ENGINES
def test_a_newcomer_is_by_default_a_client_before_its_first_round_and_tunes_its_head(engine: str) -> None:
    run = trained(ALGORITHMS["fedper"](), engine, replace(ONE_ROUND, unseen=1))
    assert is_usual(run.algorithm.newcomer, Client.newcomer)
    named, start = models(run, LAST), {**run.progress.server, **run.algorithm.init_client(run.task)}
    assert list(named) == ["unseen:5 epochs", "unseen"]
    score, data = run.task.logits, data_of(run, LAST)
    wanted = by_hand(start, "head", run.task.lr, data.batches(5, "adapt 0"), score)
    assert apart(named["unseen"][0], wanted) < 1e-5


@ENGINES
@pytest.mark.parametrize("statistics", [None, "shared", "personal"])
def test_a_newcomer_of_its_own_is_made_of_what_is_sent(statistics: str | None, engine: str) -> None:
    normed = {} if statistics is None else {"model": "resnet8", "norm": "batch", "statistics": statistics}
    setting = replace(ONE_ROUND, unseen=2, participation=0.2, **normed)  # type: ignore[arg-type]
    run = trained(Pulled(), engine, setting)
    named, data = models(run, EMPTY, LAST), data_of(run, LAST)
    shared = run.progress.server
    assert list(named) == ["unseen"]
    empty, last = named["unseen"]
    assert apart(tree.parameters(empty), tree.parameters(shared)) == 0.0
    wanted = run.algorithm.newcomer(run.task, shared, data)["mine"]
    if statistics == "personal":  # what only clients have, a newcomer has not yet
        wanted = tree.merge(wanted, tree.split(run.task.init(), tree.is_statistic)[0])
    assert apart(last, wanted) == 0.0
    assert (last["head"]["bias"] - shared["head"]["bias"]).min() >= 26
    assert set(run.store.clients()).isdisjoint({EMPTY, LAST})
    metrics = run.outcome().metrics
    assert metrics["unseen"] is not None and "unseen:5 epochs" not in metrics


def test_a_newcomer_may_be_tuned_in_a_way_of_its_own() -> None:
    run = trained(Pulled(steps=2, tuned=(Adaptation(epochs=3),)), setting=replace(ONE_ROUND, unseen=1))
    named, start = models(run, LAST), run.algorithm.newcomer(run.task, run.progress.server, data_of(run, LAST))["mine"]
    assert list(named) == ["unseen:2 steps", "unseen"]
    assert apart(named["unseen"][0]["head"], start["head"]) == 0.0
    assert apart(named["unseen"][0]["body"], start["body"]) > 1e-3
    assert "personal:3 epochs" in models(run, 0)
    untuned = models(trained(Pulled(), setting=replace(ONE_ROUND, unseen=1)), LAST)
    assert list(untuned) == ["unseen"] and apart(untuned["unseen"][0], start) == 0.0


@ENGINES
def test_without_labels_newcomers_do_what_needs_none(engine: str) -> None:
    setting = replace(ONE_ROUND, unseen=1, unseen_labels=False)
    entropy = Adaptation(epochs=1, loss="entropy", labels=False, curve=())
    for listed, names in (
        (stages(HEAD_EPOCHS), ["unseen"]),
        ((SEES, replace(SEES, labels=False), entropy), ["unseen:1 steps", "unseen:1 epochs", "unseen"]),
    ):
        run = trained(Looks(tuned=(Adaptation(epochs=1),), listed=listed), engine, setting)
        named = models(run, LAST)
        assert list(named) == names
        assert apart(named[names[0]][0], run.progress.server) == 0.0  # the loss that tells labels had nothing to tell
        assert (apart(named["unseen"][0], run.progress.server) > 1e-4) == (len(names) > 1)
    metrics = run.outcome().metrics
    assert metrics["unseen"] is not None and metrics["unseen.masked"] is None
    seeing = trained(run.algorithm, engine, replace(setting, unseen_labels=True)).outcome()
    assert seeing.digest == run.outcome().digest and seeing.metrics["unseen.masked"] is not None
    assert {key: seeing.metrics[key] for key in metrics if "personal" in key} == {
        key: metrics[key] for key in metrics if "personal" in key
    }


@ENGINES
def test_without_labels_a_newcomers_state_is_made_without(engine: str) -> None:
    run = trained(Pulled(), engine, replace(ONE_ROUND, unseen=1, unseen_labels=False))
    assert apart(models(run, LAST)["unseen"][0], run.progress.server) == 0.0
    ditto = trained(ALGORITHMS["ditto"](), engine, run.setting)
    assert apart(models(ditto, LAST)["unseen"][0], ditto.progress.server) == 0.0


# A method without a linear head -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cosine(Algorithm):
    """Prototypes that are trained as weights, compared by their angle."""

    def init_server(self, task: Task) -> Tree:
        model = task.init()
        return {"body": model["body"], "prototypes": model["head"]["weight"]}

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        z = F.normalize(task.model.features(model["body"], x), dim=1)
        return 20 * z @ F.normalize(model["prototypes"], dim=1).T

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        def loss(params: Tree, batch: Batch) -> Tensor:
            return cross_entropy(self.predict(task, params, batch.x), batch)

        return task.sgd(loss, shared, data.batches(task.epochs)), private

    def global_model(self, task: Task, server: Tree) -> Tree:
        return server

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        return shared


@ENGINES
def test_a_method_without_a_linear_head_is_tuned_through_its_own_scores(engine: str) -> None:
    run = trained(Cosine(), engine, replace(toy.SETTING, rounds=2, unseen=4))
    named, data = models(run, LAST), data_of(run, LAST)
    assert list(named) == ["unseen:5 epochs", "unseen"]
    (found,) = named["unseen"]
    prototypes = run.progress.server["prototypes"].clone().requires_grad_()
    optimiser = torch.optim.SGD([prototypes], lr=run.task.lr, momentum=toy.SETTING.momentum)
    for batch in data.batches(5, "adapt 0"):
        optimiser.zero_grad()
        scores = run.algorithm.predict(run.task, {**run.progress.server, "prototypes": prototypes}, batch.x)
        F.cross_entropy(scores, batch.y).backward()
        optimiser.step()
    assert apart(found, {**run.progress.server, "prototypes": prototypes.detach()}) < 1e-4
    assert apart(found, run.progress.server) > 1e-3
    metrics = run.outcome().metrics
    assert metrics["unseen"] is not None and metrics["unseen"] > 0.5


# Predictors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Nearest(Plain):
    """A variant by the distance to class means of features, and one that is always wrong."""

    predictors: ClassVar[Mapping[str, str]] = {"nearest": "nearest", "wrong": "upside_down"}

    def global_variants(self, task: Task, server: Tree) -> dict[str, Tree]:
        return {"wrong": {**server, "sign": -torch.ones(())}, "same": server}

    def personal_variants(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> dict[str, Tree]:
        sums = torch.zeros(task.num_classes, task.model.feature_size)
        for batch in data.plain_batches():
            hot = (batch.y[:, None] == torch.arange(task.num_classes)) * batch.weight[:, None]
            sums = sums + hot.T @ task.model.features(shared["body"], batch.x)
        known = data.class_counts > 0
        means = torch.where(known[:, None], sums / data.class_counts.clamp(min=1)[:, None], 1e6)
        return {"nearest": {"body": shared["body"], "means": means}}

    def nearest(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        z = task.model.features(model["body"], x)
        apart: Tensor = (z[:, None] - model["means"]).square().sum(2)
        return -apart

    def upside_down(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        sign: Tensor = model["sign"]
        return sign * task.logits(model, x)


def right(run: Run, name: str) -> dict[int, int]:
    """How many images each client, or all together, got right at the end."""
    *_, tally = (tally for tally in run.progress.counts if tally.model == name)
    return {int(k): int(tally.rows[2, tally.rows[0] == k].sum()) for k in tally.rows[0].unique()}


@ENGINES
def test_a_variant_is_scored_by_the_predictor_of_its_name(engine: str) -> None:
    run = trained(Nearest(), engine)
    algorithm, task, population, server = run.algorithm, run.task, run.population, run.progress.server
    assert isinstance(algorithm, Nearest)
    x, y = population.test.plain(torch.arange(len(population.test))), population.test.y
    scores = task.logits(server, x)
    assert right(run, "generic") == right(run, "generic:same") == {-1: int((scores.argmax(1) == y).sum())}
    assert right(run, "generic:wrong") == {-1: int((scores.argmin(1) == y).sum())}
    for client in (0, 3):
        rows = population.tests[client]
        (variant,) = models(run, client)["personal:nearest"]
        found = algorithm.nearest(task, variant, x[rows]).argmax(1) == y[rows]
        assert right(run, "personal:nearest")[client] == int(found.sum())
        assert right(run, "personal")[client] == int((scores[rows].argmax(1) == y[rows]).sum())


def test_a_variants_predictor_leaves_the_other_models_their_shared_features() -> None:
    crew, ray = hired(partial(toys, Nearest, "serial", ONE_ROUND), 2)
    run = toy_run(Nearest, setting=ONE_ROUND, crew=crew)
    run.step()
    assert {"_embed", "_try"} <= ray.did
    tried = {name for name, models_ in models(run, 0, 1).items() for model in models_ if "means" in model}
    assert tried == {"personal:nearest"}
    first = replace(ONE_ROUND, rounds=2)  # in the last round models right after training have bodies of their own
    crew, ray = hired(partial(toys, "fedavg", "serial", first), 2)
    toy_run("fedavg", setting=first, crew=crew).step()
    assert "_embed" in ray.did and "_try" not in ray.did


# Sentences --------------------------------------------------------------------------------------------------


class Counted(Plain):
    """Its model holds a whole number, and no head."""

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        return {"body": shared["body"], "store": {"y": data.class_counts}}

    def predict(self, task: Task, model: Tree, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :6]


class NoMethod(Nearest):
    predictors: ClassVar[Mapping[str, str]] = {"nearest": "farthest"}


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (
            NoMethod(),
            "NoMethod names the method 'farthest', and has none that is called so; write it, or name another",
        ),
        (
            Plain(tuned=(HEAD, Adaptation(epochs=1, parts=("body", "frame")))),
            "the adaptation of Plain moves 'frame', and its model has body, head; name these in the parts of the stage",
        ),
        (
            Plain(tuned=(Adaptation(epochs=1, loss="pull"),)),
            "Plain names the method 'pull', and has none that is called so; write it, or name another",
        ),
        (
            Counted(tuned=(HEAD,)),
            "the adaptation of Counted moves 'store/y', which holds whole numbers; name other parts in the stage",
        ),
    ],
)
def test_what_is_named_and_not_there_is_refused_in_a_sentence_after_the_first_round(
    algorithm: Algorithm, said: str
) -> None:
    with pytest.raises(Misnamed) as caught:
        toy.run(algorithm).step()
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"epochs": 2, "steps": 3}, "epochs = 2 and steps = 3: a stage has one of them; leave one out"),
        ({"epochs": -1}, "epochs = -1: a stage has at least 0"),
        ({"steps": 0}, "steps = 0: a stage has at least 1"),
        ({"lr": 0.1, "lr_factor": 2.0}, "lr_factor = 2.0 and lr = 0.1: a stage has one of them; leave one out"),
        ({"labels": False}, "labels = False: cross-entropy needs labels; name a loss of your own that does not"),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused_where_it_is_written(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Adaptation(**fields)


class Branches(Pulled):
    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        return {"mine": shared if data.n > 3 else task.init()}


def test_a_newcomer_that_cannot_be_stacked_is_named() -> None:
    with pytest.raises(CannotStack, match=r"^Branches\.newcomer branches on a tensor's value"):
        trained(Branches(), "stacked", replace(ONE_ROUND, unseen=1, norm="batch", statistics="personal"))


# Elsewhere --------------------------------------------------------------------------------------------------


class All(Nearest):
    """Everything at once."""

    def adaptation(self, task: Task) -> tuple[Adaptation, ...]:
        return (Adaptation(epochs=2, parts=("head",)), Adaptation(steps=3, loss="pull", lr=0.01))

    def pull(self, task: Task, model: Tree, data: LocalData, batch: Batch) -> Tensor:
        return task.loss(model, batch) + 0.1 * tree.dot(model["head"], model["head"])

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        return {"head": task.sgd(task.loss, shared, data.batches(1))["head"]}

    def init_client(self, task: Task) -> Tree:
        return {"head": task.init()["head"]}

    def personal_model(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> Tree:
        return {"body": shared["body"], "head": private["head"]}


@ENGINES
@pytest.mark.parametrize("changes", [{}, {"unseen_labels": False}])
def test_a_crew_of_two_processes_gives_the_same_bits(engine: str, changes: dict[str, Any]) -> None:
    setting = replace(toy.SETTING, rounds=1, unseen=2, **changes)
    crew, ray = hired(partial(toys, All, engine, setting), 2)
    assert left(toy_run(All, engine, setting, crew)) == left(toy_run(All, engine, setting))
    assert ray.handed_out > 0


@pytest.mark.parametrize("plugin", [Plain, Looks, Pulled, Cosine, Nearest, All])
def test_working_plugins_keep_the_new_promises(plugin: type[Algorithm]) -> None:
    new = ("newcomers are served", "adaptation is data", "predictors are there")
    for promise in (*new, "evaluation is pure", "models fit the architecture", "test data stay out of training"):
        checks.ALGORITHM_PROMISES[promise](plugin)


class ChangesWhatIsSent(Plain):
    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        shared["head"]["bias"].add_(1.0)
        return {}


class DividesByNothing(Pulled):
    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        return {"mine": tree.scale(shared, data.n / data.n)}


class NeedsLabels(Pulled):
    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        share = data.class_counts.max() / data.class_counts.sum()
        return {"mine": tree.scale(shared, torch.where(data.n > 0, share, torch.ones(())))}


class DrawsAnew(Pulled):
    times: ClassVar[list[int]] = []

    def newcomer(self, task: Task, shared: Tree, data: LocalData) -> Tree:
        self.times.append(0)
        return {"mine": tree.scale(shared, float(len(self.times)))}


class ListsWords(Plain):
    def adaptation(self, task: Task) -> Any:
        return ("5 epochs",)


class NoVariant(Plain):
    predictors: ClassVar[Mapping[str, str]] = {"nearest": "predict"}


@dataclass(frozen=True, kw_only=True)
class AnyOld(Plain):
    times: ClassVar[list[int]] = []

    def adaptation(self, task: Task) -> Any:
        self.times.append(0)
        return Adaptation(epochs=len(self.times))


@pytest.mark.parametrize(
    ("broken", "promise", "said"),
    [
        (ChangesWhatIsSent, "newcomers are served", "changes the run's states by"),
        (DividesByNothing, "newcomers are served", "of 0 examples, with labels (serial), gets a model that is not"),
        (NeedsLabels, "newcomers are served", "26 examples, without labels (stacked), gets a model that is not finite"),
        (DrawsAnew, "newcomers are served", "gets another model when asked again"),
        (ListsWords, "adaptation is data", "lists '5 epochs', which is no Adaptation"),
        (AnyOld, "adaptation is data", "lists other stages when asked again"),
        (NoVariant, "predictors are there", "names the variant 'nearest'; there are none"),
    ],
)  # fmt: skip
def test_broken_promises_are_said(broken: type[Algorithm], promise: str, said: str) -> None:
    with pytest.raises(ContractBroken) as caught:
        checks.ALGORITHM_PROMISES[promise](broken)
    assert said in str(caught.value)


def test_a_stage_is_data_that_can_be_said() -> None:
    listed = stages(Adaptation(steps=1, lr=0.01, parts=("frame",), loss="pull", labels=False))
    assert pickle.loads(pickle.dumps(listed)) == listed
    assert str(listed[0]) == "1 step of frame at lr 0.01 by pull without labels"
    assert stages(None) == stages(()) == () and stages(listed) == listed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fedavg_ft", {"adaptation": "before the test: 5 epochs of body and head at 1 × lr"}),
        ("fedavg", {"adaptation": None, "newcomers": "before the test: 5 epochs of head at 1 × lr"}),
    ],
)
def test_show_says_what_is_done_before_the_test(name: str, said: dict[str, str | None]) -> None:
    described = catalogue.describe("algorithms", name, "digits")
    assert {key: described[key] for key in ("adaptation", "newcomers") if key in described} == said


def test_turns_are_said_once() -> None:
    said = catalogue._in_words(3 * (replace(HEAD, epochs=1), BODY))
    assert said == "before the test: 1 epoch of head at 0.5 × lr, then 3 epochs of body at lr 0.02; that 3 times"
    assert catalogue._in_words((HEAD, BODY)) == (
        "before the test: 2 epochs of head at 0.5 × lr, then 3 epochs of body at lr 0.02"
    )


@dataclass(frozen=True, kw_only=True)
class FollowsTheSetting(Looks):
    def adaptation(self, task: Task) -> tuple[Adaptation, ...]:
        return (Adaptation(steps=1), Adaptation(epochs=task.epochs))


@pytest.mark.parametrize("epochs", [1, 7])
def test_validation_knows_which_models_are_tested_when(epochs: int) -> None:
    setting = replace(ONE_ROUND, rounds=2, epochs=epochs, unseen=1, unseen_labels=False)
    algorithm = FollowsTheSetting(listed=(HEAD, replace(SEES, labels=False)))
    each, final = expected.tested_models(SimpleNamespace(algorithm=algorithm, trained_by=setting))  # type: ignore[arg-type]
    run = trained(algorithm, setting=setting)
    for round, names in ((1, each), (2, final)):
        assert names == {tally.model for tally in run.progress.counts if tally.round == round}
    assert final >= {"personal:1 steps", f"personal:{epochs} epochs", "unseen:1 steps"} and "unseen:0 epochs" in each


def test_the_adaptation_is_found_by_the_instance() -> None:
    """What stands around a method may hand on its verbs: asking the class would not find them."""
    around = SimpleNamespace(predict=Plain().predict, newcomer=Pulled().newcomer)
    assert is_usual(around.predict, Client.predict) and not is_usual(around.newcomer, Client.newcomer)
    assert not is_usual(Cosine().predict, Client.predict)
    assert tuning.budgets(stages(Plain().newcomer_adaptation(toy.task(Plain())))) == ("5 epochs",)
