"""FedAvg-Prior: FedAvg's training, Bayes' rule before the test, and what it costs and tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Algorithm, Tree
from bench.contract import checks, toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference

SETTING = replace(toy.SETTING, rounds=2, eval_every=2)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
AGAINST = pytest.mark.parametrize("against", ["global", "uniform"])
EMPTY = toy.SIZES.index(0)


def made(**fields: Any) -> Algorithm:
    algorithm: Algorithm = ALGORITHMS["fedavg_prior"](**fields)
    return algorithm


def run_of(algorithm: Algorithm, engine: str = "serial", **changes: Any) -> Run:
    return toy.finish(toy.run(algorithm, engine, setting=replace(SETTING, **changes)))


def probabilities(run: Run, model: Tree) -> Tensor:
    """Of the first training pictures: (40, C) float64."""
    return run.task.logits(model, run.population.images.plain(torch.arange(40))).double().softmax(1)


def counts(run: Run, client: int) -> Tensor:
    return torch.bincount(run.population.images.y[run.population.index[client]], minlength=6).double()


@AGAINST
@ENGINES
def test_the_personal_model_is_the_generic_one_by_bayes_rule(engine: str, against: str) -> None:
    """p(y | x) of the client is p(y | x) of all, times how much more often the client has y."""
    run = run_of(made(against=against), engine)
    generic = probabilities(run, run.progress.server)
    everyone = torch.stack([counts(run, client) for client in range(len(toy.SIZES))]).sum(0)
    for client in (0, 3, 5, 7):
        (ratio := counts(run, client)).div_(everyone if against == "global" else 1.0)
        assert (ratio == 0).any()  # a class that it lacks is never given
        expected = generic * ratio / (generic * ratio).sum(1, keepdim=True)
        personal = probabilities(run, checks.tested_models(run, client)["personal"])
        assert torch.allclose(personal, expected, atol=1e-6)


@AGAINST
@ENGINES
def test_without_examples_the_personal_model_is_the_generic_one(engine: str, against: str) -> None:
    run = run_of(made(against=against), engine)
    assert largest_difference(checks.tested_models(run, EMPTY)["personal"], run.progress.server) == 0.0


def test_a_client_that_has_everything_has_the_generic_model() -> None:
    run = toy.finish(toy.run(made(), setting=replace(SETTING, clients=1), sizes=(240,)))
    assert largest_difference(checks.tested_models(run, 0)["personal"], run.progress.server) < 1e-6


@pytest.mark.equivalence
@AGAINST
@ENGINES
def test_training_is_fedavgs_and_nothing_is_tuned(engine: str, against: str) -> None:
    mine, fedavg = (run_of(each, engine) for each in (made(against=against), ALGORITHMS["fedavg"]()))
    assert largest_difference(mine.progress.server, fedavg.progress.server) == 0.0
    ours, theirs = mine.outcome(), fedavg.outcome()
    assert ours.metrics["generic"] == theirs.metrics["generic"]
    for name in ("train_samples", "adaptation_samples", "adaptation_flops", "server_samples", "bytes_up", "bytes_down"):
        assert ours.cost[name] == theirs.cost[name]
    assert not ours.cost["adaptation_samples"]


@pytest.mark.parametrize("labels", [True, False])
@ENGINES
def test_a_client_held_out_shifts_by_its_labels_or_has_the_generic_model(engine: str, labels: bool) -> None:
    run = run_of(made(), engine, unseen=1, unseen_labels=labels)
    newcomer = len(toy.SIZES) - 1
    models = checks.tested_models(run, newcomer)
    assert set(models) == {"unseen"}  # no budget of tuning stands beside it
    trained, own = checks.tested_models(run, 0)["personal"], counts(run, newcomer)
    assert largest_difference(models["unseen"]["body"], trained["body"]) == 0.0
    shift = models["unseen"]["head"]["bias"] - run.progress.server["head"]["bias"]
    if labels:
        assert torch.equal(shift < -1e3, own == 0) and shift.any()
    else:
        assert not shift.any()


@pytest.mark.parametrize(
    ("written", "tier", "needs"),
    [
        ("fedavg_prior", "L", {"prior"}),
        ("fedavg_prior(against='uniform')", "S", set()),
        ("fedavg_prior(against='uniform')+balanced_softmax(prior='global')", "L", {"prior"}),
    ],
)
def test_what_the_server_knows_depends_on_the_field(written: str, tier: str, needs: set[str]) -> None:
    (algorithm,) = parse_algorithms(written)
    assert (algorithm.tier, set(algorithm.needs)) == (tier, needs)
    assert (toy.task(algorithm).prior is None) == (tier == "S")


def test_a_part_that_needs_the_global_frequencies_does_not_change_what_the_shift_is_against() -> None:
    uniform = "fedavg_prior(against='uniform')"
    shifts = []
    for algorithm in parse_algorithms(f"{uniform}, {uniform}+balanced_softmax(prior='global')"):
        run = run_of(algorithm)
        personal = checks.tested_models(run, 0)["personal"]
        shifts.append(personal["head"]["bias"] - run.progress.server["head"]["bias"])
    assert torch.allclose(shifts[0], shifts[1], atol=1e-4)
