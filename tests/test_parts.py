"""Parts: alone they keep their contract, on a method they do what they say and nothing else, and a row with parts is
spelt, stored, tuned and shown like any other.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import (
    Aggregation,
    Algorithm,
    Channel,
    Correction,
    LocalData,
    Loss,
    Task,
    Tree,
    Uploads,
    UsesPrior,
    keys,
    tree,
)
from bench.algorithm import Exchange
from bench.contract import checks, parts, probes, toy
from bench.contract.promises import ContractBroken, findings
from bench.data import Batch
from bench.losses import cross_entropy, mean
from bench.part import Part
from bench.plugins.registry import ALGORITHMS, PARTS, UnknownPlugin, label, name
from bench.protocol import composed
from bench.protocol.composed import Composed
from bench.protocol.composition import compose, is_neutral, refusal
from bench.protocol.presets import PAPER, Choice, Preset
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import parse_algorithms
from bench.results import entrants, records
from bench.results.leaderboard import leaderboards
from bench.sweep import driver
from bench.sweep.config import Sweep, parse_datasets
from bench.sweep.pool import InProcess
from bench.sweep.run import Run
from bench.tracking import described
from bench.training import engine as engines
from bench.training import evaluation, rounds
from bench.tuning.space import space
from bench.tuning.study import Study
from bench.validation import rebuilding
from bench.validation.report import validate
from bench.validation.rerun import candidates, rerun
from tests.test_command import Bench
from tests.test_command import bench as bench
from tests.test_crew import hired, left, toy_run, toys

SETTING = replace(toy.SETTING, rounds=2, unseen=1)
ENGINES = ("serial", "stacked")
FOUR = "fedavg_ft(finetune_epochs=1)+balanced_softmax(prior='estimated')+topk+trimmed_mean+tau_norm"
"""A part of each kind, all with states of their own."""


def made(text: str) -> Algorithm:
    (algorithm,) = parse_algorithms(text)
    return algorithm


def on(method: str, *those: Part) -> Composed:
    """By hand: nothing is checked, nothing is left out."""
    return Composed(made(method), those)


def ran(algorithm: str | Algorithm, engine: str = "serial", **setting: Any) -> rounds.Run:
    one = made(algorithm) if isinstance(algorithm, str) else algorithm
    return toy.finish(toy.run(one, engine, setting=replace(SETTING, **setting)))


def metrics(run: rounds.Run) -> dict[str, float | None]:
    return run.outcome().metrics


def apart(one: rounds.Run, other: rounds.Run) -> float:
    """How far two runs' servers are apart, in what both keep."""
    a, b = one.progress.server, other.progress.server
    return tree.largest_difference({key: a[key] for key in b}, b)


# Parts by themselves


@pytest.mark.parametrize("promise", parts.PROMISES)
@pytest.mark.parametrize("part", list(PARTS))
def test_a_part_keeps(part: str, promise: str) -> None:
    parts.PROMISES[promise](PARTS[part])


GOLDEN = Batch(torch.zeros(1, 1, 1, 1), torch.tensor([2]), torch.ones(1))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("cross_entropy", 2.407606),
        ("focal(gamma=0.5)", 2.296671),
        ("focal", 1.993605),
        ("balanced_softmax", 4.063197),
        ("balanced_softmax(absent=0.5)", 4.063197),
        ("balanced_softmax(prior='uniform')", 2.407606),
    ],
)
def test_losses_of_one_example_are_those_computed_by_hand(text: str, value: float) -> None:
    (part,) = made(f"fedrod+{text}").pieces[1:]
    assert isinstance(part, Loss)
    task = replace(toy.run(toy.Host()).task, num_classes=3)
    counts = part.counts(task, torch.tensor([70.0, 20.0, 10.0]), None)
    assert counts is not None
    loss = part.loss(task, torch.tensor([[2.0, 1.0, 0.0]]), None, GOLDEN, counts)
    assert float(loss) == pytest.approx(value, abs=1e-6)


def test_the_slope_of_focal_loss_goes_through_its_weight_or_not() -> None:
    slopes = []
    for detach in (True, False):
        logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        part = PARTS["focal"](detach=detach)
        assert isinstance(part, Loss)
        part.loss(toy.run(toy.Host()).task, logits, None, GOLDEN, torch.ones(3)).backward()
        assert logits.grad is not None
        slopes.append(float(logits.grad[0, 2]))
    p = math.exp(-2.407606)
    assert slopes[0] == pytest.approx(-((1 - p) ** 3), rel=1e-5)
    assert slopes[1] == pytest.approx(-((1 - p) ** 3) * (1 + 2 * p * 2.407606 / (1 - p)), rel=1e-5)


def test_focal_loss_has_a_slope_where_a_model_is_sure() -> None:
    value, slope = parts._loss(PARTS["focal"](gamma=0.5), rows=5, padding=0, scale=200.0)
    assert bool(value.isfinite()) and bool(slope.isfinite().all())


def test_tau_norm_divides_rows_by_a_power_of_their_norm() -> None:
    head = {"weight": torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.6, 0.8], [0.0, 0.0]]), "bias": torch.ones(4)}
    part = PARTS["tau_norm"](tau=0.5)
    assert isinstance(part, Correction)
    found = part.correct(toy.run(toy.Host()).task, {"head": head}, None)
    assert found is not None
    wanted = torch.tensor([[1.341641, 1.788854], [0.0, 1.0], [0.6, 0.8], [0.0, 0.0]])
    assert torch.allclose(found["head"]["weight"], wanted, atol=1e-6)
    assert found["head"]["bias"].tolist() == [0.0] * 4


