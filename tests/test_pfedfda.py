"""pFedFDA: discriminants and statistics by hand, how they are mixed, and heads that stand still."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Tree, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, measured, method

SETTING = replace(toy.SETTING, rounds=2)


def start(setting: Any = SETTING, engine: str = "serial", **fields: Any) -> Run:
    return toy.run(ALGORITHMS["pfedfda"](**fields), engine, setting=setting)


def module() -> Any:
    return importlib.import_module("bench.algorithms.pfedfda")


def gaussian() -> Tree:
    a = torch.linspace(-1, 1, 12).reshape(4, 3)
    return {"means": torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.0]]), "covariance": a.T @ a}


def test_a_discriminant_is_the_log_posterior() -> None:
    """Up to what all classes of an example share."""
    given, shares = gaussian(), torch.tensor([0.2, 0.8])
    head = module().discriminant(given, 0.5, shares)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    normals = [torch.distributions.MultivariateNormal(mean, given["covariance"] + 0.5 * torch.eye(3))
               for mean in given["means"]]  # fmt: skip
    joint = torch.stack([normal.log_prob(x) for normal in normals], 1) + shares.log()
    ours = torch.log_softmax(x @ head["weight"].T + head["bias"], 1)
    assert torch.allclose(ours, torch.log_softmax(joint, 1), atol=1e-5)


def test_statistics_are_those_of_the_examples_and_else_the_received() -> None:
    z = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 4.0], [9.0, 9.0]])
    received = {"means": torch.full((3, 2), 7.0), "covariance": torch.eye(2)}
    found = module().statistics(z, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0, 1.0, 0.0]), received)
    assert found["means"].tolist() == [[2.0, 0.0], [0.0, 4.0], [7.0, 7.0]]
    assert torch.allclose(found["covariance"], torch.tensor([[2 / 3, 0.0], [0.0, 0.0]]))
    none = module().statistics(z[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0), received)
    assert largest_difference(none, received) == 0.0


def test_the_first_head_has_the_common_initial_heads_weights() -> None:
    run = start(ridge=2.0)
    head = method(run).head(toy.received(run, 0), data_of(run, 0))
    assert torch.allclose(head["weight"], run.task.init()["head"]["weight"], atol=1e-6)


def test_bodies_are_trained_under_a_head_that_stands_still() -> None:
    run = start(replace(toy.SETTING, momentum=0.0, epochs=1))
    head, (weight, bias) = (
        method(run).head(toy.received(run, 0), data_of(run, 0)),
        (leaf.clone().requires_grad_() for leaf in run.progress.server["body"]["hidden"].values()),
    )
    optimiser = torch.optim.SGD([weight, bias], run.setting.lr)
    for batch in data_of(run, 0).batches(1):
        optimiser.zero_grad()
        z = torch.relu(F.linear(batch.x.flatten(1), weight, bias))
        F.cross_entropy(F.linear(z, head["weight"], head["bias"]), batch.y).backward()
        optimiser.step()
    upload, kept = toy.upload_once(run)
    expected = {"hidden": {"weight": weight.detach(), "bias": bias.detach()}}
    assert largest_difference(upload["body"], expected) < 1e-5
    assert kept == {}


@pytest.mark.parametrize("blend", [0.0, 0.25, 1.0])
def test_statistics_are_mixed_by_the_blend(blend: float) -> None:
    run = start(blend=blend)
    shared, data = toy.received(run, 0), data_of(run, 0)
    z, y = features(run, shared["body"]), data.y
    found = method(run).adapted(run.task, shared["body"], shared, data)
    here = [int(c) for c in y.unique()]
    for c in range(6):
        own = z[y == c].mean(0) if c in here else shared["means"][c]
        assert torch.allclose(found["means"][c], blend * own + (1 - blend) * shared["means"][c], atol=1e-5)
    centred = torch.cat([z[y == c] - z[y == c].mean(0) for c in here])
    covariance = blend * centred.T @ centred / 60 + (1 - blend) * torch.eye(64)
    assert torch.allclose(found["covariance"], covariance, atol=1e-5)


def features(run: Run, body: Tree) -> Tensor:
    return run.task.model.features(body, run.population.images.plain(data_of(run, 0).index))


def test_without_a_blend_own_data_say_nothing_but_how_often_classes_occur() -> None:
    run = start(blend=0.0)
    shared = toy.received(run, 0)
    heads = []
    for client in (0, 7):
        personal = run.algorithm.personal_model(run.task, shared, {}, data_of(run, client))
        assert personal is not None
        heads.append(personal["head"])
        counts = data_of(run, client).class_counts
        shares = (counts / counts.sum()).clamp(min=1e-4).log()
        centred = personal["head"]["bias"] - shares
        assert torch.allclose(centred, -(shared["means"] * personal["head"]["weight"]).sum(1) / 2, atol=1e-5)
    assert torch.equal(heads[0]["weight"], heads[1]["weight"])


def test_validation_takes_what_predicts_the_other_half_best() -> None:
    """Trained statistics are worth something; the first round's received ones, an initial head, are not."""
    run = start()
    shared, data = toy.received(run, 0), data_of(run, 0)
    received = {key: shared[key] for key in ("means", "covariance")}
    z, y = features(run, shared["body"]), data.y
    first = keys.uniform(keys.fold(data.key, "half"), 60) < 0.5
    assert 20 <= int(first.sum()) <= 40
    errors = []
    for blend in (k / 10 for k in range(11)):
        error = 0.0
        for a, b in ((first, ~first), (~first, first)):
            own = module().statistics(z[a], y[a], torch.ones(int(a.sum())), received)
            head = method(run).head({key: blend * own[key] + (1 - blend) * received[key] for key in own}, data)
            error += float(F.cross_entropy(z[b] @ head["weight"].T + head["bias"], y[b], reduction="sum"))
        errors.append(error)
    best = errors.index(min(errors)) / 10
    assert best > 0 and len({round(error, 3) for error in errors}) > 5
    expected = method(start(blend=best)).adapted(run.task, shared["body"], shared, data_of(run, 0))
    assert largest_difference(method(run).adapted(run.task, shared["body"], shared, data_of(run, 0)), expected) < 1e-5


