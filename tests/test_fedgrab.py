"""Fed-GraB: steps by hooks on logits, controllers, the analysis of the head, FedAvg without controllers."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured

fedgrab = importlib.import_module("bench.algorithms.fedgrab")

SETTING = replace(toy.SETTING, participation=1.0, rounds=3, momentum=0.9, weight_decay=1e-2)
OFF = "proportional=0, integral=0, differential=0"
LOPSIDED = 1
"""A client with three of the six classes."""


def run_of(spelt: str, engine: str = "serial", setting: Any = SETTING, **more: Any) -> Run:
    (algorithm,) = parse_algorithms(spelt)
    return toy.run(algorithm, engine, setting=setting, **more)


def model_of(run: Run) -> Tree:
    return {key: run.progress.server[key] for key in ("body", "head")}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_without_controllers_it_is_fedavg_of_whatever_loss(engine: str) -> None:
    for spelt, loss in ((f"fedgrab({OFF})+cross_entropy", "fedavg"), (f"fedgrab({OFF}, rest=0)+focal", "fedavg+focal")):
        runs = [toy.finish(run_of(each, engine)) for each in (spelt, loss)]
        assert largest_difference(model_of(runs[0]), model_of(runs[1])) == 0.0


def test_closed_controllers_are_plain_entropy_and_open_ones_are_not() -> None:
    """In the first round all are closed."""
    one = replace(SETTING, rounds=1)
    closed, off = (toy.finish(run_of(spelt, setting=one)) for spelt in ("fedgrab", f"fedgrab({OFF})"))
    assert largest_difference(model_of(closed), model_of(off)) == 0.0
    assert all(not closed.store[k]["control"].any() for k in closed.store.clients())
    opened, off = (toy.finish(run_of(spelt)) for spelt in ("fedgrab", f"fedgrab({OFF})"))
    assert largest_difference(model_of(opened), model_of(off)) > 1e-3


@pytest.mark.parametrize("engine", ["serial", "stacked"])
@pytest.mark.parametrize("tail", [[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
def test_steps_are_those_of_hooks_on_logits(engine: str, tail: list[int]) -> None:
    """Pushes up and down are added up apart, over batches and rounds, and never forgotten."""
    spelt = "fedgrab(proportional=3, integral=0.2, differential=0.7, slope=0.8, limit=2)"
    run = run_of(spelt, engine, replace(SETTING, rounds=2, client_weights="uniform"))
    sizes = {k: len(run.population.index[k]) for k in range(8)}
    expected: dict[int, Any] = {k: (np.zeros(6), np.zeros(6), np.zeros(6), [np.zeros(6)] * 2) for k in sizes}
    for round in range(2):
        run.progress.server = {**run.progress.server, "tail": torch.tensor(tail).float()}
        before, models = run.progress.server, []
        for k in (k for k in sizes if sizes[k]):
            model, expected[k] = hooked(run, before, k, round, np.array(tail), *expected[k])
            models.append(model)
        run.step()
        mean = tree.map(lambda *leaves: torch.stack(leaves).mean(0), *models)
        assert largest_difference(model_of(run), mean) < 2e-5
    largest = 0.0
    for k, (up, down, control, _) in expected.items():
        assert np.abs(run.store[k]["gap"].numpy() - (up - down)).max() < 1e-4
        assert np.abs(run.store[k]["control"].numpy() - control).max() < 1e-3
        assert not control[np.array(tail) == 0].any()
        largest = max(largest, np.abs(control).max())
    assert largest == 2.0  # the limit is reached


def hooked(run: Run, server: Tree, client: int, round: int, tail: Any, up: Any, down: Any, u: Any, errors: Any) -> Any:
    """Train as 8.1 of the card says, by torch's own optimiser and a hook that replaces the gradient of logits."""
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(model_of(run)).values()]
    optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
    for batch in data_of(run, client, round).batches(2):
        e, (e1, e2) = down - up, errors
        u = np.clip(u + 3 * (e - e1) + 0.2 * e + 0.7 * (e - 2 * e1 + e2), -2, 2) * tail
        errors = [e, e1]
        positive, negative = ((10 / 9) / (1 / 9 + np.exp(-0.8 * v)) for v in (u, -u))
        y = F.one_hot(batch.y, 6)
        weight = torch.from_numpy(np.where(y.numpy() > 0, positive, negative)).float()
        pushed: list[Tensor] = []

        def reweigh(g: Tensor, weight: Tensor = weight, pushed: list[Tensor] = pushed) -> Tensor:
            pushed.append(g * weight)
            return pushed[0]

        logits = F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:])
        logits.register_hook(reweigh)
        p = torch.sigmoid(logits)
        entropy = -(y * p.log() + (1 - y) * (1 - p).log()).sum() / len(y)
        optimiser.zero_grad()
        entropy.backward()
        optimiser.step()
        size = pushed[0].abs().double().numpy()
        up, down = up + (size * y.numpy()).sum(0), down + (size * (1 - y.numpy())).sum(0)
    leaves = zip(tree.flatten(model_of(run)), (p.detach() for p in w), strict=True)
    return tree.unflatten(dict(leaves)), (up, down, u, errors)


