"""Airbench: its rates, schedule, Lookahead and views are those of the code, which sums where we average."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import Tree, keys, models, tree
from bench.contract import toy
from bench.plugins.registry import ALGORITHMS, DATASETS
from bench.protocol.bundles import named
from bench.training.rounds import Run
from tests.by_hand import FEW, method

ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])
PLAIN: dict[str, Any] = {
    "nesterov": False, "bias_scale": 1.0, "smoothing": 0.0, "warmup": 0.0, "start": 1.0, "end": 1.0,
    "lookahead_every": 0, "views": 1,
}  # fmt: skip
SETTING = replace(toy.SETTING, participation=1.0, weight_decay=1e-2, rounds=3, eval_every=3)
STEPS = 476
"""Of the code: 9.9 epochs of 48 whole batches."""


def run_of(engine: str = "serial", setting: Any = SETTING, sizes: tuple[int, ...] = toy.SIZES, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["airbench"](**fields), engine, setting=setting, sizes=sizes)


def recipe(**fields: Any) -> Any:
    return ALGORITHMS["airbench"](**fields)


# Numbers of the code ----------------------------------------------------------------------------------------


def test_the_schedule_is_the_codes() -> None:
    told = {0: 0.2, 54: 0.59633, 109: 1.0, 292: 0.536267, 475: 0.072534}
    found = recipe().factor(torch.tensor([*map(float, told)]), torch.tensor(float(STEPS)))
    assert found.tolist() == pytest.approx([*told.values()], abs=1e-5)
    whole = recipe().factor(torch.arange(STEPS).float(), torch.tensor(float(STEPS)))
    assert int(whole.argmax()) == 109 and (whole[:109].diff() > 0).all() and (whole[109:].diff() < 0).all()
    flat = recipe(warmup=0.0, start=1.0, end=1.0)
    assert flat.factor(torch.arange(7).float(), torch.tensor(7.0)).tolist() == [1.0] * 7
    assert float(recipe().factor(torch.tensor(9.0), torch.tensor(0.0))) == pytest.approx(0.07)  # nobody has examples


def test_the_slow_model_keeps_what_the_codes_does() -> None:
    found = recipe().kept(torch.tensor([5.0, 240.0, 475.0]), torch.tensor(float(STEPS))).tolist()
    assert found == pytest.approx([9.0e-7, 0.0992, 0.7689], rel=6e-3)
    assert found[2] == pytest.approx(0.95**5 * (475 / 476) ** 3, rel=1e-6)


def test_a_step_is_torchs_on_the_sum_over_1024_with_the_codes_two_rates_and_decays() -> None:
    """The rates are of a summed loss there, and both of a decay's factors are said with them."""
    setting, batch = named("airbench", DATASETS["cifar10"]()), 1024
    task = replace(toy.task(recipe()), momentum=setting.momentum, weight_decay=setting.weight_decay)
    drawn = keys.normal(keys.key(1), 5, 3)
    start: Tree = {"body": {"conv": {"weight": drawn[:2]}, "norm": {"weight": drawn[2], "bias": drawn[3]}},
                   "head": {"bias": drawn[4]}}  # fmt: skip
    leaves = {path: torch.nn.Parameter(leaf.clone()) for path, leaf in tree.flatten(start).items()}
    groups = [
        {"params": [leaf for path, leaf in leaves.items() if path != "body/norm/bias"], "lr": 1.464844e-3,
         "weight_decay": 1.362365},
        {"params": [leaves["body/norm/bias"]], "lr": 0.09375, "weight_decay": 0.021287},
    ]  # fmt: skip
    theirs = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    params, velocity = start, tree.zeros_like(start)
    for step in range(12):
        for number, leaf in enumerate(leaves.values()):
            leaf.grad = 20 * keys.normal(keys.fold(keys.key(2), step, number), *leaf.shape)  # of the sum
        mean = {path: leaf.grad / batch for path, leaf in leaves.items() if leaf.grad is not None}
        rate = torch.tensor(setting.lr)
        params, velocity = method(run_of()).descended(task, params, tree.unflatten(mean), velocity, rate)
        theirs.step()
    found = tree.flatten(params)
    for path, leaf in leaves.items():
        torch.testing.assert_close(found[path], leaf.detach(), rtol=1e-5, atol=1e-5)
        assert (leaf.detach() - tree.flatten(start)[path]).abs().max() > 0.02


