"""Federated adversarial training: what clients train on, what switches it off, and what it is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, keys, losses, tree
from bench.attacks import divergences
from bench.contract import toy
from bench.models.layers import Recorder, training
from bench.plugins.registry import ALGORITHMS
from bench.protocol.settings import BadConfig
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of, done, measured
from tests.test_config import sweep

HOSTILE = replace(
    toy.SETTING, momentum=0.9, weight_decay=1e-2, clip=0.5, rounds=2, attack_epsilon=0.1, attack_step=0.03
)
DEEP = replace(HOSTILE, model="resnet8", norm="batch", rounds=1, epochs=1, augment="crop_flip")


def start(setting: Any = HOSTILE, name: str = "fat", engine: str = "serial", **fields: Any) -> Run:
    sizes = FEW if setting.model == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), engine, setting=setting, sizes=sizes)


def method(run: Run) -> Any:
    return run.algorithm


def first(run: Run, client: int = 0) -> Batch:
    return next(iter(data_of(run, client).batches(1)))


def logits(w: list[Tensor], x: Tensor) -> Tensor:
    """The toy's network, of its leaves in their order."""
    return F.linear(torch.relu(F.linear(x.flatten(1), *w[:2])), *w[2:])


def leaves(model: Tree) -> list[Tensor]:
    return [leaf.clone().requires_grad_() for leaf in tree.flatten(model).values()]


NONE = torch.zeros(6)

# What switches it off -------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [HOSTILE, DEEP], ids=["mlp", "resnet8, batch norm"])
@pytest.mark.parametrize(
    ("epsilon", "fields"),
    [
        (0.0, {}),
        (0.1, {"steps": 0}),
        (0.1, {"objective": "trades", "beta": 0.0}),
        (0.1, {"objective": "trades", "steps": 0}),
    ],
)
def test_without_an_attack_it_is_fedavg(epsilon: float, fields: dict[str, Any], setting: Any) -> None:
    run = done(start(replace(setting, attack_epsilon=epsilon), engine="stacked", **fields))  # which runs one by one
    fedavg = done(start(setting, "fedavg"))
    assert largest_difference(run.progress.server, fedavg.progress.server) == 0.0
    assert run.progress.cost["train_samples"] == fedavg.progress.cost["train_samples"]


@pytest.mark.equivalence
def test_where_classes_are_equally_frequent_calibration_is_immaterial() -> None:
    batch = Batch(keys.normal(keys.key(1), 12, 1, 8, 8), torch.arange(12) % 6, torch.ones(12))
    run = start()
    task, model = run.task_at(0), run.progress.server
    plain = method(run).attacked_loss(task, model, batch, NONE)
    alike = method(run).attacked_loss(task, model, batch, torch.full((6,), 7.0).log())
    apart = method(run).attacked_loss(task, model, batch, torch.tensor([90.0, 7, 7, 7, 7, 0.1]).log())
    assert float(alike) == pytest.approx(float(plain), rel=1e-5) and abs(float(apart - plain)) > 0.1


# What clients train on ------------------------------------------------------------------------------------------------


def test_a_step_follows_the_slope_at_images_that_ten_steps_uphill_have_made() -> None:
    setting = replace(HOSTILE, clip=None, momentum=0.0, weight_decay=0.0, batch_size=64, epochs=1)
    run = start(setting)
    task, batch = run.task_at(0), first(run)
    assert task.ball is not None
    w = leaves(run.progress.server)
    epsilon, step, (low, high) = 0.1 / 0.2, 0.03 / 0.2, (-2.5, 2.5)
    x = task.ball.anywhere(batch.x, keys.fold(batch.keys, "attack"))
    assert float((x - batch.x).abs().max()) > 0.8 * epsilon
    for _ in range(10):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(logits(w, x), batch.y), x)
        x = (x + step * slope.sign()).detach().clamp(batch.x - epsilon, batch.x + epsilon).clamp(low, high)
    F.cross_entropy(logits(w, x), batch.y).backward()
    expected = [leaf.detach() - task.lr * leaf.grad for leaf in w if leaf.grad is not None]
    upload, _ = toy.upload_once(run)
    for found, leaf, before in zip(tree.flatten(upload).values(), expected, w, strict=True):
        assert torch.allclose(found, leaf, atol=2e-6) and not torch.allclose(found, before, atol=1e-4)


def test_trades_adds_how_far_attacked_images_are_from_what_they_were_taken_for() -> None:
    run = start(objective="trades")
    task, batch = run.task_at(0), first(run)
    model = run.progress.server
    hard = method(run).attacked(task, model, batch, NONE)
    w = leaves(model)
    p, q = logits(w, batch.x).softmax(1), logits(w, hard).softmax(1)
    expected = F.cross_entropy(logits(w, batch.x), batch.y) + 6 * F.kl_div(q.log(), p, reduction="batchmean")
    expected.backward()
    moving = tree.map(lambda leaf: leaf.clone().requires_grad_(), model)
    found = method(run).attacked_loss(task, moving, batch, NONE)
    found.backward()
    assert torch.allclose(found, expected, rtol=1e-5)
    for own, leaf in zip(tree.flatten(moving).values(), w, strict=True):
        assert own.grad is not None and leaf.grad is not None and torch.allclose(own.grad, leaf.grad, atol=1e-5)
    plain, under = (task.logits(model, x).detach() for x in (batch.x, hard))
    gained = [float(divergences(plain, logits).sum()) for logits in (under, plain)]
    assert gained[0] > 0.01 and abs(gained[1]) < 1e-6


