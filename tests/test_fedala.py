"""FedALA: mixtures and their weights by hand, FedAvg where weights stay at 1, and what a test leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, method, trained

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
PLAIN = replace(toy.SETTING, momentum=0.0, epochs=1)


def start(setting: Any = SETTING, engine: str = "serial", **fields: Any) -> Run:
    return toy.run(ALGORITHMS["fedala"](**fields), engine, setting=setting)


def apart(run: Run, client: int = 0) -> Run:
    """Let a client have a last head that is another than the received one."""
    own = tree.map(
        lambda leaf: leaf + torch.linspace(-1, 1, leaf.numel()).reshape(leaf.shape), run.store[client]["own"]
    )
    run.store[client] = {"own": own, "weights": tree.map(lambda w: torch.full_like(w, 0.5), own)}
    return run


def model(run: Run) -> Tree:
    return {"body": run.progress.server["body"], "head": run.progress.server["head"]}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layers", [1, 2])
def test_without_steps_of_weights_it_is_fedavg(engine: str, layers: int) -> None:
    run = toy.finish(start(engine=engine, merge_lr=0.0, layers=layers))
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=SETTING))
    assert largest_difference(model(run), model(fedavg)) == 0.0
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"]
    assert run.progress.cost["bytes_down"] == fedavg.progress.cost["bytes_down"]


@pytest.mark.parametrize("engine", ENGINES)
def test_with_them_it_is_not_and_weights_stay_between_0_and_1(engine: str) -> None:
    run = toy.finish(start(engine=engine, merge_lr=300.0))
    fedavg = toy.finish(toy.run(ALGORITHMS["fedavg"](), engine, setting=SETTING))
    assert largest_difference(model(run), model(fedavg)) > 1e-4
    weights = torch.cat([leaf.flatten() for k in (0, 1) for leaf in tree.flatten(run.store[k]["weights"]).values()])
    assert weights.min() >= 0 and weights.max() == 1 and 0 < float((weights < 1).float().mean()) < 1


def test_in_the_first_round_nothing_is_there_to_be_mixed() -> None:
    first = replace(SETTING, rounds=1)
    one, other = toy.finish(start(first)), toy.finish(toy.run(ALGORITHMS["fedavg"](), setting=first))
    assert largest_difference(model(one), model(other)) == 0.0


def test_weights_step_against_the_gradient_of_the_mixture() -> None:
    """W <- clip(W - eta g (received - own)), g at own + (received - own) W, along batches of the client's share."""
    run = apart(start(PLAIN, merge_lr=2.0))
    shared, private, data = toy.received(run, 0), run.store[0], data_of(run, 0)
    expected = {key: leaf.clone() for key, leaf in private["weights"]["head"].items()}
    own, received = private["own"]["head"], shared["head"]
    chosen = keys.uniform(keys.fold(data.key, "merge"), 60) < 0.8
    assert 40 <= int(chosen.sum()) <= 55
    body = shared["body"]["hidden"]
    for batch in data.batches(1, "merge"):
        z = torch.relu(F.linear(batch.x.flatten(1), body["weight"], body["bias"]))
        head = {k: (own[k] + (received[k] - own[k]) * expected[k]).requires_grad_() for k in own}
        F.cross_entropy(F.linear(z, head["weight"], head["bias"]), batch.y, reduction="none")[
            chosen[batch.example]
        ].mean().backward()
        for key, leaf in head.items():
            assert leaf.grad is not None
            expected[key] = (expected[key] - 2.0 * leaf.grad * (received[key] - own[key])).clamp(0, 1)
    learnt = method(run).learnt(run.task_at(0), shared, private, data)
    assert largest_difference(learnt["head"], expected) < 1e-5
    assert largest_difference(learnt, private["weights"]) > 1e-2


def test_a_client_trains_the_mixture_and_keeps_its_head() -> None:
    run = apart(start(PLAIN))
    shared, private, data, task = toy.received(run, 0), run.store[0], data_of(run, 0), run.task_at(0)
    weights = method(run).learnt(task, shared, private, data)
    begin = method(run).mixed(task, shared, private, weights)
    assert largest_difference(begin["body"], shared["body"]) == 0.0
    by_hand = trained(run, begin, data_of(run, 0).batches(1))
    upload, kept = toy.upload_once(run)
    assert largest_difference(upload, by_hand) < 1e-5
    assert largest_difference(kept, {"own": {"body": {}, "head": upload["head"]}, "weights": weights}) == 0.0


def test_weights_of_zero_leave_the_head_at_home() -> None:
    run = apart(start(PLAIN, merge_lr=0.0))
    private = {**run.store[0], "weights": tree.zeros_like(run.store[0]["weights"])}
    shared, data = toy.received(run, 0), data_of(run, 0)
    personal = run.algorithm.personal_model(run.task_at(0), shared, private, data)
    assert personal is not None
    assert largest_difference(personal["head"], private["own"]["head"]) == 0.0
    assert largest_difference(personal["body"], shared["body"]) == 0.0


def test_layers_are_counted_from_the_head() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch")
    task = toy.run(ALGORITHMS["fedavg"](), setting=setting).task
    kept = [ALGORITHMS["fedala"](layers=n).init_client(task)["own"] for n in (1, 2, 3, 100)]
    assert [set(own["body"]) for own in kept[:2]] == [set(), {"stage3_1"}]
    assert set(kept[2]["body"]) == {"stage2_1", "stage3_1"} and "stem" in kept[3]["body"]
    assert not any(tree.is_statistic(path) for path in tree.flatten(kept[3]))


def test_the_tested_model_is_mixed_anew_and_nothing_of_it_is_kept() -> None:
    run = toy.finish(start(merge_lr=30.0))
    before = tree.clone(run.store[0])
    shared, data, task = toy.received(run, 0, 2), data_of(run, 0, 2), run.task_at(2)
    personal = run.algorithm.personal_model(task, shared, run.store[0], data)
    assert personal is not None
    weights = method(run).learnt(task, shared, run.store[0], data_of(run, 0, 2))
    assert largest_difference(personal, method(run).mixed(task, shared, run.store[0], weights)) == 0.0
    assert largest_difference(weights, run.store[0]["weights"]) > 1e-4
    assert largest_difference(before, run.store[0]) == 0.0