def by_hand(run: Run) -> Tree:
    """The whole recipe on the toy's network, with torch's SGD on summed losses; all batches are whole."""
    setting, size = run.setting, run.setting.batch_size
    start = run.task.init()
    w = [torch.nn.Parameter(leaf.clone()) for leaf in tree.flatten(start).values()]
    slow = [leaf.detach().clone() for leaf in w]
    decay = setting.weight_decay * size
    optimiser = torch.optim.SGD(w, setting.lr / size, setting.momentum, weight_decay=decay, nesterov=True)
    total, t = setting.rounds * setting.epochs * 3, 0
    for round in range(setting.rounds):
        visit = run.population.pooled_visit(round, {})
        for epoch in range(setting.epochs):
            order = visit.index[keys.permutation(keys.fold(visit.key, f"order  {epoch}"), len(visit.index))]
            for rows in order.split(size):
                peak = math.floor(0.23 * total)
                factor = 0.2 + 0.8 * t / peak if t < peak else 1 - 0.93 * (t - peak) / (total - peak)
                optimiser.param_groups[0]["lr"] = setting.lr / size * factor
                x, y = run.population.images.plain(rows), run.population.images.y[rows]
                logits = F.linear(torch.relu(F.linear(x.flatten(1), *w[:2])), *w[2:])
                optimiser.zero_grad()
                F.cross_entropy(logits, y, reduction="sum", label_smoothing=0.2).backward()
                optimiser.step()
                t += 1
                if t % 5 == 0:
                    kept = 0.95**5 * (t / total) ** 3
                    for mine, fast in zip(slow, w, strict=True):
                        mine.add_(fast.detach() - mine, alpha=1 - kept)
                        fast.data.copy_(mine)
    assert t == total == 18
    return tree.unflatten(dict(zip(tree.flatten(start), slow, strict=True)))


@ENGINES
def test_a_run_is_the_recipe_written_by_hand_with_sums(engine: str) -> None:
    """Eighteen steps: the last three, after which the slow model does not follow, have no part in the result."""
    run = toy.finish(run_of(engine, sizes=(30, 18, *[0] * 6)))
    assert tree.largest_difference(run.progress.server, by_hand(run)) < 2e-5
    assert float(run.store[-1]["steps"]) == 18
    assert tree.largest_difference(run.progress.server, run.task.init()) > 0.01


# What makes it another method -------------------------------------------------------------------------------


@pytest.mark.equivalence
@ENGINES
@pytest.mark.parametrize(
    "fields", [{"rounds": 1}, {"rounds": 1, "clip": 0.5, "decayed": "weights"}, {"participation": 0.5, "momentum": 0.0}]
)
def test_with_all_extras_off_it_is_centralised(engine: str, fields: dict[str, Any]) -> None:
    """Whose momentum starts anew in each round."""
    setting = replace(SETTING, **fields)
    mine = toy.finish(run_of(engine, setting, **PLAIN))
    plain = toy.finish(toy.run(ALGORITHMS["centralised"](), engine, setting=setting))
    assert tree.largest_difference(mine.progress.server, plain.progress.server) < 1e-5
    assert mine.outcome().metrics["generic"] == plain.outcome().metrics["generic"]


@pytest.mark.equivalence
def test_a_slow_model_that_keeps_nothing_is_none() -> None:
    followed, none = (toy.finish(run_of(lookahead=0.0, lookahead_every=every)) for every in (1, 0))
    assert tree.largest_difference(followed.progress.server, none.progress.server) == 0


def test_the_settings_own_schedule_has_no_part_in_it() -> None:
    constant, falling = (toy.finish(run_of(setting=replace(SETTING, lr_cosine=falls))) for falls in (False, True))
    assert tree.largest_difference(constant.progress.server, falling.progress.server) == 0


def test_running_statistics_are_slow_too() -> None:
    setting = replace(SETTING, model="resnet8", norm="batch", epochs=1, rounds=2, lr=0.01, eval_every=2)
    run = toy.finish(run_of(setting=setting, sizes=FEW, lookahead_every=1, lookahead=1.0))
    first, last = (tree.flatten(each)["body/stem/norm/stats/mean"] for each in (run.task.init(), run.progress.server))
    assert torch.equal(last, tree.flatten(run.store[-1]["slow"])["body/stem/norm/stats/mean"])
    fast = toy.finish(run_of(setting=setting, sizes=FEW, lookahead_every=0)).progress.server
    assert 0 < (last - first).abs().max() < (tree.flatten(fast)["body/stem/norm/stats/mean"] - first).abs().max()


# The test ---------------------------------------------------------------------------------------------------


def test_views_are_an_image_its_mirror_image_and_both_shifted_either_way() -> None:
    run = run_of(setting=replace(SETTING, model="linear"))
    model, x = run.task.init(), keys.normal(keys.key(3), 4, 1, 8, 8)
    down, up = [1, *range(7)], [*range(1, 8), 6]  # rows of an image that is moved by one, the border reflected
    straight = {(): 0.25, (0,): 0.125, (1,): 0.125}
    expected = torch.zeros(4, 6)
    for shift, weight in straight.items():
        rows = [down, up][shift[0]] if shift else [*range(8)]
        moved = x[:, :, rows][:, :, :, rows]
        for view in (moved, moved.flip(3)):
            expected += weight * run.task.logits(model, view)
    torch.testing.assert_close(recipe().predict(run.task, model, x), expected)
    pair = (run.task.logits(model, x) + run.task.logits(model, x.flip(3))) / 2
    torch.testing.assert_close(recipe(views=2).predict(run.task, model, x), pair)
    assert torch.equal(recipe(views=1).predict(run.task, model, x), run.task.logits(model, x))


def test_what_is_no_picture_has_one_view() -> None:
    for model, shape in (("frozen", (5, 1, 1)), ("mlp", (3, 2)), ("mlp", (7,))):
        task = replace(toy.task(recipe()), model=models.build(model, 6, shape))
        weights, x = task.init(), keys.normal(keys.key(1), 3, *shape)
        assert torch.equal(recipe().predict(task, weights, x), task.logits(weights, x))
