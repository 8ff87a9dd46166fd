"""Per-FedAvg: its steps against loops written out, the exact gradient of a quadratic, and the step before the test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Adaptation, Batch, Tree, losses, tree
from bench.algorithm import stages
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
SETTING = replace(toy.SETTING, rounds=2, weight_decay=1e-2, clip=0.5)
LOWERED = replace(toy.SETTING, rounds=2, weight_decay=1e-2, lr_steps=((0.5, 0.2),))
BATCH_NORM = replace(toy.SETTING, model="resnet8", norm="batch", rounds=2, epochs=1, participation=1.0, eval_every=2)
FEW = (5, 3, 0, 0, 0, 0, 0, 0)


def run_of(name: str = "perfedavg", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    sizes = FEW if setting.model == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def gradient(w: list[Tensor], batch: Batch) -> list[Tensor]:
    """Of cross-entropy, for all leaves of the toy's network in their order."""
    leaves = [leaf.detach().requires_grad_() for leaf in w]
    logits = F.linear(torch.relu(F.linear(batch.x.flatten(1), *leaves[:2])), *leaves[2:])
    return list(torch.autograd.grad(F.cross_entropy(logits, batch.y), leaves))


def moved(w: list[Tensor], along: list[Tensor], by: float) -> list[Tensor]:
    return [a + by * b for a, b in zip(w, along, strict=True)]


@pytest.mark.equivalence
@pytest.mark.parametrize("order", ["fo", "hf"])
@ENGINES
def test_without_an_inner_step_it_is_fedavg(engine: str, order: str) -> None:
    """Bit for bit, its test too: nothing is tuned then."""
    run, fedavg = toy.finish(run_of(engine=engine, inner_rate=0, order=order)), toy.finish(run_of("fedavg", engine))
    assert largest_difference(run.progress.server, fedavg.progress.server) == 0.0
    assert run.outcome().metrics == fedavg.outcome().metrics


@ENGINES
def test_with_one_it_is_not(engine: str) -> None:
    runs = [toy.finish(run) for run in (run_of(engine=engine), run_of(engine=engine, order="hf"))]
    models = [run.progress.server for run in (*runs, toy.finish(run_of("fedavg", engine)))]
    assert largest_difference(models[0], models[2]) > 1e-3
    assert largest_difference(models[0], models[1]) > 1e-4


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("order", ["fo", "hf"])
def test_steps_are_those_of_the_paper(order: str, round: int) -> None:
    """Three batches that have nothing to do with each other; no schedule lowers the rate of the inner step."""
    run = run_of(setting=LOWERED, order=order, inner_rate=4.0, delta=0.01)
    task, data = run.task_at(round), data_of(run, 0, round)
    assert task.lr == pytest.approx(0.05 * (0.2 if round else 1.0))
    alpha, start = 4.0 * 0.05, tree.flatten(run.progress.server)
    w = [torch.nn.Parameter(leaf.clone()) for leaf in start.values()]
    optimiser = torch.optim.SGD(w, task.lr, run.setting.momentum, weight_decay=run.setting.weight_decay)
    streams = [list(data.batches(2, salt)) for salt in ("inner", "", "curvature")]
    for inner, outer, third in zip(*streams, strict=True):
        g = gradient(moved(list(w), gradient(list(w), inner), -alpha), outer)
        if order == "hf":
            ahead, behind = (gradient(moved(list(w), g, by), third) for by in (0.01, -0.01))
            g = [a - alpha * (b - c) / 0.02 for a, b, c in zip(g, ahead, behind, strict=True)]
        for p, step in zip(w, g, strict=True):
            p.grad = step
        optimiser.step()
    expected = tree.unflatten(dict(zip(start, (p.detach() for p in w), strict=True)))
    assert largest_difference(toy.upload_once(run, 0, task)[0], expected) < 1e-5
    other = run_of(setting=LOWERED, order="fo" if order == "hf" else "hf", inner_rate=4.0, delta=0.01)
    assert largest_difference(toy.upload_once(other, 0, task)[0], expected) > 1e-4