POINTS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1), (5.0, 5.0), (0.05, 0.05), (0.02, 0.0)]


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.0, (0.752857, 0.75)), (0.15, (0.054, 0.05)), (0.3, (0.056667, 0.05)), (0.49, (0.05, 0.05))],
)
def test_the_trimmed_mean_of_seven_points(share: float, wanted: tuple[float, float]) -> None:
    rule = PARTS["trimmed_mean"](share=share)
    assert isinstance(rule, Aggregation)
    updates = [{"body": {"w": torch.tensor(point)}} for point in POINTS]
    found = rule.combine(toy.run(toy.Host()).task, updates, torch.ones(7).double() / 7)
    assert found["body"]["w"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_share_of_a_number_is_not_one_less_by_rounding() -> None:
    updates = [{"body": {"w": torch.tensor([float(k >= 71)])}} for k in range(100)]
    rule, task = PARTS["trimmed_mean"](share=0.29), toy.run(toy.Host()).task
    assert isinstance(rule, Aggregation)
    assert float(rule.combine(task, updates, torch.ones(100).double())["body"]["w"]) == 0.0
    channel = PARTS["topk"](share=0.07)
    assert isinstance(channel, Channel)
    update = {"body": {"w": torch.arange(300.0)}}
    sent, _ = channel.send(task, update, tree.zeros_like(update), task.key)
    assert len(sent["body"]["w"]["value"]) == 21


def test_topk_sends_the_largest_first_of_equals_and_small_tensors_whole() -> None:
    channel, task = PARTS["topk"](share=0.01), toy.run(toy.Host()).task
    assert isinstance(channel, Channel)
    long = torch.zeros(300)
    long[[7, 50, 100, 200]] = torch.tensor([1.0, -3.0, 2.0, -2.0])
    long[[250, 251]] = 2.0
    update = {"body": {"long": long, "short": torch.ones(255)}}
    sent, kept = channel.send(task, update, tree.zeros_like(update), task.key)
    assert sorted(sent["body"]["long"]["index"].tolist()) == [50, 100, 200]
    assert sent["body"]["long"]["index"].dtype == torch.int32
    assert set(sent["body"]["short"]) == {"whole"}
    assert tree.nbytes(sent) == 3 * 8 + 255 * 4
    assert kept["body"]["long"].nonzero().flatten().tolist() == [7, 250, 251]
    again, _ = channel.send(task, tree.zeros_like(update), kept, task.key)  # what was kept is due the next time
    assert sorted(again["body"]["long"]["index"].tolist()) == [7, 250, 251]
    level = {"body": {"long": torch.ones(300)}}
    assert channel.send(task, level, tree.zeros_like(level), task.key)[0]["body"]["long"]["index"].tolist() == [0, 1, 2]


# Priors


def counted(part: UsesPrior, own: list[float] | None, prior: list[float] | None, estimated: list[float] | None) -> Any:
    task = replace(toy.run(toy.Host()).task, num_classes=3, prior=None if prior is None else torch.tensor(prior))
    given = [None if each is None else torch.tensor(each) for each in (own, estimated)]
    found = part.counts(task, *given)
    return None if found is None else found.tolist()


@pytest.mark.parametrize(
    ("prior", "absent", "wanted", "server"),
    [
        ("local", "out", [6.0, 2.0, 0.0], None),
        ("local", 0.5, [6.0, 2.0, 0.5], None),
        ("global", "out", [4.0, 4.0, 0.0], [1.5, 1.5, 0.0]),
        ("global", 0.1, [4.0, 4.0, 0.1], [1.5, 1.5, 0.1]),
        ("estimated", "out", [2.0, 2.0, 4.0], [0.75, 0.75, 1.5]),
        ("uniform", "out", [8 / 3] * 3, [1.0] * 3),
    ],
)
def test_counts_are_in_examples_of_the_client_whatever_the_source(
    prior: Any, absent: Any, wanted: list[float], server: list[float] | None
) -> None:
    part = PARTS["balanced_softmax"](prior=prior, absent=absent)
    assert isinstance(part, UsesPrior)
    known = ([0.5, 0.5, 0.0], [10.0, 10.0, 20.0])
    assert counted(part, [6.0, 2.0, 0.0], *known) == pytest.approx(wanted)
    found = counted(part, None, *known)
    assert found is None if server is None else found == pytest.approx(server)


def test_an_estimate_is_uniform_until_anybody_has_sent_counts() -> None:
    part = PARTS["balanced_softmax"](prior="estimated")
    assert isinstance(part, UsesPrior)
    assert counted(part, [6.0, 0.0, 0.0], None, [0.0, 0.0, 0.0]) == [2.0, 2.0, 2.0]


def test_one_class_and_no_other_leaves_nothing_to_learn() -> None:
    part = PARTS["balanced_softmax"]()
    assert isinstance(part, Loss)
    loss = part.loss(toy.run(toy.Host()).task, torch.randn(1, 3), None, GOLDEN, torch.tensor([0.0, 0.0, 9.0]))
    assert float(loss) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_estimate_is_the_sum_of_what_the_cohorts_sent_and_is_paid_for(engine: str) -> None:
    run, plain = ran("fedavg+balanced_softmax(prior='estimated')", engine), ran("fedavg", engine)
    cohorts = [client for r in range(2) for client in run.population.cohort(r)]
    wanted = torch.stack([run.population.class_counts(client) for client in cohorts]).sum(0)
    assert torch.equal(run.progress.server["parts"]["counts"], wanted.float())
    for way in ("bytes_up", "bytes_down"):
        assert run.progress.cost[way] - plain.progress.cost[way] == 4 * 6 * len(cohorts)


# What they do on a method


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_fedavg_with_balanced_softmax_is_the_generic_half_of_fedrod(engine: str) -> None:
    mine, theirs = ran("fedavg+balanced_softmax", engine), ran("fedrod", engine)
    assert apart(mine, theirs) == 0.0
    assert metrics(mine)["generic"] == metrics(theirs)["generic"]
    assert apart(ran("fedrod+balanced_softmax", engine), theirs) == 0.0  # its own loss, in its own place


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedavg", "fedrep", "scaffold", "ditto", "fedloge(etf_steps=10)"])
def test_cross_entropy_is_what_methods_have_anyway(method: str, engine: str) -> None:
    assert ran(f"{method}+cross_entropy", engine).outcome().digest == ran(method, engine).outcome().digest


def test_cross_entropy_takes_the_place_of_a_loss_of_ones_own() -> None:
    assert apart(ran("fedrod+cross_entropy"), ran("fedavg")) == 0.0
    assert apart(ran("fedrod+focal(gamma=0)"), ran("fedavg")) < engines.TOLERANCE  # and is not left out there


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedavg", "fedavg_ft", "creff(match_steps=1, head_epochs=1)", "fedrod"])
def test_a_correction_acts_on_every_tested_model_and_on_no_state(method: str, engine: str) -> None:
    mine, plain = (ran(each, engine, eval_every=2) for each in (f"{method}+tau_norm", method))
    assert mine.outcome().digest == plain.outcome().digest
    found, usual = metrics(mine), metrics(plain)
    for kind in ("generic", "personal", "unseen"):
        assert found[f"{kind}:uncorrected"] == usual[kind]
        assert found[kind] is not None
    others = [key for key in usual if key.partition(".")[0].partition("@")[0] not in ("generic", "personal", "unseen")]
    assert others and all(found[key] == usual[key] for key in others)  # variants and budgets stay as they were trained


def test_a_correction_is_of_the_adapted_model() -> None:
    run = toy.run(made("fedavg_ft+tau_norm"), setting=replace(SETTING, rounds=1))
    seen: list[Tree] = []
    usual = run.evaluator._test
    run.evaluator._test = lambda task, models, *rest: (seen.append(models[0]), usual(task, models, *rest))[1]  # type: ignore[method-assign, func-returns-value]
    run.step()
    _after, *budgets, corrected, trained = seen
    assert trained is budgets[-1]
    norms = corrected["head"]["weight"].norm(dim=1)
    assert torch.allclose(norms, torch.ones(6)) and corrected["body"] is trained["body"]
    assert torch.allclose(corrected["head"]["weight"], F.normalize(trained["head"]["weight"]))


def test_corrections_follow_each_other_as_they_are_written() -> None:
    head = {"head": {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.ones(1)}}
    task, tau = toy.run(toy.Host()).task, PARTS["tau_norm"]()
    for those, length in (((tau, probes.Doubling()), 2.0), ((probes.Doubling(), tau), 1.0)):
        changed = on("fedavg", *those).corrected(task, {}, head, None)
        assert changed is not None and float(changed["head"]["weight"].norm()) == pytest.approx(length)


def test_a_loss_part_leaves_tuning_before_the_test_alone() -> None:
    runs = (toy.run(made(each), setting=SETTING) for each in ("fedavg_ft", "fedavg_ft+balanced_softmax"))
    plain, mine = (checks.tested_models(run, 0) for run in runs)
    after = [models.pop("personal:after") for models in (plain, mine)]  # which is after training by the part
    assert tree.largest_difference(plain, mine) == 0.0 < tree.largest_difference(*after)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedavg", "fedbabu", "scaffold", "creff(match_steps=1, head_epochs=1)"])
@pytest.mark.parametrize(
    "off", [("focal", {"gamma": 0.0}), ("balanced_softmax", {"prior": "uniform"}), ("topk", {"share": 1.0})]
)
def test_off_by_hand_is_what_the_method_does(method: str, engine: str, off: tuple[str, dict[str, Any]]) -> None:
    part = PARTS[off[0]](**off[1])
    assert is_neutral(part)
    assert apart(ran(on(method, part), engine), ran(method, engine)) <= engines.TOLERANCE


@pytest.mark.equivalence
def test_a_mean_of_which_nothing_is_trimmed_is_the_plain_one() -> None:
    equal = replace(SETTING, unseen=0, participation=1.0)
    runs = [
        toy.finish(toy.run(made(text), setting=equal, sizes=(40,) * 8))
        for text in ("fedavg+trimmed_mean(share=0)", "fedavg")
    ]
    assert 0 < apart(*runs) < engines.TOLERANCE
    unequal = [ran(text, participation=1.0) for text in ("fedavg+trimmed_mean(share=0)", "fedavg")]
    assert apart(*unequal) > engines.TOLERANCE  # without weights


@dataclass(frozen=True, kw_only=True)
class Krum(Aggregation):
    """The update that is nearest to the others, whole."""

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        flat = torch.stack([torch.cat([leaf.flatten() for leaf in tree.flatten(u).values()]) for u in updates])
        far = torch.cdist(flat, flat).square().sort(1).values[:, 1 : max(2, len(flat) - 2)].sum(1)
        return updates[int(far.argmin())]


def uploads_of(run: rounds.Run, *clients: int) -> tuple[list[Tree], Tensor]:
    return [toy.upload_once(run, k)[0] for k in clients], run.population.sizes(clients)


@pytest.mark.parametrize("method", ["creff(match_steps=1, head_epochs=1)", "fedavg", "fedbabu", "scaffold"])
def test_body_and_head_are_combined_together_whoever_asks_for_one_of_them(method: str) -> None:
    run = toy.run(on(method, Krum()), setting=SETTING)
    trees, sizes = uploads_of(run, 0, 1, 2, 3, 4)
    after = run.algorithm.aggregate(run.task_at(0), run.progress.server, Uploads(trees, sizes))
    assert any(
        all(
            tree.largest_difference({key: after[key]}, {key: each[key]}) < 1e-6
            for key in ("body", "head")
            if key in each
        )
        for each in trees
    )
    plain = toy.run(made(method), setting=SETTING)
    usual = plain.algorithm.aggregate(plain.task_at(0), plain.progress.server, Uploads(trees, sizes))
    others = [key for key in usual if key not in ("body", "head", "retrained")]
    assert tree.largest_difference({k: after[k] for k in others}, {k: usual[k] for k in others}) == 0.0


@dataclass(frozen=True, kw_only=True)
class Notes(Aggregation):
    """The first update, and the weights it was asked with."""

    given: ClassVar[list[list[float]]] = []

    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        self.given.append(weights.tolist())
        return updates[0]


@pytest.mark.parametrize(
    ("method", "sizes", "wanted"),
    [
        ("fedavg", [44.0, 33.0], [44 / 77, 33 / 77]),
        ("creff(match_steps=1, head_epochs=1)", [44.0, 33.0], [44 / 77, 33 / 77]),  # asks twice
        ("scaffold", [44.0, 33.0], [44 / 77, 33 / 77]),
        ("fedavg", [0.0, 0.0], [0.5, 0.5]),
    ],
)
def test_a_rule_is_asked_once_with_the_weights_of_the_mean_in_its_place(
    method: str, sizes: list[float], wanted: list[float]
) -> None:
    run = toy.run(on(method, Notes()), setting=SETTING)
    trees, _ = uploads_of(run, 1, 2)
    Notes.given.clear()
    run.algorithm.aggregate(run.task_at(0), run.progress.server, Uploads(trees, torch.tensor(sizes).double()))
    assert Notes.given == [pytest.approx(wanted)]


def test_means_of_a_class_are_no_business_of_a_rule() -> None:
    trees: list[Tree] = [{"head": {"weight": torch.eye(2)}}, {"head": {"weight": torch.zeros(2, 2)}}]
    shared: Tree = {"head": {"weight": torch.zeros(2, 2)}}
    received = composed._Combined(Uploads(trees, torch.ones(2)), probes.First(), None, shared)  # type: ignore[arg-type]
    per_class = received.mean("head", torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    assert per_class["weight"].diagonal().tolist() == [0.25, 0.5] and not received.known
    assert torch.equal(received.mean("head")["weight"], torch.eye(2))


# Channels


@dataclass(frozen=True, kw_only=True)
class Noisy(Channel):
    """An update and noise."""

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        return tree.map(lambda leaf: leaf + 0.1 * keys.normal(key, *leaf.shape), update), {}

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        return sent


def test_what_does_not_arrive_now_arrives_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a run: what the server moved by and what waits at the only client are all its updates."""
    total: list[Tree] = []
    usual: Any = PARTS["topk"].send

    def send(self: Any, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        total.append(update)
        done: tuple[Tree, Tree] = usual(self, task, update, kept, key)
        return done

    monkeypatch.setattr(PARTS["topk"], "send", send)
    setting = replace(toy.SETTING, rounds=4, participation=1.0)
    run = toy.run(made("fedavg+topk"), setting=setting, sizes=(60, 0, 0, 0, 0, 0, 0, 0))
    start = run.progress.server
    toy.finish(run)
    moved = tree.sub(run.progress.server, start)
    waiting = run.store[0]["parts"]["0"]
    mine = [each for each in total if tree.dot(each, each) > 0]
    assert len(mine) == 4 and float(tree.dot(waiting, waiting)) > 0
    everything = mine[0]
    for each in mine[1:]:
        everything = tree.add(everything, each)
    assert tree.largest_difference(everything, tree.map(torch.add, moved, waiting)) < 1e-5


def test_bytes_are_those_of_what_is_sent() -> None:
    run, plain = ran("fedavg+topk"), ran("fedavg")
    leaves = tree.flatten(run.task.init()).values()
    each = sum(8 * math.ceil(0.1 * leaf.numel()) if leaf.numel() >= 256 else 4 * leaf.numel() for leaf in leaves)
    visits = sum(len(run.population.cohort(r)) for r in range(2))
    assert run.progress.cost["bytes_up"] == each * visits < plain.progress.cost["bytes_up"] / 4
    assert run.progress.cost["bytes_down"] == plain.progress.cost["bytes_down"]


@dataclass(frozen=True, kw_only=True)
class Packs(Channel):
    """All leaves in one tensor."""

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        return {"all": torch.cat([leaf.flatten().double() for leaf in tree.flatten(update).values()])}, {}

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        leaves = iter(sent["all"].split([leaf.numel() for leaf in tree.flatten(like).values()]))
        return tree.map(lambda leaf: next(leaves).to(leaf.dtype).reshape(leaf.shape), like)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["fedavg", "fedbabu"])
def test_of_two_channels_the_second_is_given_what_the_first_sends(method: str, engine: str) -> None:
    topk = PARTS["topk"]()
    alone = ran(on(method, topk), engine)
    assert apart(alone, ran(method, engine)) > engines.TOLERANCE
    both = ran(on(method, topk, Packs()), engine)
    assert apart(both, alone) == 0.0
    assert tree.largest_difference(both.store[0], alone.store[0]) == 0.0
    assert both.progress.cost["bytes_up"] == 2 * alone.progress.cost["bytes_up"]  # doubles for floats and indices
    if method == "fedavg":
        whole = ran(on(method, Packs(), PARTS["topk"](share=1.0)), engine)
        assert apart(whole, ran(method, engine)) <= engines.TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Twice(toy.Host):
    """Two trips a round."""

    def exchanges(self, task: Task) -> tuple[Exchange, ...]:
        return (Exchange(), Exchange(client="again"))

    def again(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        return self.local_update(task, shared, private, data)


@dataclass(frozen=True, kw_only=True)
class Listens(probes.Halving):
    heard: ClassVar[list[int]] = []

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        self.heard.append(int(key))
        return super().send(task, update, kept, key)


@dataclass(frozen=True, kw_only=True)
class ListensToo(Listens):
    """The same in the second place."""


def test_a_channels_key_is_of_client_round_trip_and_place_and_of_nobody_else() -> None:
    Listens.heard.clear()
    run = ran(Composed(Twice(), (Listens(), ListensToo())), participation=1.0)
    Listens.heard[:] = [key for key in Listens.heard if key != int(run.task.key)]  # for shapes
    assert len(set(Listens.heard)) == len(Listens.heard) == 2 * 2 * 2 * run.population.training
    assert not {int(run.population.visit(k, r, {}).key) for k in range(8) for r in range(2)} & set(Listens.heard)


def test_a_channel_draws_for_each_client_and_round_and_alike_in_both_engines() -> None:
    serial, stacked = (ran(on("fedavg", Noisy()), engine) for engine in ENGINES)
    assert apart(serial, stacked) <= engines.TOLERANCE
    run = toy.run(on("fedavg", Noisy()), setting=SETTING)
    sent = [toy.upload_once(run, client)[0]["parts"]["update"] for client in (0, 1)]
    plain = [toy.upload_once(toy.run(made("fedavg"), setting=SETTING), client)[0] for client in (0, 1)]
    noise = [tree.sub(a, tree.sub(b, run.progress.server)) for a, b in zip(sent, plain, strict=True)]
    assert tree.largest_difference(*noise) > 0.01


def test_a_method_that_sends_no_head_back_keeps_nothing_of_it() -> None:
    run = ran("fedbabu+topk")
    kept = run.store[0]["parts"]["0"]
    assert float(tree.dot(kept["head"], kept["head"])) == 0.0 < float(tree.dot(kept["body"], kept["body"]))
    upload, _ = toy.upload_once(run)
    assert set(upload["parts"]["update"]) == {"body"} and tree.nbytes(upload["body"]) == 0


# A row with parts runs like any other


@pytest.mark.parametrize("engine", ENGINES)
def test_a_crew_of_two_leaves_what_one_process_leaves(engine: str) -> None:
    make: Any = partial(made, FOUR)
    one = left(toy_run(make, engine, SETTING))
    crew, ray = hired(partial(toys, make, engine, SETTING), 2)
    assert left(toy_run(make, engine, SETTING, crew=crew)) == one
    assert ray.handed_out > 0


@pytest.mark.parametrize("statistics", ["shared", "personal"])
def test_statistics_of_norm_layers_are_no_updates(statistics: str) -> None:
    setting: dict[str, Any] = {"model": "resnet8", "norm": "batch", "statistics": statistics, "rounds": 1, "epochs": 1}
    mine, plain = ran(on("fedavg", probes.First(), probes.Halving()), **setting), ran("fedavg", **setting)
    pairs = zip(*(tree.flatten(run.progress.server).items() for run in (mine, plain)), strict=True)
    same = {path: torch.equal(leaf, other) for (path, leaf), (_, other) in pairs}
    assert {same[path] for path in same if tree.is_statistic(path)} == {True}
    assert not any(same[path] for path in same if not tree.is_statistic(path))
    kept = ran("fedavg+topk", **setting).store[0]
    assert not any(map(tree.is_statistic, tree.flatten((kept["own"] if statistics == "personal" else kept)["parts"])))


def test_a_row_with_parts_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = left(toy.run(made(FOUR), setting=SETTING))
    first = toy.run(made(FOUR), setting=SETTING, checkpoint=tmp_path / "checkpoint.pt")
    first.saved = -math.inf
    first.step()
    again = toy.run(made(FOUR), setting=SETTING, checkpoint=tmp_path / "checkpoint.pt")
    assert again.progress.round == 1 and left(again) == whole
    other = toy.run(made("fedavg_ft(finetune_epochs=1)"), setting=SETTING, checkpoint=tmp_path / "checkpoint.pt")
    assert other.progress.round == 0


def test_a_checkpoint_is_of_the_versions_of_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    before = toy.run(made("fedavg+topk")).fingerprint
    monkeypatch.setattr(PARTS["topk"], "version", 2)
    assert toy.run(made("fedavg+topk")).fingerprint != before
    assert toy.run(made("fedavg")).fingerprint.startswith("FedAvg() 1 Setting(")


def test_every_hook_of_an_algorithm_is_answered_for_its_method() -> None:
    """A hook that is new in `Algorithm` and not here would be the default's, whatever the method says."""
    asked_of_pieces = {"version", "paper", "space", "refuses", "own_loss", "family", "controls", "later"}
    asked_of_pieces |= {"trains_another"}
    hooks = {hook for hook in dir(Algorithm) if not hook.startswith("_")} - asked_of_pieces
    assert hooks <= set(vars(Composed))


def test_what_cannot_be_stacked_is_named_with_its_parts() -> None:
    with pytest.raises(engines.CannotStack, match=r"^FedAvg\(\) \+ BranchesOnATensor\(\) branches on a tensor's value"):
        ran(on("fedavg", BranchesOnATensor()), "stacked")
    personal: dict[str, Any] = {"norm": "batch", "statistics": "personal", "model": "resnet8"}
    with pytest.raises(engines.CannotStack, match=r"^FedAvg\(\) \+ BranchesOnATensor\(\) branches"):
        ran(on("fedavg", BranchesOnATensor()), "stacked", **personal)


# Rows are spelt, ordered, refused


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("fedavg+focal", "fedavg+focal"),
        ("fedavg + focal( gamma = 2 )", "fedavg+focal"),
        ("fedavg+tau-norm(tau=5e-1)", "fedavg+tau_norm(tau=0.5)"),
        ("fedrep(head_epochs=2)+tau_norm+focal(gamma=1)", "fedrep(head_epochs=2)+focal(gamma=1.0)+tau_norm"),
        ("fedavg+tau_norm+trimmed_mean+topk+focal", "fedavg+focal+topk+trimmed_mean+tau_norm"),
        ("fedavg+balanced_softmax(absent=1e-1)", "fedavg+balanced_softmax(absent=0.1)"),
        ("fedavg+focal(gamma=0)", "fedavg"),
        ("fedavg+topk(share=1)+balanced_softmax(prior='uniform')", "fedavg"),
        ("fedavg+focal(gamma=0,detach=True)+cross_entropy", "fedavg+cross_entropy"),
        ("fedrod+focal(gamma=0)", "fedrod+focal(gamma=0.0)"),
        ("fedrod+topk(share=1)", "fedrod"),
    ],
)
def test_a_row_has_one_spelling(text: str, spelt: str) -> None:
    algorithm = made(text)
    assert label(algorithm) == spelt
    assert made(spelt) == algorithm and made(repr(spelt).strip("'\"")) == algorithm