def test_the_weights_are_a_bounded_logistic_curve_through_one() -> None:
    method: Any = ALGORITHMS["fedgrab"]()
    u = torch.linspace(-300, 300, 1001)
    weight = method.weight(u)
    assert float(method.weight(torch.zeros(()))) == 1.0
    near = u.abs() < 20
    assert bool((weight[near].diff() > 0).all()) and bool((weight.diff() >= 0).all())
    assert float(weight.min()) >= 0 and float(weight.max()) <= 10
    assert bool(((method.weight(u) > 1) == (method.weight(-u) < 1)).all())
    assert float(method.weight(torch.tensor(2.0))) == pytest.approx((10 / 9) / (1 / 9 + np.exp(-1.0)), rel=1e-6)


def test_a_constant_error_moves_a_controller_by_its_integral_gain() -> None:
    method: Any = ALGORITHMS["fedgrab"](proportional=7.0, integral=0.25, differential=3.0)
    gap, zero = torch.full((6,), -2.0), torch.zeros(6)  # an error of 2
    state = {"gap": gap, "before": zero, "earlier": zero, "control": zero}
    seen = []
    for _ in range(5):
        control = method.control(state, torch.ones(6))
        seen.append(float(control[0]))
        state = {"gap": gap, "before": state["gap"], "earlier": state["before"], "control": control}
    assert seen[0] == 7 * 2 + 0.25 * 2 + 3 * 2 and seen[1] - seen[0] == 0.25 * 2 - 3 * 2
    assert np.diff(seen)[1:].tolist() == [0.5] * 3
    assert not method.control(state, zero).any()


def test_what_a_client_lacks_is_pushed_down_less_and_less() -> None:
    run = run_of("fedgrab(rest=0)", setting=replace(SETTING, rounds=6))
    toy.finish(run)
    method: Any = run.algorithm
    lacking = data_of(run, LOPSIDED).class_counts == 0
    assert 0 < int(lacking.sum()) < 6
    control = run.store[LOPSIDED]["control"]
    assert float(method.weight(-control)[lacking].max()) < 0.1 and float(method.weight(control)[lacking].min()) > 5
    assert bool((run.store[LOPSIDED]["gap"][lacking] < 0).all())


def test_balance_is_nearer_with_controllers_than_without() -> None:
    """What they are for: of classes that a client has, pushes up and down come nearer to each other."""
    gaps = []
    for gains in ("", f", {OFF}"):
        run = toy.finish(run_of(f"fedgrab(rest=0{gains})", setting=replace(SETTING, rounds=8)))
        there = data_of(run, LOPSIDED).class_counts > 0
        gaps.append(float(run.store[LOPSIDED]["gap"][there].abs().mean()))
    assert gaps[0] < 0.5 * gaps[1]


