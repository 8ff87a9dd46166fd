"""Adaptive Smoothing: what is mixed, what it certifies, who trains on what, what switches it off, what it gains."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, keys, tree
from bench.attacks import slope
from bench.contract import toy
from bench.models.layers import Recorder, training
from bench.plugins.registry import ALGORITHMS
from bench.protocol.spelling import parse_algorithms
from bench.training import robustness
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of, done, measured, method

HOSTILE = replace(
    toy.SETTING, momentum=0.9, weight_decay=1e-2, clip=0.5, rounds=2, attack_epsilon=0.1, attack_step=0.03
)
PLAIN = replace(HOSTILE, momentum=0.0, weight_decay=0.0, clip=None, epochs=1)
DEEP = replace(HOSTILE, model="resnet8", norm="batch", rounds=1, epochs=1, augment="crop_flip")
TESTED = replace(HOSTILE, attack="pgd", attack_steps=3, eval_every=2)
smoothing: Any = importlib.import_module("bench.algorithms.smoothing")


def start(setting: Any = HOSTILE, name: str = "smoothing", few: bool = False, **fields: Any) -> Run:
    if name in ("smoothing", "fat"):
        fields = {"steps": 2, **fields}
    sizes = FEW if few or setting.model == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), setting=setting, sizes=sizes)


def first(run: Run, client: int = 0) -> Batch:
    return next(iter(data_of(run, client).batches(1)))


def drawn(run: Run, seed: int) -> Tree:
    """A network with logits far apart."""
    model = run.task.model.init(keys.key(seed))
    return {"body": model["body"], "head": tree.scale(model["head"], 5.0)}


def mixed(run: Run, **more: Tensor) -> Tree:
    """A personal model of two networks that disagree."""
    robust, standard = drawn(run, 3), drawn(run, 4)
    return {**robust, "standard": {key: standard[key] for key in method(run).own}, **more}


def answers(run: Run) -> dict[str, Tensor]:
    return {tally.model: tally.rows for tally in run.progress.predictions}


def recognised(told: Tensor) -> int:
    """Images that are taken for their class."""
    return int(told[2, told[0] == told[1]].sum())


def logits(w: list[Tensor], x: Tensor) -> Tensor:
    """The toy's network, of its leaves in their order."""
    return F.linear(torch.relu(F.linear(x.flatten(1), *w[:2])), *w[2:])


def leaves(model: Tree) -> list[Tensor]:
    return [leaf.clone().requires_grad_() for leaf in tree.flatten(model).values()]