def test_parts_that_are_off_are_not_there_at_all() -> None:
    assert made("fedavg+focal(gamma=0)+topk(share=1.0)") == made("fedavg") == compose(made("fedavg"), [])
    assert type(made("fedavg+focal(gamma=0)")) is ALGORITHMS["fedavg"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("focal+fedavg", "focal is a part; write fedavg+focal"),
        ("topk(share=0.5)+focal+fedrep(head_epochs=1)", "topk is a part; write fedrep(head_epochs=1)+topk(share=0.5)"),
        ("focal", "focal is a part; write METHOD+focal"),
        ("fedavg+fedrep", "fedavg+fedrep: fedrep is an algorithm, and after a plus stand parts: balanced_softmax,"),
        ("fedavg+", "'fedavg+': a method and parts are wanted, with a plus between them"),
        ("fedavg++focal", "a method and parts are wanted"),
        ("+focal", "a method and parts are wanted"),
        ("fedavg+focal(1)", "focal(1): give parameters by name"),
        ("fedavg+focal(gamma=-1)", "focal(gamma=-1): gamma must be a number from 0 to 1,000,000"),
        ("fedavg+focal(delta=1)", "no such parameter; focal takes gamma, detach"),
        ("fedavg+topk(share=0)", "topk(share=0): share must be a number above 0 and up to 1"),
        ("fedavg+topk(share=1.1)", "must be a number above 0 and up to 1"),
        ("fedavg+trimmed_mean(share=0.5)", "must be a number from 0 to below 0.5"),
        ("fedavg+tau_norm(tau=1.1)", "must be a number from 0 to 1"),
        ("fedavg+balanced_softmax(absent=0)", "absent must be 'out' or a number above 0"),
        ("fedavg+balanced_softmax(prior='theirs')", "prior must be 'local', 'global', 'estimated' or 'uniform'"),
        ("fedavg+focal+cross_entropy", "focal and cross_entropy are both of the kind loss, of which one is allowed"),
        ("fedavg+topk+topk(share=0.5)", "fedavg+topk+topk(share=0.5): topk stands there twice; leave one out"),
        ("local+topk", "local+topk: topk is of the kind channel, which makes no sense here: nothing is sent"),
        ("local+trimmed_mean", "trimmed_mean is of the kind aggregation, which makes no sense here: nothing is sent"),
        ("centralised+topk", "which makes no sense here: the data are pooled, and nothing is sent"),
        ("centralised+trimmed_mean", "the data are pooled"),
    ],
)
def test_what_is_no_row_is_answered_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        made(text)
    assert said in str(caught.value)


