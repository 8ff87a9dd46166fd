"""Local: who trains in which round under its two budgets, and a newcomer that trains the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, trained

SETTING = replace(toy.SETTING, rounds=3, participation=0.25, momentum=0.9, weight_decay=1e-2)
BUDGETS = pytest.mark.parametrize("budget", ["matched", "converged"])
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["local"](**fields), engine, setting=setting)


@ENGINES
@BUDGETS
def test_a_client_trains_alone_in_the_rounds_of_its_budget(budget: str, engine: str) -> None:
    """From the initial model, each round from where the last one ended; the learning rate is the round's."""
    run = run_of(engine, budget=budget)
    last = toy.finish(run).setting.rounds
    everybody = range(run.population.training)
    turns = {k: [r for r in range(last) if budget == "converged" or k in run.population.cohort(r)] for k in everybody}
    assert list(run.store.clients()) == [k for k, rounds in turns.items() if rounds]
    assert budget == "converged" or 0 < len(run.store.clients()) < len(everybody)
    for k, rounds in turns.items():
        model = run.task.init()
        for r in rounds:
            model = trained(run, model, data_of(run, k, r).batches(run.setting.epochs))
        assert largest_difference(run.store[k], model) < 5e-6
        own = run.algorithm.personal_model(run.task, {}, run.store[k], data_of(run, k, 0))
        assert own is not None and largest_difference(own, run.store[k]) == 0.0


@BUDGETS
def test_the_budget_is_counted(budget: str) -> None:
    run = toy.finish(run_of(budget=budget))
    setting, cohorts = run.setting, [run.population.cohort(r) for r in range(run.setting.rounds)]
    visited = [range(run.population.training)] * setting.rounds if budget == "converged" else cohorts
    images = sum(len(run.population.index[k]) for each in visited for k in each)
    cost = run.outcome().cost
    assert cost["train_samples"] == setting.epochs * images
    assert cost["bytes_down"] == cost["bytes_up"] == 0
    assert run.progress.server == {}


@pytest.mark.equivalence
def test_with_full_participation_the_budgets_are_one() -> None:
    runs = [toy.finish(run_of(setting=replace(SETTING, participation=1.0), budget=b)) for b in ("matched", "converged")]
    assert runs[0].outcome().digest == runs[1].outcome().digest


def test_no_client_sees_another() -> None:
    """Its model is the same whatever the others hold."""
    runs = [toy.run(ALGORITHMS["local"](), setting=replace(SETTING, participation=1.0), sizes=sizes)
            for sizes in (toy.SIZES, (60, *(0,) * 7))]  # fmt: skip
    runs[1].population.index[0] = runs[0].population.index[0]
    runs[1].population.images = runs[0].population.images
    assert largest_difference(toy.finish(runs[0]).store[0], toy.finish(runs[1]).store[0]) == 0.0


@ENGINES
@BUDGETS
def test_a_client_held_out_trains_the_whole_initial_model_for_five_epochs(budget: str, engine: str) -> None:
    run = toy.finish(run_of(engine, replace(SETTING, unseen=1), budget=budget))
    k, last = run.population.size - 1, run.setting.rounds - 1
    models = run.evaluator.models(run.task_at(last), {}, {}, run.store, [k], True)
    data, wanted = data_of(run, k, last), trained(run, run.task.init(), data_of(run, k, last).batches(5, "adapt 0"))
    assert len(data.index) and list(models) == ["unseen:5 epochs", "unseen"]
    assert largest_difference(models["unseen"][0], wanted) < 5e-6
    for part in ("body", "head"):
        assert largest_difference({part: models["unseen"][0][part]}, {part: run.task.init()[part]}) > 1e-3


@BUDGETS
def test_a_client_never_drawn_has_the_initial_model_where_the_budget_is_matched(budget: str) -> None:
    run = toy.finish(run_of(budget=budget))
    never = set(range(run.population.training)) - set(run.store.clients())
    assert bool(never) == (budget == "matched")
    assert all(largest_difference(run.store[k], run.task.init()) == 0.0 for k in never)


def test_the_budget_is_one_of_two() -> None:
    assert parse_algorithms("local(budget='converged')")[0].exchanges(run_of().task)[0].everyone
    with pytest.raises(ValueError, match=r"budget must be 'matched' or 'converged'"):
        ALGORITHMS["local"](budget="endless")
