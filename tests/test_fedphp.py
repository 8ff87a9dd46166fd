"""FedPHP: the discrepancy by hand, a client's steps against a loop written out, what is inherited, and how fast."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from math import exp
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, Uploads, tree
from bench.algorithm import stages
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, trained

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
TRANSFERS = pytest.mark.parametrize("transfer", ["mmd", "kd"])
SETTING = replace(toy.SETTING, rounds=2, weight_decay=1e-2, clip=0.5)
PLAIN = replace(toy.SETTING, rounds=3, participation=0.25)
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=3, epochs=1, participation=1.0, eval_every=3)
FEW = (5, 3, 0, 0, 0, 0, 0, 0)
EMPTY = toy.SIZES.index(0)
MODEL = 4 * (64 * 64 + 64 + 64 * 6 + 6)  # bytes


def run_of(name: str = "fedphp", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = FEW if setting.model == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def model(state: Tree) -> Tree:
    return {"body": state["body"], "head": state["head"]}


def shifted(model: Tree) -> Tree:
    return tree.map(lambda leaf: leaf + 0.05 * torch.arange(leaf.numel()).reshape(leaf.shape).cos(), model)


def inherits(run: Run, visited: float, visits: float, client: int = 0) -> Tree:
    """Let a client have visited, of so many times, and give what it has inherited."""
    inherited = shifted(run.task.init())
    run.store[client] = {**inherited, "visited": torch.tensor(visited)}
    run.progress.server = {**run.progress.server, "visits": torch.tensor(visits)}
    return inherited


def discrepancy(a: Tensor, b: Tensor, weight: Tensor | None = None) -> float:
    ALGORITHMS["fedphp"]()
    batch = Batch(a, torch.zeros(len(a)), torch.ones(len(a)) if weight is None else weight)
    return float(import_module("bench.algorithms.fedphp").discrepancy(a, b, batch))


def pairwise(a: Tensor, b: Tensor) -> Tensor:
    """The same, pair by pair: kernels of 1/4, 1/2, 1, 2 and 4 times the mean squared distance of different points."""
    x, total, n = [*a, *b], a.new_zeros(()), len(a)
    squared = [[(p - q).square().sum() for q in x] for p in x]
    width = torch.stack([torch.stack(row) for row in squared]).sum().detach() / (2 * n * (2 * n - 1))
    for i in range(2 * n):
        for j in range(2 * n):
            kernels = torch.stack([(-squared[i][j] / (width * 2.0**k)).exp() for k in range(-2, 3)]).sum()
            total = total + (1 if (i < n) == (j < n) else -1) * kernels
    return total / n**2


# The discrepancy ------------------------------------------------------------------------------------------------------


def test_of_two_points_it_is_known() -> None:
    """Whatever their distance: it is itself the width."""
    wanted = 2 * sum(1 - exp(-1 / factor) for factor in (0.25, 0.5, 1.0, 2.0, 4.0))
    for apart in (0.1, 2.0, 30.0):
        assert discrepancy(torch.zeros(1, 3), torch.full((1, 3), apart)) == pytest.approx(wanted, rel=1e-5)


def test_it_is_what_pairs_say_and_padding_has_no_say() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, generator=draw), 1 + torch.randn(5, 4, generator=draw)
    wanted = float(pairwise(a, b))
    assert discrepancy(a, b) == pytest.approx(wanted, rel=1e-5) and wanted > 0.1
    longer = [torch.cat([each, 9 * torch.ones(2, 4)]) for each in (a, b)]
    assert discrepancy(longer[0], longer[1], torch.tensor([1.0] * 5 + [0.0] * 2)) == pytest.approx(wanted, rel=1e-5)
    assert discrepancy(a, b, torch.zeros(5)) == 0.0


def test_the_same_features_in_any_order_are_no_discrepancy() -> None:
    a = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    assert discrepancy(a, a.flip(0)) == pytest.approx(0.0, abs=1e-5)
    assert discrepancy(torch.ones(3, 2), torch.ones(3, 2)) == 0.0


# Clients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.05, 0.9])
@TRANSFERS
def test_steps_are_those_of_the_papers_loss(transfer: str, weight: float) -> None:
    """(1 - c) cross-entropy + c times what the inherited model teaches; the teacher's logits alone are cooled."""
    setting = replace(toy.SETTING, epochs=1, batch_size=4)
    run = run_of(setting=setting, transfer=transfer, weight=weight, temperature=3.0)
    inherited = list(tree.flatten(inherits(run, 1.0, 4.0, 4)).values())
    start = tree.flatten(model(run.progress.server))
    w = [torch.nn.Parameter(leaf.clone()) for leaf in start.values()]
    optimiser = torch.optim.SGD(w, run.setting.lr, run.setting.momentum)
    for batch in data_of(run, 4).batches(1):
        x, y = batch.x.flatten(1), batch.y
        z, z_h = (torch.relu(F.linear(x, *each[:2])) for each in (w, inherited))
        logits, logits_h = F.linear(z, *w[2:]), F.linear(z_h, *inherited[2:])
        soft = F.cross_entropy(logits, (logits_h / 3.0).softmax(1))
        optimiser.zero_grad()
        taught = pairwise(z, z_h) if transfer == "mmd" else soft
        ((1 - weight) * F.cross_entropy(logits, y) + weight * taught).backward()
        optimiser.step()
    expected = tree.unflatten(dict(zip(start, (p.detach() for p in w), strict=True)))
    upload, _ = toy.upload_once(run, 4)
    assert largest_difference(upload, expected) < 2e-5
    fedavg = trained(run, model(run.progress.server), data_of(run, 4).batches(1))
    assert largest_difference(upload, fedavg) > 1e-4