def test_two_rules_are_one_too_many() -> None:
    with pytest.raises(LookupError):  # it has no name to be told by
        compose(made("fedavg"), [PARTS["trimmed_mean"](), Krum()])
    assert compose(made("fedavg"), [PARTS["tau_norm"](), probes.Doubling()]).pieces[1:] == (
        PARTS["tau_norm"](),
        probes.Doubling(),
    )


def test_an_unknown_part_is_answered_with_the_near_ones() -> None:
    with pytest.raises(UnknownPlugin, match=r"no bench\.parts plug-in is called 'focall'; did you mean focal"):
        made("fedavg+focall")


def test_a_linear_head_is_corrected_only_where_one_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ALGORITHMS["fedavg"], "predict", lambda self, task, model, x: task.logits(model, x), raising=False
    )
    with pytest.raises(BadConfig, match="it corrects a linear head, and this method predicts in its own way"):
        made("fedavg+tau_norm")
    assert made("fedavg+topk").pieces[0] == made("fedavg")
    assert refusal(made("fedavg"), OfPrototypes()) is None
    run = ran("fedavg+topk")
    assert evaluation._predicts(run.here, "predict") and metrics(run)["generic"] is not None  # scored in that way


def test_a_linear_head_is_scored_as_one_with_parts_too() -> None:
    assert not evaluation._predicts(toy.run(made("fedavg+tau_norm")).here, "predict")


