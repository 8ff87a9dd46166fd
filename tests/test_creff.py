"""CReFF: one whole round re-computed with torch's modules and optimisers, and what its pieces must not do."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import LocalData, Tree, federated_features, keys, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size, trained

SETTING = replace(toy.SETTING, participation=0.5, rounds=3, momentum=0.9, weight_decay=1e-2)
CHEAP: dict[str, Any] = {"features_per_class": 10, "match_steps": 5, "head_epochs": 3}
CLASSES = range(6)


def run_of(engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["creff"](**{**CHEAP, **fields}), engine, setting=setting)


def class_gradients(run: Run, body: Tree, head: Tree, data: LocalData) -> dict[int, tuple[Tensor, ...]]:
    """Of the mean cross-entropy of each class that a client holds, by the head's weight and bias."""
    x, y = run.population.images.plain(data.index), data.y
    z = torch.relu(F.linear(x.flatten(1), *tree.flatten(body).values()))
    w = [head[name].clone().requires_grad_() for name in ("weight", "bias")]
    return {
        int(c): torch.autograd.grad(F.cross_entropy(F.linear(z[y == c], *w), y[y == c]), w) for c in torch.unique(y)
    }


def matched(features: Tensor, head: Tree, targets: dict[int, tuple[Tensor, ...]], steps: int) -> Tensor:
    """SGD of rate 0.1 on the mismatch of gradients, 1 - cosine of each row of the weight's and of the bias's."""
    moving = torch.nn.Parameter(features.clone())
    optimiser = torch.optim.SGD([moving], lr=0.1)
    for _ in range(steps):
        apart = torch.zeros(())
        for c, (weight, bias) in targets.items():
            w = [head[name].clone().requires_grad_() for name in ("weight", "bias")]
            entropy = F.cross_entropy(F.linear(moving[c], *w), torch.full((len(moving[c]),), c))
            mine = torch.autograd.grad(entropy, w, create_graph=True)
            for a, b in [*zip(mine[0], weight, strict=True), (mine[1], bias)]:
                apart = apart + 1 - a @ b / (a.norm() * b.norm() + 1e-6)
        optimiser.zero_grad()
        apart.backward()
        optimiser.step()
    return moving.detach()


def retrained(run: Run, features: Tensor, round: int, epochs: int) -> Tree:
    """A fresh linear layer, trained by SGD of rate 0.01 in batches of 32; the round's own draw says how it starts."""
    key = keys.fold(run.task.key, "server", "retrain", round)
    layer = torch.nn.Linear(features.shape[2], len(features))
    layer.load_state_dict(run.task.model.init(key)["head"])
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01)
    x, y = features.flatten(0, 1), torch.arange(len(features)).repeat_interleave(features.shape[1])
    for epoch in range(epochs):
        for rows in keys.permutation(keys.fold(key, epoch), len(x)).split(32):
            optimiser.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimiser.step()
    return {name: leaf.detach().clone() for name, leaf in layer.named_parameters()}


def a_round(run: Run, server: Tree, round: int) -> Tree:
    """Algorithm 1, from what the server has before a round to what it has after it."""
    model = {"body": server["body"], "head": server["head"]}
    found: dict[int, list[tuple[Tensor, ...]]] = {}
    models = []
    for client in run.population.cohort(round):
        data = data_of(run, client, round)
        for c, gradient in class_gradients(run, server["body"], server["retrained"], data).items():
            found.setdefault(c, []).append(gradient)
        models.append(trained(run, model, data.batches(run.setting.epochs)))
    mean = mean_by_size(run, run.population.cohort(round), models)
    targets = {
        c: tuple(torch.stack(part).mean(0) for part in zip(*those, strict=True)) for c, those in sorted(found.items())
    }
    features = matched(server["features"], server["retrained"], targets, CHEAP["match_steps"])
    return {**mean, "features": features, "retrained": retrained(run, features, round, CHEAP["head_epochs"])}


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_a_round_is_the_papers(engine: str) -> None:
    """From the second on, when the re-trained head is no longer the averaged one."""
    run = run_of(engine)
    for round in range(3):
        before = tree.clone(run.progress.server)
        run.step()
        after, wanted = run.progress.server, a_round(run, before, round)
        assert after.keys() == wanted.keys()
        for key in wanted:
            assert largest_difference({key: after[key]}, {key: wanted[key]}) < 2e-4, (key, round)
        assert float((before["features"] - after["features"]).abs().max()) > 1e-3


def test_a_class_counts_once_for_each_client_that_holds_it_however_many_images_it_has() -> None:
    """The cohort of a round has clients of unequal size that share a class, or the test above says too little."""
    run = run_of()
    counts = torch.stack([run.population.class_counts(k) for k in run.population.cohort(1)])
    shared = (counts > 0).sum(0) > 1
    assert any(len(counts[:, c][counts[:, c] > 0].unique()) > 1 for c in torch.nonzero(shared).flatten().tolist())
    assert not bool(((counts > 0).sum(0) > 0).all())  # and some class is absent


