"""CLIP2FL: a round re-computed with torch's own SGD, and what is left of it without its teacher."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Network, Tree, Uploads, keys, tree
from bench.contract import toy
from bench.models import MODELS, Block, build
from bench.models.layers import apply_linear
from bench.models.teacher import Features
from bench.plugins.registry import ALGORITHMS
from bench.training.rounds import Run
from bench.tree import largest_difference
from tests.by_hand import data_of, mean_by_size

SETTING = replace(toy.SETTING, participation=0.5, rounds=3, momentum=0.9, weight_decay=1e-2)
SHORT: dict[str, Any] = {"features_per_class": 10, "match_steps": 5, "head_epochs": 3}
WIDTH, CLASSES = 24, 6
clip2fl: Any = importlib.import_module("bench.algorithms.clip2fl")
ENGINES = pytest.mark.parametrize("engine", ["serial", "stacked"])


def run_of(engine: str = "serial", setting: Any = SETTING, **fields: Any) -> Run:
    return toy.run(ALGORITHMS["clip2fl"](**{**SHORT, **fields}), engine, setting=setting)


def features_of_teacher() -> Features:
    found = toy.teacher(toy.Toy().load(), ALGORITHMS["clip2fl"]())
    assert found is not None
    return found


# A round ----------------------------------------------------------------------------------------------------


def student(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.relu(F.linear(x.flatten(1), w["body/hidden/weight"], w["body/hidden/bias"]))
    return F.linear(hidden, w["body/projection/weight"], w["body/projection/bias"])


def teachers_logits(rows: Tensor) -> Tensor:
    images, texts = features_of_teacher()
    return 100 * F.cosine_similarity(images[rows][:, None], texts, dim=2)


def trained(run: Run, model: Tree, client: int, round: int, a: float, t: float) -> Tree:
    """SGD on cross-entropy + a · T² · KL, over official rows of the client's images."""
    rows = toy.split(toy.Toy().load()).clients[client]
    w = {path: torch.nn.Parameter(leaf.clone()) for path, leaf in tree.flatten(model).items()}
    setting = run.setting
    optimiser = torch.optim.SGD(w.values(), setting.lr, setting.momentum, weight_decay=setting.weight_decay)
    for batch in data_of(run, client, round).batches(setting.epochs):
        logits = F.linear(student(w, batch.x), w["head/weight"], w["head/bias"])
        wanted = (teachers_logits(rows[batch.example]) / t).softmax(1)
        apart = F.kl_div((logits / t).log_softmax(1), wanted, reduction="batchmean")
        optimiser.zero_grad()
        (F.cross_entropy(logits, batch.y) + a * t * t * apart).backward()
        optimiser.step()
    return tree.unflatten({path: leaf.detach() for path, leaf in w.items()})


def class_gradients(run: Run, server: Tree, client: int, round: int) -> dict[int, tuple[Tensor, ...]]:
    data = data_of(run, client, round)
    z = student(tree.flatten({"body": server["body"]}), run.population.images.plain(data.index))
    w = [server["retrained"][name].clone().requires_grad_() for name in ("weight", "bias")]
    return {
        int(c): torch.autograd.grad(F.cross_entropy(F.linear(z[data.y == c], *w), data.y[data.y == c]), w)
        for c in data.y.unique()
    }


def matched(server: Tree, targets: Mapping[int, tuple[Tensor, ...]], steps: int, pull: float, t: float) -> Tensor:
    """SGD of rate 0.1 on 1 - cosine of each row of gradients, and on the contrast of all features with all texts."""
    texts = F.normalize(features_of_teacher().texts)
    moving = torch.nn.Parameter(server["features"].clone())
    optimiser = torch.optim.SGD([moving], lr=0.1)
    for _ in range(steps):
        apart = torch.zeros(())
        for c, (weight, bias) in targets.items():
            w = [server["retrained"][name].clone().requires_grad_() for name in ("weight", "bias")]
            entropy = F.cross_entropy(F.linear(moving[c], *w), torch.full((len(moving[c]),), c))
            mine = torch.autograd.grad(entropy, w, create_graph=True)
            for x, y in [*zip(mine[0], weight, strict=True), (mine[1], bias)]:
                apart = apart + 1 - x @ y / (x.norm() * y.norm() + 1e-6)
        terms = [-torch.log_softmax(texts @ f / t, 0)[c] for c in range(CLASSES) for f in moving[c]]
        optimiser.zero_grad()
        (apart + pull * torch.stack(terms).mean()).backward()
        optimiser.step()
    return moving.detach()