def test_which_methods_of_ours_refuse_what() -> None:
    refused = {
        (each, probe.kind) for each in ALGORITHMS for probe in probes.PROBES if refusal(ALGORITHMS[each](), probe)
    }
    nothing_is_sent = {
        (each, kind) for each in ("local", "centralised", "airbench") for kind in ("channel", "aggregation")
    }
    assert nothing_is_sent <= refused and not {each for each, _ in refused} & {"fedavg", "fedrep", "fedloge", "creff"}


@dataclass(frozen=True, kw_only=True)
class SendsSteps(Algorithm):
    """Neither sends a body or head back nor asks for means of them."""

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        trained = task.sgd(task.loss, shared, data.batches(task.epochs))
        return {"step": tree.sub(trained, shared)}, private

    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        return tree.add(server, uploads.mean("step"))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (PARTS["topk"](), "nothing is carried, as no body or head comes back that was sent"),
        (PARTS["trimmed_mean"](), "nothing is combined, as no mean of a body or head that was sent is asked for"),
    ],
)
def test_a_part_that_meets_nothing_says_so_in_the_first_round(part: Part, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        toy.run(Composed(SendsSteps(), (part,))).step()


@dataclass(frozen=True, kw_only=True)
class OfPrototypes(probes.Doubling):
    reads: ClassVar[frozenset[str]] = frozenset({"prototypes"})


def test_a_correction_says_what_the_model_lacks() -> None:
    with pytest.raises(BadConfig, match="the correction reads prototypes, which the model lacks"):
        toy.run(on("fedavg", OfPrototypes())).step()


# Identity


def run_of(text: str, dataset: str = "digits", **more: Any) -> Run:
    asked = Sweep(
        algorithms=tuple(parse_algorithms(text)),
        datasets=tuple(parse_datasets(dataset)),
        data_root=Path("data"),
        **more,
    )
    (run,) = asked.expand()
    return run


def test_identity_has_parts_only_where_there_are_some() -> None:
    plain, mine = run_of("fedavg"), run_of("fedavg+topk(share=0.5)+focal")
    assert "parts" not in plain.identity()["algorithm"]
    assert mine.identity()["algorithm"] == {
        **plain.identity()["algorithm"],
        "parts": [
            {"name": "focal", "version": 1, "fields": {"gamma": 2.0, "detach": False}},
            {"name": "topk", "version": 1, "fields": {"share": 0.5}},
        ],
    }
    assert mine.protocol == plain.protocol and mine.id != plain.id
    assert mine.id == run_of("fedavg+focal(gamma=2)+topk(share=0.5)").id
    assert run_of("fedavg+focal(gamma=0)").id == plain.id
    assert mine.label == "fedavg+focal+topk(share=0.5)" and name(mine.algorithm) == "fedavg+focal+topk"


@pytest.mark.parametrize(
    ("text", "tier", "needs"),
    [
        ("fedavg+focal", "S", set()),
        ("fedrep+focal", "S", {"body"}),
        ("fedavg+balanced_softmax", "S", set()),
        ("fedavg+balanced_softmax(prior='estimated')+topk", "L", set()),
        ("fedrep+balanced_softmax(prior='global')", "L", {"body", "prior"}),
        ("creff+focal", "L", {"body"}),
        ("centralised+balanced_softmax(prior='estimated')", "A", {"pooled"}),
    ],
)
def test_a_row_has_the_worst_tier_and_all_needs_of_its_pieces(text: str, tier: str, needs: set[str]) -> None:
    assert made(text).tier == tier and made(text).needs == needs


# Results, presets, tuning


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with and without parts, finished."""
    folder = tmp_path_factory.mktemp("results")
    asked = Sweep(
        algorithms=tuple(parse_algorithms(f"fedavg,fedavg+focal(gamma=1),{FOUR}")),
        datasets=tuple(parse_datasets("digits")),
        overrides={"rounds": 2, "eval_every": 1, "unseen": 2, "epochs": 1},
        data_root=Path("no data here"),
    )
    assert {result.status for result in driver.run(asked.expand(), folder, pool=InProcess())} == {"done"}
    return folder


def record_of(out: Path, algorithm: str) -> Any:
    (found,) = (each for each in records.read_all(out)[0] if each.algorithm == algorithm)
    return found


def test_published_rows_with_parts_hold_together_and_can_be_run_again(out: Path) -> None:
    report = validate(out, Path("no data here"))
    assert {problem.file for problem in report.problems} <= {"README.md", "sweeps"}
    runs = candidates(report.inspected, Path("no data here"))
    assert len(runs) == 3
    for run_id, run in runs.items():
        assert not rerun(records.read(out / run_id), run).differs


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        (lambda those: those.reverse(), "identity.algorithm", "is not as this code writes it"),
        (lambda those: those.clear(), "identity.algorithm", "is not as this code writes it"),
        (lambda those: those.append(those[0]), "identity.algorithm.parts", "balanced_softmax stands there twice"),
        (lambda those: those[1].update(name="nothing"), "identity.algorithm.parts.1.name", "is unknown here"),
        (lambda those: those[1].update(version=2), "identity.algorithm.parts.1.version", "knows topk up to 1"),
        (
            lambda those: those[1]["fields"].update(share=2.0),
            "identity.algorithm.parts.1.fields.share",
            "is 2.0, and must be",
        ),
        (lambda those: those[1]["fields"].update(share=1.0), "identity.algorithm", "is not as this code writes it"),
        (lambda those: those[1]["fields"].update(x=1), "identity.algorithm.parts.1.fields.x", "is no field"),
        (lambda those: those.insert(0, "focal"), "identity.algorithm.parts.0", "names no plug-in"),
    ],
)
def test_an_identity_whose_parts_cannot_be_is_not_rebuilt(out: Path, change: Any, key: str, said: str) -> None:
    record = record_of(out, "fedavg_ft+balanced_softmax+topk+trimmed_mean+tau_norm")
    assert rebuilding.rebuild(record).algorithm == made(FOUR)
    identity = json.loads(json.dumps(record.identity))
    change(identity["algorithm"]["parts"])
    with pytest.raises(rebuilding.CannotRebuild, match=said) as caught:
        rebuilding.rebuild(replace(record, identity=identity))
    assert caught.value.key == key
    with pytest.raises(rebuilding.CannotRebuild, match="is no list"):
        rebuilding.rebuild(replace(record, identity={**identity, "algorithm": {**identity["algorithm"], "parts": {}}}))


def test_a_part_of_a_later_version_makes_a_result_outdated(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PARTS["focal"], "version", 2)
    asked = rebuilding.rebuild(record_of(out, "fedavg+focal"))
    assert asked.outdated == {"algorithm": "version 1 of focal, which is at version 2 here"}


def test_rows_of_a_table_are_told_apart_and_found_by_what_a_person_writes(out: Path) -> None:
    boards = leaderboards(records.read_all(out)[0])
    found = {row.label: (row.algorithm, row.version, row.tier) for row in boards[0].rows}
    assert found == {
        "fedavg": ("fedavg", "1", "S"),
        "fedavg+focal(gamma=1.0)": ("fedavg+focal", "1+1", "S"),
        FOUR: ("fedavg_ft+balanced_softmax+topk+trimmed_mean+tau_norm", "1+1+1+1+1", "L"),
    }
    wanted = {
        "fedavg": "fedavg",
        "fedavg+focal": "fedavg+focal(gamma=1.0)",
        "fedavg + focal(detach=False)": "fedavg+focal(gamma=1.0)",
        "fedavg-ft+balanced_softmax+topk(share=0.1)+trimmed_mean+tau_norm": FOUR,
    }
    assert entrants.choose(boards, wanted) == list(dict.fromkeys(wanted.values()))
    for word in ("fedavg+focal(gamma=3.0)", "fedavg+topk", "focal", "fedavg+focal+"):
        with pytest.raises(BadConfig):
            entrants.choose(boards, [word])


def test_mlflow_is_told_of_method_and_parts(out: Path) -> None:
    told = described.of_record(record_of(out, "fedavg+focal"))
    assert told == described.of_record(record_of(out, "fedavg+focal"))
    assert told.tags["algorithm"] == "fedavg+focal" and told.title.startswith("fedavg+focal(gamma=1.0) digits")
    assert (told.params["algorithm.focal.gamma"], told.params["algorithm.focal.detach"]) == ("1.0", "False")
    assert described.of_record(record_of(out, "fedavg")).tags["algorithm"] == "fedavg"


def preset(asked: str, call: str) -> Preset:
    return Preset(name="tuned", algorithms={asked: Choice(call=call)})


def test_a_preset_chooses_the_fields_of_method_and_parts() -> None:
    asked = made("fedrep+focal+topk")
    for call in ("fedrep(head_epochs=2)+focal(gamma=1.3)+topk", "fedrep+topk(share=0.5)", "fedrep"):
        assert preset("fedrep+focal+topk", call).choose(asked) == (made(call), None)
    for call in ("fedavg+focal+topk", "fedrep+focal+topk+tau_norm", "fedrep+cross_entropy+topk"):
        with pytest.raises(BadConfig, match="a call of that algorithm is wanted"):
            preset("fedrep+focal+topk", call).choose(asked)
    with pytest.raises(BadConfig, match=r"has no fedrep\+focal; it has fedrep"):
        preset("fedrep", "fedrep").choose(made("fedrep+focal"))


def test_the_papers_values_are_those_of_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PARTS["topk"], "paper", {"share": 0.01})
    chosen, _ = PAPER.choose(made("fedloge+focal+topk"))
    assert label(chosen) == "fedloge(scale=1.0)+focal+topk(share=0.01)"
    assert label(PAPER.choose(made("fedloge+topk(share=0.5)"))[0]) == "fedloge(scale=1.0)+topk(share=0.5)"
    monkeypatch.setattr(PARTS["topk"], "paper", {"part": 0.01})
    with pytest.raises(BadConfig, match="topk: its `paper` names part, which is no field"):
        PAPER.choose(made("fedloge+topk"))


def test_fields_of_parts_are_tuned_under_the_parts_name() -> None:
    run = run_of("fedrep(body_epochs=2)+balanced_softmax+topk")
    found = space(run.algorithm, run.setting.lr)
    assert set(found) == {"head_epochs", "topk.share", "lr"}  # a prior is what the server may know
    study = Study(run=run, seeds=(0,), space=found)
    values = {"head_epochs": 5, "topk.share": 0.25, "lr": 0.1}
    tried = study.begun(values, 1)
    assert tried.call == "fedrep(head_epochs=5, body_epochs=2)+balanced_softmax+topk(share=0.25)"
    assert [study.value(each, tried) for each in values] == [5, 0.25, 0.1]
    assert [study.value(each, study.begun({}, 0)) for each in values] == [10, 0.1, run.setting.lr]
    assert label(study.algorithm({"topk.share": 1.0})) == "fedrep(body_epochs=2)+balanced_softmax"
    assert study.begun({"topk.share": 2.0}, 2).reason == "TopK(share=2.0): share must be a number above 0 and up to 1"
    assert set(space(made("fedavg+focal"), 0.1)) == {"focal.gamma", "lr"}
    assert set(space(made("fedavg+focal(gamma=1)+trimmed_mean"), 0.1)) == {"trimmed_mean.share", "lr"}


# What a person sees


def test_show_prints_the_method_and_its_parts(bench: Bench) -> None:
    shown = bench("show", "fedrep(head_epochs=3)+topk(share=0.05)")
    assert shown.status == 0 and shown.out.startswith("fedrep(head_epochs=3)+topk(share=0.05) (algorithm)\n")
    for line in ("fedrep (algorithm)", "Server keeps   body", "  head_epochs = 3", "topk (part)", "  share = 0.05"):
        assert re.search(rf"^{re.escape(line)}($|  \()", shown.out, re.MULTILINE)
    assert "\nneutral        share = 1.0\n" in shown.out
    found = json.loads(bench("show", "creff+balanced_softmax(prior='global')", "--json").out)
    assert (found["tier"], found["needs"]) == ("L", ["body", "prior"])
    assert [piece["name"] for piece in found["pieces"]] == ["creff", "balanced_softmax"]
    assert found["pieces"][1]["fields"]["prior"]["value"] == "global"
    assert bench("show", "local+topk").status == 2


def test_parts_are_listed_and_shown(bench: Bench) -> None:
    entries = {entry.pop("name"): entry for entry in json.loads(bench("list", "parts", "--json").out)}
    assert list(entries) == sorted(PARTS) and entries["ccvr"].pop("summary").startswith("CCVR: ")
    assert entries["ccvr"] == {"kind": "correction", "tier": "L", "year": 2021}
    assert entries["cross_entropy"]["year"] is None  # not one paper's
    assert "Kind           loss" in bench("show", "focal").out
    assert json.loads(bench("show", "tau-norm", "--json").out)["kind"] == "parts"


def test_a_plan_has_the_label_and_the_name(bench: Bench) -> None:
    words = ("--rounds", "1", "--ray", "off", "--tracking-uri", "off", "--dry-run", "--no-probe", "--json")
    answer = bench("run", "--algos", "fedavg+tau_norm+focal(gamma=1)", *words)
    (row,) = json.loads(answer.out)["runs"]
    assert (row["algorithm"], row["call"]) == ("fedavg+focal+tau_norm", "fedavg+focal(gamma=1.0)+tau_norm")


def test_check_holds_a_part_to_its_own_promises(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PROMISES", dict(list(parts.PROMISES.items())[:4]))
    answer = bench("check", "tau_norm", "--json")
    findings = json.loads(answer.out)["findings"]
    assert answer.status == 0 and [finding["promise"] for finding in findings] == list(parts.PROMISES)
    assert "did you mean tau_norm" in bench("check", "tau_nrm").err


# Broken parts


@dataclass(frozen=True, kw_only=True)
class Plain(Loss):
    """What the broken losses are made of."""

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        return 1.5 * mean(self.each(logits.float(), batch, counts), batch)

    def each(self, logits: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        return F.cross_entropy(logits, batch.y, reduction="none")


@dataclass(frozen=True, kw_only=True)
class WeighsPadding(Plain):
    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        return 1.5 * F.cross_entropy(logits.float(), batch.y)


@dataclass(frozen=True, kw_only=True)
class InHalfPrecision(Plain):
    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        return 1.5 * mean(F.cross_entropy(logits, batch.y, reduction="none"), batch)


@dataclass(frozen=True, kw_only=True)
class LogOfZero(Plain):
    def each(self, logits: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        return F.cross_entropy(logits * counts.log(), batch.y, reduction="none")


@dataclass(frozen=True, kw_only=True)
class BranchesOnATensor(Plain):
    def each(self, logits: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        return super().each(logits, batch, counts) * (2.0 if counts.sum() > 20 else 1.0)


@dataclass(frozen=True, kw_only=True)
class WrongNeutral(Plain):
    neutral: ClassVar[dict[str, object]] = {"factor": 1.0}
    factor: float = 2.0


@dataclass(frozen=True, kw_only=True)
class OffByDefault(Plain):
    neutral: ClassVar[dict[str, object]] = {"factor": 1.0}
    factor: float = 1.0

    def loss(self, task: Task, logits: Tensor, features: Tensor | None, batch: Batch, counts: Tensor) -> Tensor:
        return self.factor * mean(self.each(logits.float(), batch, counts), batch)


@dataclass(frozen=True, kw_only=True)
class LiesAboutTheTier(UsesPrior, Plain):
    @property
    def tier(self) -> str:
        return "S"


@dataclass(frozen=True, kw_only=True)
class Adds(Aggregation):
    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        return tree.map(lambda *leaves: torch.stack(leaves).sum(0), *updates)


@dataclass(frozen=True, kw_only=True)
class ChangesUpdates(Aggregation):
    def combine(self, task: Task, updates: Sequence[Tree], weights: Tensor) -> Tree:
        for leaf in tree.flatten(updates[0]).values():
            leaf.zero_()
        return tree.map(lambda *leaves: torch.stack(leaves).mean(0), *updates)


@dataclass(frozen=True, kw_only=True)
class Forgets(Channel):
    """Of a tensor the first half is sent, and of the rest nothing is kept."""

    def init(self, task: Task, update: Tree) -> Tree:
        return tree.zeros_like(update)

    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        return tree.map(lambda leaf: leaf.flatten()[: -(-leaf.numel() // 2)], update), tree.zeros_like(update)

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        return tree.map(
            lambda leaf, half: torch.cat([half, leaf.new_zeros(leaf.numel() - len(half))]).reshape(leaf.shape),
            like,
            sent,
        )


@dataclass(frozen=True, kw_only=True)
class Grows(probes.Halving):
    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        return tree.map(torch.Tensor.double, update), {}

    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        return tree.map(torch.Tensor.float, sent)


@dataclass(frozen=True, kw_only=True)
class Peeks(probes.Halving):
    def receive(self, task: Task, sent: Tree, like: Tree) -> Tree:
        return tree.add(sent, like, 1e-3)


@dataclass(frozen=True, kw_only=True)
class DrawsGlobally(probes.Halving):
    def send(self, task: Task, update: Tree, kept: Tree, key: Tensor) -> tuple[Tree, Tree]:
        return tree.map(lambda leaf: leaf + 1e-3 * torch.randn_like(leaf), update), {}


@dataclass(frozen=True, kw_only=True)
class InPlace(Correction):
    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        model["head"]["bias"].add_(1.0)
        return model


@dataclass(frozen=True, kw_only=True)
class OtherShape(Correction):
    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        return {"head": {"weight": model["head"]["weight"][:3], "bias": model["head"]["bias"]}}


@dataclass(frozen=True, kw_only=True)
class NeedsCounts(Correction):
    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        assert counts is not None
        return {"head": {**model["head"], "bias": model["head"]["bias"] - (1 + counts).log()}}


@dataclass(frozen=True, kw_only=True)
class Idle(Correction):
    def correct(self, task: Task, model: Tree, counts: Tensor | None) -> Tree | None:
        return None


@pytest.mark.parametrize(
    ("broken", "promise", "said"),
    [
        (WeighsPadding, "a loss is a mean over real examples, in float32", "padding changes the loss"),
        (InHalfPrecision, "a loss is a mean over real examples, in float32", "not taken to float32"),
        (LogOfZero, "a loss is finite", "a client of one class makes the loss"),
        (BranchesOnATensor, "engines agree", "branches on a tensor's value"),
        (WrongNeutral, "off is off", "at its neutral values a model changes by"),
        (OffByDefault, "it changes what it says", "its defaults are those at which it changes nothing"),
        (LiesAboutTheTier, "every prior works", "with prior global its tier is S"),
        (probes.First, "a rule gives what is agreed", "updates in another order"),
        (probes.First, "the order of clients is irrelevant", "listing the clients backwards"),
        (Adds, "a rule gives what is agreed", "seven equal updates"),
        (ChangesUpdates, "a rule gives what is agreed", "away from what it should be"),
        (Forgets, "a channel carries", "what arrived and what is kept differ from what was sent"),
        (Grows, "a channel carries", "bytes become"),
        (Peeks, "a channel carries", "depends on the values of `like`"),
        (DrawsGlobally, "the seed decides, and nothing else", "two runs of one seed differ"),
        (InPlace, "a correction keeps shapes", "a model is changed in place"),
        (OtherShape, "a correction keeps shapes", "or in other shapes"),
        (NeedsCounts, "a correction keeps shapes", "AssertionError"),
        (Idle, "it changes what it says", "nothing differs from the method without it"),
        (Plain, "the docstring says kind, what the server learns, departures", "has no line Kind, Learns, Departs"),
        (Plain, "the name is the file's name", "registered as []"),
    ],
)
def test_the_contract_of_parts_catches(broken: type[Part], promise: str, said: str) -> None:
    (finding,) = findings(broken, {promise: parts.PROMISES[promise]})
    assert finding.problem is not None and said in finding.problem


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Kind           loss", "Kind           channel", "the docstring says channel, and it is of the kind loss"),
        ("nothing beyond updates", "each client's class counts", "the server learns each client's class counts"),
        ("Departs", "Differs", "has no line Departs"),
    ],
)
def test_a_docstring_that_is_not_true_is_caught(old: str, new: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[PARTS["cross_entropy"].__module__]
    monkeypatch.setattr(module, "__doc__", str(module.__doc__).replace(old, new))
    with pytest.raises(ContractBroken, match=said):
        parts.docstring_says_it(PARTS["cross_entropy"])


# Methods that parts do not reach


@dataclass(frozen=True, kw_only=True)
class TrainsByItself(Algorithm):
    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        def loss(params: Tree, batch: Batch) -> Tensor:
            return cross_entropy(task.logits(params, batch.x), batch)

        return task.sgd(loss, shared, data.batches(task.epochs)), private


@dataclass(frozen=True, kw_only=True)
class AveragesByItself(toy.Host):
    def aggregate(self, task: Task, server: Tree, uploads: Uploads) -> Tree:
        return {key: tree.map(lambda leaf: leaf.mean(0), uploads[key]) for key in server}


@dataclass(frozen=True, kw_only=True)
class ClaimsALoss(toy.Host):
    own_loss: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class HidesALoss(toy.Host):
    scale: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Misspelt(toy.Host):
    refuses: ClassVar[dict[str, str]] = {"losses": "it has its own"}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (TrainsByItself, "a part of the kind loss changes nothing; train by task.loss or task.criterion"),
        (AveragesByItself, "nothing is combined, as no mean of a body or head"),
        (SendsSteps, "nothing is carried"),
        (ClaimsALoss, "own_loss = True, and cross-entropy in its place changes nothing; say own_loss = False"),
        (HidesALoss, "own_loss = False, and cross-entropy in its place changes something; say own_loss = True"),
        (Misspelt, "it refuses losses, which is no kind of a part"),
    ],
)
def test_a_method_that_parts_do_not_reach_is_caught(broken: type[Algorithm], said: str) -> None:
    promise = "parts act, or are refused"
    (finding,) = findings(broken, {promise: checks.ALGORITHM_PROMISES[promise]})
    assert finding.problem is not None and said in finding.problem


def test_a_method_may_refuse_what_does_not_reach_it() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Refuses(AveragesByItself):
        refuses: ClassVar[dict[str, str]] = {"aggregation": "it averages in its own way"}

    checks.parts_act(Refuses)


@dataclass(frozen=True, kw_only=True)
class Alone(BranchesOnATensor):
    stackable: ClassVar[bool] = False


def test_a_part_that_cannot_be_stacked_has_clients_run_one_by_one() -> None:
    assert toy.run(on("fedavg", Alone()), "stacked").here.engine is engines.serial
