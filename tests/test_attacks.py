"""Attacks on test images: where they may go, what they find, from where they are drawn, and how they are reported."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import Task, Tree, attacks, keys, models, tree
from bench.attacks import EPSILON, STEP, Ball
from bench.command.main import main
from bench.contract import toy
from bench.data import Images
from bench.plugins.registry import ALGORITHMS, DATASETS
from bench.protocol.settings import LATER, OF_AN_ATTACK, BadConfig
from bench.protocol.words import _USUAL_ATTACK, attack_in_words
from bench.results import columns, layout
from bench.results.leaderboard import leaderboards
from bench.site.rows import COLUMNS
from bench.sweep.resolving import resolve_setting
from bench.training import apgd, robustness
from bench.training.job import surroundings
from bench.training.population import draw_attacked
from bench.training.rounds import Run
from bench.validation.inspection import inspect
from tests.by_hand import short
from tests.test_crew import hired
from tests.test_results import record

HARD = replace(toy.SETTING, rounds=2, attack="pgd", attack_epsilon=0.1, attack_step=0.03, attack_steps=5)
KEYS = keys.fold(keys.key(3), torch.arange(40))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ATTACKED = {"generic.robust", "personal.robust"}


def ball(epsilon: float, step: float = 0.01, low: float = -9.0, high: float = 9.0) -> Ball:
    """A ball of one channel, whose pixels are numbers as they are."""
    return Ball(*(torch.full((1, 1, 1), each) for each in (epsilon, step, low, high)))


def pictures() -> Images:
    x = torch.arange(40 * 3 * 16).reshape(40, 3, 4, 4) % 256
    return Images(x.to(torch.uint8), torch.zeros(40, dtype=torch.int64), MEAN, STD)


def linear(weight: list[list[float]], bias: list[float] | None = None) -> Callable[[Tensor], Tensor]:
    rows = torch.tensor(weight)
    return lambda x: F.linear(x.flatten(1), rows, None if bias is None else torch.tensor(bias))


def network(classes: int = 6, seed: int = 1) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """A small curved model, and images that it mostly knows."""
    model = models.build("mlp", classes, (1, 8, 8))
    w = model.init(keys.key(seed))
    x = keys.normal(keys.key(seed + 1), 40, 1, 8, 8)

    def score(x: Tensor) -> Tensor:
        return model.logits(w["head"], model.features(w["body"], x))

    return score, x, score(x).argmax(1)


def answers(run: Run) -> dict[str, Tensor]:
    """What the last evaluation took images for."""
    return {tally.model: tally.rows for tally in run.progress.predictions}


def right(rows: Tensor) -> dict[tuple[int, int], int]:
    """Right answers by client and class."""
    found: dict[tuple[int, int], int] = {}
    for client, label, predicted, images in rows[:4].T.tolist():
        found[client, label] = found.get((client, label), 0) + images * (label == predicted)
    return found


# Where an attack may go -----------------------------------------------------------------------------------------------


def test_the_range_ends_at_the_darkest_and_the_brightest_pixel_to_the_bit() -> None:
    ends = torch.tensor([[0, 255]]).expand(3, 2).reshape(1, 3, 1, 2).to(torch.uint8)
    images = Images(ends, torch.zeros(1), MEAN, STD)
    dark, bright = images.plain(torch.tensor([0]))[0].unbind(2)
    found = attacks.around(images, EPSILON, STEP)
    assert torch.equal(found.low[:, :, 0], dark) and torch.equal(found.high[:, :, 0], bright)
    for channel, std in enumerate(STD):
        assert float(found.epsilon[channel]) == pytest.approx(8 / 255 / std)
        assert float(found.step[channel]) == pytest.approx(2 / 255 / std)


@pytest.mark.parametrize("epsilon", [0.0, 8 / 255, 0.3])
def test_whatever_is_found_lies_in_the_ball_and_is_a_picture(epsilon: float) -> None:
    images = pictures()
    x = images.plain(torch.arange(40))
    found = attacks.around(images, epsilon, 0.1)

    def uphill(x: Tensor) -> Tensor:
        return (x * torch.arange(-23.5, 24.0).reshape(3, 4, 4)).sum()

    for made in (found.anywhere(x, KEYS), found.beside(x, KEYS), found.ascended(uphill, x, x, 4)):
        std, mean = (torch.tensor(each)[:, None, None] for each in (STD, MEAN))
        pixels, before = (each * std + mean for each in (made, x))
        assert float((pixels - before).abs().max()) <= epsilon + 1e-6
        assert float(pixels.min()) >= -1e-6 and float(pixels.max()) <= 1 + 1e-6
        assert made.stride() == x.stride()
        assert torch.equal(made, x) == (epsilon == 0.0)
    if epsilon:  # as far as it may go, within the range
        end = (found.ascended(uphill, x, x, 4) - x).abs() / found.epsilon
        inside = (before > epsilon) & (before < 1 - epsilon)
        assert float(end[inside].min()) > 0.999 or epsilon > 0.1


def test_a_start_is_uniform_in_the_ball_and_hangs_on_the_image_alone() -> None:
    x = torch.zeros(40, 1, 16, 16)
    found = ball(0.5).anywhere(x, KEYS)
    counted = torch.histc(found, 10, -0.5, 0.5) / found.numel()
    assert float((counted - 0.1).abs().max()) < 0.01 and float(found.mean().abs()) < 0.01
    for some in (torch.tensor([7]), torch.tensor([9, 2, 30])):
        assert torch.equal(ball(0.5).anywhere(x[some], KEYS[some]), found[some])
        assert torch.equal(ball(0.5).beside(x[some], KEYS[some]), ball(0.5).beside(x, KEYS)[some])
    noise = ball(0.5, low=0.0, high=1.0).beside(x + 0.5, KEYS) - 0.5
    assert float(noise.std()) == pytest.approx(0.001, rel=0.05)


# What it finds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "holds"), [(0.1, False), (0.04, True), (0.0, True)])
@pytest.mark.parametrize("attack", [robustness.by_pgd, apgd.worst])
def test_a_linear_model_is_broken_where_its_margin_is_below_epsilon_times_the_length_of_its_difference(
    epsilon: float, holds: bool, attack: Any
) -> None:
    """Of w_y - w_j = (1, -3) and a margin of 0.2: 0.2 - 4 · 0.1 is below 0, and 0.2 - 4 · 0.04 above."""
    x = torch.tensor([0.2, 0.0]).reshape(1, 1, 1, 2)
    found = attack(linear([[1.0, -3.0], [0.0, 0.0]]), x, torch.tensor([0]), ball(epsilon), 30, KEYS[:1])
    assert found.tolist() == [0 if holds else 1]


def test_of_two_classes_pgd_finds_all_that_there_are_and_no_others() -> None:
    score = linear(keys.normal(keys.key(5), 2, 16).tolist())
    x = keys.normal(keys.key(6), 40, 1, 4, 4)
    y = score(x).argmax(1)
    margin = (score(x)[torch.arange(40), y] - score(x)[torch.arange(40), 1 - y]).abs()
    difference = score(torch.eye(16).reshape(16, 1, 4, 4))
    reach = float((difference[:, 0] - difference[:, 1]).abs().sum())
    for epsilon in (0.05, 0.15, 0.4):
        found = robustness.by_pgd(score, x, y, ball(epsilon, epsilon / 4), 20, KEYS)
        assert torch.equal(found == y, margin > epsilon * reach)
    assert 0 < int((margin > 0.15 * reach).sum()) < 40


def test_the_loss_does_not_fall_and_the_first_point_is_the_image_itself() -> None:
    score, x, y = network()

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(score(x), y, reduction="sum")

    values = [loss(ball(0.2, 0.02).ascended(loss, x, x, steps)) for steps in range(8)]
    assert all(later > earlier for earlier, later in itertools.pairwise(values))
    wrong = (y + 1) % 6
    assert torch.equal(robustness.by_pgd(score, x, wrong, ball(0.0), 3, KEYS), score(x).argmax(1))


def test_an_image_is_broken_if_it_is_on_any_point_of_the_way() -> None:
    """A narrow strip of another class lies on the way to where the loss is largest by a hair."""

    def score(x: Tensor) -> Tensor:
        at = x.flatten(1)[:, :1]
        strip = torch.where((at > 0.045) & (at < 0.055), 5.0, 0.0)
        return torch.cat([torch.ones_like(at) - at, strip + 0.0 * at], 1)

    x = torch.zeros(1, 1, 1, 1)
    own = KEYS[:1]
    first = ball(0.1, 0.02).anywhere(x, own)
    steps = [float(first)]
    while steps[-1] < 0.1:
        steps.append(min(steps[-1] + 0.02, 0.1))
    met = any(0.045 < at < 0.055 for at in steps)
    found = robustness.by_pgd(score, x, torch.tensor([0]), ball(0.1, 0.02), 20, own)
    assert (int(found) == 1) == met
    found = robustness.by_pgd(score, x, torch.tensor([0]), ball(0.1, 0.005), 60, own)
    assert int(found) == (1 if first < 0.055 else 0)


def test_the_image_itself_is_looked_at_and_the_end_of_the_last_step() -> None:
    def hollow(x: Tensor) -> Tensor:
        at = x.flatten(1)[:, :1]
        return torch.cat([torch.zeros_like(at), torch.where(at.abs() < 1e-4, 1.0, -1.0) + 0 * at], 1)

    x, y = torch.zeros(1, 1, 1, 1), torch.tensor([0])
    assert robustness.by_pgd(hollow, x, y, ball(0.1), 3, KEYS[:1]).tolist() == [1]
    score, x = linear([[1.0, -3.0], [0.0, 0.0]]), torch.tensor([0.2, 0.0]).expand(40, 1, 1, 2)
    starts = score(ball(0.1).anywhere(x, KEYS)).argmax(1)
    found = robustness.by_pgd(score, x, torch.zeros(40, dtype=torch.int64), ball(0.1, 0.5), 1, KEYS)
    assert int((starts == 0).sum()) > 0 and found.tolist() == 40 * [1]


def test_what_an_image_is_taken_for_hangs_on_no_other() -> None:
    score, x, y = network()
    for attack in (robustness.by_pgd, apgd.worst):
        found = attack(score, x, y, ball(0.08, 0.02), 10, KEYS)
        assert 0 < int((found == y).sum()) < 40
        some = torch.tensor([31, 4, 17])
        assert torch.equal(attack(score, x[some], y[some], ball(0.08, 0.02), 10, KEYS[some]), found[some])


# In a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.equivalence
@pytest.mark.parametrize("name", ["fedavg", "fedrep"])
def test_an_attack_changes_nothing_but_adds_its_own_numbers(name: str) -> None:
    runs = [toy.finish(toy.run(short(name), setting=replace(HARD, attack=each))) for each in ("none", "pgd")]
    without, under = (run.outcome() for run in runs)
    assert without.digest == under.digest and without.rounds[:-1] == under.rounds[:-1]
    assert without.metrics == {key: value for key, value in under.metrics.items() if ".robust" not in key}
    assert not [key for key in without.metrics if "robust" in key]
    more = {key.partition(".robust")[0] for key in under.metrics.keys() - without.metrics.keys()}
    assert more == ({"personal"} if name == "fedrep" else {"generic", "personal"})
    costs = [{key: value for key, value in each.cost.items() if "seconds" not in key} for each in (without, under)]
    costs = [{key: value for key, value in each.items() if key != "peak_memory_bytes"} for each in costs]
    assert costs[0] == costs[1]


@pytest.mark.equivalence
def test_without_room_an_attack_counts_as_a_plain_test_does() -> None:
    run = toy.finish(toy.run(short("fedavg"), setting=replace(HARD, attack_epsilon=0.0)))
    found = answers(run)
    for kind in ("generic", "personal"):
        assert right(found[kind]) == right(found[f"{kind}.robust"]) and right(found[kind])


def test_fewer_are_recognised_under_attack_in_every_class_of_every_client() -> None:
    found = answers(toy.finish(toy.run(short("fedavg"), setting=HARD)))
    for kind in ("generic", "personal"):
        clean, robust = right(found[kind]), right(found[f"{kind}.robust"])
        assert clean.keys() == robust.keys() and all(robust[place] <= clean[place] for place in robust)
        assert 0 < sum(robust.values()) < sum(clean.values())


def test_some_images_are_drawn_by_the_seed_alone_and_a_client_has_its_own_of_them() -> None:
    setting = replace(HARD, attack_images=25, attack_steps=1)
    runs = [toy.finish(toy.run(short(name), setting=setting)) for name in ("fedavg", "fedper")]
    chosen = draw_attacked(setting, len(runs[0].population.test), keys.key(0))
    assert len(chosen.unique()) == 25 and torch.equal(chosen, chosen.sort().values)
    assert torch.equal(chosen, runs[1].population.attacked[-1])
    assert not torch.equal(chosen, draw_attacked(setting, len(runs[0].population.test), keys.key(1)))
    fewer = draw_attacked(replace(setting, attack_images=10), len(runs[0].population.test), keys.key(0))
    assert np.isin(fewer.numpy(), chosen.numpy()).all()
    assert int(answers(runs[0])["generic.robust"][3].sum()) == 25
    for run in runs:
        for client in range(7):
            own = [row for row in run.population.tests[client].tolist() if row in chosen.tolist()]
            rows = answers(run)["personal.robust"]
            assert int(rows[3, rows[0] == client].sum()) == len(own)


def test_it_attacks_through_the_methods_own_predictor() -> None:
    """FedNH's cosines: by its raw head the slope would be another."""
    run = toy.finish(toy.run(short("fednh"), setting=replace(HARD, attack_steps=3)))
    population, task = run.population, run.task_at(1)
    model = run.algorithm.global_model(task, run.progress.server)
    assert model is not None and task.ball is not None
    rows = population.attacked[-1]
    own = keys.fold(keys.fold(task.key, "attack"), rows)
    x, y = population.test.plain(rows), population.test.y[rows]
    by = partial(run.algorithm.predict, task, model)
    parts = zip(x.split(128), y.split(128), own.split(128), strict=True)
    expected = torch.cat([robustness.by_pgd(by, some, of, task.ball, 3, drawn) for some, of, drawn in parts])
    found = answers(run)["generic.robust"]
    assert sum(right(found).values()) == int((expected == y).sum())