# What is mixed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(0.0, (0.9, 0.1)), (0.5, (0.65, 0.35)), (0.8, (0.5, 0.5)), (0.9, (0.45, 0.55)), (1.0, (0.4, 0.6))],
)
def test_probabilities_are_mixed_and_at_four_fifths_it_is_a_tie(alpha: float, expected: tuple[float, float]) -> None:
    standard, robust = (torch.tensor([each]).log() for each in ((0.9, 0.1), (0.4, 0.6)))
    found = smoothing.mixture(standard + 3, robust - 7, alpha)
    assert found.exp()[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("personal", ["head", "all"])
def test_a_prediction_is_the_logarithm_of_the_mixture_of_scaled_logits(personal: str) -> None:
    run = start(personal=personal, alpha=0.7, scale_standard=2.0, scale_robust=0.5)
    model, x = mixed(run), first(run).x
    task = run.task_at(0)
    own = {"body": model["body"], **model["standard"]}
    g, h = (logits(leaves(each), x) for each in (own, {"body": model["body"], "head": model["head"]}))
    expected = 0.3 * (2 * g).softmax(1) + 0.7 * (0.5 * h).softmax(1)
    found = method(run).predict(task, model, x)
    assert torch.allclose(found.exp(), expected, atol=1e-6) and len(found.argmax(1).unique()) > 1
    assert not torch.allclose(task.logits(own, x), task.logits(model, x), atol=0.5)
    for alpha, expected in ((0.0, 2 * g), (1.0, 0.5 * h)):
        found = replace(method(run), alpha=alpha).predict(task, model, x)
        assert torch.allclose(found.softmax(1), expected.softmax(1), atol=1e-6)
    generic = method(run).global_model(task, run.progress.server)
    assert torch.equal(method(run).predict(task, generic, x), task.logits(run.progress.server, x))


@pytest.mark.parametrize("alpha", [0.3, 0.51, 0.6, 0.8, 0.97])
def test_where_it_is_certified_nothing_that_the_standard_part_says_matters_and_elsewhere_something_does(
    alpha: float,
) -> None:
    key, n = keys.key(11), 1000
    sure = 10 ** (2 * keys.uniform(keys.fold(key, "sure"), n, 1))
    robust, standard = (
        sure * keys.normal(keys.fold(key, part), n, 4).log_softmax(1) for part in ("robust", "standard")
    )
    favoured, runner_up = robust.topk(2, 1).indices.unbind(1)
    found = smoothing.certified(robust.softmax(1), alpha)
    against = 60.0 * F.one_hot(runner_up, 4)
    for said in (standard, 60.0 * F.one_hot(standard.argmax(1), 4), against):
        taken = smoothing.mixture(said, robust, alpha).argmax(1)
        assert torch.equal(taken[found], favoured[found])
    assert not (smoothing.mixture(against, robust, alpha).argmax(1) == favoured)[~found].any()
    assert (0 < int(found.sum()) < n) == (alpha > 0.5) and not smoothing.certified(robust.softmax(1), 0.5).any()
    assert smoothing.certified(torch.tensor([[0.5, 0.24, 0.26], [0.626, 0.374, 0.0]]), 0.8).tolist() == [False, True]


@pytest.mark.parametrize("personal", ["head", "all"])
def test_the_slope_of_an_attack_is_that_of_the_mixture_and_goes_through_both_parts(personal: str) -> None:
    run = start(personal=personal, alpha=0.6)
    task, batch, model = run.task_at(0), first(run), mixed(run)

    def steepest(alpha: float) -> Tensor:
        by = replace(method(run), alpha=alpha)
        return slope(lambda x: F.cross_entropy(by.predict(task, model, x), batch.y), batch.x)

    x = batch.x.clone().requires_grad_()
    own = {"body": model["body"], **model["standard"]}
    g, h = (logits(leaves(each), x).softmax(1) for each in (own, {"body": model["body"], "head": model["head"]}))
    (expected,) = torch.autograd.grad(F.nll_loss((0.4 * g + 0.6 * h).log(), batch.y), x)
    assert torch.allclose(steepest(0.6), expected, atol=1e-6)
    for part in (0.0, 1.0):
        assert float((steepest(part).sign() != expected.sign()).float().mean()) > 0.05


def test_a_test_attacks_the_mixture_as_it_predicts() -> None:
    run = toy.finish(start(TESTED))
    task, population = run.task_at(1), run.population
    found, rows = answers(run)["personal.robust"], population.attacked[0]
    model = toy.tested_models(run, 0)["personal"]
    assert task.ball is not None and len(rows) <= 128
    x, y, own = population.test.plain(rows), population.test.y[rows], keys.fold(keys.fold(task.key, "attack"), rows)
    under = robustness.by_pgd(lambda x: method(run).predict(task, model, x), x, y, task.ball, 3, own)
    assert 0 < int((under == y).sum()) == recognised(found[1:4, found[0] == 0]) < len(y)


# What switches it off -------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [HOSTILE, DEEP], ids=["mlp", "resnet8, batch norm"])
@pytest.mark.parametrize("personal", ["head", "all"])
def test_whatever_is_a_clients_own_the_generic_model_is_fats(personal: str, setting: Any) -> None:
    run, fat = done(start(setting, personal=personal, steps=1)), done(start(setting, "fat", steps=1))
    assert largest_difference(run.progress.server, fat.progress.server) == 0.0
    for what in ("bytes_up", "bytes_down", "train_samples"):
        assert run.progress.cost[what] == fat.progress.cost[what]


@pytest.mark.equivalence
def test_with_a_share_of_one_each_client_answers_as_fats_generic_model_under_attack_too() -> None:
    run, fat = toy.finish(start(TESTED, alpha=1.0)), toy.finish(start(TESTED, "fat"))
    found, expected = answers(run), answers(fat)
    for kind in ("personal", "personal.robust", "generic", "generic.robust"):
        assert torch.equal(found[kind], expected[kind])
    assert torch.equal(found["personal:robust"], expected["personal"])
    assert not torch.equal(found["personal"], found["personal:standard"])


@pytest.mark.equivalence
def test_with_a_share_of_nothing_each_client_has_its_standard_part() -> None:
    run = toy.finish(start(TESTED, alpha=0.0))
    found = answers(run)
    assert torch.equal(found["personal"], found["personal:standard"])
    assert not torch.equal(found["personal"], found["personal:robust"])


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [HOSTILE, DEEP], ids=["mlp", "resnet8, batch norm"])
def test_a_whole_standard_model_is_what_the_client_would_train_alone(setting: Any) -> None:
    run, local = done(start(setting, personal="all", steps=0)), done(start(setting, "local"))
    assert run.store.clients() == local.store.clients()
    for client in run.store.clients():
        assert largest_difference(run.store[client]["standard"], local.store[client]) == 0.0


