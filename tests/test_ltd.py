"""LTD: what a teacher makes of labels, who trains when and what stands still, what switches it off, what it gains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, keys, losses, tree
from bench.attacks import divergences
from bench.contract import toy
from bench.models.layers import Recorder, training
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of, done, measured, method

HOSTILE = replace(
    toy.SETTING, momentum=0.9, weight_decay=1e-2, clip=0.5, rounds=2, attack_epsilon=0.1, attack_step=0.03
)
PLAIN = replace(HOSTILE, momentum=0.0, weight_decay=0.0, clip=None, epochs=1)
DEEP = replace(HOSTILE, model="resnet8", norm="batch", rounds=2, epochs=1, augment="crop_flip")
AT_ONCE: dict[str, Any] = {"teacher_rounds": 0.0}
"""The student trains from the first round on."""
NOWHERE = -1e4
"""A logit of what is not there."""


def start(setting: Any = HOSTILE, name: str = "ltd", **fields: Any) -> Run:
    sizes = FEW if setting.model == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), setting=setting, sizes=sizes)


def first(run: Run, client: int = 0) -> Batch:
    return next(iter(data_of(run, client).batches(1)))


def saying(run: Run, *logits: float) -> Tree:
    """A model that says the same of every image."""
    model = run.task.init()
    said = torch.tensor([*logits, *[NOWHERE] * (6 - len(logits))])
    return {"body": model["body"], "head": {"weight": 0 * model["head"]["weight"], "bias": said}}


def taught(run: Run, seed: int = 3) -> Run:
    """The same run, whose teacher is another network, with logits far apart."""
    drawn = run.task.model.init(keys.key(seed))
    run.progress.server = {**run.progress.server, "teacher": tree.scale(drawn, 2.0)}
    return run


def student(server: Tree) -> Tree:
    return {key: server[key] for key in ("body", "head")}


# Soft labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (0.5, (0.866813, 0.117310, 0.015876)),
        (1.0, (0.665241, 0.244728, 0.090031)),
        (5.0, (0.401760, 0.328933, 0.269307)),
    ],
)
def test_labels_are_the_teachers_logits_over_the_temperature(temperature: float, expected: tuple[float, ...]) -> None:
    run = start(temperature=temperature)
    soft = method(run).softened(run.task_at(0), saying(run, 2.0, 1.0, 0.0), first(run).x)
    assert soft.shape == (16, 6) and soft.dtype == torch.float32 and not soft.requires_grad
    assert soft[0].tolist() == pytest.approx([*expected, 0.0, 0.0, 0.0], abs=1e-6)


def test_the_students_logits_have_no_temperature() -> None:
    run = start(steps=0)
    task, batch = run.task_at(0), first(run)
    soft = method(run).softened(task, saying(run, 2.0, 1.0, 0.0), batch.x)
    found = method(run).distilled(task, saying(run, 0.0, 1.0, 2.0), batch, soft)
    entropy = -float(soft[0, :3] @ soft[0, :3].log())
    assert float(found) == pytest.approx(1.540058, abs=1e-5) and float(found) - entropy == pytest.approx(
        0.454647, abs=1e-5
    )


def test_the_temperature_is_in_labels_alone_and_no_prediction_knows_it() -> None:
    setting = replace(HOSTILE, attack="pgd", attack_images=60, attack_steps=2)
    run = toy.finish(start(setting, steps=1))
    other = toy.finish(toy.run(ALGORITHMS["ltd"](steps=1, temperature=50.0), setting=replace(setting, rounds=1)))
    other.progress.server = run.progress.server
    task, last = other.task_at(0), run.task_at(1)
    found = other.evaluator.generic(task, other.progress.server, True)
    expected = run.evaluator.generic(last, run.progress.server, True)
    assert found.keys() == expected.keys() and "generic.robust" in found
    assert all(torch.equal(a, b) for kind in found for a, b in zip(found[kind], expected[kind], strict=True))


# Who trains when ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "rounds", "begins"), [(0.4, 50, 20), (0.07, 100, 7), (0.0, 9, 0), (1.0, 9, 9), (0.4, 2, 1)]
)
def test_the_teacher_trains_for_its_share_of_the_rounds_exactly(share: float, rounds: int, begins: int) -> None:
    run = start(replace(HOSTILE, rounds=rounds), teacher_rounds=share)
    assert method(run).begins(run.task) == begins
    phases = [method(run).exchanges(run.task_at(r))[0].phase for r in range(rounds)]
    assert phases == begins * ["teacher"] + (rounds - begins) * ["student"]


@pytest.mark.equivalence
@pytest.mark.parametrize("setting", [HOSTILE, DEEP], ids=["mlp", "resnet8, batch norm"])
def test_at_first_it_is_fedavg_of_the_teacher_and_the_student_stays_as_it_was_drawn(setting: Any) -> None:
    run, fedavg = done(start(setting, teacher_rounds=1.0)), done(start(setting, "fedavg"))
    server = run.progress.server
    assert largest_difference(server["teacher"], fedavg.progress.server) == 0.0
    assert largest_difference(student(server), run.task.init()) == 0.0
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"]
    assert run.progress.cost["train_flops"] == fedavg.progress.cost["train_flops"]


@pytest.mark.parametrize("setting", [replace(HOSTILE, rounds=3), DEEP], ids=["mlp", "resnet8, batch norm"])
def test_then_no_bit_of_the_teacher_moves_and_none_of_it_goes_up(setting: Any) -> None:
    run = start(setting, steps=1, beta=1.0)
    first, between = [run.progress.server for _ in toy.trips(run)]
    last, begins = run.progress.server, method(run).begins(run.task)
    assert largest_difference(between["teacher"], last["teacher"]) == 0.0
    assert largest_difference(first["teacher"], between["teacher"]) > 1e-4
    assert largest_difference(student(first), student(between)) == 0.0
    before, after = (tree.flatten(student(state)) for state in (between, last))
    assert all(not torch.equal(before[path], after[path]) for path in before)  # running statistics too
    sent = [toy.upload_once(run, 0, run.task_at(r))[0] for r in (0, begins)]
    assert {key for key in sent[0] if sent[0][key]} == {"teacher"}
    assert {key for key in sent[1] if sent[1][key]} == {"body", "head"} and sent[0].keys() == sent[1].keys()


@pytest.mark.equivalence
def test_with_a_personal_teacher_its_head_stays_with_the_client_as_of_fedper() -> None:
    run, fedper = (
        done(start(name=name, **fields))
        for name, fields in (("ltd", {"personal_teacher": True, "teacher_rounds": 1.0}), ("fedper", {}))
    )
    assert run.progress.server["teacher"].keys() == {"body"}
    assert largest_difference(run.progress.server["teacher"]["body"], fedper.progress.server["body"]) == 0.0
    assert run.store.clients() == fedper.store.clients()
    assert all(largest_difference(run.store[k]["teacher"], fedper.store[k]) == 0.0 for k in run.store.clients())


def test_soft_labels_follow_the_client_whose_head_the_teacher_has() -> None:
    run = taught(start(personal_teacher=True, steps=1, **AT_ONCE))
    body = {"body": run.progress.server["teacher"]["body"]}
    run.progress.server["teacher"] = body
    uploads = []
    for seed in (4, 5):
        own = {"teacher": {"head": run.task.model.init(keys.key(seed))["head"]}}
        run.store[0] = own
        upload, kept = toy.upload_once(run)
        assert largest_difference(kept, own) == 0.0 and upload["teacher"] == {}
        uploads.append(student(upload))
        (variant,) = method(run).personal_variants(run.task, run.progress.server, own, data_of(run, 0)).values()
        assert largest_difference(variant, {**body, **own["teacher"]}) == 0.0
    assert largest_difference(*uploads) > 1e-4 and method(run).global_variants(run.task, run.progress.server) == {}


# What the student trains on -------------------------------------------------------------------------------------------


def logits(w: list[Tensor], x: Tensor) -> Tensor:
    """The toy's network, of its leaves in their order."""
    return F.linear(torch.relu(F.linear(x.flatten(1), *w[:2])), *w[2:])