@ENGINES
def test_a_round_is_the_papers(engine: str) -> None:
    """From the second on, when the re-trained head is not the averaged one; the contrast at a weight that shows."""
    a, t, pull, warm = 0.5, 2.0, 40.0, 0.3
    run = run_of(engine, distil=a, temperature=t, contrast=pull, contrast_temperature=warm)
    for round in range(3):
        before = tree.clone(run.progress.server)
        cohort = run.population.cohort(round)
        run.step()
        after = run.progress.server
        model = {"body": before["body"], "head": before["head"]}
        wanted = mean_by_size(run, cohort, [trained(run, model, k, round, a, t) for k in cohort])
        assert largest_difference({key: after[key] for key in model}, wanted) < 2e-4, round
        found = [class_gradients(run, before, k, round) for k in cohort]
        targets = {}
        for c in range(CLASSES):
            those = [gradient[c] for gradient in found if c in gradient]
            if those:
                targets[c] = tuple(torch.stack(part).mean(0) for part in zip(*those, strict=True))
        features = matched(before, targets, SHORT["match_steps"], pull, warm)
        assert float((after["features"] - features).abs().max()) < 2e-4
        assert float((before["features"] - features).abs().max()) > 1e-3
    assert largest_difference(after["retrained"], before["retrained"]) > 1e-2


# The teacher ------------------------------------------------------------------------------------------------


def test_who_says_what_the_teacher_says_is_not_drawn_anywhere() -> None:
    wanted = torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(1))
    for temperature in (1.0, 3.0):
        said = wanted + torch.arange(7.0)[:, None]  # the softmax knows no level
        found = clip2fl.divergence(*((each / temperature).log_softmax(1) for each in (wanted, said)))
        assert float(found.abs().max()) < 1e-6
    assert float(clip2fl.divergence(wanted.log_softmax(1), (2 * wanted).log_softmax(1)).min()) > 1e-2


def test_the_divergence_has_its_golden_value_and_its_direction() -> None:
    """Of (1/2, 1/2) from (3/4, 1/4): 3/4 log 3/2 + 1/4 log 1/2."""
    wanted, said = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert clip2fl.divergence(wanted, said).item() == pytest.approx(0.130812, abs=1e-6)
    assert clip2fl.divergence(said, wanted).item() == pytest.approx(0.143841, abs=1e-6)