@pytest.mark.parametrize(
    ("visited", "visits", "mu"), [(1, 4, 0.225), (2, 4, 0.45), (4, 4, 0.9), (9, 4, 0.9), (1, 0.5, 0.9)]
)
def test_a_model_is_inherited_the_more_the_more_often_a_client_was_there(
    visited: float, visits: float, mu: float
) -> None:
    run = run_of()
    inherited = inherits(run, visited, visits)
    upload, kept = toy.upload_once(run)
    mean = tree.map(lambda old, new: mu * old + (1 - mu) * new, inherited, upload)
    assert largest_difference(model(kept), mean) < 1e-6
    assert float(kept["visited"]) == visited + 1


@pytest.mark.equivalence
@TRANSFERS
@ENGINES
def test_the_first_visit_is_fedavgs_and_its_model_is_inherited(engine: str, transfer: str) -> None:
    setting = replace(SETTING, rounds=1)
    run, fedavg = (toy.finish(each) for each in (
        run_of("fedphp", engine, setting, transfer=transfer), run_of("fedavg", engine, setting)
    ))  # fmt: skip
    assert largest_difference(model(run.progress.server), fedavg.progress.server) == 0.0
    upload, kept = toy.upload_once(run_of(setting=setting))
    assert largest_difference(model(kept), upload) == 0.0


@pytest.mark.equivalence
@TRANSFERS
@ENGINES
def test_without_a_teacher_the_global_model_is_fedavgs(engine: str, transfer: str) -> None:
    run, fedavg = (toy.finish(each) for each in (
        run_of(engine=engine, weight=0.0, transfer=transfer), run_of("fedavg", engine)
    ))  # fmt: skip
    assert largest_difference(model(run.progress.server), fedavg.progress.server) == 0.0
    assert run.outcome().metrics["generic"] == fedavg.outcome().metrics["generic"]


@TRANSFERS
@ENGINES
def test_with_one_it_is_not(engine: str, transfer: str) -> None:
    run, fedavg = toy.finish(run_of(engine=engine, transfer=transfer)), toy.finish(run_of("fedavg", engine))
    assert largest_difference(model(run.progress.server), fedavg.progress.server) > 1e-4


