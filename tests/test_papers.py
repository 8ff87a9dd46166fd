"""What each paper says must be true of its method: equivalences, invariants and hand-computed values."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Algorithm, Batch, Tree, Uploads, federated_features, keys, losses, models, tree
from bench.contract import toy
from bench.contract.toy import finish, states, upload_once
from bench.contract.toy import run as toy_run
from bench.models import layers
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import Setting
from bench.training.rounds import Run
from bench.tree import largest_difference

TWO_ROUNDS = replace(toy.SETTING, rounds=2)
HOSTILE = replace(TWO_ROUNDS, momentum=0.9, weight_decay=1e-2)
"""Momentum and weight decay move whatever they can reach."""


def make(name: str, **fields: Any) -> Algorithm:
    algorithm: Algorithm = ALGORITHMS[name](**fields)
    return algorithm


def trained(name: str, setting: Setting = TWO_ROUNDS, engine: str = "serial", **fields: Any) -> Run:
    return finish(toy_run(make(name, **fields), engine, setting=setting))


def private(run: Run) -> Tree:
    return {str(k): run.store[k] for k in run.store.clients()}


def same(a: Tree, b: Tree) -> bool:
    return largest_difference(a, b) == 0.0


# FedAvg -----------------------------------------------------------------------------------------------------
# ---------


def plain_sgd(run: Run, rows: Tensor, rounds: int) -> Tree:
    """The textbook loop, over the batches that client 0 would see."""
    setting, images = run.setting, run.population.images
    params = {path: leaf.clone().requires_grad_() for path, leaf in tree.flatten(run.task.init()).items()}
    for r in range(rounds):
        key = run.population.visit(0, r, {}).key
        optimiser = torch.optim.SGD(
            params.values(), lr=setting.lr, momentum=setting.momentum, weight_decay=setting.weight_decay
        )
        for epoch in range(setting.epochs):
            order = keys.permutation(keys.fold(key, f"order  {epoch}"), len(rows))
            for batch in order.split(setting.batch_size):
                optimiser.zero_grad()
                p = tree.unflatten(dict(params))
                F.cross_entropy(run.task.logits(p, images.plain(rows[batch])), images.y[rows[batch]]).backward()
                optimiser.step()
    return tree.unflatten({path: leaf.detach() for path, leaf in params.items()})


@pytest.mark.equivalence
@pytest.mark.parametrize("name", ["fedavg", "centralised"])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_one_client_is_the_textbook_loop(name: str, weight_decay: float) -> None:
    setting = replace(toy.SETTING, clients=1, participation=1.0, rounds=3, weight_decay=weight_decay)
    run = toy_run(make(name), setting=setting, sizes=(192,))
    rows = run.population.index[0]
    expected = plain_sgd(run, rows, setting.rounds)
    assert largest_difference(expected, finish(run).progress.server) < 1e-6


@pytest.mark.equivalence
def test_a_full_batch_step_of_all_clients_is_a_step_on_the_pool() -> None:
    setting = replace(toy.SETTING, participation=1.0, rounds=1, epochs=1, batch_size=1000)
    federated = trained("fedavg", setting).progress.server
    pooled = trained("centralised", setting).progress.server
    assert largest_difference(federated, pooled) < 1e-6


def test_a_learning_rate_of_nearly_zero_changes_nearly_nothing() -> None:
    run = toy_run(make("fedavg"), setting=replace(TWO_ROUNDS, lr=1e-12))
    start = tree.clone(run.progress.server)
    assert largest_difference(start, finish(run).progress.server) < 1e-9


def test_averages_are_weighted_by_size_and_sum_to_one() -> None:
    uploads = Uploads([{"a": torch.tensor([1.0])}, {"a": torch.tensor([4.0])}], torch.tensor([30.0, 10.0]))
    assert uploads.mean()["a"].item() == pytest.approx(1.75)
    assert uploads.mean(weights=torch.tensor([1.0, 1.0]))["a"].item() == pytest.approx(2.5)
    same_models = Uploads([{"a": torch.full((3,), 0.1)}] * 5, torch.arange(1.0, 6.0))
    assert torch.equal(same_models.mean()["a"], torch.full((3,), 0.1))


def test_a_mean_per_class_counts_only_the_clients_that_hold_it() -> None:
    uploads = Uploads([{"g": {"w": torch.tensor(w)}} for w in ([1.0, 5.0, 7.0], [3.0, 9.0, 7.0])], torch.ones(2))
    seen = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    assert uploads.mean("g", seen)["w"].tolist() == [2.0, 9.0, 7.0]


# Degenerate equivalences (every one to the bit unless it says otherwise) --------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_fedprox_without_pull_is_fedavg(engine: str) -> None:
    fedprox, fedavg = trained("fedprox", engine=engine, mu=0.0), trained("fedavg", engine=engine)
    assert same(fedprox.progress.server, fedavg.progress.server)


@pytest.mark.equivalence
def test_fedprox_of_a_single_step_is_fedavg() -> None:
    setting = replace(toy.SETTING, rounds=1, epochs=1, batch_size=1000)
    assert same(trained("fedprox", setting, mu=5.0).progress.server, trained("fedavg", setting).progress.server)


def test_fedprox_stays_closer_the_stronger_it_pulls() -> None:
    def distance(mu: float) -> float:
        run = toy_run(make("fedprox", mu=mu))
        upload, _ = upload_once(run)
        gap = tree.sub(upload, run.progress.server)
        return float(tree.dot(gap, gap))

    assert distance(0.0) > distance(0.1) > distance(1.0) > distance(5.0) > 0


def test_fedprox_pulls_by_mu_times_the_distance() -> None:
    anchor: Tree = {"w": torch.tensor([1.0, 2.0])}
    at = torch.tensor([4.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(0.1 * losses.proximal({"w": at}, anchor), at)
    assert gradient.tolist() == pytest.approx([0.3, -0.2])


@pytest.mark.equivalence
def test_fedavg_ft_without_epochs_is_fedavg() -> None:
    tuned, plain = trained("fedavg_ft", finetune_epochs=0).outcome(), trained("fedavg").outcome()
    assert (tuned.digest, tuned.metrics) == (plain.digest, plain.metrics)


def test_fine_tuning_reports_a_curve_that_starts_at_fedavg() -> None:
    tuned, plain = trained("fedavg_ft").outcome(), trained("fedavg").outcome()
    assert tuned.digest == plain.digest
    assert tuned.metrics["personal:0 epochs"] == plain.metrics["personal"]
    assert tuned.metrics["personal:5 epochs"] == tuned.metrics["personal"]
    assert tuned.metrics["personal:1 epochs"] not in (None, plain.metrics["personal"])
    assert "personal:10 epochs" not in tuned.metrics


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_ditto_without_pull_is_local_training_beside_fedavg(engine: str) -> None:
    ditto = trained("ditto", engine=engine, pull=0.0)
    assert same(private(ditto), private(trained("local", engine=engine)))
    assert same(ditto.progress.server, trained("fedavg", engine=engine).progress.server)


@pytest.mark.equivalence
def test_dittos_global_model_is_fedavgs_whatever_the_pull() -> None:
    assert same(trained("ditto", pull=2.0).progress.server, trained("fedavg").progress.server)


def test_dittos_anchor_is_the_received_model() -> None:
    # With lr · pull = 1 and no momentum a step forgets the personal model: anchor - lr · gradient at the old
    # one.
    setting = replace(toy.SETTING, momentum=0.0, epochs=1, batch_size=1000, lr=0.5)
    run = toy_run(make("ditto", pull=2.0), setting=setting)
    _, kept = upload_once(run)
    task, anchor = run.task_at(0), run.progress.server
    data = run.population
    batch = Batch(data.images.plain(data.index[0]), data.images.y[data.index[0]], torch.ones(len(data.index[0])))
    _, gradient, _ = task.gradient(task.loss, run.store[0], batch)
    assert largest_difference(kept, tree.add(anchor, gradient, -0.5)) < 1e-6


@pytest.mark.equivalence
def test_fedrep_without_head_epochs_is_fedbabu() -> None:
    fedrep = trained("fedrep", HOSTILE, head_epochs=0, body_epochs=2)
    fedbabu = trained("fedbabu", HOSTILE)
    assert same(fedrep.progress.server["body"], fedbabu.progress.server["body"])


def test_fedrep_without_epochs_moves_nothing() -> None:
    run = toy_run(make("fedrep", head_epochs=0, body_epochs=0), setting=HOSTILE)
    start = tree.clone(run.progress.server)
    finish(run)
    assert same(start, run.progress.server)
    assert all(same(state, run.store.initial) for state in run.store.all())


@pytest.mark.equivalence
def test_fedrep_without_body_epochs_leaves_the_body() -> None:
    run = toy_run(make("fedrep", body_epochs=0), setting=HOSTILE)
    start = tree.clone(run.progress.server)
    assert same(start, finish(run).progress.server)
    assert not same(run.store[0], run.store.initial)


@pytest.mark.parametrize("statistics", ["shared", "frozen"])
def test_a_frozen_body_keeps_its_running_statistics(statistics: str) -> None:
    setting = replace(HOSTILE, model="resnet8", norm="batch", statistics=statistics, rounds=1, epochs=1)
    run = toy_run(make("fedrep", head_epochs=1, body_epochs=0), setting=setting, sizes=(20, 9, 0, 0, 0, 0, 0, 3))
    upload, _ = upload_once(run)
    assert same(upload, run.progress.server)


def test_fedbabus_head_never_moves() -> None:
    run = toy_run(make("fedbabu"), setting=HOSTILE)
    start = tree.clone(run.progress.server)
    finish(run)
    assert same(start["head"], run.progress.server["head"])
    assert largest_difference(start["body"], run.progress.server["body"]) > 1e-3
    assert "head" not in upload_once(run)[0]


def test_fedper_and_fedrep_clients_of_equal_data_keep_equal_heads_apart_from_their_order() -> None:
    run = trained("fedper", replace(toy.SETTING, rounds=1, participation=0.5))
    idle = set(range(len(toy.SIZES))) - set(run.store.clients())
    assert idle
    assert all(same(run.store[k], {"head": run.task.init()["head"]}) for k in idle)


@pytest.mark.equivalence
def test_scaffolds_first_round_is_fedavg_with_equal_weights() -> None:
    setting = replace(toy.SETTING, rounds=1, participation=1.0)
    scaffold = toy_run(make("scaffold"), setting=setting, sizes=(24,) * 8)
    fedavg = toy_run(make("fedavg"), setting=setting, sizes=(24,) * 8)
    server = finish(scaffold).progress.server
    expected = finish(fedavg).progress.server
    assert largest_difference({"body": server["body"], "head": server["head"]}, expected) < 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_scaffolds_control_is_the_mean_of_all_clients_controls(momentum: float) -> None:
    run = trained("scaffold", replace(toy.SETTING, rounds=4, participation=0.5, momentum=momentum))
    everyone = [run.store[k]["control"] for k in range(len(toy.SIZES))]
    assert (
        largest_difference(run.progress.server["control"], tree.map(lambda x: x.mean(0), tree.stack(everyone))) < 1e-6
    )


@pytest.mark.equivalence
def test_scaffold_with_one_client_is_fedavg() -> None:
    setting = replace(toy.SETTING, clients=1, participation=1.0, rounds=4)
    scaffold = finish(toy_run(make("scaffold"), setting=setting, sizes=(100,))).progress.server
    fedavg = finish(toy_run(make("fedavg"), setting=setting, sizes=(100,))).progress.server
    assert largest_difference({"body": scaffold["body"], "head": scaffold["head"]}, fedavg) < 1e-5


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_scaffolds_control_is_a_mean_of_the_gradients_taken(momentum: float) -> None:
    # One batch an epoch and a rate of nearly zero: all gradients are the gradient at the start.
    setting = replace(toy.SETTING, momentum=momentum, batch_size=1000, epochs=5, lr=1e-4)
    run = toy_run(make("scaffold"), setting=setting)
    _, kept = upload_once(run)
    task, rows = run.task_at(0), run.population.index[0]
    batch = Batch(run.population.images.plain(rows), run.population.images.y[rows], torch.ones(len(rows)))
    _, gradient, _ = task.gradient(task.loss, task.init(), batch)
    assert largest_difference(kept["control"], gradient) < 1e-2 * math.sqrt(float(tree.dot(gradient, gradient)))


@pytest.mark.equivalence
def test_fedrods_generic_arm_is_fedavg_where_classes_are_balanced() -> None:
    counts = torch.tensor([10, 10, 10])
    logits, batch = torch.randn(4, 3), Batch(torch.zeros(4, 1), torch.tensor([0, 1, 2, 0]), torch.ones(4))
    balanced = losses.balanced_softmax(logits, batch, counts)
    assert balanced.item() == pytest.approx(losses.cross_entropy(logits, batch).item(), abs=1e-6)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_fedrods_body_and_generic_head_do_not_see_the_personal_head(clip: float | None) -> None:
    run = toy_run(make("fedrod"), setting=replace(toy.SETTING, clip=clip))
    one, _ = upload_once(run)
    run.store.initial = tree.map(lambda leaf: torch.linspace(-3, 3, leaf.numel()).view_as(leaf), run.store.initial)
    other, _ = upload_once(run)
    assert same(one, other)


def test_fedrods_personal_model_starts_as_the_generic_one() -> None:
    run = toy_run(make("fedrod"))
    personal = run.algorithm.personal_model(run.task, run.progress.server, run.store[0], None)  # type: ignore[arg-type]
    assert personal is not None
    assert same(personal, run.progress.server)


# Losses: golden values of the field ---------------------------------------------------------------


def test_balanced_softmax_has_its_golden_value() -> None:
    logits, batch = (
        torch.tensor([[2.0, 1.0, 0.0]]),
        Batch(torch.zeros(1, 1), torch.tensor([2]), torch.ones(1)),
    )
    assert losses.cross_entropy(logits, batch).item() == pytest.approx(2.407606, abs=1e-6)
    assert losses.balanced_softmax(logits, batch, torch.tensor([70, 20, 10])).item() == pytest.approx(
        4.063197, abs=1e-6
    )


def test_an_absent_class_leaves_the_balanced_softmax() -> None:
    logits, batch = (
        torch.tensor([[2.0, 1.0, 0.0]]),
        Batch(torch.zeros(1, 1), torch.tensor([2]), torch.ones(1)),
    )
    two = losses.balanced_softmax(logits, batch, torch.tensor([5, 0, 5]))
    assert two.item() == pytest.approx(2.126928, abs=1e-6)  # restricted softmax over classes 0 and 2
    alone = losses.balanced_softmax(logits, batch, torch.tensor([0, 0, 5]))
    assert alone.item() == 0.0


def test_padding_weighs_nothing_in_a_loss() -> None:
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    padded = losses.cross_entropy(logits, Batch(y, y, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])))
    assert padded.item() == pytest.approx(F.cross_entropy(logits[:3], y[:3]).item(), abs=1e-6)
    assert losses.cross_entropy(logits, Batch(y, y, torch.zeros(5))).item() == 0.0


# CReFF ------------------------------------------------------------------------------------------------------
# ---------

CHEAP_CREFF: dict[str, Any] = {"features_per_class": 10, "match_steps": 5, "head_epochs": 3}


@pytest.mark.equivalence
def test_creffs_averaged_model_is_fedavgs_to_the_bit() -> None:
    creff, fedavg = trained("creff", **CHEAP_CREFF), trained("fedavg")
    assert same({key: creff.progress.server[key] for key in ("body", "head")}, fedavg.progress.server)
    assert creff.outcome().metrics["generic:averaged"] == fedavg.outcome().metrics["generic"]


def test_creffs_slope_of_the_mismatch_has_its_golden_values() -> None:
    """From (1, 0) towards (1, 1) straight up, by 1 / sqrt(2), however long that is; at its end nowhere."""
    a, b = torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    expected = torch.tensor([[0.0, -0.707107], [0.0, 0.0]])
    assert torch.allclose(federated_features.mismatch_slope(a, b), expected, atol=2e-6)
    assert torch.allclose(federated_features.mismatch_slope(a, 7 * b), expected, atol=2e-6)


def test_creffs_class_gradient_is_autograds() -> None:
    run = toy_run(make("creff", **CHEAP_CREFF))
    upload, _ = upload_once(run)
    task, rows = run.task, run.population.index[0]
    x, y = run.population.images.plain(rows), run.population.images.y[rows]
    z = task.model.features(run.progress.server["body"], x)
    for c in range(6):
        weight = run.progress.server["retrained"]["weight"].clone().requires_grad_()
        bias = run.progress.server["retrained"]["bias"].clone().requires_grad_()
        if bool((y == c).any()):
            assert upload["seen"][c] == 1
            loss = F.cross_entropy(F.linear(z[y == c], weight, bias), y[y == c])
            expected = torch.autograd.grad(loss, (weight, bias))
            assert torch.allclose(upload["gradient"]["weight"][c], expected[0], atol=1e-6)
            assert torch.allclose(upload["gradient"]["bias"][c], expected[1], atol=1e-6)
        else:
            assert upload["seen"][c] == 0
            assert not upload["gradient"]["weight"][c].any()


def test_creff_leaves_the_features_of_absent_classes_and_lowers_the_mismatch_of_the_others() -> None:
    run = toy_run(make("creff", features_per_class=10, match_steps=50, head_epochs=1))
    before = run.progress.server
    upload, _ = upload_once(run)
    after = run.algorithm.aggregate(run.task, before, Uploads([upload], torch.ones(1)))
    present = upload["seen"] > 0
    assert 0 < int(present.sum()) < 6
    assert torch.equal(after["features"][~present], before["features"][~present])

    def apart(features: Tensor) -> float:
        head = before["retrained"]
        residual = F.linear(features, head["weight"], head["bias"]).softmax(2) - torch.eye(6)[:, None]
        weight = torch.einsum("cmk,cmd->ckd", residual, features)
        alike = F.cosine_similarity(weight, upload["gradient"]["weight"], dim=2)
        return float((1 - alike)[present].sum())

    assert apart(after["features"]) < 0.8 * apart(before["features"])


def test_creffs_retrained_head_separates_separable_features() -> None:
    run = toy_run(make("creff"))
    features = 0.1 * torch.randn(6, 10, 64, generator=torch.Generator().manual_seed(0))
    features[range(6), :, range(6)] += 3.0
    head = federated_features.retrained(run.task.init()["head"], features, 60, 0.1, run.task.key)
    scores = F.linear(features.flatten(0, 1), head["weight"], head["bias"])
    assert torch.equal(scores.argmax(1), torch.arange(6).repeat_interleave(10))


# FedLoGe ----------------------------------------------------------------------------------------------------
# ---------


@pytest.fixture(scope="module")
def sparse_etf() -> Any:
    return importlib.import_module("bench.algorithms.fedloge").sparse_etf


def geometry(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norms, off-diagonal angles in degrees, eigenvalues of the Gram matrix of unit rows."""
    norms = v.double().norm(dim=1)
    cosine = (v.double() / norms[:, None]) @ (v.double() / norms[:, None]).T
    off = cosine[~torch.eye(len(v), dtype=torch.bool)].clamp(-1, 1)
    return norms, torch.rad2deg(torch.arccos(off)), torch.linalg.eigvalsh(cosine)