def test_where_both_parts_are_one_it_is_either_whatever_the_share() -> None:
    run = start()
    model, x = mixed(run), first(run).x
    alike = {**model, "standard": {"head": model["head"]}}
    task = run.task_at(0)
    for alpha in (0.0, 0.3, 0.8, 1.0):
        found = replace(method(run), alpha=alpha).predict(task, alike, x)
        assert torch.allclose(found.log_softmax(1), task.logits(model, x).log_softmax(1), atol=1e-5)


# Who trains on what ---------------------------------------------------------------------------------------------------


def test_a_standard_head_follows_images_as_they_are_on_a_body_that_follows_attacked_ones() -> None:
    run = start(PLAIN, steps=3)
    task, data = run.task_at(0), data_of(run, 0)
    w, head = leaves(run.progress.server), leaves(run.store.initial["standard"]["head"])
    for batch in data.batches(1):
        model = tree.unflatten(dict(zip(tree.flatten(run.progress.server), (p.detach() for p in w), strict=True)))
        hard = method(run).attacked(task, model, batch)
        assert float((hard - batch.x).abs().max()) > 0.2
        z = torch.relu(F.linear(batch.x.flatten(1), *w[:2])).detach()
        value = F.cross_entropy(logits(w, hard), batch.y) + F.cross_entropy(F.linear(z, *head), batch.y)
        both = zip([*w, *head], torch.autograd.grad(value, [*w, *head]), strict=True)
        moved = [(leaf - run.setting.lr * along).detach().requires_grad_() for leaf, along in both]
        w, head = moved[:4], moved[4:]
    upload, kept = toy.upload_once(run)
    for found, by_hand in ((upload, w), (kept, head)):
        for leaf, expected in zip(tree.flatten(found).values(), by_hand, strict=True):
            assert torch.allclose(leaf, expected.detach(), atol=2e-6)
    assert kept.keys() == {"standard"} and kept["standard"].keys() == {"head"}
    assert largest_difference(kept["standard"]["head"], upload["head"]) > 1e-3


@pytest.mark.parametrize("personal", ["head", "all"])
def test_long_slopes_of_a_standard_part_do_not_shorten_those_of_the_robust_model(personal: str) -> None:
    run = start(replace(HOSTILE, clip=0.05), personal=personal)
    usual, _ = toy.upload_once(run)
    far = {"standard": tree.scale(run.store.initial["standard"], 30.0)}
    run.store[0] = far
    upload, kept = toy.upload_once(run)
    assert largest_difference(upload, usual) == 0.0 and largest_difference(kept, far) > 1e-3


@pytest.mark.parametrize("personal", ["head", "all"])
def test_a_robust_body_is_looked_at_in_evaluation_mode_and_a_body_of_its_own_trains(personal: str) -> None:
    run = start(DEEP, personal=personal)
    task, batch = run.task_at(0), first(run)
    model = {**run.progress.server, **run.store.initial}
    moving = tree.map(lambda leaf: leaf.clone().requires_grad_(leaf.is_floating_point()), model)
    recorder = Recorder(batch.weight, False, False)
    with training(recorder):
        loss = method(run).standard_loss(task, moving, data_of(run, 0), batch)
    assert bool(recorder.seen) == (personal == "all")
    loss.backward()
    reached = {path for path, leaf in tree.flatten(moving).items() if leaf.grad is not None and leaf.grad.any()}
    assert reached and all(path.startswith("standard/") for path in reached)


