"""GBME: one expert is FedAvg, a phase of all and one of each by automatic differentiation, what updates give away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import Tree, Uploads, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, measured, method, trained

SETTING = replace(toy.SETTING, participation=1.0, rounds=5, momentum=0.9, weight_decay=1e-2)
DEEP = replace(SETTING, model="small_cnn")
ONE_CLASS = 5


def run_of(name: str, engine: str = "serial", setting: Any = SETTING, sizes: Any = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS[name](**fields), engine, setting=replace(setting, clients=len(sizes)), sizes=sizes)


def expert(model: Tree, e: int) -> Tree:
    """The model of an expert of the toy's dense network, which has no trunk."""
    return {"body": model["body"][f"expert{e}"], "head": model["head"][f"expert{e}"]}


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_one_expert_that_nothing_balances_is_fedavg(engine: str) -> None:
    off, fedavg, balanced = (
        toy.finish(run_of(name, engine, **fields)).progress.server
        for name, fields in (
            ("gbme", {"experts": 1, "prior": "uniform"}),
            ("fedavg", {}),
            ("gbme", {"experts": 1}),
        )
    )
    assert largest_difference(expert(off, 0), fedavg) == 0.0
    assert largest_difference(expert(balanced, 0), fedavg) > 1e-3


def test_a_trunk_is_shared_and_experts_start_apart() -> None:
    run = run_of("gbme", setting=DEEP)
    body, head = run.progress.server["body"], run.progress.server["head"]
    plain = run.task.init()
    assert set(body) == {"conv1", "conv2", "expert0", "expert1", "expert2"} and set(body["expert0"]) == {"hidden"}
    whole = {"body": {**{k: body[k] for k in ("conv1", "conv2")}, **body["expert0"]}, "head": head["expert0"]}
    assert largest_difference(whole, plain) == 0.0
    assert largest_difference(head["expert1"], head["expert2"]) > 0.01
    x = run.population.images.plain(torch.arange(4))
    each = [run.task.logits({"body": {**body, **body[f"expert{e}"]}, "head": head[f"expert{e}"]}, x) for e in range(3)]
    model = {"body": body, "head": head}
    assert torch.allclose(run.algorithm.predict(run.task, model, x), (each[0] + each[1] + each[2]) / 3, atol=1e-6)


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_first_all_experts_learn_from_all_by_balanced_softmax(engine: str) -> None:
    run = run_of("gbme", engine)
    before, prior = run.progress.server, None
    counts = np.zeros(6)
    for k in range(8):
        counts += estimated(run, before, k)
    prior = torch.from_numpy(np.maximum(counts, 5)).float()
    models = []
    for k in range(8):
        w = [torch.nn.Parameter(leaf.clone()) for e in range(3) for leaf in tree.flatten(expert(before, e)).values()]
        optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
        for batch in data_of(run, k).batches(2):
            optimiser.zero_grad()
            for e in range(3):
                z = torch.relu(F.linear(batch.x.flatten(1), *w[4 * e : 4 * e + 2]))
                shifted = F.linear(z, *w[4 * e + 2 : 4 * e + 4]) + (prior / prior.sum()).log()
                F.cross_entropy(shifted, batch.y).backward()
            optimiser.step()
        paths = [path for e in range(3) for path in tree.flatten({f"{e}": expert(before, e)})]
        models.append(tree.unflatten(dict(zip(paths, (p.detach() for p in w), strict=True))))
    run.step()
    assert torch.equal(run.progress.server["prior"], prior)
    found = {f"{e}": expert(run.progress.server, e) for e in range(3)}
    assert largest_difference(found, mean_by_size(run, range(8), models)) < 5e-5


def estimated(run: Run, server: Tree, client: int) -> Any:
    """A client's class counts, from an epoch of each expert by cross-entropy."""
    data = data_of(run, client)
    if not len(data.index):
        return np.zeros(6)
    went = np.zeros(6)
    for e in range(3):
        start = expert(server, e)
        moved = trained(run, start, data_of(run, client).batches(1, "probe"))["head"]["weight"]
        went += (moved - start["head"]["weight"]).double().numpy().sum(1) / 3
    went = np.maximum(went, 1e-5)
    return np.round(went / went.sum() * len(data.index))


def test_updates_give_frequencies_away() -> None:
    run = run_of("gbme")
    exchange = run.algorithm.exchanges(run.task_at(0))[0]
    for k in range(8):
        counts = toy.upload_once(run, k, exchange=exchange)[0]["counts"]
        assert np.abs(counts.numpy() - estimated(run, run.progress.server, k)).max() <= 1
    data = data_of(run, ONE_CLASS)
    counts = toy.upload_once(run, ONE_CLASS, exchange=exchange)[0]["counts"]
    assert counts.tolist() == torch.bincount(data.y, minlength=6).tolist()