def test_a_dense_etf_is_equiangular(sparse_etf: Any) -> None:
    v = sparse_etf(keys.key(0), 10, 64, 0.0, 1.0)
    norms, angles, _ = geometry(v)
    assert torch.allclose(norms, torch.ones(10, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(angles, torch.tensor(math.degrees(math.acos(-1 / 9)), dtype=torch.float64), atol=1e-3)
    assert v.sum(0).abs().max() < 1e-6


@pytest.mark.parametrize("faithful", [False, True])
def test_the_sparse_etf_of_ten_classes_has_the_published_geometry(sparse_etf: Any, faithful: bool) -> None:
    v = sparse_etf(keys.key(1), 10, 512, 0.6, 0.1, faithful=faithful)
    start = sparse_etf(keys.key(1), 10, 512, 0.6, 0.1, steps=0, faithful=faithful)
    norms, angles, eigenvalues = geometry(v)
    if faithful:  # the authors' logs: 0.10056-0.10060, spread 6e-5, variance 0.0040-0.0073
        assert abs(float(norms.mean()) - 0.1) < 1e-3
        assert float(norms.std()) < 1e-4
    else:
        assert torch.allclose(norms, torch.tensor(0.1, dtype=torch.float64), atol=1e-6)
    assert float(angles.mean()) == pytest.approx(96.3794, abs=0.002)
    assert float(angles.var()) < 0.01
    assert float(angles.min()) > 96.2 > float(geometry(start)[1].min())
    assert float(eigenvalues[0]) < 0.005
    assert float((start == 0).sum()) == int(0.6 * 512 * 10)
    assert bool((v[start == 0] == 0).all())
    lone = (start != 0).sum(0) == 1
    assert bool((v[:, ~lone][start[:, ~lone] != 0] != 0).all())


def test_the_sparse_etf_of_a_hundred_classes_has_the_published_geometry(sparse_etf: Any) -> None:
    norms, angles, eigenvalues = geometry(sparse_etf(keys.key(1), 100, 512, 0.6, 0.1))
    assert torch.allclose(norms, torch.tensor(0.1, dtype=torch.float64), atol=1e-6)
    assert float(angles.mean()) == pytest.approx(90.5788, abs=0.005)
    assert float(angles.var()) < 0.06
    assert float(angles.min()) > 90.1
    assert float((eigenvalues[1:] * 99 / 100 - 1).abs().max()) < 0.01


def test_more_classes_than_features_still_gives_a_head(sparse_etf: Any) -> None:
    v = sparse_etf(keys.key(1), 20, 8, 0.5, 0.1, steps=200)
    norms, angles, _ = geometry(v)
    assert torch.allclose(norms, torch.tensor(0.1, dtype=torch.float64), atol=1e-6)
    assert float(angles.min()) > 10


FAST: dict[str, Any] = {"etf_steps": 100}


def test_fedloges_etf_never_changes() -> None:
    run = toy_run(make("fedloge", **FAST), setting=HOSTILE)
    start = tree.clone(run.progress.server["etf"])
    assert same(start, finish(run).progress.server["etf"])


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_fedloges_upload_does_not_depend_on_the_private_head(engine: str, clip: float | None) -> None:
    runs = [toy_run(make("fedloge", **FAST), engine, setting=replace(toy.SETTING, clip=clip)) for _ in range(2)]
    runs[1].store.initial = tree.map(lambda leaf: 2 * leaf + 1.0, runs[1].store.initial)
    assert same(*(finish(run).progress.server for run in runs))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_fedloges_body_does_not_depend_on_the_shared_head(clip: float | None) -> None:
    runs = [toy_run(make("fedloge", **FAST), setting=replace(toy.SETTING, clip=clip)) for _ in range(2)]
    shifted = tree.map(lambda leaf: 2 * leaf + 1.0, runs[1].progress.server["head"])
    runs[1].progress.server = {**runs[1].progress.server, "head": shifted}
    one, other = (finish(run).progress.server for run in runs)
    assert same(one["body"], other["body"])
    assert not same(one["head"], other["head"])


def test_fedloge_taught_through_a_trainable_head_alone_would_be_fedavg() -> None:
    # The body's path depends on the head that teaches it and on nothing else: FedBABU with the ETF as its
    # fixed head.
    fedloge = toy_run(make("fedloge", **FAST))
    fedbabu = toy_run(make("fedbabu"))
    fedbabu.progress.server = {**fedbabu.progress.server, "head": fedloge.progress.server["etf"]}
    assert same(finish(fedloge).progress.server["body"], finish(fedbabu).progress.server["body"])


def test_fedloges_realigned_rows_have_equal_norm_and_old_directions() -> None:
    run = trained("fedloge", **FAST)
    raw = run.progress.server["head"]
    model = run.algorithm.global_model(run.task, run.progress.server)
    assert model is not None
    assert torch.allclose(model["head"]["weight"].norm(dim=1), torch.tensor(1.7), atol=1e-6)
    cosine = F.cosine_similarity(model["head"]["weight"], raw["weight"], dim=1)
    assert torch.allclose(cosine, torch.ones(6), atol=1e-6)
    assert torch.equal(model["head"]["bias"], raw["bias"])
    assert same(raw, run.progress.server["head"])


def test_fedloges_scale_does_not_matter_without_a_bias() -> None:
    predictions = []
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    run = trained("fedloge", **FAST)
    for scale in (1.0, 1.7, 20.0):
        algorithm = make("fedloge", scale=scale, generic_bias="drop", **FAST)
        model = algorithm.global_model(run.task, run.progress.server)
        assert model is not None
        predictions.append(run.task.model.logits(model["head"], x).argmax(1))
    assert torch.equal(predictions[0], predictions[1])
    assert torch.equal(predictions[0], predictions[2])


def test_fedloges_personal_rows_carry_the_product_of_norms() -> None:
    run = trained("fedloge", **FAST)
    ours, mine = run.progress.server["head"], run.store[0]["head"]

    def personal(rule: str) -> Tree:
        algorithm = make("fedloge", personal_rule=rule, **FAST)
        model = algorithm.personal_model(run.task, run.progress.server, run.store[0], None)  # type: ignore[arg-type]
        assert model is not None
        head: Tree = model["head"]
        return head

    p0, p1, p2 = personal("P0"), personal("P1"), personal("P2")
    product = ours["weight"].norm(dim=1) * mine["weight"].norm(dim=1)
    assert torch.allclose(p0["weight"].norm(dim=1), product, rtol=1e-5)
    assert torch.allclose(F.cosine_similarity(p0["weight"], ours["weight"], dim=1), torch.ones(6), atol=1e-6)
    assert torch.equal(p0["bias"], ours["bias"])
    assert torch.allclose(p1["weight"] - p0["weight"], mine["weight"], atol=1e-5)
    assert torch.allclose(p1["bias"], ours["bias"] + mine["bias"])
    assert torch.allclose(p2["weight"] - p0["weight"], ours["weight"], atol=1e-5)
    assert torch.allclose(p2["bias"], ours["bias"] + mine["bias"])


def test_fedloge_reports_its_three_generic_heads_side_by_side() -> None:
    metrics = trained("fedloge", **FAST).outcome().metrics
    assert all(metrics[key] is not None for key in ("generic", "generic:auxiliary", "generic:etf"))


def test_masked_predictions_never_name_an_absent_class() -> None:
    run = toy_run(make("fedavg"), setting=TWO_ROUNDS)
    run.population.tests = [torch.arange(len(run.population.test))] * len(
        toy.SIZES
    )  # everybody is tested on everything
    finish(run)
    held = torch.stack([run.population.class_counts(k) for k in range(len(toy.SIZES))]) > 0
    right = {(tally.model, k, c): n for tally in run.progress.counts for k, c, n, *_ in tally.rows.T.tolist()}
    absent = [(k, c) for k in range(len(toy.SIZES)) for c in range(6) if not held[k, c] and held[k].any()]
    assert absent
    assert all(right["personal.masked", k, c] == 0 for k, c in absent)
    assert any(right["personal", k, c] > 0 for k, c in absent)


# What a seed decides -------------------------------------------------------------------------------------------------


def test_cohorts_differ_by_round_and_seed_and_never_by_algorithm() -> None:
    def cohorts(name: str, seed: int) -> list[tuple[int, ...]]:
        setting = replace(toy.SETTING, participation=0.5)
        population = toy_run(make(name), seed=seed, setting=setting).population
        return [population.cohort(r) for r in range(8)]

    assert len(set(cohorts("fedavg", 0))) > 4
    assert cohorts("fedavg", 0) != cohorts("fedavg", 1)
    assert cohorts("fedavg", 0) == cohorts("scaffold", 0)
    drawn = [k for seed in range(40) for cohort in cohorts("fedavg", seed) for k in cohort]
    shares = torch.bincount(torch.tensor(drawn)) / (40 * 8)
    assert shares.tolist() == pytest.approx([0.5] * 8, abs=0.1)


def test_the_seed_decides_initial_weights_and_the_order_of_data_each_by_itself() -> None:
    one, other = toy_run(make("fedavg"), seed=0), toy_run(make("fedavg"), seed=1)
    assert largest_difference(one.task.init()["body"], other.task.init()["body"]) > 0.01
    first, second = one.population.visit(0, 0, {}), other.population.visit(0, 0, {})
    assert not torch.equal(first.key, second.key)
    assert not torch.equal(first.key, one.population.visit(0, 1, {}).key)
    assert not torch.equal(first.key, one.population.visit(1, 0, {}).key)


# Norm statistics, models, clipping ----------------------------------------------------------------


@pytest.mark.parametrize("statistics", ["shared", "personal", "frozen"])
def test_batch_norm_statistics_follow_their_policy(statistics: str) -> None:
    setting = replace(toy.SETTING, model="resnet8", norm="batch", statistics=statistics, rounds=1, epochs=1)
    setting = replace(setting, participation=1.0, batch_size=8)
    run = toy_run(make("fedavg"), setting=setting, sizes=(16, 12, 0, 0, 0, 0, 0, 8))
    start = tree.split(tree.clone(run.progress.server), tree.is_statistic)[0]
    finish(run)
    now = tree.split(run.progress.server, tree.is_statistic)[0]
    assert same(start, now) == (statistics != "shared")
    assert (run.outcome().metrics["generic"] is None) == (statistics == "personal")
    if statistics == "personal":
        own = [run.store[k]["statistics"] for k in (0, 1, 2)]
        assert largest_difference(own[0], own[1]) > 0
        assert same(own[2], start)  # an empty client keeps the first values


@pytest.mark.parametrize("statistics", ["shared", "personal"])
def test_engines_agree_on_batch_norm(statistics: str) -> None:
    setting = replace(toy.SETTING, model="resnet8", norm="batch", statistics=statistics, rounds=1, epochs=1)
    setting = replace(setting, participation=1.0, batch_size=8, lr=0.01)
    one, other = (
        finish(toy_run(make("fedavg"), engine, setting=setting, sizes=(20, 13, 8, 0, 0, 0, 0, 6)))
        for engine in ("serial", "stacked")
    )
    assert largest_difference(states(one), states(other)) < 2e-4


def test_batch_norm_is_torchs_with_and_without_padding() -> None:
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1
    layer = layers.norm_layer("batch", 4, torch.device("cpu"))
    reference = torch.nn.BatchNorm2d(4)
    expected = reference(x[:5])
    for padded in (False, True):
        recorder = layers.Recorder(torch.tensor([1.0, 1, 1, 1, 1, 0]), padded, frozen=False)
        with layers.training(recorder):
            y = layers.batch_norm(layer, x if padded else x[:5])
        assert torch.allclose(y[:5], expected, atol=1e-5)
        mean, var = layer["stats"]["mean"], layer["stats"]["var"]
        assert torch.allclose(recorder.seen[id(mean)], reference.running_mean, atol=1e-6)  # type: ignore[arg-type]
        assert torch.allclose(recorder.seen[id(var)], reference.running_var, atol=1e-6)  # type: ignore[arg-type]
        assert not mean.any()


@pytest.mark.parametrize(
    ("name", "classes", "shape", "norm", "parameters"),
    [
        ("linear", 10, (1, 8, 8), "group", 650),
        ("mlp", 10, (1, 8, 8), "group", 4_810),
        ("small_cnn", 10, (1, 28, 28), "group", 105_866),
        ("fedavg_cnn", 10, (3, 32, 32), "group", 878_538),
        ("resnet8", 10, (3, 32, 32), "batch", 1_227_594),
        ("resnet8", 100, (3, 32, 32), "batch", 1_250_724),
        ("resnet18", 10, (3, 32, 32), "batch", 11_168_832 + 5_130),
        ("resnet34", 100, (3, 32, 32), "group", 21_276_992 + 51_300),
        ("resnet32", 10, (3, 32, 32), "group", 466_906),
        ("resnet56", 10, (3, 32, 32), "group", 855_770),
    ],
)
def test_parameter_counts(name: str, classes: int, shape: tuple[int, int, int], norm: str, parameters: int) -> None:
    model = models.build(name, classes, shape, norm)
    params = model.init(keys.key(0))
    assert sum(leaf.numel() for leaf in tree.flatten(tree.parameters(params)).values()) == parameters
    z = model.features(params["body"], torch.zeros(2, *shape))
    assert z.shape == (2, model.feature_size)
    assert model.logits(params["head"], z).shape == (2, classes)


def test_initial_weights_have_the_stated_spread() -> None:
    params = models.build("resnet8", 10, (3, 32, 32)).init(keys.key(3))
    conv = params["body"]["stage1_1"]["first"]["conv"]["weight"]
    assert float(conv.std()) == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    head = params["head"]["weight"]
    assert float(head.abs().max()) <= 1 / 16
    assert torch.allclose(head.norm(dim=1), torch.tensor(math.sqrt(1 / 3)), rtol=0.1)  # rows of a linear layer


@pytest.mark.parametrize("engine", ["serial", "stacked"])
def test_clipping_bounds_the_step(engine: str) -> None:
    setting = replace(toy.SETTING, rounds=1, epochs=1, batch_size=1000, momentum=0.0, lr=1.0, clip=1e-3)
    run = toy_run(make("fedavg"), engine, setting=setting)
    start = tree.clone(run.progress.server)
    gap = tree.sub(finish(run).progress.server, start)
    assert 0 < math.sqrt(float(tree.dot(gap, gap))) <= 1.001e-3


def test_momentum_can_be_carried_from_round_to_round() -> None:
    run = toy_run(make("fedavg"))
    task, rows = run.task, run.population.index[0]
    x, y = run.population.images.plain(rows), run.population.images.y[rows]
    batches = [Batch(x[i : i + 10], y[i : i + 10], torch.ones(10)) for i in range(0, 40, 10)]
    whole = task.sgd(task.loss, task.init(), batches)
    half, momentum = task.resume_sgd(task.loss, task.init(), batches[:2], None)
    again, _ = task.resume_sgd(task.loss, half, batches[2:], momentum)
    assert same(whole, again)


# Through the command line --------------------------------------------------------------------------------------------


def bench_run(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run `bench run` as a user would, and give its runs by algorithm as it was spelt."""
    command = [sys.executable, "-m", "bench", "run", "--json", "--ray", "off", "--tracking-uri", "off"]
    done = subprocess.run([*command, "--out", str(folder), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {run["call"]: run for run in json.loads(done.stdout)["runs"]}


@pytest.mark.equivalence
def test_degenerate_methods_are_fedavg_through_the_command_line(tmp_path: Path) -> None:
    algorithms = "fedavg,fedprox(mu=0),fedavg_ft(finetune_epochs=0),fedprox"
    runs = bench_run(tmp_path, "--algos", algorithms, "--rounds", "3")
    fedavg = runs.pop("fedavg")
    assert runs.pop("fedprox")["digest"] != fedavg["digest"]
    assert len(runs) == 2
    for run in runs.values():
        assert (run["digest"], run["metrics"]) == (fedavg["digest"], fedavg["metrics"])


def test_fedavg_of_one_client_is_centralised_training_through_the_command_line(tmp_path: Path) -> None:
    runs = bench_run(
        tmp_path, "--algos", "fedavg,centralised", "--clients", "1", "--participation", "1", "--rounds", "3"
    )
    assert runs["fedavg"]["digest"] == runs["centralised"]["digest"]
    assert runs["fedavg"]["metrics"] == runs["centralised"]["metrics"]
