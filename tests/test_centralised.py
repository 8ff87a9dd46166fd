"""Centralised: rounds re-computed on the union, and its budget, which is the cohorts'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import LocalData
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import trained

SETTING = replace(toy.SETTING, participation=0.25, rounds=6, momentum=0.9, weight_decay=1e-2, unseen=1)
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(name: str = "centralised", engine: str = "serial", setting: Any = SETTING) -> Run:
    return toy.run(ALGORITHMS[name](), engine, setting=setting)


def data_of(run: Run, round: int) -> LocalData:
    visit = run.population.pooled_visit(round, {})
    n = torch.tensor(len(visit.index))
    return LocalData(run.population.images, visit.index, n, visit.key, visit.class_counts, run.setting.batch_size)


@ENGINES
def test_a_round_goes_on_from_the_last_one_on_the_next_of_the_pooled_examples(engine: str) -> None:
    run = run_of(engine=engine)
    model = run.task.init()
    for round in range(run.setting.rounds):
        model = trained(run, model, data_of(run, round).batches(run.setting.epochs))
        run.step()
        assert largest_difference(run.progress.server, model) < 1e-5
    assert list(run.store.clients()) == [-1] and run.store[-1] == {}


def test_a_round_has_as_many_examples_as_its_cohort_and_all_of_the_union_come_equally_often() -> None:
    run, fedavg = run_of(), run_of("fedavg")
    union = torch.cat(run.population.index[: run.population.training])
    seen = torch.zeros(len(run.population.images.y), dtype=torch.int64)
    for round in range(run.setting.rounds):
        rows = data_of(run, round).index
        assert len(rows) == sum(len(fedavg.population.index[k]) for k in fedavg.population.cohort(round))
        seen.scatter_add_(0, rows, torch.ones_like(rows))
    assert int(seen[union].max() - seen[union].min()) <= 1 < int(seen[union].sum())
    held_out = run.population.index[-1]
    assert len(held_out) and not seen[held_out].any()
    costs = [toy.finish(each).outcome().cost["train_samples"] for each in (run, fedavg)]
    assert costs[0] == costs[1] == run.setting.epochs * int(seen.sum())


def test_nothing_is_sent_and_one_model_is_everybodys() -> None:
    run = toy.finish(run_of())
    outcome, server = run.outcome(), run.progress.server
    assert outcome.cost["bytes_down"] is None and outcome.cost["bytes_up"] is None
    task = run.task_at(run.setting.rounds - 1)
    generic = run.algorithm.global_model(task, server)
    assert generic is not None and largest_difference(generic, server) == 0.0
    clients = range(run.population.training)
    models = run.evaluator.models(task, server, server, run.store, clients, False)["personal"]
    assert all(largest_difference(model, server) == 0.0 for model in models)


@ENGINES
def test_it_knows_all_classes_where_clients_know_two_each(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, eval_every=8)
    metrics = toy.finish(run_of(engine=engine, setting=setting)).outcome().metrics
    federated = toy.finish(run_of("fedavg", engine, setting)).outcome().metrics
    assert (metrics["generic"] or 0.0) > 0.9
    assert (metrics["generic"] or 0.0) >= (federated["generic"] or 1.0)