def leaves(model: Tree) -> list[Tensor]:
    return [leaf.clone().requires_grad_() for leaf in tree.flatten(model).values()]


def test_a_step_follows_soft_labels_of_images_as_they_are_at_images_that_ten_steps_uphill_have_made() -> None:
    run = taught(start(replace(PLAIN, batch_size=64), temperature=2.0, **AT_ONCE))
    task, batch = run.task_at(0), first(run)
    assert task.ball is not None
    w, epsilon, step = leaves(student(run.progress.server)), 0.1 / 0.2, 0.03 / 0.2
    soft = (logits(leaves(run.progress.server["teacher"]), batch.x) / 2).softmax(1).detach()
    x = task.ball.anywhere(batch.x, keys.fold(batch.keys, "attack"))
    for _ in range(10):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(logits(w, x), soft), x)
        x = (x + step * slope.sign()).detach().clamp(batch.x - epsilon, batch.x + epsilon).clamp(-2.5, 2.5)
    F.cross_entropy(logits(w, x), soft).backward()
    upload = tree.flatten(student(toy.upload_once(run)[0])).values()
    for found, leaf in zip(upload, w, strict=True):
        assert leaf.grad is not None
        assert torch.allclose(found, leaf.detach() - task.lr * leaf.grad, atol=2e-6)
        assert not torch.allclose(found, leaf, atol=1e-4)


