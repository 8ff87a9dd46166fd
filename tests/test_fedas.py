"""FedAS: alignment and traces by hand, FedPer without both, and what a client that never took part is tested with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, method, trained

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=3, weight_decay=1e-2, clip=1.0)
PLAIN = replace(toy.SETTING, momentum=0.0, epochs=1)
BATCH_NORM = replace(SETTING, model="resnet8", norm="batch")


def start(setting: Any = SETTING, engine: str = "serial", name: str = "fedas", **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting)


def body(run: Run) -> Tree:
    found: Tree = run.progress.server["body"]
    return found


def returned(run: Run, client: int = 0, by: float = 0.05) -> Run:
    """Let a client come back with a body other than the received one."""
    own = run.task.init()
    away = tree.map(lambda leaf: leaf + by * torch.linspace(-1, 1, leaf.numel()).reshape(leaf.shape), own["body"])
    run.store[client] = {"body": away, "head": own["head"], "trained": torch.ones(())}
    return run


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_without_alignment_and_weights_it_is_fedper(engine: str) -> None:
    run, fedper = start(engine=engine, align_lr=0.0, fisher=False), start(engine=engine, name="fedper")
    assert largest_difference(body(toy.finish(run)), body(toy.finish(fedper))) == 0.0
    for k in fedper.store.clients():
        assert largest_difference(run.store[k]["head"], fedper.store[k]["head"]) == 0.0


@pytest.mark.parametrize("off", [{"align_lr": 0.0}, {"fisher": False}])
@pytest.mark.parametrize("engine", ENGINES)
def test_each_half_of_it_matters(off: dict[str, Any], engine: str) -> None:
    twice = replace(SETTING, rounds=2, participation=1.0)
    one, other = toy.finish(start(twice, engine)), toy.finish(start(twice, engine, **off))
    assert largest_difference(body(one), body(other)) > 1e-4


def test_a_body_is_aligned_with_the_means_of_the_clients_own() -> None:
    """A mean squared error for each class of a batch, summed over classes."""
    run = returned(start(PLAIN))
    shared, data, own = toy.received(run, 0), data_of(run, 0), run.store[0]["body"]["hidden"]
    x = run.population.images.plain(data.index)
    z = torch.relu(F.linear(x.flatten(1), own["weight"], own["bias"]))
    w = [leaf.clone().requires_grad_() for leaf in shared["body"]["hidden"].values()]
    optimiser = torch.optim.SGD(w, lr=0.01)
    for batch in data.batches(1, "align"):
        features = torch.relu(F.linear(batch.x.flatten(1), *w))
        errors = [F.mse_loss(features[batch.y == c], z[data.y == c].mean(0).expand(int((batch.y == c).sum()), -1))
                  for c in batch.y.unique()]  # fmt: skip
        optimiser.zero_grad()
        torch.stack(errors).sum().backward()
        optimiser.step()
    aligned = method(run).aligned(run.task_at(0), shared, run.store[0], data_of(run, 0))
    expected = {"hidden": {"weight": w[0].detach(), "bias": w[1].detach()}}
    assert largest_difference(aligned, expected) < 1e-6
    assert largest_difference(aligned, shared["body"]) > 1e-5


def test_alignment_moves_no_running_statistics() -> None:
    run = start(BATCH_NORM)
    shared, private, small = toy.received(run, 4), run.store[4], data_of(run, 4)
    aligned = method(run).aligned(run.task_at(0), shared, private, small)
    still, received = (tree.split(each, tree.is_statistic)[0] for each in (aligned, shared["body"]))
    assert still and largest_difference(still, received) == 0.0


def test_who_comes_back_trains_the_aligned_body_under_its_own_head() -> None:
    run = returned(start(PLAIN, align_lr=0.5))
    run.store[0]["head"] = tree.map(lambda leaf: leaf + 0.1, run.store[0]["head"])
    aligned = method(run).aligned(run.task_at(0), toy.received(run, 0), run.store[0], data_of(run, 0))
    upload, kept = toy.upload_once(run)
    by_hand = trained(run, {"body": aligned, "head": run.store[0]["head"]}, data_of(run, 0).batches(1))
    assert largest_difference({"body": kept["body"], "head": kept["head"]}, by_hand) < 1e-5
    assert largest_difference(upload["body"], kept["body"]) == 0.0 and set(upload) == {"body", "trace"}


def test_who_comes_for_the_first_time_has_nothing_to_align_with() -> None:
    uploads = []
    for align_lr in (0.0, 0.5):
        run = start(PLAIN, align_lr=align_lr)
        run.progress.server["body"] = tree.map(lambda leaf: leaf + 0.1, body(run))
        uploads.append(toy.upload_once(run)[0])
    assert largest_difference(*uploads) == 0.0


def test_the_trace_adds_up_squared_gradients_of_batches() -> None:
    run = start(PLAIN)
    upload, kept = toy.upload_once(run)
    expected, batches = 0.0, list(data_of(run, 0).batches(1, "trace"))
    for batch in batches:
        w = [leaf.clone().requires_grad_() for leaf in tree.flatten({k: kept[k] for k in ("body", "head")}).values()]
        loss = F.cross_entropy(F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:]), batch.y)
        expected += sum(float(g.square().sum()) for g in torch.autograd.grad(loss, w))
    assert len(batches) == 4
    assert float(upload["trace"]) == pytest.approx(expected, rel=1e-4)


def test_bodies_count_by_their_traces_and_the_empty_one_by_nothing() -> None:
    run = start(PLAIN)
    bodies = [{"w": torch.tensor([value])} for value in (1.0, 3.0, 100.0)]
    sent = [{"body": b, "trace": torch.tensor(t)} for b, t in zip(bodies, (3.0, 1.0, 0.0), strict=True)]
    uploads = Uploads(sent, torch.tensor([1.0, 9.0, 0.0]).double())
    assert float(method(run).aggregate(run.task, {}, uploads)["body"]["w"]) == pytest.approx(1.5)
    assert float(method(start(PLAIN, fisher=False)).aggregate(run.task, {}, uploads)["body"]["w"]) == pytest.approx(2.8)
    assert float(toy.upload_once(run, toy.SIZES.index(0))[0]["trace"]) == 0.0


def test_bodies_and_a_number_travel() -> None:
    run = start()
    run.step()
    size = 4 * sum(leaf.numel() for leaf in tree.flatten(body(run)).values())
    assert run.progress.cost["bytes_down"] == 6 * size
    assert run.progress.cost["bytes_up"] == 6 * (size + 4)


def test_the_tested_model_is_the_clients_last_and_a_newcomers_the_newest_body() -> None:
    run = start(replace(SETTING, participation=0.25))
    for _ in range(2):
        run.step()
    shared, known = toy.received(run, 0, 2), run.store.clients()
    client, new = known[0], next(k for k in range(8) if k not in known)
    mine, theirs = (run.algorithm.personal_model(run.task_at(2), shared, run.store[k], data_of(run, k))
                    for k in (client, new))  # fmt: skip
    assert mine is not None and theirs is not None
    assert largest_difference(mine, {"body": run.store[client]["body"], "head": run.store[client]["head"]}) == 0.0
    assert largest_difference(theirs, {"body": body(run), "head": run.task.init()["head"]}) == 0.0