@pytest.mark.parametrize("name", ["knnper", "fedem", "gbme", "fedcp", "gpfl", "fedetf", "fedgela", "fedproto", "fedbn"])
def test_predictors_of_all_kinds_can_be_attacked(name: str) -> None:
    setting = replace(HARD, rounds=1, attack_steps=2)
    metrics = toy.finish(toy.run(short(name), setting=setting)).outcome().metrics
    clean, robust = metrics["personal"], metrics["personal.robust"]
    assert clean is not None and robust is not None and robust < clean + 1e-9


def test_processes_and_the_size_of_a_slice_change_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy.finish(toy.run(short("fedavg"), setting=HARD))
    monkeypatch.setattr(robustness, "_SLICE", 16)
    several, ray = hired(partial(surroundings, run.job))
    again = toy.finish(Run(run.job, crew=several))
    assert ray.handed_out
    for kind in ATTACKED:
        assert torch.equal(answers(run)[kind], answers(again)[kind])


def test_both_engines_attack_from_the_same_points() -> None:
    found = [answers(toy.finish(toy.run(short("fedavg"), engine, setting=HARD))) for engine in ("serial", "stacked")]
    for kind in ATTACKED:
        apart = [abs(a - b) for a, b in zip(*(right(each[kind]).values() for each in found), strict=True)]
        assert sum(apart) <= 1  # models differ in last bits