@pytest.mark.equivalence
@pytest.mark.parametrize("off", [{"attack_epsilon": 0.0}, {"steps": 0}])
def test_without_an_attack_at_temperature_one_it_is_self_distillation(off: dict[str, Any]) -> None:
    setting = replace(PLAIN, attack_epsilon=off.get("attack_epsilon", 0.1))
    run = taught(start(setting, temperature=1.0, steps=off.get("steps", 3), **AT_ONCE))
    w = leaves(student(run.progress.server))
    teacher = leaves(run.progress.server["teacher"])
    for batch in data_of(run, 0).batches(1):
        loss = F.cross_entropy(logits(w, batch.x), logits(teacher, batch.x).softmax(1).detach(), reduction="none")
        slopes = torch.autograd.grad(losses.mean(loss, batch), w)
        w = [(leaf - run.setting.lr * along).detach().requires_grad_() for leaf, along in zip(w, slopes, strict=True)]
    upload = student(toy.upload_once(run)[0])
    apart = [float((a - b.detach()).abs().max()) for a, b in zip(tree.flatten(upload).values(), w, strict=True)]
    assert max(apart) < 2e-6 and largest_difference(upload, student(run.progress.server)) > 1e-2


@pytest.mark.equivalence
@pytest.mark.parametrize("steps", [0, 3])
def test_without_a_temperature_it_is_fat_on_what_the_teacher_takes_images_for(steps: int) -> None:
    run, fat = taught(start(temperature=1e-6, steps=steps, **AT_ONCE)), start(name="fat", steps=steps)
    images, teacher = fat.population.images, run.progress.server["teacher"]
    images.y[:] = run.task.logits(teacher, images.plain(torch.arange(len(images)))).argmax(1)
    assert images.y is not run.population.images.y and len(images.y.unique()) > 2
    found, expected = (student(done(each).progress.server) for each in (run, fat))
    assert largest_difference(found, expected) < 1e-5
    assert largest_difference(found, student(taught(start()).progress.server)) > 1e-2


def test_a_divergence_from_images_as_they_are_may_be_added() -> None:
    run = taught(start(beta=3.0, steps=4))
    task, batch = run.task_at(0), first(run)
    model, soft = student(run.progress.server), torch.full((16, 6), 1 / 6)
    hard = method(run).attacked(task, model, batch, soft)
    found, w = tree.map(lambda leaf: leaf.clone().requires_grad_(), model), leaves(model)
    loss = method(run).distilled(task, found, batch, soft)
    plain, under = logits(w, batch.x), logits(w, hard)
    expected = F.cross_entropy(under, soft) + 3 * divergences(plain, under).mean()
    values = [float(each.detach()) for each in (loss, expected, divergences(plain, under).mean())]
    assert values[0] == pytest.approx(values[1], rel=1e-5) and values[2] > 0.01
    loss.backward()
    expected.backward()
    for own, leaf in zip(tree.flatten(found).values(), w, strict=True):
        assert own.grad is not None and leaf.grad is not None and torch.allclose(own.grad, leaf.grad, atol=1e-5)


def test_teacher_and_attack_look_in_evaluation_mode_and_move_no_statistic() -> None:
    run = start(DEEP, steps=2)
    task, batch, model = run.task_at(0), first(run), student(run.progress.server)
    moving = tree.map(lambda leaf: leaf.clone().requires_grad_(), model)
    soft = method(run).softened(task, moving, batch.x)
    hard = method(run).attacked(task, model, batch, soft)
    recorder = Recorder(batch.weight, False, False)
    with training(recorder):
        assert torch.equal(method(run).softened(task, moving, batch.x), soft) and not soft.requires_grad
        assert torch.equal(method(run).attacked(task, model, batch, soft), hard)
    assert not recorder.seen


# What it costs, and is worth ------------------------------------------------------------------------------------------


def test_all_passes_of_an_attack_are_counted_and_the_teachers_own() -> None:
    once = replace(HOSTILE, rounds=1, epochs=1)
    fedavg = done(start(once, "fedavg")).progress.cost["train_flops"]
    none, ten, twenty = (
        done(start(once, steps=steps, **AT_ONCE)).progress.cost["train_flops"] for steps in (0, 10, 20)
    )
    assert (twenty - ten) / (ten - none) == pytest.approx(1.0, rel=0.02) and ten > 8 * fedavg
    assert 1.1 < none / fedavg < 1.7  # a forward pass of the teacher


def test_it_withstands_what_its_teacher_does_not_and_both_are_reported() -> None:
    setting = replace(toy.SETTING, rounds=12, eval_every=12, attack="pgd", attack_epsilon=0.15, attack_step=0.04)
    setting = replace(setting, attack_images=90)
    run, fedavg = toy.finish(start(setting, temperature=1.0)), toy.finish(start(setting, "fedavg"))
    assert measured(run, "generic.robust") > measured(fedavg, "generic.robust") + 0.1
    assert measured(run, "generic") > 0.7 and measured(run, "generic:teacher") > 0.7


def test_the_softer_labels_are_the_less_sure_the_student_is() -> None:
    sure = []
    for temperature in (0.5, 2.0, 10.0):
        run = done(start(replace(toy.SETTING, rounds=6), temperature=temperature, steps=1))
        images = run.population.images
        scores = run.task.logits(run.progress.server, images.plain(torch.arange(len(images))))
        sure.append(float(scores.softmax(1).amax(1).mean()))
    assert sure[0] > sure[1] + 0.05 > sure[2] + 0.1
