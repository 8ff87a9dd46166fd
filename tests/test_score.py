"""SCoRe's losses on features: the cards' values and numpy's, what is 0 and when, and what they do to a body."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import Algorithm, LocalData, Loss, Task, Tree, keys, losses, tree
from bench.contract import toy
from bench.data import Batch
from bench.part import Part
from bench.plugins.registry import PARTS, label, told
from bench.protocol.composed import Composed
from bench.protocol.presets import PAPER
from bench.protocol.spelling import parse_algorithms
from bench.training.engine import TOLERANCE
from bench.training.rounds import Run
from tests import virtual
from tests.test_adaptation import data_of

SETTING = replace(toy.SETTING, rounds=2)
ENGINES = ("serial", "stacked")
FORMS: dict[str, list[dict[str, str]]] = {
    "facility_location": [{}],
    "graph_cut": [{"form": "information"}, {"form": "correlation"}],
    "log_determinant": [{"form": "information"}, {"form": "correlation"}],
}
EVERY = [(name, fields) for name, those in FORMS.items() for fields in those]
GOLDEN = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
"""The example of the cards: the first two are of one class, the last two of another."""
GOLDEN_Y = [1, 1, 2, 2]


def part_of(name: str, **fields: Any) -> Loss:
    part = PARTS[name](**fields)
    assert isinstance(part, Loss)
    return part


def task_of(num_classes: int) -> Task:
    return replace(toy.run(toy.Host()).task, num_classes=num_classes)


def batch_of(y: list[int], padding: int = 0) -> Batch:
    weight = (torch.arange(len(y)) < len(y) - padding).float()
    return Batch(torch.zeros(len(y), 1, 1, 1), torch.tensor(y), weight)


def term(part: Loss, z: Tensor, y: list[int], padding: int = 0, num_classes: int = 5) -> Tensor:
    """Give the sum of what a part adds to cross-entropy for each example, divided by its weight; all logits are 0."""
    batch, logits = batch_of(y, padding), torch.zeros(len(y), num_classes)
    whole = part.loss(task_of(num_classes), logits, z, batch, torch.ones(num_classes))
    weight: float = part.weight  # type: ignore[attr-defined]
    return (whole - losses.cross_entropy(logits, batch)) / weight * batch.weight.sum()


def by_hand(name: str, z: Tensor, y: list[int], form: str = "", factor: float = 1.0) -> float:
    """Compute a term class by class, in numpy; `factor` is the paper's lambda."""
    rows, labels = z.double().numpy(), np.array(y)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = unit @ unit.T

    def volume(members: Any) -> float:
        block = similar[np.ix_(members, members)] + factor * np.eye(len(members))
        return float(np.linalg.slogdet(block)[1])

    total = 0.0
    for c in sorted(set(y)):
        inside, outside = np.flatnonzero(labels == c), np.flatnonzero(labels != c)
        across = similar[np.ix_(inside, outside)]
        if name == "facility_location":
            total += sum(similar[i, inside].max() for i in outside) / len(inside)
        elif name == "log_determinant":
            total += volume(inside) / len(inside)
        elif form == "information":
            total += (across.sum() - factor * similar[np.ix_(inside, inside)].sum()) / len(inside)
        else:
            total += factor * across.sum() / len(inside)
    return total - volume(np.arange(len(y))) if (name, form) == ("log_determinant", "correlation") else total


def factor_of(name: str, value: float) -> dict[str, float]:
    """Name the paper's lambda as the part does."""
    return {key: value for part, key in (("graph_cut", "diversity"), ("log_determinant", "ridge")) if part == name}


def random(rows: int, width: int = 7, name: str = "z") -> Tensor:
    return keys.normal(keys.fold(keys.key(3), name), rows, width)


Y = [0, 1, 1, 3, 0, 1, 3, 0, 4, 1]
"""Class 2 is absent, class 4 is there once."""