def test_a_model_is_attacked_in_evaluation_mode_and_in_half_precision_too() -> None:
    setting = replace(HARD, model="resnet8", norm="batch", rounds=1, epochs=1, attack_steps=1, attack_images=20)
    for precision in ("fp32", "bf16"):
        run = toy.finish(toy.run(short("fedavg"), setting=setting, sizes=(9, 5, 0, 0, 0, 0, 0, 0), precision=precision))
        before = tree.clone(run.progress.server)
        again = run.evaluator.generic(run.task_at(0), run.progress.server, True)
        assert tree.largest_difference(before, run.progress.server) == 0.0
        (found,), rows = again["generic.robust"], answers(run)["generic.robust"]
        assert torch.equal(found[2], rows[3].long())


@pytest.mark.parametrize("name", ["fedavg", "local"])
def test_a_board_knows_which_images_are_attacked(name: str, tmp_path: Path) -> None:
    fields = "attack=pgd", "attack_images=150", "attack_steps=1"
    asked = [word for field in fields for word in ("--set", field)]
    few = "--rounds", "2", "--eval-clients", "7"
    command = ["run", "--algos", name, "--ray", "off", "--tracking-uri", "off", "--out", str(tmp_path), "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *few, *asked], prog_name="bench")
    (folder,) = (path.parent for path in tmp_path.glob("*/run.json"))
    found = inspect(folder, Path())
    assert ended.value.code in (None, 0) and found.dealt is not None and found.problems == []
    expected = {"personal"} if name == "local" else {"generic", "personal"}
    assert {kind for kind in found.tested if kind.endswith(".robust")} == {f"{kind}.robust" for kind in expected}
    rows = found.dealt.tested["generic.robust"]
    assert int(rows[2].sum()) == 150 and int(found.dealt.tested["generic"][2].sum()) > 150


# What is asked, and told ----------------------------------------------------------------------------------------------


def test_what_no_attack_reads_or_none_can_move_is_refused() -> None:
    assert set(OF_AN_ATTACK) < set(LATER)
    for key, value in (("attack_steps", 3), ("attack_images", 9)):
        with pytest.raises(BadConfig, match=f"{key} = {value}: no test is attacked; leave it out, or say how with"):
            resolve_setting("quick", DATASETS["digits"](), {key: value})
        assert getattr(resolve_setting("quick", DATASETS["digits"](), {key: value, "attack": "pgd"}), key) == value
    with pytest.raises(BadConfig, match="attack = 'autoattack': must be one of none, pgd, apgd"):
        resolve_setting("quick", DATASETS["digits"](), {"attack": "autoattack"})
    assert resolve_setting("quick", DATASETS["digits"](), {"attack_epsilon": 0.1}).attack_epsilon == 0.1


def test_examples_that_are_not_made_of_pixels_are_not_attacked(tmp_path: Path) -> None:
    file = tmp_path / "table.npz"
    floats = np.random.RandomState(0).rand(30, 5).astype(np.float32)
    np.savez(file, train_x=floats, train_y=np.arange(30) % 3, test_x=floats, test_y=np.arange(30) % 3)
    dataset: Any = DATASETS["arrays"](path=str(file))
    with pytest.raises(BadConfig, match="attack = pgd: these examples are not made of pixels"):
        resolve_setting("quick", dataset, {"attack": "pgd"})


def test_a_table_has_columns_of_attacks_where_there_was_one_and_a_dash_where_a_model_is_not() -> None:
    told = {"attack": "pgd", "attack_images": 500}
    values = {"personal.robust.balanced": 0.25, "personal.robust": 0.5}
    rows = [
        record("fedavg", setting=told, values={"generic.robust": 0.125, "generic.robust.few": 0.0, **values}),
        record("fedrep", setting=told, values=values),
    ]
    (board,) = leaderboards(rows)
    shown = {column.title: [column.show(row) for row in board.rows] for column in columns.columns(board)}
    assert sorted(shown["robust"]) == ["12.5", "–"] and shown["robust personal"] == ["50.0", "50.0"]
    assert {"robust", "robust balanced", "robust personal"} <= {column.title for column in columns.main_columns(board)}
    said = "robust: pgd moves each pixel by up to 8/255, along the slope of the model that is tested; on up to 500 test"
    assert any(line.startswith(said) for line in layout.remarks(board))
    (plain,) = leaderboards([record("fedavg")])
    assert not [column for column in columns.columns(plain) if "robust" in column.title]
    assert not [line for line in layout.remarks(plain) if "robust" in line]
    assert {column.key for column in columns.ROBUST} <= {column.key for column, _ in COLUMNS}


def test_what_is_usual_is_told_in_words_as_the_setting_has_it() -> None:
    assert all(LATER[key] == value for key, value in _USUAL_ATTACK.items())
    assert attack_in_words({}) is None
    assert "4/255" in str(attack_in_words({"attack": "apgd", "attack_epsilon": 4 / 255}))
    assert math.isclose(EPSILON, 8 / 255) and math.isclose(STEP, 2 / 255)
    assert robustness.STEPS == {"pgd": 20, "apgd": 100}


def test_a_task_without_pixels_has_no_ball() -> None:
    assert isinstance(toy.task(ALGORITHMS["fedavg"]()).ball, Ball)
    task: Task = replace(toy.task(ALGORITHMS["fedavg"]()), ball=None)
    model: Tree = task.init()
    assert tree.largest_difference(attacks.frozen(model), model) == 0.0