@pytest.mark.parametrize("personal", ["head", "all"])
def test_a_loss_part_stands_in_both_losses(personal: str) -> None:
    once = replace(PLAIN, batch_size=64)  # of one step, so that no part sees what the other's loss has done
    (algorithm,) = parse_algorithms(f"smoothing(steps=1, personal='{personal}')+focal(gamma=3)")
    composed, plain = toy.run(algorithm, setting=once), start(once, steps=1, personal=personal)
    for found, usual in zip(toy.upload_once(composed), toy.upload_once(plain), strict=True):
        assert largest_difference(found, usual) > 1e-4


def test_a_client_that_never_took_part_predicts_as_the_generic_model_and_one_held_out_trains_its_standard_part() -> (
    None
):
    setting = replace(HOSTILE, participation=0.15, rounds=1, unseen=2)
    run = done(start(setting))
    new = next(k for k in range(6) if k not in run.store.clients())
    task, server = run.task_at(0), run.progress.server
    x = first(run).x
    model = toy.tested_models(run, new)["personal"]
    assert largest_difference(model["standard"]["head"], server["head"]) == 0.0
    assert torch.equal(method(run).predict(task, model, x).argmax(1), task.logits(server, x).argmax(1))
    held = toy.tested_models(run, 7)["unseen"]
    for key in ("body", "head"):
        assert largest_difference(held[key], server[key]) == 0.0
    assert largest_difference(held["standard"]["head"], server["head"]) > 1e-2
    other = toy.tested_models(done(start(setting, alpha=0.1)), 7)["unseen"]
    assert largest_difference(other, held) == 0.0  # the share has no part in it
    one = start(setting, personal="all")
    assert one.algorithm.newcomer(task, server, data_of(run, 7))["standard"].keys() == {"body", "head"}


# A share that follows the image ---------------------------------------------------------------------------------------


def test_an_adaptive_share_lies_between_alpha_and_one_and_its_slope_is_always_defined() -> None:
    standard, robust = keys.normal(keys.key(1), 5, 6), keys.normal(keys.key(2), 5, 6)
    doubt = torch.tensor([-400.0, -1.0, 0.0, 2.0, 400.0])
    for alpha in (0.0, 0.6, 1.0):
        share = (alpha + (1 - alpha) * doubt.sigmoid())[:, None]
        expected = (1 - share) * standard.softmax(1) + share * robust.softmax(1)
        u = doubt.clone().requires_grad_()
        found = smoothing.mixture(standard, robust, alpha, u)
        assert torch.allclose(found.exp(), expected, atol=1e-6)
        (by,) = torch.autograd.grad(found[:, 0].sum(), u)
        assert by.isfinite().all() and bool(by[1:4].all()) == (alpha < 1)


def test_what_a_share_hangs_on_is_how_sure_both_parts_are() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.1, 0.8, 0.1]])
    found = smoothing.sureness(*(each.log() for each in probabilities))
    assert found[0].tolist() == pytest.approx([0.25, 1.0397208, 0.7, 0.6390319], abs=1e-6)
    rule = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.5])
    doubt = smoothing.doubt(*(each.log() for each in probabilities), rule)
    assert float(doubt) == pytest.approx(0.25 - 2 * 1.0397208 + 2.1 - 4 * 0.6390319 + 0.5, abs=1e-5)


def test_a_rule_is_a_logistic_fitted_to_numbers_of_mean_0_and_deviation_1() -> None:
    found, under = keys.normal(keys.key(5), 400, 4) * torch.tensor([1.0, 0.1, 3.0, 2.0]) + 4, torch.zeros(400)
    under[found[:, 0] - 10 * found[:, 1] + keys.normal(keys.key(6), 400) > -36] = 1.0
    rule = smoothing.fitted(found, under)
    standing = (found - found.mean(0)) / found.std(0, correction=0)
    w = (rule[:4] * found.std(0, correction=0)).requires_grad_()
    b = (rule[4] + rule[:4] @ found.mean(0)).detach().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(standing @ w + b, under) + 0.005 * (w @ w + b * b)
    loss.backward()
    assert w.grad is not None and b.grad is not None
    assert float(w.grad.abs().max()) < 1e-4 and abs(float(b.grad)) < 1e-4
    told = (found @ rule[:4] + rule[4] > 0) == (under > 0)
    assert float(told.float().mean()) > 0.8 and rule[0] > 0.5 > -5 > rule[1]
    assert smoothing.fitted(found[:0], under[:0]).tolist() == 5 * [0.0]