def test_the_gradient_of_features_is_that_of_their_mean_loss() -> None:
    """Which only the 1e-6 beside small gradients can tell from their sum."""
    run = run_of()
    server = run.progress.server
    draw = torch.Generator().manual_seed(0)
    target = {"weight": 1e-6 * torch.randn(6, 6, 64, generator=draw), "bias": 1e-6 * torch.randn(6, 6, generator=draw)}
    targets: dict[int, tuple[Tensor, ...]] = {c: (target["weight"][c], target["bias"][c]) for c in CLASSES}
    everywhere = torch.ones(6, dtype=torch.bool)
    mine = federated_features.matched(server["features"], server["retrained"], target, everywhere, 5, 0.1)
    wanted = matched(server["features"], server["retrained"], targets, 5)
    moved = float((wanted - server["features"]).abs().max())
    assert float((mine - wanted).abs().max()) < 1e-2 * moved


def problem(d: int, absent: int = 4) -> tuple[Tensor, Tree, dict[str, Tensor], Tensor]:
    """Six classes of ten features in float64, a head, targets of which one has rows of zeros, and who is there."""
    draw = torch.Generator().manual_seed(d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    features, head = normal(6, 10, d), {"weight": normal(6, d) / d**0.5, "bias": normal(6)}
    target = {"weight": normal(6, 6, d), "bias": normal(6, 6)}
    target["weight"][2, 1:] = 0.0
    return features, head, target, torch.arange(6) != absent


@pytest.mark.parametrize("d", [3, 30, 44, 200])  # features, targets and head are 22 rows
def test_features_descend_as_by_automatic_differentiation_however_long_they_are(d: int) -> None:
    features, head, target, present = problem(d)
    targets: dict[int, tuple[Tensor, ...]] = {
        c: (target["weight"][c], target["bias"][c]) for c in CLASSES if present[c]
    }
    found = federated_features.matched(features, head, target, present, 20, 0.1)
    wanted = matched(features, head, targets, 20)
    assert float((wanted - features).abs().max()) > 1e-2
    assert torch.allclose(found, wanted, rtol=0.0, atol=1e-10)
    assert torch.equal(found[4], features[4])


def test_short_vectors_stand_for_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    slope = federated_features.mismatch_slope

    def noted(a: Tensor, b: Tensor) -> Tensor:
        lengths.append(a.shape[-1])
        given: Tensor = slope(a, b)
        return given

    monkeypatch.setattr(federated_features, "mismatch_slope", noted)
    for d in (43, 44, 200):
        federated_features.matched(*problem(d), 1, 0.1)
    assert lengths[::2] == [43, 22, 22]


@pytest.mark.parametrize("which", ["a", "b", "neither"])
def test_the_slope_of_the_mismatch_is_that_of_automatic_differentiation(which: str) -> None:
    a, b = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if which != "neither":
        (a if which == "a" else b)[1:3] = 0.0
    a.requires_grad_()
    apart = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)
    (wanted,) = torch.autograd.grad(apart.sum(), a)
    assert torch.allclose(federated_features.mismatch_slope(a.detach(), b), wanted, rtol=1e-12, atol=1e-12)


def test_each_round_trains_a_head_of_its_own_start() -> None:
    run = run_of(head_epochs=0)
    starts = [run.progress.server["retrained"]]
    for _ in range(2):
        run.step()
        starts.append(run.progress.server["retrained"])
    assert all(largest_difference(a, b) > 0.05 for a, b in itertools.combinations(starts, 2))


def test_features_are_drawn_once_and_go_on_from_round_to_round() -> None:
    run = run_of(match_steps=0)
    before = run.progress.server["features"].clone()
    assert before.shape == (6, 10, 64)
    assert abs(float(before.mean())) < 0.05 and float(before.std()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(toy.finish(run).progress.server["features"], before)


def test_the_retrained_head_is_what_is_tested_and_never_what_is_trained() -> None:
    run = toy.finish(run_of())
    task, server = run.task_at(2), run.progress.server
    sent = run.algorithm.broadcast(task, server)
    assert "features" not in sent
    wanted = {"body": server["body"], "head": server["retrained"]}
    for model in (
        run.algorithm.global_model(task, server),
        run.algorithm.personal_model(task, sent, {}, data_of(run, 0, 2)),
    ):
        assert model is not None and largest_difference(model, wanted) == 0.0
    upload, _ = toy.upload_once(run, 0, task)
    averaged = {"body": server["body"], "head": server["head"]}
    assert largest_difference(server["head"], server["retrained"]) > 1e-2
    mine = {"body": upload["body"], "head": upload["head"]}
    assert largest_difference(mine, trained(run, averaged, data_of(run, 0, 2).batches(run.setting.epochs))) < 5e-6


def test_the_defaults_are_the_references() -> None:
    creff = ALGORITHMS["creff"]()
    assert (creff.features_per_class, creff.match_steps, creff.head_epochs) == (100, 100, 300)
    assert (creff.match_lr, creff.head_lr) == (0.1, 0.01)