@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_both_statistics_matter(blend: float) -> None:
    one, other = toy.finish(start()), toy.finish(start(blend=blend))
    assert largest_difference(one.progress.server, other.progress.server) > 1e-4


def test_a_class_that_nobody_has_keeps_its_mean() -> None:
    run = start(replace(toy.SETTING, rounds=1, participation=1.0))
    lacking = [c for c in range(6) if not data_of(run, 4).class_counts[c]]
    before = run.progress.server["means"].clone()
    upload, _ = toy.upload_once(run, 4)
    assert lacking and torch.allclose(upload["means"][lacking], before[lacking], atol=1e-6)


def test_a_body_means_and_a_covariance_travel_both_ways() -> None:
    run = start()
    run.step()
    size = 4 * (sum(leaf.numel() for leaf in tree.flatten(run.progress.server["body"]).values()) + 6 * 64 + 64 * 64)
    assert run.progress.cost["bytes_up"] == run.progress.cost["bytes_down"] == 6 * size


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_client_held_out_of_training_finds_its_head_like_everybody(engine: str) -> None:
    run = toy.finish(start(replace(toy.SETTING, rounds=4, unseen=1, eval_every=4), engine))
    assert measured(run, "unseen") > 0.8
    assert run.algorithm.newcomer_adaptation(run.task) is None


def test_statistics_are_of_the_trained_body_and_the_tested_head_is_of_adapted_ones() -> None:
    run = start(blend=1.0)
    shared, data, (upload, _) = toy.received(run, 0), data_of(run, 0), toy.upload_once(run)
    z = features(run, upload["body"])
    for c in data.y.unique().tolist():
        assert torch.allclose(upload["means"][c], z[data.y == c].mean(0), atol=1e-5)
    personal = run.algorithm.personal_model(run.task, shared, {}, data)
    expected = method(run).head(method(run).adapted(run.task, shared["body"], shared, data), data)
    assert personal is not None and largest_difference(personal["head"], expected) == 0.0
    assert largest_difference(personal["head"], method(run).head(shared, data)) > 1e-2
