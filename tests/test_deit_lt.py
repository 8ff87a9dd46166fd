"""DeiT-LT: one head of two, what the teacher's labels weigh, who trains when and by what, what switches it off."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Batch, Tree, keys, losses, tree
from bench.contract import toy
from bench.models.layers import Recorder, training
from bench.plugins.registry import ALGORITHMS
from bench.splits.longtail import class_sizes
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import FEW, data_of, done, measured, method
from tests.test_command import Bench
from tests.test_command import bench as bench

HOSTILE = replace(toy.SETTING, momentum=0.9, weight_decay=1e-2, clip=0.5, rounds=2)
PLAIN = replace(HOSTILE, momentum=0.0, weight_decay=0.0, clip=None, epochs=1)
TOKENS = replace(
    PLAIN, model="vit_mini", norm="layer", optimiser="adamw", lr=0.002, participation=1.0, eval_every=9, rounds=1
)
AT_ONCE: dict[str, Any] = {"teacher_rounds": 0.0}
"""The student trains from the first round on."""
blanked = importlib.import_module("bench.algorithms.deit_lt").blanked
BOTH = pytest.mark.parametrize("setting", [PLAIN, TOKENS], ids=["one token", "two tokens"])
PARTS = ("body", "head", "dist")


def start(setting: Any = HOSTILE, name: str = "deit_lt", **fields: Any) -> Run:
    sizes = FEW if setting.model == "vit_mini" or fields.get("teacher") == "resnet8" else toy.SIZES
    return toy.run(ALGORITHMS[name](**fields), setting=setting, sizes=sizes)


def first(run: Run, client: int = 0) -> Batch:
    return next(iter(data_of(run, client).batches(1)))


def student(server: Tree) -> Tree:
    return {key: server[key] for key in PARTS}


def saying(run: Run, label: int) -> Run:
    """The same run, whose teacher says the same of every image."""
    teacher = run.progress.server["teacher"]
    head = {"weight": 0 * teacher["head"]["weight"], "bias": losses.one_hot(torch.tensor([label]), 6)[0]}
    run.progress.server = {**run.progress.server, "teacher": {**teacher, "head": head}}
    return run


def apart(run: Run) -> Run:
    """The same run, whose two heads are not alike."""
    server = run.progress.server
    dist = tree.map(lambda leaf: keys.normal(keys.key(3), *leaf.shape), server["dist"])
    run.progress.server = {**server, "dist": dist}
    return run


# Two heads and one ----------------------------------------------------------------------------------------------------


@BOTH
def test_the_model_that_is_tested_is_the_mean_of_both_heads(setting: Any) -> None:
    run = apart(start(setting))
    task, server, x = run.task_at(0), run.progress.server, first(run).x
    z = task.model.features(server["body"], x)
    tokens = task.model.tokens
    cls = F.linear(z[:, : z.shape[1] // tokens], server["head"]["weight"], server["head"]["bias"])
    dist = F.linear(z[:, -z.shape[1] // tokens :], server["dist"]["weight"], server["dist"]["bias"])
    model, variants = method(run).global_model(task, server), method(run).global_variants(task, server)
    assert torch.allclose(task.logits(model, x), (cls + dist) / 2, atol=1e-5)
    assert torch.allclose(task.logits(variants["cls"], x), cls, atol=1e-5)
    assert torch.allclose(task.logits(variants["dist"], x), dist, atol=1e-5)
    assert float((cls - dist).abs().max()) > 0.5
    assert torch.equal(method(run).taught(task, variants["teacher"], x), method(run).taught(task, server["teacher"], x))
    personal = method(run).personal_model(task, server, {}, data_of(run, 0))
    assert largest_difference(personal, model) == 0.0


@BOTH
def test_it_starts_from_everybodys_model_to_the_bit(setting: Any) -> None:
    run = start(setting)
    assert largest_difference(method(run).global_model(run.task, run.progress.server), run.task.init()) == 0.0
    wide = run.task.model.feature_size // run.task.model.tokens
    assert run.progress.server["head"]["weight"].shape == run.progress.server["dist"]["weight"].shape == (6, wide)


# What the teacher's labels weigh --------------------------------------------------------------------------------------

WEIGHTS = (0.050611, 0.076900, 0.121134, 0.195037, 0.318805, 0.524590, 0.868349, 1.442627, 2.409223, 3.992724)
"""Of CIFAR-10 with a tail of 100, worked out from the counts."""


def test_weights_are_those_of_the_tail_of_cifar10() -> None:
    counts = torch.tensor(class_sizes("exponential", 5000, 100.0, 10)).float()
    assert counts[[0, 9]].tolist() == [5000, 50]
    assert losses.class_weights(counts, 0.9999).tolist() == pytest.approx(WEIGHTS, abs=1e-5)


def loss_of(run: Run, batch: Batch, weights: Tensor, **changes: Tree) -> Tensor:
    found: Tensor = method(run).distilled(run.task_at(0), {**run.progress.server, **changes}, batch, weights)
    return found


def test_the_loss_is_half_labels_and_half_what_the_teacher_says_weighed_by_its_classes() -> None:
    """Of two examples the teacher takes one for a class that weighs 3 and one for another that weighs 1: the mean is
    over 4, and padding has no part in it."""
    run = apart(start(PLAIN, erased=0.0))
    batch, weights = first(run), torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    server, task = run.progress.server, run.task_at(0)
    images = run.population.images.plain(torch.arange(192))
    said = method(run).said(task, server["teacher"], images)
    assert len(said.unique()) > 1
    common = int(said.mode().values)
    weights = torch.ones(6).index_fill(0, torch.tensor([common]), 3.0)
    one, other = int((said == common).nonzero()[0]), int((said != common).nonzero()[0])
    x = images[[one, other, one]]
    pair = replace(
        batch, x=x, y=torch.tensor([2, 5, 0]), weight=torch.tensor([1.0, 1.0, 0.0]), example=batch.example[:3]
    )
    z = task.model.features(server["body"], x)
    by_labels = F.cross_entropy(task.model.logits(server["head"], z)[:2], pair.y[:2])
    each = F.cross_entropy(task.model.logits(server["dist"], z)[:2], said[[one, other]], reduction="none")
    expected = 0.5 * by_labels + 0.5 * (3 * each[0] + each[1]) / 4
    assert float(loss_of(run, pair, weights)) == pytest.approx(float(expected), abs=1e-5)
    plain = 0.5 * by_labels + 0.5 * each.mean()
    assert float(loss_of(run, pair, torch.ones(6))) == pytest.approx(float(plain), abs=1e-5)
    assert abs(float(plain - expected)) > 1e-3


def after(**fields: Any) -> Tree:
    """The student after two rounds of a teacher who stands still, in the second of which weights may come."""
    return student(done(start(PLAIN, **AT_ONCE, **fields)).progress.server)


def test_weights_come_late_and_only_where_classes_differ() -> None:
    assert largest_difference(after(drw=0.5), after(drw=1.0)) > 1e-4
    assert largest_difference(after(drw=0.5), after(drw=0.0)) > 1e-4
    assert largest_difference(after(drw=0.5, beta=0.0), after(drw=1.0)) == 0.0
    assert losses.class_weights(torch.full((6,), 7.0), 0.9999).tolist() == pytest.approx([1.0] * 6, abs=1e-6)


def test_a_class_that_a_client_lacks_weighs_as_if_it_had_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(PLAIN, drw=0.0, **AT_ONCE)
    given: list[Tensor] = []
    usual = losses.class_weights

    def told(counts: Tensor, beta: float) -> Tensor:
        given.append(usual(counts, beta))
        return given[-1]

    monkeypatch.setattr(losses, "class_weights", told)
    toy.upload_once(run, 0)
    counts = data_of(run, 0).class_counts
    assert bool((counts == 0).any())
    (weights,) = given
    assert weights[counts == 0].tolist() == pytest.approx([float(weights.max())] * int((counts == 0).sum()))
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-6) and float(weights.min()) < 0.2


# Who teaches whom -----------------------------------------------------------------------------------------------------


@BOTH
def test_labels_reach_one_head_and_the_teacher_the_other_and_nothing_the_teacher(setting: Any) -> None:
    slopes = {}
    for alpha in (0.0, 0.5, 1.0):
        run = apart(start(setting, alpha=alpha, erased=0.0))
        moving = tree.map(lambda leaf: leaf.clone().requires_grad_(), tree.parameters(run.progress.server))
        loss_of(run, first(run), torch.ones(6), **moving).backward()
        slopes[alpha] = {path: leaf.grad for path, leaf in tree.flatten(moving).items()}
    for path, slope in slopes[0.5].items():
        none, whole = slopes[0.0][path], slopes[1.0][path]
        if path.startswith("teacher/"):
            assert slope is none is whole is None
        elif path.startswith("head/"):
            assert none is not None and slope is not None and torch.allclose(slope, none / 2, atol=1e-6)
            assert whole is None or not whole.any()
        elif path.startswith("dist/"):
            assert none is None and whole is not None and slope is not None
            assert torch.allclose(slope, whole / 2, atol=1e-6) and bool(slope.any())


@BOTH
def test_where_the_teacher_says_one_class_one_head_says_it_and_the_other_does_not(setting: Any) -> None:
    run = saying(start(replace(setting, rounds=3, epochs=5), **AT_ONCE), 4)
    done(run)
    images = run.population.images
    index = torch.cat([rows for rows in run.population.index if len(rows)])
    variants = method(run).global_variants(run.task, run.progress.server)
    x, y = images.plain(index), images.y[index]
    says = {name: run.task.logits(variants[name], x).argmax(1) for name in ("cls", "dist")}
    assert float((says["dist"] == 4).float().mean()) > 0.95
    assert float((says["cls"] == y).float().mean()) > 0.6 > float((y == 4).float().mean()) + 0.2


def test_the_teacher_looks_in_evaluation_mode_at_the_images_that_the_student_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = start(replace(PLAIN, norm="batch"), teacher="resnet8", erased=1.0)
    task, batch, teacher = run.task_at(0), first(run), run.progress.server["teacher"]
    usual: Tensor = method(run).said(task, teacher, batch.x)
    recorder = Recorder(batch.weight, False, False)
    with training(recorder):
        assert torch.equal(method(run).said(task, teacher, batch.x), usual)
        assert not recorder.seen
    seen: list[Tensor] = []

    def watched(self: Any, task: Any, teacher: Tree, x: Tensor) -> Tensor:
        seen.append(x)
        return usual

    monkeypatch.setattr(type(run.algorithm), "said", watched)
    loss_of(run, batch, torch.ones(6))
    assert len(seen) == 1 and torch.equal(seen[0], blanked(batch, 1.0)) and not torch.equal(seen[0], batch.x)


# Who trains when ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "drw", "rounds", "begins", "weighed"),
    [(0.4, 0.92, 50, 20, 47), (0.07, 0.5, 100, 7, 53), (0.0, 0.0, 9, 0, 0), (0.4, 0.92, 2, 1, 1), (0.5, 1.0, 8, 4, 8)],
)
def test_the_teacher_has_its_share_of_the_rounds_and_weights_the_late_ones_of_the_rest(
    share: float, drw: float, rounds: int, begins: int, weighed: int
) -> None:
    run = start(replace(HOSTILE, rounds=rounds), teacher_rounds=share, drw=drw)
    tasks = [run.task_at(r) for r in range(rounds)]
    phases = [method(run).exchanges(task)[0].phase for task in tasks]
    assert phases == begins * ["teacher"] + (rounds - begins) * ["student"]
    assert [method(run).weighs(task) for task in tasks[begins:]] == [r >= weighed for r in range(begins, rounds)]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_at_first_the_teacher_alone_moves_and_then_no_bit_of_it(norm: str) -> None:
    run = start(replace(HOSTILE, norm=norm, epochs=1), teacher="resnet8")
    before, between = [run.progress.server for _ in toy.trips(run)]
    last = run.progress.server
    assert largest_difference(before["teacher"], between["teacher"]) > 1e-4
    assert largest_difference(student(before), student(between)) == 0.0
    assert largest_difference(between["teacher"], last["teacher"]) == 0.0
    first, then = (tree.flatten(student(state)) for state in (between, last))
    assert all(not torch.equal(first[path], then[path]) for path in first)
    sent = [toy.upload_once(run, 0, run.task_at(r))[0] for r in (0, 1)]
    assert {key for key in sent[0] if sent[0][key]} == {"teacher"}
    assert {key for key in sent[1] if sent[1][key]} == set(PARTS) and sent[0].keys() == sent[1].keys()


def test_what_a_client_has_after_its_work_is_all_that_it_trained() -> None:
    for fields in ({"teacher_rounds": 1.0}, AT_ONCE):
        run = start(PLAIN, **fields)
        task, shared = run.task_at(0), run.progress.server
        seen, _ = method(run).after_training(task, shared, {}, data_of(run, 0))
        upload, _ = toy.upload_once(run, 0, task)
        assert largest_difference(seen, tree.merge(shared, upload)) == 0.0 and seen.keys() == shared.keys()


def test_the_teacher_is_resnet8_of_images_of_32_pixels_and_a_small_cnn_of_smaller_ones() -> None:
    for enlarged, fields, name in ((1, {}, "small_cnn"), (4, {}, "resnet8"), (4, {"teacher": "resnet20"}, "resnet20")):
        algorithm = ALGORITHMS["deit_lt"](**fields)
        run = toy.run(algorithm, setting=PLAIN, sizes=FEW, dataset=toy.Toy(test=12, enlarged=enlarged))
        task = run.task
        assert method(run).network(task) == task.network(name)
        (own,) = {tuple(leaf.shape) for path, leaf in tree.flatten(run.progress.server).items()
                  if path == "teacher/head/weight"}  # fmt: skip
        assert own == (6, task.network(name).feature_size)


# By what the teacher is trained ---------------------------------------------------------------------------------------


def slopes_of(run: Run, teacher: Tree, batch: Batch, counts: Tensor | None) -> Tree:
    """A gradient by torch alone."""
    network = method(run).network(run.task)
    w = tree.map(lambda leaf: leaf.clone().requires_grad_(), teacher)
    logits = network.logits(w["head"], network.features(w["body"], batch.x))
    if counts is not None:
        logits = logits + torch.where(counts > 0, counts.float().log(), -torch.inf)
    F.cross_entropy(logits, batch.y).backward()

    def slope(leaf: Tensor) -> Tensor:
        assert leaf.grad is not None
        return leaf.grad

    return tree.map(slope, w)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_a_step_of_the_teacher_follows_the_slope_at_the_worst_point_nearby(rho: float, balanced: bool) -> None:
    """w - lr · g(w + rho g / |g|), of cross-entropy whose logits have the logarithm of counts."""
    run = start(replace(PLAIN, batch_size=64), teacher_rounds=1.0, rho=rho, balanced=balanced)
    batch, teacher = first(run), run.progress.server["teacher"]
    counts = data_of(run, 0).class_counts if balanced else None
    g = slopes_of(run, teacher, batch, counts)
    far = tree.add(teacher, g, rho / float(tree.norm(g)))
    expected = tree.add(teacher, slopes_of(run, far, batch, counts), -run.setting.lr)
    found = toy.upload_once(run)[0]["teacher"]
    assert largest_difference(found, expected) < 2e-6
    if rho:
        assert largest_difference(expected, tree.add(teacher, g, -run.setting.lr)) > 1e-4


@pytest.mark.equivalence
def test_an_ordinary_teacher_is_fedavgs_model() -> None:
    run = start(teacher_rounds=1.0, rho=0.0, balanced=False)
    fedavg = start(replace(HOSTILE, model="small_cnn"), "fedavg")
    fedavg.progress.server = run.progress.server["teacher"]
    before = run.progress.server
    done(run)
    assert largest_difference(run.progress.server["teacher"], done(fedavg).progress.server) == 0.0
    assert largest_difference(student(run.progress.server), student(before)) == 0.0
    assert run.progress.cost["bytes_up"] == fedavg.progress.cost["bytes_up"]
    assert run.progress.cost["train_flops"] == fedavg.progress.cost["train_flops"]


def test_a_flat_teacher_takes_twice_the_work() -> None:
    flat, usual = (done(start(teacher_rounds=1.0, rho=rho)).progress.cost["train_flops"] for rho in (0.05, 0.0))
    assert flat / usual == pytest.approx(2.0, rel=0.01)


def test_a_teacher_that_takes_less_than_the_student_is_no_forged_cost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (
        "run", "--algos", "deit_lt(teacher_rounds=1.0)", "--model", "vit_mini", "--rounds", "1", "--participation",
        "0.1", "--eval-clients", "1", "--ray", "off", "--tracking-uri", "off", "--out", "results",
    )  # fmt: skip
    bench(*asked)
    assert "no problems" in bench("validate", "results").out
    monkeypatch.setattr(ALGORITHMS["deit_lt"], "trains_another", False)
    assert "cost.train_flops is" in bench("validate", "results").out


# What switches it off -------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
def test_without_distillation_one_head_is_fedavgs_and_the_other_stays() -> None:
    run, fedavg = start(alpha=0.0, **AT_ONCE), start(name="fedavg")
    before = run.progress.server
    server, expected = done(run).progress.server, done(fedavg).progress.server
    cls = method(run).global_variants(run.task, server)["cls"]
    assert largest_difference(cls, expected) == 0.0
    assert largest_difference(server["dist"], before["dist"]) == 0.0  # decay does not reach it, either
    assert run.progress.cost["train_flops"] == fedavg.progress.cost["train_flops"]


def test_without_labels_the_first_head_stays() -> None:
    run = start(alpha=1.0, **AT_ONCE)
    before = run.progress.server
    server = done(run).progress.server
    assert largest_difference(server["head"], before["head"]) == 0.0
    assert largest_difference(server["dist"], before["dist"]) > 1e-3


# Blanked squares ------------------------------------------------------------------------------------------------------


def test_a_blanked_square_is_half_as_wide_and_high_and_lies_anywhere() -> None:
    x = 1 + torch.rand(400, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    batch = Batch(x, torch.zeros(400, dtype=torch.int64), torch.ones(400), key=keys.key(7))
    found = blanked(batch, 1.0)
    gone = (found == 0).all(1)
    assert torch.equal(found[:, 0] == 0, gone) and gone.flatten(1).sum(1).tolist() == [4 * 5] * 400
    assert torch.equal(torch.where(gone[:, None], x, found), x)
    tops, lefts = gone.any(2).int().argmax(1), gone.any(1).int().argmax(1)
    assert set(tops.tolist()) == set(range(5)) and set(lefts.tolist()) == set(range(6))
    assert all(bool(square.any(1).sum() == 4 and square.any(0).sum() == 5) for square in gone)
    some = (blanked(batch, 0.25) == 0).flatten(1).any(1)
    assert 0.18 < float(some.float().mean()) < 0.32
    part = replace(batch, x=x[:7], y=batch.y[:7], weight=batch.weight[:7])
    assert torch.equal(blanked(part, 1.0), found[:7])


def test_without_a_share_or_without_an_image_nothing_is_blanked() -> None:
    batch = Batch(torch.ones(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), torch.ones(3))
    assert blanked(batch, 0.0) is batch.x
    flat = replace(batch, x=torch.ones(3, 64))
    assert blanked(flat, 1.0) is flat.x


# What it is worth -----------------------------------------------------------------------------------------------------


def test_mean_either_head_and_teacher_are_reported_and_all_have_learnt() -> None:
    setting = replace(PLAIN, optimiser="adamw", lr=0.01, rounds=6, epochs=4, participation=1.0, eval_every=6)
    run = toy.finish(start(setting))
    mean, cls, dist, teacher = (measured(run, f"generic{which}") for which in ("", ":cls", ":dist", ":teacher"))
    assert min(mean, cls, dist, teacher) > 0.6 and len({mean, cls, dist, teacher}) > 1
    assert abs(dist - teacher) < 0.2