@pytest.mark.equivalence
@pytest.mark.parametrize("delta", [0.03, 1.0])
def test_of_a_quadratic_hf_takes_the_exact_gradient_whatever_delta(delta: float) -> None:
    """grad F(w - alpha grad f(w)) = (I - alpha H) grad f(u), by differentiating twice; "fo" leaves out the first."""

    def squares(logits: Tensor, features: Tensor | None, batch: Batch) -> Tensor:
        return losses.mean(0.5 * (logits - losses.one_hot(batch.y, 6)).square().sum(1), batch)

    setting = replace(toy.SETTING, model="linear", momentum=0.0, epochs=1, batch_size=1000)
    run = run_of(setting=setting, order="hf", inner_rate=0.2, delta=delta)
    task = replace(run.task_at(0), objective=squares)
    (batch,) = data_of(run, 0).batches(1)
    w = [leaf.clone().requires_grad_() for leaf in tree.flatten(run.progress.server).values()]

    def f(w: list[Tensor]) -> Tensor:
        return squares(F.linear(batch.x.flatten(1), *w), None, batch)

    u = moved(w, list(torch.autograd.grad(f(w), w, create_graph=True)), -0.2 * 0.05)
    exact, first = torch.autograd.grad(f(u), w, retain_graph=True), torch.autograd.grad(f(u), u)
    for order, wanted in (("hf", exact), ("fo", first)):
        run = run_of(setting=setting, order=order, inner_rate=0.2, delta=delta)
        step = tree.scale(tree.sub(run.progress.server, toy.upload_once(run, 0, task)[0]), 1 / 0.05)
        for found, expected in zip(tree.flatten(step).values(), wanted, strict=True):
            assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert float((exact[0] - first[0]).norm()) > 1e-2 * float(first[0].norm())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("unseen", [0, 1])
@ENGINES
def test_everybody_takes_the_same_step_before_the_test(engine: str, unseen: int, steps: int) -> None:
    """On a batch of the client's training examples, at the rate of the inner step, held out or not."""
    setting = replace(LOWERED, unseen=unseen, momentum=0.0, weight_decay=0.0)
    run = toy.finish(run_of(engine=engine, setting=setting, inner_rate=3.0, steps=steps))
    server, task, client = run.progress.server, run.task_at(1), 7
    named = run.evaluator.models(task, server, server, run.store, [client], True)
    (model,) = named["unseen" if unseen else "personal"]
    w = list(tree.flatten(server).values())
    for batch in data_of(run, client, 1).batches(steps=steps, salt="adapt 0"):
        w = moved(w, gradient(w, batch), -3.0 * 0.05)
    assert largest_difference(model, tree.unflatten(dict(zip(tree.flatten(server), w, strict=True)))) < 1e-5
    assert stages(run.algorithm.newcomer_adaptation(task)) == (Adaptation(steps=steps, lr_factor=3.0),)


def test_its_step_is_worth_something() -> None:
    run = toy.finish(run_of(setting=replace(toy.SETTING, eval_every=4)))
    assert measured(run, "personal") > measured(run, "personal:0 epochs")


@pytest.mark.parametrize(("order", "passes"), [("fo", 2), ("hf", 3)])
@ENGINES
def test_a_step_takes_two_batches_or_three_and_nothing_more_travels(engine: str, order: str, passes: int) -> None:
    run, fedavg = toy.finish(run_of(engine=engine, order=order)), toy.finish(run_of("fedavg", engine))
    assert run.progress.cost["train_samples"] == passes * fedavg.progress.cost["train_samples"]
    for what in ("bytes_down", "bytes_up"):
        assert run.progress.cost[what] == fedavg.progress.cost[what]


def test_engines_agree_under_batch_norm() -> None:
    runs = [run_of(engine=engine, setting=BATCH_NORM) for engine in ("serial", "stacked")]
    for run in runs:
        run.step()
    found: list[Tree] = [run.progress.server for run in runs]
    assert largest_difference(*found) < 2e-4