@pytest.mark.parametrize("e", [0, 1, 2])
def test_later_one_expert_learns_at_a_time_three_times_as_fast(e: int) -> None:
    run = run_of("gbme", together=0.0)
    before = run.progress.server = {**run.progress.server, "prior": torch.tensor([9.0, 5, 4, 3, 2, 1])}
    exchange = run.algorithm.exchanges(run.task_at(1))[e]
    upload = toy.upload_once(run, 0, run.task_at(1), exchange)[0]
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(expert(before, e)).values()]
    optimiser = torch.optim.SGD(w, 0.05, 0.9, weight_decay=1e-2)
    for batch in data_of(run, 0, 1).batches(2):
        optimiser.zero_grad()
        logits = F.linear(torch.relu(F.linear(batch.x.flatten(1), *w[:2])), *w[2:])
        (3 * F.cross_entropy(logits + before["prior"].log(), batch.y)).backward()
        optimiser.step()
    for other in range(3):
        if other != e:
            assert largest_difference(expert(upload, other), expert(before, other)) == 0.0
    wanted = tree.unflatten(dict(zip(tree.flatten(expert(before, e)), (p.detach() for p in w), strict=True)))
    assert largest_difference(expert(upload, e), wanted) < 5e-5


def test_each_expert_has_clients_of_its_own_kind() -> None:
    run = run_of("gbme", sizes=(20,) * 9, own=0.75)
    assert [len(run.algorithm.exchanges(run.task_at(r))) for r in range(5)] == [2, 1, 1, 3, 3]
    ranks = torch.tensor([3.0, 9, 1, 8, 2, 7, 6, 5, 4])
    server, thirds = {**run.progress.server, "ranks": ranks}, ({1, 3, 5}, {6, 7, 8}, {0, 2, 4})
    seen = []
    for r in range(3, 60):
        for e, exchange in enumerate(run.algorithm.exchanges(replace(run.task, round=r))):
            choose = getattr(run.algorithm, exchange.cohort or "")
            chosen = choose(replace(run.task, round=r), server, (0, 1, 2, 3))
            assert len(set(chosen)) == 4 and len(set(chosen) & thirds[e]) >= 3
            seen.append(tuple(chosen))
    assert len(set(seen)) > 20
    half: Any = ALGORITHMS["gbme"](own=0.5)
    inside = [len(set(half.choose1(replace(run.task, round=r), server, (0, 1))) & thirds[1]) for r in range(40)]
    assert set(inside) == {1, 2}  # one of two is its own, and the other of all
    short = method(run).choose0(run.task, server, tuple(range(8)))
    assert len(set(short)) == 8 and thirds[0] <= set(short)


def test_clients_are_ranked_by_how_frequent_their_classes_are() -> None:
    run = run_of("gbme")
    counts = torch.tensor([[9.0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 2, 2], [5, 20, 0, 0, 0, 0]])
    uploads = Uploads([{"counts": each} for each in counts], torch.ones(3), torch.tensor([0, 4, 6]))
    algorithm: Any = run.algorithm
    server = algorithm.estimate(run.task, run.progress.server, uploads)
    assert server["prior"].tolist() == [14, 21, 5, 5, 5, 5]
    assert server["ranks"].tolist() == pytest.approx([0.9 * 14 + 2.1, 0, 0, 0, 5, 0, 0.2 * 14 + 0.8 * 21, 0])


def test_bytes_are_counts_once_and_models_thrice_a_round_in_the_end() -> None:
    run = run_of("gbme")
    model, c = sum(tree.nbytes(run.progress.server[key]) for key in ("body", "head")), 6
    plain = tree.nbytes(run.task.init())
    assert model == 3 * plain
    toy.finish(run)
    trips = 3 * 1 + 2 * 3
    assert run.progress.cost["bytes_up"] == 8 * (trips * model + 4 * c)
    assert run.progress.cost["bytes_down"] == 8 * (trips + 1) * (model + 4 * c)


def test_engines_agree_under_batch_norm() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", rounds=1, epochs=1)
    runs = [toy.finish(run_of("gbme", engine, setting, (20, 9, 0))) for engine in ("serial", "stacked")]
    assert largest_difference(*(toy.states(run) for run in runs)) < 1e-4


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_gets_a_model_that_knows_its_classes(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)
    assert measured(toy.finish(run_of("gbme", engine, setting)), "unseen") > 0.8