def test_a_client_fits_its_rule_to_its_images_and_the_same_attacked_and_asks_no_label() -> None:
    run = done(start(adaptive=True, steps=3))
    task, data = run.task_at(1), data_of(run, 0, 1)
    model = toy.tested_models(run, 0)["personal"]
    assert model["rule"].shape == (5,) and model["rule"].dtype == torch.float32
    assert "rule" not in run.store[0] and "rule" not in toy.upload_once(run)[0]
    known, unknown = (method(run).rule(task, model, each) for each in (data, data.unlabelled()))
    assert torch.equal(known, unknown) and known.any()
    (batch,) = data.plain_batches()
    half = {**model, "rule": torch.zeros(5)}
    by = method(run).predict(task, half, batch.x)
    assert torch.allclose(by.exp(), smoothing.mixture(*method(run).scores(task, half, batch.x), 0.9).exp(), atol=1e-6)
    hard = method(run).attacked(task, half, replace(batch, y=by.argmax(1)))
    found = [smoothing.sureness(*method(run).scores(task, model, x)) for x in (batch.x, hard)]
    expected = smoothing.fitted(torch.cat(found), torch.arange(2.0).repeat_interleave(len(batch.x)))
    assert torch.allclose(known, expected, atol=1e-4)
    odds = [each @ known[:4] + known[4] for each in found]
    assert float(odds[1].mean()) > float(odds[0].mean()) + 0.05
    empty = toy.tested_models(run, toy.SIZES.index(0))["personal"]
    assert empty["rule"].tolist() == 5 * [0.0]


def test_an_attack_goes_through_the_rule() -> None:
    run = start(adaptive=True, alpha=0.2)
    model = mixed(run, rule=torch.tensor([3.0, 1.0, -4.0, 1.0, 0.0]))
    task, batch = run.task_at(0), first(run)
    by = method(run).predict
    told = smoothing.doubt(*method(run).scores(task, model, batch.x), model["rule"])

    def held(x: Tensor) -> Tensor:
        mixture: Tensor = smoothing.mixture(*method(run).scores(task, model, x), 0.2, told)
        return F.cross_entropy(mixture, batch.y)

    through = slope(lambda x: F.cross_entropy(by(task, model, x), batch.y), batch.x)
    past = slope(held, batch.x)
    assert torch.allclose(by(task, model, batch.x), smoothing.mixture(
        *method(run).scores(task, model, batch.x), 0.2, told))  # fmt: skip
    assert float((through.sign() != past.sign()).float().mean()) > 0.02


# What it costs, and is worth ------------------------------------------------------------------------------------------


def test_the_standard_part_costs_a_pass_more_and_a_rule_what_it_attacks() -> None:
    once = replace(PLAIN, rounds=1)

    def cost(name: str = "smoothing", **fields: Any) -> float:
        return done(start(once, name, few=True, **fields)).progress.cost["train_flops"]

    fedavg, fat, head, whole = cost("fedavg"), cost("fat"), cost(), cost(personal="all")
    assert 0.3 < (head - fat) / fedavg < 0.7 and (whole - fat) / fedavg == pytest.approx(1.0, rel=0.02)
    assert cost(steps=10) > 10 * fedavg
    few, many, none = (
        toy.finish(start(once, few=True, **fields)).progress.cost
        for fields in ({"adaptive": True}, {"adaptive": True, "steps": 10}, {})
    )
    assert few["adaptation_samples"] == pytest.approx(sum(FEW) / 3) and none["adaptation_samples"] == 0.0
    assert many["adaptation_flops"] > 2.5 * few["adaptation_flops"] > 0


@pytest.mark.parametrize("personal", ["head", "all"])
def test_it_is_as_accurate_as_its_robust_part_and_withstands_what_its_standard_part_does_not(personal: str) -> None:
    setting = replace(toy.SETTING, participation=1.0, eval_every=4, attack_epsilon=0.15, attack_step=0.0375)
    setting = replace(setting, attack="pgd", attack_steps=10, attack_images=90)
    run = toy.finish(start(setting, personal=personal, steps=10))
    assert measured(run, "personal") > measured(run, "personal:robust") + 0.05
    other, task, server = start(setting, personal=personal, alpha=0.0), run.task_at(3), run.progress.server
    standard = other.evaluator.personal(task, server, run.store, range(8), True)["personal.robust"]
    assert recognised(answers(run)["personal.robust"][1:4]) > recognised(torch.cat(standard, 1)) + 5