def shares(norms: list[float]) -> Any:
    """By z-scores, as the release has it."""
    p = (np.array(norms) - np.mean(norms)) / np.std(norms)
    p = p - p.min() if p.min() < 0 else p
    return p / p.sum()


@pytest.mark.parametrize("norms", [[9.0, 7.0, 5.0, 3.0, 2.0, 1.0], [1.0, 4.0, 2.0, 8.0, 5.0, 7.0]])
def test_frequencies_are_read_from_row_norms(norms: list[float]) -> None:
    weight = F.normalize(torch.randn(6, 9, generator=torch.Generator().manual_seed(1)), dim=1)
    weight = weight * torch.tensor(norms)[:, None]
    found = fedgrab.estimated_shares(weight)
    assert np.abs(found.numpy() - shares(norms)).max() < 1e-6
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-6)
    assert found.argsort().tolist() == np.argsort(norms).tolist()
    assert torch.allclose(fedgrab.estimated_shares(7 * weight), found, atol=1e-6)
    assert not fedgrab.estimated_shares(torch.ones(6, 9)).any()


@pytest.mark.parametrize(
    ("mass", "tail"),
    [
        ([50.0, 20.0, 15.0, 11.0, 3.0, 1.0], [0, 0, 0, 0, 1, 1]),  # 50 70 85 96 99 100: the fourth holds 95 %
        ([1.0, 3.0, 11.0, 15.0, 20.0, 50.0], [1, 1, 0, 0, 0, 0]),
        ([96.0, 1.0, 1.0, 1.0, 1.0, 0.0], [0, 1, 1, 1, 1, 1]),
        ([50.0, 20.0, 15.0, 10.0, 4.0, 1.0], [0, 0, 0, 0, 1, 1]),  # exactly 95 % before the fifth
        ([0.0] * 6, [0] * 6),  # nothing is known
    ],
)
def test_the_tail_lies_beyond_95_percent(mass: list[float], tail: list[int]) -> None:
    method: Any = ALGORITHMS["fedgrab"]()
    assert method._tail(torch.tensor(mass)).tolist() == tail
    everything: Any = ALGORITHMS["fedgrab"](rest=0.0)
    assert everything._tail(torch.tensor(mass)).tolist() == ([1] * 6 if any(mass) else tail)


def test_the_estimate_is_averaged_over_rounds_and_read_from_the_averaged_head() -> None:
    run = run_of("fedgrab", setting=replace(SETTING, rounds=3))
    assert not run.progress.server["tail"].any()
    total = np.zeros(6)
    for round in range(3):
        run.step()
        total += shares(run.progress.server["head"]["weight"].norm(dim=1).tolist())
        assert np.abs(run.progress.server["mass"].numpy() - total).max() < 1e-5
        there, wanted = 0.0, [0] * 6
        for c in np.argsort(-total):
            wanted[c] = int(there >= 0.95 * total.sum())
            there += total[c]
        assert run.progress.server["tail"].tolist() == wanted and (round > 0 or any(wanted))


def test_bytes_are_the_model_and_which_classes_are_tail() -> None:
    run = run_of("fedgrab", setting=replace(SETTING, rounds=1))
    model = tree.nbytes(model_of(run))
    toy.finish(run)
    assert run.progress.cost["bytes_up"] == 8 * model
    assert run.progress.cost["bytes_down"] == 8 * (model + 4 * 6)


def test_engines_agree_under_batch_norm() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
    sizes = (20, 9, 0, 0, 0, 0, 0, 0)
    runs = [toy.finish(run_of("fedgrab(rest=0)", engine, setting, sizes=sizes)) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(run) for run in runs)) < 1e-4


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("fedgrab", engine, setting)), "unseen") > 0.8


def test_the_defaults_are_the_releases() -> None:
    method = ALGORITHMS["fedgrab"]()
    assert (method.proportional, method.integral, method.differential) == (10.0, 0.01, 0.1)
    assert (method.slope, method.limit, method.rest) == (0.5, 100.0, 0.95)
