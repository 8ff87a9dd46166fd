"""GPFL: valve and conditions by hand, its steps against loops written out, and what a client's condition is made of."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, measured, method

ENGINES = ("serial", "stacked")
SETTING = replace(toy.SETTING, rounds=2, momentum=0.9, weight_decay=1e-2)
SHARED = ("body", "valve", "embeddings")
GPFL = importlib.import_module("bench.algorithms.gpfl")


def run_of(engine: str = "serial", setting: Any = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["gpfl"](**fields), engine, setting=setting, sizes=sizes)


def written_out(valve: Tree, z: Tensor, condition: Tensor) -> Tensor:
    """relu((1 + gamma) z + beta), both a normalised relu(W c + b)."""
    parts = {}
    for name in ("gamma", "beta"):
        linear, norm = valve[name]["linear"], valve[name]["norm"]
        hidden = torch.relu(linear["weight"] @ condition + linear["bias"])
        spread = (hidden.var(unbiased=False) + 1e-5).sqrt()
        parts[name] = norm["weight"] * (hidden - hidden.mean()) / spread + norm["bias"]
    return torch.relu((1 + parts["gamma"]) * z + parts["beta"])


def hidden(body: Tree, x: Tensor) -> Tensor:
    return torch.relu(F.linear(x.flatten(1), body["hidden"]["weight"], body["hidden"]["bias"]))


def test_a_valve_scales_and_shifts_by_its_condition() -> None:
    """Both maps give (3, 1), of which (1, -1) is left: gamma is half of that, beta a quarter more."""
    linear = {"weight": torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "bias": torch.tensor([1.0, 2.0])}
    norm = {"weight": torch.full((2,), 0.5), "bias": torch.zeros(2)}
    valve = {"gamma": {"linear": linear, "norm": norm},
             "beta": {"linear": linear, "norm": {**norm, "bias": torch.full((2,), 0.25)}}}  # fmt: skip
    found = GPFL.opened(valve, torch.tensor([[2.0, 4.0], [1.0, 0.1]]), torch.tensor([2.0, 1.0]))
    assert found == pytest.approx(torch.tensor([[3.75, 1.75], [2.25, 0.0]]), abs=1e-4)


def test_a_condition_averages_embeddings_by_the_clients_classes() -> None:
    run = run_of()
    data = replace(data_of(run, 0), class_counts=torch.tensor([3, 1, 0, 0, 0, 0]), n=torch.tensor(4))
    rows = torch.arange(12.0).reshape(6, 2)
    assert GPFL.condition(rows, data).tolist() == [0.5, 1.5]
    none = replace(data, class_counts=torch.zeros(6, dtype=torch.int64), n=torch.tensor(0))
    assert GPFL.condition(rows, none).tolist() == [0.0, 0.0]
    even = replace(data, class_counts=torch.full((6,), 2), n=torch.tensor(12))  # personal is then generic
    assert torch.allclose(GPFL.condition(rows, even), rows.mean(0))


@pytest.mark.parametrize(("magnitude", "decay"), [(0.0, 0.0), (0.5, 0.0), (0.01, 0.1)])
def test_steps_are_those_of_the_papers_loss(magnitude: float, decay: float) -> None:
    """Three optimisers at one rate; conditions and targets are of the received embeddings, and stand still."""
    run = run_of(magnitude=magnitude, decay=decay)
    received, data, own = toy.received(run, 0), data_of(run, 0), run.store[0]["head"]
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten({**received, "head": own}).items()}
    w = tree.unflatten(leaves)
    shares = torch.bincount(data.y, minlength=6) / len(data.y)
    still = received["embeddings"].clone()
    generic, personal = still.mean(0), (shares[:, None] * still).sum(0)
    plain = [leaf for path, leaf in leaves.items() if path.split("/")[0] in ("body", "head")]
    decayed = [leaf for path, leaf in leaves.items() if path.split("/")[0] in ("valve", "embeddings")]
    optimisers = [torch.optim.SGD(plain, 0.05, 0.9, weight_decay=1e-2),
                  torch.optim.SGD(decayed, 0.05, 0.9, weight_decay=1e-2 + decay)]  # fmt: skip
    for batch in data.batches(2):
        z = hidden(w["body"], batch.x)
        ours, mine = written_out(w["valve"], z, generic), written_out(w["valve"], z, personal)
        entropy = F.cross_entropy(F.linear(mine, w["head"]["weight"], w["head"]["bias"]), batch.y)
        angles = F.cross_entropy(F.cosine_similarity(ours[:, None], w["embeddings"][None], dim=2), batch.y)
        apart = (ours - still[batch.y]).norm()  # of the batch as one matrix
        for optimiser in optimisers:
            optimiser.zero_grad()
        (entropy + angles + magnitude * apart).backward()
        for optimiser in optimisers:
            optimiser.step()
    upload, kept = toy.upload_once(run)
    assert upload.keys() == set(SHARED) and kept.keys() == {"head"}
    assert largest_difference({**upload, **kept}, tree.map(torch.Tensor.detach, w)) < 2e-5


def test_embeddings_and_valve_are_clipped_each_by_itself() -> None:
    """What pulls at them does not shorten the step of body and head: the reference has three optimisers."""
    setting = replace(SETTING, epochs=1, batch_size=1000, momentum=0.0, weight_decay=0.0, clip=0.01)
    models = []
    for decay in (0.0, 1.0):
        run = run_of(setting=setting, decay=decay)
        start = {**run.progress.server, "head": run.store[0]["head"]}
        upload, kept = toy.upload_once(run)
        moved = tree.sub({**upload, **kept}, start)
        assert float(tree.norm({"a": moved["body"], "b": moved["head"]})) == pytest.approx(0.05 * 0.01, rel=1e-2)
        assert float(moved["embeddings"].norm()) == pytest.approx(0.05 * 0.01, rel=1e-2)
        assert float(tree.norm(moved["valve"])) == pytest.approx(0.05 * 0.01, rel=1e-2)
        models.append({"body": upload["body"], **kept})
    assert largest_difference(*models) < 1e-7


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("off", [{"magnitude": 0.0}, {"decay": 0.0}])
def test_each_of_its_values_matters(engine: str, off: dict[str, Any]) -> None:
    one, other = (toy.finish(run_of(engine, **fields)).progress.server for fields in (dict[str, Any](), off))
    assert largest_difference(one, other) > 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_rounds_average_all_but_heads_by_size(engine: str) -> None:
    run = run_of(engine)
    for round in range(2):
        cohort = run.population.cohort(round)
        work = [toy.upload_once(run, k, run.task_at(round)) for k in cohort]
        run.step()
        assert largest_difference(run.progress.server, mean_by_size(run, cohort, [upload for upload, _ in work])) < 2e-5
        assert all(largest_difference(run.store[k], kept) < 2e-5 for k, (_, kept) in zip(cohort, work, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_body_embeddings_and_valve_travel_both_ways(engine: str) -> None:
    run = run_of(engine)
    run.step()
    d, visits = 64, len(run.population.cohort(0))
    shared = 64 * 64 + 64 + 6 * d + 2 * (d * d + 3 * d)
    assert run.progress.cost["bytes_down"] == run.progress.cost["bytes_up"] == 4 * visits * shared


def test_a_client_is_tested_under_its_own_head_at_its_own_condition() -> None:
    run = toy.finish(run_of())
    task, server, data = run.task_at(1), run.progress.server, data_of(run, 0)
    head = run.task.init()["head"]
    model = method(run).personal_model(task, server, {"head": head}, data)
    x = run.population.images.plain(run.population.index[1])
    z = hidden(server["body"], x)
    shares = torch.bincount(data.y, minlength=6) / len(data.y)
    features = written_out(server["valve"], z, shares @ server["embeddings"])
    expected = F.linear(features, head["weight"], head["bias"])
    assert torch.allclose(method(run).predict(task, model, x), expected, atol=1e-4)
    elsewhere = written_out(server["valve"], z, server["embeddings"].mean(0))
    assert float((elsewhere - features).abs().max()) > 1e-2
    assert method(run).global_model(task, server) is None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_class_that_nobody_holds_harms_nobody(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(SETTING, participation=1.0), sizes=(20, 9, 0)))
    assert tree.is_finite(toy.states(run)) and tree.is_finite(run.progress.server)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_client_held_out_is_tested_at_the_condition_of_its_own_classes(engine: str) -> None:
    run = toy.finish(run_of(engine, replace(toy.SETTING, rounds=8, unseen=1, eval_every=8)))
    task, server = run.task_at(7), run.progress.server
    (model,) = run.evaluator.models(task, server, server, run.store, [7], True)["unseen"]
    assert torch.allclose(model["condition"], GPFL.condition(server["embeddings"], data_of(run, 7)), atol=1e-6)
    assert largest_difference({"head": model["head"]}, {"head": run.task.init()["head"]}) > 1e-3
    assert measured(run, "unseen") > 0.7 and measured(run, "personal") > 0.7