def test_trades_starts_beside_each_image_and_adversarial_training_anywhere_in_the_ball() -> None:
    far = []
    for objective in ("at", "trades"):
        run = start(objective=objective, steps=1)
        batch = first(run)
        far.append((method(run).attacked(run.task_at(0), run.progress.server, batch, NONE) - batch.x).abs())
    step = 0.03 / 0.2
    assert float(far[1].max()) < step + 0.03 < 2 * step < float(far[0].max())
    assert float((far[1] / step - 1).abs().median()) > 1e-3  # where it is flat at the image itself


def test_calibrated_logits_are_attacked_as_they_are_and_fitted_ten_times_as_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = start(calibration=0.1, scale=10.0, steps=1)
    task, model = run.task_at(0), run.progress.server
    data, batch = data_of(run, 0), first(run)
    shift = 0.1 * (data.class_counts + 1e-7).log()
    assert float(shift.min()) == pytest.approx(-1.6118, abs=1e-3)  # of a class that the client does not have
    hard = method(run).attacked(task, model, batch, shift)
    assert task.ball is not None
    by = [
        task.ball.ascended(
            lambda x, scale=scale: F.cross_entropy(scale * (task.logits(model, x) + shift), batch.y),  # type: ignore[misc]
            batch.x, task.ball.anywhere(batch.x, keys.fold(batch.keys, "attack")), 1,
        )
        for scale in (1.0, 10.0)
    ]  # fmt: skip
    assert torch.equal(hard, by[0]) and not torch.equal(hard, by[1])
    found = method(run).attacked_loss(task, model, batch, shift)
    expected = losses.cross_entropy(10 * (task.logits(model, hard) + shift), batch)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    plain = start(steps=1)
    both = [toy.upload_once(each)[0] for each in (run, plain)]
    assert largest_difference(*both) > 1e-3
    given: list[Tensor] = []

    def noted(self: Any, task: Any, params: Tree, batch: Batch, shift: Tensor) -> Tensor:
        given.append(shift)
        loss: Tensor = task.loss(params, batch)
        return loss

    monkeypatch.setattr(type(run.algorithm), "attacked_loss", noted)
    toy.upload_once(run)
    assert given and all(torch.equal(each, shift) for each in given)


@pytest.mark.parametrize("objective", ["at", "trades"])
def test_a_model_that_is_attacked_is_in_evaluation_mode_and_moves_no_statistic(objective: str) -> None:
    run = start(DEEP, objective=objective, steps=2)
    task, model, batch = run.task_at(0), run.progress.server, first(run)
    outside = method(run).attacked(task, model, batch, NONE)
    recorder = Recorder(batch.weight, False, False)
    with training(recorder):
        inside = method(run).attacked(task, model, batch, NONE)
    assert torch.equal(outside, inside) and not recorder.seen
    trained, _ = toy.upload_once(run)
    before, after = tree.flatten(model), tree.flatten(trained)
    assert all(not torch.equal(before[path], after[path]) for path in before if tree.is_statistic(path))


def test_what_is_made_of_an_image_hangs_on_its_place_in_the_stream_alone() -> None:
    run = start()
    task, model, batch = run.task_at(0), run.progress.server, first(run)
    whole = method(run).attacked(task, model, batch, NONE)
    half = next(batch.parts(8))
    assert torch.allclose(method(run).attacked(task, model, half, NONE), whole[:8], atol=1e-6)
    assert not torch.equal(method(run).attacked(task, model, replace(batch, key=keys.key(5)), NONE), whole)


# What it costs, and is worth ------------------------------------------------------------------------------------------


def test_all_passes_of_an_attack_are_counted_as_operations() -> None:
    runs = (start(name="fedavg"), start(steps=10), start(steps=20))
    fedavg, ten, twenty = (done(run).progress.cost["train_flops"] for run in runs)
    assert (twenty - ten) / (ten - fedavg) == pytest.approx(1.0, rel=0.02) and ten > 8 * fedavg


def test_it_withstands_what_fedavg_does_not_and_pays_for_it() -> None:
    setting = replace(toy.SETTING, rounds=12, eval_every=12, attack="pgd", attack_epsilon=0.15, attack_step=0.04)
    found = [toy.finish(start(setting, name)) for name in ("fat", "fedavg")]
    robust = [measured(run, "generic.robust") for run in found]
    assert robust[0] > robust[1] + 0.1 and measured(found[0], "generic") > 0.7
    assert measured(found[0], "personal.robust") > measured(found[1], "personal.robust")


def test_examples_without_pixels_are_refused(tmp_path: Path) -> None:
    file, floats = tmp_path / "table.npz", np.random.RandomState(0).rand(30, 5).astype(np.float32)
    np.savez(file, train_x=floats, train_y=np.arange(30) % 3, test_x=floats, test_y=np.arange(30) % 3)
    with pytest.raises(BadConfig, match="fat needs examples that are made of pixels, which it attacks, and those of"):
        sweep("fat", f"arrays(path='{file}')").expand()