def test_the_teacher_goes_by_its_running_statistics_and_keeps_them_apart() -> None:
    uploads = []
    for shift in (0.0, 1.0):
        run = run_of(setting=BATCH_NORM, weight=0.5)
        inherited = inherits(run, 1.0, 4.0)
        statistics, weights = tree.split(inherited, tree.is_statistic)
        inherited = tree.merge(weights, tree.map(lambda leaf, by=shift: leaf + by, statistics))
        run.store[0] = {**inherited, "visited": torch.tensor(1.0)}
        uploads.append(toy.upload_once(run)[0])
    moving, trained = ([tree.split(each, tree.is_statistic)[part] for each in uploads] for part in (0, 1))
    assert largest_difference(*trained) > 1e-4
    assert moving[0] and largest_difference(*moving) == 0.0


def test_engines_agree_under_batch_norm() -> None:
    runs = [run_of("fedphp", engine, BATCH_NORM) for engine in ("serial", "stacked")]
    for run in (*runs, *runs):
        run.step()
    assert largest_difference(*map(toy.states, runs)) < 5e-4


@ENGINES
def test_without_examples_nothing_is_inherited(engine: str) -> None:
    run = toy.finish(run_of(engine=engine, setting=replace(SETTING, participation=1.0)))
    assert largest_difference(run.store[EMPTY], run.store.initial) == 0.0
    assert float(run.store[0]["visited"]) == 2


# Rounds ---------------------------------------------------------------------------------------------------------------


def test_visits_to_expect_are_reckoned_from_who_came() -> None:
    """Of four rounds and eight clients: six came, then two, then four."""
    run = run_of(setting=replace(SETTING, rounds=4))
    server, found = run.progress.server, []
    for round, came in enumerate((6, 2, 4)):
        sent = [model(run.task.init())] * came
        server = run.algorithm.aggregate(run.task_at(round), server, Uploads(sent, torch.ones(came)))
        found.append(float(server["visits"]))
    assert found == pytest.approx([3.0, 2.0, 2.0])


def test_of_everybody_in_every_round_visits_are_rounds() -> None:
    run = toy.finish(run_of(setting=replace(SETTING, participation=1.0)))
    assert float(run.progress.server["visits"]) == 2.0


def test_tested_is_what_was_inherited() -> None:
    run = toy.finish(run_of(setting=replace(SETTING, participation=1.0)))
    task, server = run.task_at(1), run.progress.server
    shared = run.algorithm.broadcast(task, server)
    (tested,) = run.evaluator.models(task, server, shared, run.store, [0], True)["personal"]
    assert largest_difference(tested, model(run.store[0])) == 0.0
    assert largest_difference(tested, model(server)) > 1e-3
    generic = run.algorithm.global_model(task, server)
    assert generic is not None and largest_difference(generic, model(server)) == 0.0


@ENGINES
@pytest.mark.parametrize("unseen", [0, 2])
def test_who_never_took_part_inherits_what_a_first_visit_would_leave(unseen: int, engine: str) -> None:
    run = toy.finish(run_of(engine=engine, setting=replace(PLAIN, unseen=unseen)))
    population, server, task = run.population, run.progress.server, run.task_at(2)
    never = [k for k in range(population.training) if k not in run.store.clients() and len(population.index[k])]
    client = population.size - 1 if unseen else never[0]
    named = run.evaluator.models(task, server, server, run.store, [client], True)
    (tested,) = named["unseen" if unseen else "personal"]
    expected = trained(run, model(server), data_of(run, client, 2).batches(run.setting.epochs))
    assert largest_difference(tested, expected) < 1e-5
    assert largest_difference(run.store[client], run.store.initial) == 0.0
    assert stages(run.algorithm.newcomer_adaptation(task)) == ()


def test_a_model_travels_and_downwards_a_number_besides() -> None:
    run = run_of()
    run.step()
    assert run.progress.cost["bytes_down"] == 6 * (MODEL + 4)
    assert run.progress.cost["bytes_up"] == 6 * MODEL