# Values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "wanted"),
    [
        ("facility_location", {}, 0.5),
        ("graph_cut", {"form": "information"}, -3.4),
        ("graph_cut", {"form": "information", "diversity": 0.5}, -2.1),
        ("graph_cut", {"form": "correlation"}, -0.8),
        ("log_determinant", {"form": "information"}, 1.339139),
        ("log_determinant", {"form": "correlation"}, -0.817264),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_cards_values_are_found(name: str, fields: dict[str, Any], wanted: float, weight: float) -> None:
    part = part_of(name, weight=weight, **fields)
    assert float(term(part, GOLDEN, GOLDEN_Y)) == pytest.approx(wanted, abs=2e-6 / weight)
    lengths = torch.tensor([[3.0], [0.1], [20.0], [1.0]])  # only the directions of features count
    assert float(term(part, lengths * GOLDEN, GOLDEN_Y)) == pytest.approx(wanted, abs=2e-6 / weight)
    assert by_hand(name, GOLDEN, GOLDEN_Y, fields.get("form", ""), fields.get("diversity", 1.0)) == pytest.approx(
        wanted, abs=1e-6
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_values_are_those_of_numpy_with_absent_classes_and_single_examples(
    name: str, fields: dict[str, Any], factor: float
) -> None:
    z = random(len(Y))
    part = part_of(name, weight=1.0, **fields, **factor_of(name, factor))
    wanted = by_hand(name, z, Y, fields.get("form", ""), factor)
    assert float(term(part, z, Y)) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_gradients_are_those_of_numpys_differences(name: str, fields: dict[str, Any]) -> None:
    z = random(len(Y)).requires_grad_()
    (slope,) = torch.autograd.grad(term(part_of(name, weight=1.0, **fields), z, Y), z)
    way, step = random(len(Y), name="way").double(), 1e-5
    there, back = (by_hand(name, z.detach().double() + s * step * way, Y, fields.get("form", "")) for s in (1, -1))
    assert float((slope.double() * way).sum()) == pytest.approx((there - back) / (2 * step), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_neither_the_order_of_examples_nor_the_names_of_classes_count(name: str, fields: dict[str, Any]) -> None:
    part, z, order = part_of(name, **fields), random(len(Y)), torch.tensor([3, 9, 0, 5, 1, 8, 2, 4, 7, 6])
    value = float(term(part, z, Y))
    assert float(term(part, z[order], [Y[k] for k in order.tolist()])) == pytest.approx(value, rel=1e-5)
    assert float(term(part, z, [(2 * y + 1) % 5 for y in Y])) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_padding_and_what_has_no_label_change_neither_value_nor_gradient(name: str, fields: dict[str, Any]) -> None:
    part, z = part_of(name, **fields), random(len(Y) + 3).requires_grad_()
    found = []
    for value in (
        term(part, z[: len(Y)], Y),
        term(part, z, [*Y, 1, 2, 4], padding=3),
        term(part, z, [*Y, -1, -1, -1]),
    ):
        (slope,) = torch.autograd.grad(value, z)
        found.append((float(value.detach()), slope))
    for worth, slope in found:
        assert worth == pytest.approx(found[0][0], rel=1e-5, abs=1e-5)
        assert torch.allclose(slope, found[0][1], atol=1e-5) and float(slope[len(Y) :].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("y", "padding"), [([2] * 6, 0), ([0, 1, 2, 3, 4, 0], 0), ([0, 0, 0, 1, 1, 1], 6), ([0, 1, 0, 1, 0, 1], 3)]
)
@pytest.mark.parametrize("what", ["spread", "equal", "zeros", "opposite", "tiny", "huge"])
@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_values_and_gradients_are_finite(
    name: str, fields: dict[str, Any], what: str, y: list[int], padding: int
) -> None:
    z = random(6)
    z = {
        "spread": z,
        "equal": z[:1].repeat(6, 1),
        "zeros": torch.cat([z[:3], torch.zeros(3, 7)]),
        "opposite": torch.cat([z[:3], -z[:3]]),
        "tiny": 1e-30 * z,
        "huge": 1e15 * z,
    }[what].requires_grad_()
    part = part_of(name, **fields, **factor_of(name, 0.5))
    value = term(part, z, y, padding)
    (slope,) = torch.autograd.grad(value, z)
    assert bool(value.isfinite()) and bool(slope.isfinite().all())
    assert float(slope.abs().max()) < 1e3  # what has no direction is not moved by a million
    if padding == 6:
        assert float(value.detach()) == 0.0 == float(slope.abs().max())


def test_what_one_class_alone_is_worth() -> None:
    z = random(6)
    assert float(term(part_of("facility_location"), z, [3] * 6)) == 0.0
    assert float(term(part_of("graph_cut", form="correlation"), z, [3] * 6)) == 0.0


def test_classes_at_right_angles_have_nothing_to_do_with_each_other() -> None:
    """By Fischer's inequality the whole spans no more than its parts, and as much only at right angles."""
    y = [0, 0, 0, 1, 1, 1]
    apart = torch.cat(
        [torch.cat([random(3, 4), torch.zeros(3, 4)], 1), torch.cat([torch.zeros(3, 4), random(3, 4)], 1)]
    )
    assert float(term(part_of("facility_location"), apart, y)) == 0.0
    assert float(term(part_of("graph_cut", form="correlation"), apart, y)) == 0.0

    def slack(z: Tensor, y: list[int]) -> float:
        each, less = (
            float(term(part_of("log_determinant", form=form), z, y)) for form in ("information", "correlation")
        )
        of_each = y.count(y[0])  # all classes are of this size
        return of_each * each - (each - less)

    assert slack(apart, y) == pytest.approx(0.0, abs=1e-5)
    assert slack(random(6, 8), y) > 0.1
    assert slack(GOLDEN, GOLDEN_Y) == pytest.approx(0.521875, abs=1e-5)


def test_graph_cuts_information_without_its_inner_half_is_its_correlation() -> None:
    z = random(len(Y))
    one, other = (
        float(term(part_of("graph_cut", form=form, diversity=diversity), z, Y))
        for form, diversity in (("information", 0.0), ("correlation", 1.0))
    )
    assert one == pytest.approx(other, rel=1e-6)


def test_information_is_less_the_tighter_a_class_is() -> None:
    loose, tight = random(6), random(6)
    tight[:3] = tight[:1] + 0.1 * tight[:3]
    for name in ("graph_cut", "log_determinant"):
        part = part_of(name, form="information")
        assert term(part, tight, [0] * 3 + [1] * 3) < term(part, loose, [0] * 3 + [1] * 3) - 0.1


# Where they run ---------------------------------------------------------------------------------------------


def bound(part: Loss, task: Task) -> Task:
    return replace(task, objective=partial(part.loss, task, counts=torch.ones(task.num_classes)))


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_they_are_mapped_over_clients(name: str, fields: dict[str, Any]) -> None:
    part, task = part_of(name, **fields), task_of(5)
    z, y = random(3 * 8).reshape(3, 8, 7), torch.tensor([Y[:8], [1] * 8, [0, 1, 2, 3, 4, 0, 1, 2]])
    weight = torch.tensor([[1.0] * 8, [1.0] * 5 + [0.0] * 3, [0.0] * 8])

    def value(z: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        batch = Batch(torch.zeros(8, 1, 1, 1), y, weight)
        return part.loss(task, z[:, :5], z, batch, torch.ones(5))

    stacked, slopes = torch.func.vmap(torch.func.grad_and_value(value))(z, y, weight)[::-1]
    for k in range(3):
        slope, alone = torch.func.grad_and_value(value)(z[k], y[k], weight[k])
        assert torch.allclose(stacked[k], alone, atol=1e-5) and torch.allclose(slopes[k], slope, atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_autocast_does_not_round_cosines(name: str, fields: dict[str, Any]) -> None:
    part, z = part_of(name, **fields), random(len(Y)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rough = term(part, z, Y)
    assert rough.dtype == torch.float32 and torch.equal(rough, term(part, z.float(), Y))


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_without_features_there_is_a_sentence(name: str, fields: dict[str, Any]) -> None:
    said = "features = None: this loss is one of features, and the method has none; take one of logits"
    with pytest.raises(ValueError, match=said):
        part_of(name, **fields).loss(task_of(5), torch.zeros(10, 5), None, batch_of(Y), torch.ones(5))


@pytest.mark.parametrize("name", FORMS)
def test_on_the_device_nobody_waits_for_them(name: str) -> None:
    """As in `tests.test_virtual`, of local work alone."""
    with virtual.device() as device:
        part, task = part_of(name), task_of(5)
        z, batch = random(len(Y)).to(device).requires_grad_(), batch_of(Y, padding=2)
        there = Batch(batch.x.to(device), batch.y.to(device), batch.weight.to(device))
        with virtual.waits() as found:
            value = part.loss(task, z[:, :5], z, there, torch.ones(5, device=device))
            (slope,) = torch.autograd.grad(value, z)
        assert not found
        here = random(len(Y)).requires_grad_()
        again = part.loss(task, here[:, :5], here, batch, torch.ones(5))
        assert torch.equal(value.cpu(), again) and torch.equal(slope.cpu(), torch.autograd.grad(again, here)[0])


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_of_an_example_that_is_alone_in_its_class_two_views_have_each_other(name: str, fields: dict[str, Any]) -> None:
    """Whatever draws a class together, or keeps it from spreading, then has something to act on."""
    y, z = [0, 1, 2, 3], random(4, 6)
    seen = torch.cat([z, z + random(4, 6, "view")])
    part, within = part_of(name, views=2, **fields), seen.reshape(2, 4, 6)
    closer = torch.cat([within.mean(0), within.mean(0)])
    apart = [float(term(part, rows, [*y, *y])) for rows in (seen, closer)]
    wanted = [by_hand(name, rows, [*y, *y], fields.get("form", "")) for rows in (seen, closer)]
    assert apart == pytest.approx(wanted, rel=1e-5)
    if "information" in fields.values():
        assert apart[1] < apart[0]
    if name != "facility_location":  # the same image twice is not more than the image, and graph cut sums over pairs
        return
    twice = float(term(part, torch.cat([z, z]), [*y, *y]))
    assert twice == pytest.approx(float(term(part, z, y)), rel=1e-5)


# On a method ------------------------------------------------------------------------------------------------


def ran(algorithm: Any, engine: str = "serial", **setting: Any) -> Run:
    if isinstance(algorithm, str):
        (algorithm,) = parse_algorithms(algorithm)
    return toy.finish(toy.run(algorithm, engine, setting=replace(SETTING, **setting)))


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FORMS)
def test_at_weight_0_it_is_not_there_and_would_change_no_bit(name: str, engine: str) -> None:
    (fedavg,) = parse_algorithms("fedavg")
    (row,) = parse_algorithms(f"fedavg+{name}(weight=0)")
    assert label(row) == "fedavg"
    off: Part = part_of(name, weight=0.0)
    mine, plain = ran(Composed(fedavg, (off,)), engine), ran(fedavg, engine)
    assert mine.outcome().digest == plain.outcome().digest
    assert ran(f"fedavg+{name}", engine).outcome().digest != plain.outcome().digest


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_under_a_head_of_zeros_only_the_term_moves_the_body_and_downhill(name: str, fields: dict[str, Any]) -> None:
    run = toy.run(toy.Host())
    task, start = run.task, run.task.init()
    start = {**start, "head": tree.zeros_like(start["head"])}
    rows = torch.arange(24)
    batch = Batch(run.population.images.plain(rows), rows % 6, torch.ones(24))

    def value_and_slope(weight: float, params: Tree) -> tuple[float, Tree]:
        bench = bound(part_of(name, weight=weight, **fields), task)
        value, slope, _ = bench.gradient(bench.loss, params, batch)
        return float(value), slope["body"]

    still = value_and_slope(0.0, start)[1]
    assert tree.largest_difference(still, tree.zeros_like(still)) == 0.0
    before, slope = value_and_slope(0.5, start)
    step = 1e-3 / float(tree.dot(slope, slope)) ** 0.5
    moved = tree.merge(start, {"body": tree.sub(tree.parameters(start["body"]), tree.scale(slope, step))})
    after, _ = value_and_slope(0.5, moved)
    assert after < before


@pytest.mark.parametrize("name", ["facility_location", "graph_cut"])
def test_clients_of_one_class_do_what_fedavg_does(name: str) -> None:
    """With all of a client's labels alike the terms are 0, and so are their slopes."""
    run = toy.run(toy.Host(), sizes=(20,) * 8)
    task, params = run.task, run.task.init()
    rows = torch.arange(16)
    batch = Batch(run.population.images.plain(rows), torch.full((16,), 4), torch.ones(16))
    with_it, without = bound(part_of(name, weight=5.0), task), task
    (one, slope, _), (other, usual, _) = (each.gradient(each.loss, params, batch) for each in (with_it, without))
    assert torch.equal(one, other) and tree.largest_difference(slope, usual) == 0.0


@pytest.mark.parametrize("name", FORMS)
def test_features_of_classes_come_to_lie_further_apart(name: str) -> None:
    """What the paper is for: less similarity across classes than cross-entropy alone leaves."""
    across, weight = [], 8.0 if name == "log_determinant" else 0.5
    for text in ("fedavg", f"fedavg+{name}(weight={weight})"):
        run = ran(text, participation=1.0, rounds=4)
        rows, server = torch.arange(120), run.progress.server
        images = run.population.images
        with torch.no_grad():
            z = run.task.model.features(server["body"], images.plain(rows))
        unit = z / z.norm(dim=1, keepdim=True)
        unlike = images.y[rows][:, None] != images.y[rows]
        across.append(float((unit @ unit.T)[unlike].mean()))
    assert across[1] < 0.9 * across[0]


@dataclass(frozen=True, kw_only=True)
class TwoViews(Algorithm):
    """FedAvg with a loss beside cross-entropy, written out, on two views of each example."""

    part: Loss

    def local_update(self, task: Task, shared: Tree, private: Tree, data: LocalData) -> tuple[Tree, Tree]:
        task = bound(self.part, task)
        return task.sgd(task.loss, shared, data.batches(task.epochs, views=2)), private


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_two_views_are_those_that_a_method_would_ask_for(engine: str) -> None:
    part = part_of("facility_location", weight=1.0, views=2)
    (fedavg,) = parse_algorithms("fedavg")
    views = {"augment": "crop_flip", "rounds": 1}
    mine, written = (ran(row, engine, **views) for row in (Composed(fedavg, (part,)), TwoViews(part=part)))
    one = ran("fedavg+facility_location(weight=1)", engine, **views)
    assert tree.digest([mine.progress.server]) == tree.digest([written.progress.server])
    assert tree.largest_difference(mine.progress.server, one.progress.server) > 1e-4
    samples = [run.outcome().cost["train_samples"] for run in (mine, written, one)]
    assert samples[0] == samples[1] == 2 * (samples[2] or 0)


@pytest.mark.equivalence
@pytest.mark.parametrize("engine", ENGINES)
def test_in_batches_of_one_example_two_of_them_are_fedavg(engine: str) -> None:
    setting = replace(SETTING, batch_size=1, rounds=1, epochs=1, participation=1.0)
    rows = parse_algorithms("fedavg,fedavg+facility_location(weight=5),fedavg+graph_cut(weight=5)")
    runs = [toy.run(row, engine, setting=setting, sizes=(9, 4, 0, 0, 0, 0, 0, 0)) for row in rows]
    plain, *others = (toy.finish(run).progress.server for run in runs)
    assert [tree.largest_difference(other, plain) for other in others] == [0.0, 0.0]
    assert tree.largest_difference(plain, runs[0].task.init()) > 1e-4


def test_two_views_alone_are_a_row_and_the_control_of_two_views_with_a_term() -> None:
    """At weight 0 nothing is left out but the term: cross-entropy of both views is not FedAvg."""
    (row,) = parse_algorithms("fedavg+facility_location(weight=0, views=2)")
    assert label(row) == "fedavg+facility_location(weight=0.0, views=2)"
    controls = [ran(f"fedavg+{name}(weight=0, views=2)", rounds=1, augment="crop_flip") for name in list(FORMS)[:2]]
    assert len({tree.digest([run.progress.server]) for run in controls}) == 1
    plain = ran("fedavg", rounds=1, augment="crop_flip")
    assert tree.largest_difference(controls[0].progress.server, plain.progress.server) > 1e-4


def test_runs_of_one_view_are_those_of_before_there_were_two() -> None:
    for name in FORMS:
        assert "views" not in told(part_of(name)) and told(part_of(name, views=2))["views"] == 2
        (paper,) = PAPER.choose(parse_algorithms(f"fedavg+{name}")[0])[0].pieces[1:]
        assert paper == part_of(name, views=2)


def test_a_method_that_asks_for_views_itself_keeps_its_number() -> None:
    own = replace(data_of(toy.run(toy.Host()), 0), views=2)
    count = {asked: len(next(own.batches(1, batch_size=4, views=asked)).y) for asked in (None, 1, 2, 3)}
    assert count == {None: 8, 1: 4, 2: 8, 3: 12}
    rest, aside = own.part(0.5, "validation")
    assert (rest.views, aside.views, own.unlabelled().views) == (2, 2, 2)
    assert all(part_of(name).views == 1 for name in FORMS) and PARTS["focal"]().views == 1


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_engines_agree_on_two_views(name: str, fields: dict[str, Any]) -> None:
    (fedavg,) = parse_algorithms("fedavg")
    row = Composed(fedavg, (part_of(name, weight=2.0, views=2, **fields),))
    runs = [ran(row, engine, augment="crop_flip", rounds=1) for engine in ENGINES]
    assert tree.largest_difference(*map(toy.states, runs)) < TOLERANCE
    assert runs[0].outcome().cost["train_samples"] == runs[1].outcome().cost["train_samples"]


def test_what_is_drawn_by_places_in_a_batch_is_of_one_view_whatever_a_part_asks() -> None:
    """Padding stands between the views of stacked clients: a place of the second is another one there."""
    (row,) = parse_algorithms("fedafa+facility_location(weight=0, views=2)")
    setting = replace(SETTING, rounds=1, epochs=1)
    runs = [toy.finish(toy.run(row, engine, setting=setting)) for engine in ENGINES]
    assert tree.largest_difference(*map(toy.states, runs)) < TOLERANCE
