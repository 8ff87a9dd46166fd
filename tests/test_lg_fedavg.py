"""LG-FedAvg: what is shared and what is not, FedAvg and Local at its two ends, and the first steps of a newcomer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import Tree, tree
from bench.algorithm import stages
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, trained

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
SETTING = replace(toy.SETTING, rounds=2, weight_decay=1e-2, clip=0.5)
PLAIN = replace(toy.SETTING, rounds=3, participation=0.25)
HEAD = 4 * (64 * 6 + 6)  # bytes


def run_of(name: str = "lg_fedavg", engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting)


def kept(run: Run) -> Tree:
    return {str(k): run.store[k] for k in run.store.clients()}


def shifted(model: Tree) -> Tree:
    return tree.map(lambda leaf: leaf + 0.02 * torch.arange(leaf.numel()).reshape(leaf.shape).cos(), model)


@pytest.mark.equivalence
@ENGINES
def test_with_all_layers_shared_it_is_fedavg(engine: str) -> None:
    run, fedavg = toy.finish(run_of(engine=engine, shared_layers=2)), toy.finish(run_of("fedavg", engine))
    assert largest_difference(run.progress.server, fedavg.progress.server) == 0.0
    assert run.outcome().metrics["personal"] == fedavg.outcome().metrics["personal"]
    assert run.store.initial == {}


@pytest.mark.equivalence
@ENGINES
def test_with_none_it_is_training_alone(engine: str) -> None:
    run, local = toy.finish(run_of(engine=engine, shared_layers=0)), toy.finish(run_of("local", engine))
    assert largest_difference(kept(run), kept(local)) == 0.0
    assert run.progress.server == {}
    assert run.progress.cost["bytes_up"] == run.progress.cost["bytes_down"] == 0


@ENGINES
def test_at_the_default_it_is_neither(engine: str) -> None:
    run, fedavg, local = (toy.finish(run_of(name, engine)) for name in ("lg_fedavg", "fedavg", "local"))
    assert largest_difference(run.progress.server["head"], fedavg.progress.server["head"]) > 1e-3
    assert largest_difference(run.store[0]["body"], local.store[0]["body"]) > 1e-3


def test_the_head_alone_travels_and_is_averaged() -> None:
    run = run_of()
    drawn = run.population.cohort(0)
    sent = [toy.upload_once(run, k)[0] for k in drawn]
    run.step()
    assert [set(upload) for upload in sent] == [{"head"}] * 6 and set(run.progress.server) == {"head"}
    assert largest_difference(run.progress.server, mean_by_size(run, drawn, sent)) < 1e-6
    assert run.progress.cost["bytes_up"] == run.progress.cost["bytes_down"] == 6 * HEAD


def test_all_layers_train_together_from_where_each_was() -> None:
    run = run_of(setting=replace(PLAIN, weight_decay=1e-2))
    run.store[0] = {"body": shifted(run.task.init()["body"])}
    run.progress.server = shifted(shifted(run.progress.server))
    upload, private = toy.upload_once(run)
    start = {**run.store[0], **run.progress.server}
    expected = trained(run, start, data_of(run, 0).batches(run.setting.epochs))
    assert largest_difference({**private, **upload}, expected) < 5e-6
    assert min(largest_difference(expected[key], start[key]) for key in start) > 1e-3


def test_layers_are_counted_from_the_head_and_are_where_they_belong() -> None:
    """Running statistics go with their layers."""
    setting = replace(SETTING, model="resnet8", norm="batch")
    task = toy.run(ALGORITHMS["fedavg"](), setting=setting).task
    shared = [ALGORITHMS["lg_fedavg"](shared_layers=n).init_server(task) for n in (1, 2, 3, 5)]
    assert [set(each.get("body", {})) for each in shared[:3]] == [set(), {"stage3_1"}, {"stage2_1", "stage3_1"}]
    assert largest_difference(shared[3], task.init()) == 0.0
    assert "first" in shared[1]["body"]["stage3_1"] and "stats" in shared[1]["body"]["stage3_1"]["first"]["norm"]
    for n, upper in zip((1, 2, 3), shared, strict=False):
        lower = ALGORITHMS["lg_fedavg"](shared_layers=n).init_client(task)
        assert not tree.flatten(lower).keys() & tree.flatten(upper).keys()
        assert largest_difference(tree.merge(lower, upper), task.init()) == 0.0


def test_the_papers_three_of_five_are_those_of_lenet5_that_are_no_convolutions() -> None:
    job = toy.run(ALGORITHMS["fedavg"](), setting=replace(SETTING, model="lenet5"), dataset=toy.Toy(enlarged=4))
    three = ALGORITHMS["lg_fedavg"](**ALGORITHMS["lg_fedavg"].paper)
    assert set(three.init_server(job.task)["body"]) == {"hidden1", "hidden2"}
    assert three.init_client(job.task).keys() == {"body"}


def test_tested_are_own_layers_under_the_newest_shared_ones() -> None:
    run = toy.finish(run_of(setting=replace(PLAIN, participation=0.5)))
    task, server = run.task_at(2), run.progress.server
    earlier = next(k for k in run.store.clients() if k not in run.population.cohort(2) and toy.SIZES[k])
    (model,) = run.evaluator.models(task, server, server, run.store, [earlier], True)["personal"]
    assert largest_difference(model, {"body": run.store[earlier]["body"], "head": server["head"]}) == 0.0
    assert largest_difference(run.store[earlier]["body"], run.task.init()["body"]) > 1e-3
    assert run.algorithm.global_model(task, server) is None


@ENGINES
@pytest.mark.parametrize("unseen", [0, 2])
def test_who_never_took_part_trains_layers_of_its_own_first(unseen: int, engine: str) -> None:
    """Under the received ones, which it is tested with as they came; nothing of it is kept."""
    run = toy.finish(run_of(engine=engine, setting=replace(PLAIN, unseen=unseen)))
    population, initial = run.population, run.task.init()["body"]
    never = [k for k in range(population.training) if k not in run.store.clients() and len(population.index[k])]
    client = population.size - 1 if unseen else never[0]
    server, task = run.progress.server, run.task_at(2)
    named = run.evaluator.models(task, server, server, run.store, [client], True)
    (model,) = named["unseen" if unseen else "personal"]
    batches = data_of(run, client, 2).batches(run.setting.epochs)
    body = trained(run, {"body": initial, "head": server["head"]}, batches)["body"]
    assert largest_difference(model, {"body": body, "head": server["head"]}) < 1e-5
    assert largest_difference(run.store[client], {"body": initial}) == 0.0
    assert stages(run.algorithm.newcomer_adaptation(task)) == ()


@ENGINES
def test_a_client_held_out_is_served(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert (toy.finish(run_of(engine=engine, setting=setting)).outcome().metrics["unseen"] or 0.0) > 0.8