def test_the_square_of_a_high_temperature_keeps_the_slope() -> None:
    """It tends to the difference of centred logits over the number of classes."""
    z, teacher = torch.randn(2, 3, CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slopes = []
    for t in (100.0, 1000.0):
        moving = z.clone().requires_grad_()
        apart = clip2fl.divergence((teacher / t).log_softmax(1), (moving / t).log_softmax(1))
        slopes.append(torch.autograd.grad(t * t * apart.sum(), moving)[0])
    apart = (z - teacher) - (z - teacher).mean(1, keepdim=True)
    assert torch.allclose(slopes[0], slopes[1], atol=2e-3)
    assert torch.allclose(slopes[1], apart / CLASSES, atol=1e-3)


def test_logits_of_the_teacher_are_a_hundred_cosines_however_long_its_features_are() -> None:
    images, texts = features_of_teacher()
    found = clip2fl.teacher_logits(7 * images[:9], F.normalize(texts))
    assert torch.allclose(found, teachers_logits(torch.arange(9)), atol=1e-3)
    usual, longer = run_of(), run_of()
    longer.task = replace(longer.task, teacher=5 * texts)
    for round in range(2):
        usual.step(), longer.step()
        assert largest_difference(usual.progress.server, longer.progress.server) < 1e-4, round


def test_each_image_is_taught_by_its_own_row() -> None:
    usual, moved = run_of(), run_of()
    images = moved.population.images
    assert images.teacher is not None
    images.teacher = images.teacher.roll(1, 0)
    one, other = (toy.upload_once(run)[0] for run in (usual, moved))
    assert largest_difference(one["gradient"], other["gradient"]) == 0.0
    assert largest_difference(one["body"], other["body"]) > 1e-3


@pytest.mark.parametrize("off", ["distil", "contrast"])
def test_at_the_defaults_both_uses_of_the_teacher_act(off: str) -> None:
    changes: tuple[dict[str, Any], ...] = {}, {off: 0.0}
    runs = [toy.finish(run_of(setting=replace(SETTING, rounds=2), **fields)) for fields in changes]
    one, other = (run.progress.server for run in runs)
    assert (largest_difference(one["body"], other["body"]) > 1e-3) == (off == "distil")
    assert not torch.equal(one["features"], other["features"])


# CReFF ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Widened(Network):
    """The toy's network with a projection behind its body: CLIP2FL's student."""

    any_shape: ClassVar[bool] = True

    @property
    def feature_size(self) -> int:
        return WIDTH

    def init_body(self, key: Tensor) -> Tree:
        projection = {"weight": torch.zeros(WIDTH, 64), "bias": torch.zeros(WIDTH)}
        return {**build("mlp", CLASSES, self.shape).init(key)["body"], "projection": projection}

    @property
    def blocks(self) -> tuple[Block, ...]:
        last = Block("projection", ("projection",), lambda body, x: apply_linear(body["projection"], x))
        return (*build("mlp", CLASSES, self.shape).blocks, last)


@pytest.fixture
def creff(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begin CReFF with this student, where another run stands."""
    monkeypatch.setitem(MODELS._classes, "widened", Widened)

    def begun(like: Run) -> Run:
        setting = replace(like.setting, model="widened")
        run = toy.run(ALGORITHMS["creff"](**SHORT), like.here.engine.name, setting=setting)
        run.progress.server = tree.clone(like.progress.server)
        return run

    return begun


@pytest.mark.equivalence
@ENGINES
def test_without_its_teacher_it_is_creff_with_its_student_to_the_bit(engine: str, creff: Any) -> None:
    mine = run_of(engine, distil=0.0, contrast=0.0)
    plain = creff(mine)
    for run in (mine, plain):
        toy.finish(run)
    assert largest_difference(mine.progress.server, plain.progress.server) == 0.0
    assert mine.outcome().metrics == plain.outcome().metrics
    assert not torch.equal(toy.finish(run_of(engine)).progress.server["head"]["weight"],
                           mine.progress.server["head"]["weight"])  # fmt: skip


def test_it_sends_what_creff_sends(creff: Any) -> None:
    mine = run_of()
    plain = creff(mine)
    for run in (mine, plain):
        toy.finish(run)
    visits = sum(len(mine.population.cohort(r)) for r in range(3))
    body, head = 64 * 64 + 64 + 64 * WIDTH + WIDTH, CLASSES * WIDTH + CLASSES
    assert mine.progress.cost["bytes_down"] == plain.progress.cost["bytes_down"] == visits * 4 * (body + 2 * head)
    up = body + head + CLASSES * head + CLASSES
    assert mine.progress.cost["bytes_up"] == plain.progress.cost["bytes_up"] == visits * 4 * up


# What else must be ------------------------------------------------------------------------------------------


def test_features_of_a_class_that_nobody_holds_move_by_the_texts_alone() -> None:
    run = run_of(contrast=0.0)
    upload, _ = toy.upload_once(run)
    absent, before = upload["seen"] == 0, run.progress.server
    assert 0 < int(absent.sum()) < CLASSES

    def after(**fields: Any) -> Tensor:
        algorithm = ALGORITHMS["clip2fl"](**{**SHORT, **fields})
        found: Tensor = algorithm.aggregate(run.task, before, Uploads([upload], torch.ones(1)))["features"]
        return found

    assert torch.equal(after(contrast=0.0)[absent], before["features"][absent])
    assert not torch.equal(after(contrast=0.0)[~absent], before["features"][~absent])
    drawn, steps = after(contrast=30.0), after(contrast=30.0, match_steps=0)
    assert torch.equal(steps, before["features"])
    assert torch.allclose(drawn[absent], matched(before, {}, SHORT["match_steps"], 30.0, 0.1)[absent], atol=1e-5)
    assert bool(drawn.isfinite().all())


@pytest.mark.parametrize("features_per_class", [1, 2, 40])
def test_texts_draw_features_alike_in_short_coordinates_and_in_long_ones(features_per_class: int) -> None:
    """One of a class, few, of which what they span is narrower than the space, and many."""
    run = run_of(contrast=30.0, features_per_class=features_per_class)
    before = run.progress.server
    teacher = features_of_teacher()
    assert teacher.texts.shape[1] == WIDTH
    upload, _ = toy.upload_once(run)
    found = run.algorithm.aggregate(run.task, before, Uploads([upload], torch.ones(1)))["features"]
    targets = {
        c: (upload["gradient"]["weight"][c], upload["gradient"]["bias"][c])
        for c in range(CLASSES) if upload["seen"][c]
    }  # fmt: skip
    assert torch.allclose(found, matched(before, targets, SHORT["match_steps"], 30.0, 0.1), atol=1e-4)


def test_the_retrained_head_is_what_is_tested_and_never_what_is_trained() -> None:
    run = toy.finish(run_of())
    task, server = run.task_at(2), run.progress.server
    sent = run.algorithm.broadcast(task, server)
    assert set(sent) == {"body", "head", "retrained"}
    assert largest_difference(server["head"], server["retrained"]) > 1e-2
    x = run.population.test.plain(torch.arange(5))
    z = student(tree.flatten({"body": server["body"]}), x)
    for model in (
        run.algorithm.global_model(task, server),
        run.algorithm.personal_model(task, sent, {}, data_of(run, 0, 2)),
    ):
        assert model is not None
        assert torch.equal(run.algorithm.predict(task, model, x), apply_linear(server["retrained"], z))
    averaged = run.algorithm.global_variants(task, server)["averaged"]
    assert torch.equal(run.algorithm.predict(task, averaged, x), apply_linear(server["head"], z))
    upload, _ = toy.upload_once(run, 0, task)
    wanted = trained(run, {"body": server["body"], "head": server["head"]}, 0, 2, 1.0, 3.0)
    assert largest_difference({key: upload[key] for key in wanted}, wanted) < 1e-5


def test_the_students_own_layers_are_drawn_apart_and_the_body_is_everybodys() -> None:
    run = run_of()
    server, usual = run.progress.server, toy.run(ALGORITHMS["fedavg"](), setting=SETTING).progress.server
    own = {key: part for key, part in server["body"].items() if key != "projection"}
    assert largest_difference(own, usual["body"]) == 0.0
    assert tuple(server["head"]["weight"].shape) == (CLASSES, WIDTH)
    assert largest_difference(server["head"], server["retrained"]) == 0.0
    other = toy.run(ALGORITHMS["clip2fl"](**SHORT), seed=1, setting=SETTING).progress.server
    for key in ("projection", "hidden"):
        assert largest_difference(server["body"][key], other["body"][key]) > 1e-2
    assert float((server["features"] - other["features"]).abs().max()) > 1.0
    assert keys.uniform(run.task.key, 1) != server["body"]["projection"]["weight"][0, 0]


def test_the_defaults_are_the_references() -> None:
    usual = ALGORITHMS["clip2fl"]()
    assert (usual.distil, usual.temperature, usual.contrast, usual.contrast_temperature) == (1.0, 3.0, 0.001, 0.1)
    assert (usual.features_per_class, usual.match_steps, usual.head_epochs) == (100, 100, 300)
    assert (usual.match_lr, usual.head_lr, usual.tier) == (0.1, 0.01, "V")
