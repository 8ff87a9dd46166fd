"""Open classes: nobody trains on them, nothing else is tested on them, and models may know them for that."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import Algorithm, keys
from bench.contract import toy
from bench.dataset import Labels
from bench.plugins.registry import ALGORITHMS
from bench.protocol.bundles import SETTINGS
from bench.protocol.settings import BadConfig
from bench.results import records
from bench.results.columns import columns
from bench.results.layout import remarks
from bench.results.leaderboard import leaderboards
from bench.splits.longtail import group_classes
from bench.splits.open_set import episode, known_rows, open_classes
from bench.splits.split import PartitionFailed, make_split
from bench.sweep import driver
from bench.sweep.config import Sweep, parse_dataset
from bench.sweep.pool import InProcess
from bench.training import open_set
from bench.training.job import Job
from bench.training.open_set import asked_of, is_line, line, measured, of_client, threshold
from bench.training.rounds import Run
from bench.validation.report import validate

LABELS = Labels(torch.arange(2000) % 10, torch.arange(500) % 10)
SETTING = replace(SETTINGS["quick"](parse_dataset("digits")), clients=6, unseen=2, imbalance=5.0, open_classes=3)


def sweep(overrides: dict[str, Any]) -> Sweep:
    return Sweep(
        algorithms=(ALGORITHMS["fedavg"](),),
        datasets=(parse_dataset("digits"),),
        overrides={"rounds": 1, "epochs": 1, **overrides},
        data_root=Path("."),
    )


# Which classes, and whose ------------------------------------------------------------------------------------


def test_open_classes_are_in_no_client_and_in_no_group_and_no_others_are_missing() -> None:
    for seed, client_test in product((0, 1), ("matched", "balanced", "global")):
        split = make_split(LABELS, 10, replace(SETTING, client_test=client_test), seed)
        here = set(split.open.tolist())
        assert len(here) == 3 and split.open.tolist() == sorted(here)
        assert set(LABELS.train[torch.cat(split.clients)].tolist()) == set(range(10)) - here
        assert set(LABELS.test[torch.cat(split.tests)].tolist()) == set(range(10)) - here
        assert (split.class_counts == 0).nonzero().flatten().tolist() == sorted(here)
        whole = make_split(LABELS, 10, replace(SETTING, open_classes=0), seed)
        others = [c for c in range(10) if c not in here]
        assert torch.equal(split.class_counts[others], whole.class_counts[others]), "the tail is the same"
        groups = group_classes(split.class_counts, "thirds", split.open)
        assert {group: len(classes) for group, classes in groups.items()} == {"many": 3, "medium": 2, "few": 2}
        assert torch.cat([*groups.values()]).sort().values.tolist() == others
        assert split.class_counts[groups["many"]].min() >= split.class_counts[groups["few"]].max()


def test_users_are_not_tested_on_open_classes_either() -> None:
    users = torch.arange(2000) // 10 % 6, torch.arange(500) // 10 % 6
    setting = replace(SETTING, partition="users", alpha=None, client_test="own", imbalance=None)
    split = make_split(Labels(LABELS.train, LABELS.test, *users), 10, setting, 0)
    assert not torch.isin(LABELS.test[torch.cat(split.tests)], split.open).any()
    assert not torch.isin(LABELS.train[torch.cat(split.clients)], split.open).any() and split.left_out == 0


def test_they_are_drawn_by_the_seed_of_the_split() -> None:
    drawn = [open_classes(SETTING, 10, seed).tolist() for seed in range(8)]
    assert len({tuple(each) for each in drawn}) > 4 and drawn[3] == open_classes(SETTING, 10, 3).tolist()
    assert open_classes(replace(SETTING, split_seed=3), 10, 0).tolist() == drawn[3]
    assert open_classes(replace(SETTING, open_classes=0), 10, 0).tolist() == []
    with pytest.raises(PartitionFailed, match=r"open_classes = 9: of 10 classes at most 8 can be"):
        make_split(LABELS, 10, replace(SETTING, open_classes=9), 0)


def test_a_client_is_asked_with_shots_of_its_classes_about_all_its_test_images_of_them() -> None:
    train, test = torch.tensor([4] * 9 + [1] * 2 + [7] * 5 + [2] * 6), torch.tensor([1, 4, 7, 4, 7, 7])
    setting, key = replace(SETTING, shots=3), keys.key(0)
    asked = episode(setting, key, 5, train, test, 100)
    assert asked is not None
    assert train[asked.shots].tolist() == [4] * 3 + [7] * 3, "1 has too few shots, and of 2 there is no test image"
    assert len(asked.shots.unique()) == 6 and asked.known.tolist() == [1, 2, 3, 4, 5] and len(asked.open) == 5
    assert asked.open.tolist() == sorted(set(asked.open.tolist())) and int(asked.open.max()) < 100
    few = episode(setting, key, 5, train, test, 2)
    assert few is not None and few.open.tolist() == [0, 1], "all that there are"
    drawn = [episode(setting, keys.key(seed), client, train, test, 100) for seed, client in ((0, 6), (1, 5), (0, 5))]
    assert [each is not None and torch.equal(each.shots, asked.shots) for each in drawn] == [False, False, True]
    assert episode(replace(setting, shots=6), key, 5, train, test, 100) is None, "of one class alone"


def test_ways_limit_the_classes() -> None:
    train, test = torch.arange(8).repeat(5), torch.arange(8)
    several = [episode(replace(SETTING, ways=3), keys.key(seed), 0, train, test, 9) for seed in range(6)]
    chosen = {tuple(train[each.shots].unique().tolist()) for each in several if each is not None}
    assert {len(classes) for classes in chosen} == {3} and len(chosen) > 1
    assert all(each is not None and set(test[each.known].tolist()) in map(set, chosen) for each in several)


# Numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        ("+++|???", (1.0, 1.0, 1.0, 1.0)),
        ("(+++???)|", (1.0, 0.5, 0.5, 0.0)),
        ("???|+++", (1.0, 0.0, 0.0, 0.0)),
        ("---|???", (0.0, 1.0, 0.0, 0.0)),
        # 2 of 3 right; of six pairs 2 + 3 are in order; one right before the first open one, two before the second
        ("+-?|+?", (2 / 3, 5 / 6, 1 / 2, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))),
        ("+(+?)-|?", (2 / 3, (1.5 + 3) / 6, (1.5 + 2) / 6, 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))),
        ("+-?+?", (2 / 3, 5 / 6, 1 / 2, None)),
        ("+-|", (1 / 2, None, None, None)),
    ],
)
def test_the_numbers_of_a_line(written: str, numbers: tuple[float | None, ...]) -> None:
    assert is_line(written) and of_client(written) == pytest.approx(numbers)


def test_they_are_what_they_are_by_definition_ties_too() -> None:
    """AUROC by all pairs; OSCR as the trapezoid under correct-and-accepted against accepted open ones."""
    for seed in range(20):
        key = keys.key(seed)
        known, others = 7 + seed, 4 + seed % 5
        sure = keys.bits(keys.fold(key, "sure"), known + others).remainder(6 + seed).float()
        right = keys.bits(keys.fold(key, "right"), known + others).remainder(3) > 0
        written = line(right, known, sure, 3.0)
        pairs = [float(a > b) + float(a == b) / 2 for a in sure[:known] for b in sure[known:]]
        levels = sorted(set(sure.tolist()), reverse=True)
        curve = [(0.0, 0.0)] + [
            (
                float((sure[known:] >= level).float().mean()),
                float(((sure[:known] >= level) & right[:known]).float().mean()),
            )
            for level in levels
        ]
        area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(curve))
        fit = float(((sure[:known] >= 3) & right[:known]).float().mean())
        apart = float((sure[known:] < 3).float().mean())
        wanted = float(right[:known].float().mean()), sum(pairs) / len(pairs), area, 2 * fit * apart / (fit + apart)
        assert is_line(written) and asked_of(written) == (known, others)
        assert of_client(written) == pytest.approx(wanted, abs=1e-6)


def test_a_line_names_images_from_the_surest_on_and_the_threshold_accepts_what_equals_it() -> None:
    right, sure = torch.tensor([True, False, True, True, True]), torch.tensor([1.0, 3.0, 2.0, 2.0, 1.0])
    assert line(right, 3, sure, 2.0) == "-(+?)|(+?)"
    assert line(right, 3, sure, 2.5) == "-|(+?)(+?)" and line(right, 3, sure, 4.0) == "|-(+?)(+?)"
    assert line(right, 3, sure, 0.5) == "-(+?)(+?)|" and line(right, 3, sure, None) == "-(+?)(+?)"
    for wrong in ("+|-|?", "+(-)", "(+?", "+x", "(+|?)"):
        assert not is_line(wrong), wrong


def test_a_mean_over_clients_leaves_out_who_has_no_number() -> None:
    assert measured({1: "+|?", 2: "-?", 3: "+"}) == {
        "unseen.closed": pytest.approx(2 / 3), "unseen.auroc": 1.0, "unseen.oscr": 0.5, "unseen.h": 1.0,
    }  # fmt: skip
    assert measured({}) == dict.fromkeys(open_set.METRICS)


def test_the_threshold_accepts_nine_of_ten_shots_each_judged_by_the_others() -> None:
    labels = torch.arange(20) % 2
    support = torch.arange(20.0)[:, None]
    seen: list[int] = []

    def judge(z: Tensor, others: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        assert not (others == z).any() and len(others) == len(of) == 19
        assert torch.equal(others[:, 0].long() % 2, of)
        seen.append(int(z))
        return torch.zeros(1, dtype=torch.int64), z[:, 0]

    assert threshold(judge, support, labels) == 2.0 and seen == [*range(20)], "18 of 20 are as sure"
    assert threshold(judge, support, torch.tensor([0] * 19 + [1])) is None, (
        "who has no other of its class is not judged"
    )


# A model's answers -------------------------------------------------------------------------------------------


def judged(z: Tensor, support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    method: Algorithm = ALGORITHMS["fedavg"]()
    return method.open_set(toy.task(method), {}, z, support, labels)


def test_by_default_the_nearest_mean_of_shots_decides() -> None:
    support, labels = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 4.0]]), torch.tensor([1, 1, 0])
    taken, sure = judged(torch.tensor([[1.0, 1.0], [5.0, 1.0]]), support, labels)
    assert taken.tolist() == [1, 0] and sure.tolist() == [-1.0, -3.0]
    other, alike = judged(torch.tensor([[1.0, 1.0], [5.0, 1.0]]), support.flip(0), 1 - labels.flip(0))
    assert torch.equal(other, 1 - taken) and torch.equal(alike, sure), "whatever classes are called"


def test_chance_is_one_of_the_ways_and_features_that_part_are_perfect() -> None:
    ways, shots = 4, 6
    labels = torch.arange(ways * shots) % ways
    truth = torch.arange(4000) % ways
    noise = keys.normal_rows(keys.fold(keys.key(0), torch.arange(4000 + len(labels))), 8)
    taken, sure = judged(noise[:4000], noise[4000:], labels)
    closed, auroc, *_ = of_client(line(taken == truth, 2000, sure, None))
    assert closed == pytest.approx(1 / ways, abs=0.03) and auroc == pytest.approx(0.5, abs=0.03)
    apart = torch.eye(8)[labels] + 0.01 * noise[4000:]
    z = torch.cat([torch.eye(8)[truth[:200]], torch.eye(8)[4 + truth[:200]]]) + 0.01 * noise[:400]
    taken, sure = judged(z, apart, labels)
    assert of_client(line(taken == truth[:400], 200, sure, None))[:3] == (1.0, 1.0, 1.0)
    taken, sure = judged(torch.zeros(400, 8), torch.zeros(len(labels), 8), labels)
    assert of_client(line(taken == truth[:400], 200, sure, None))[:3] == pytest.approx((1 / ways, 0.5, 0.5 / ways))


# A run -------------------------------------------------------------------------------------------------------

FEW = {"clients": 6, "unseen": 2, "open_classes": 3, "shots": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("open")
    (ended,) = driver.run(sweep(FEW).expand(), out, pool=InProcess())
    assert ended.status == "done"
    return out


def test_a_run_tells_the_lines_of_its_clients_and_generic_models_are_tested_on_known_classes(finished: Path) -> None:
    (record,) = records.read_all(finished)[0]
    labels = torch.tensor(record.class_counts)
    withheld = (labels == 0).nonzero().flatten()
    told = record.counts()
    assert len(withheld) == 3 and not set(told["class"]) & set(withheld.tolist())
    assert set(record.open_set) == {"4", "5"}
    assert measured(record.open_set) == {key: record.metrics[key] for key in open_set.METRICS}
    assert all(0 < (record.metrics[key] or 0) < 1 for key in ("unseen.closed", "unseen.auroc", "unseen.oscr"))
    known, others = asked_of(record.open_set["4"])
    rows = told[(told["model"] == "unseen") & (told["client"] == 4)]
    assert 0 < known <= rows["total"].sum() and others == known


def test_a_table_shows_it_and_says_what_it_is(finished: Path) -> None:
    (board,) = leaderboards(records.read_all(finished)[0])
    assert {"closed", "AUROC", "OSCR", "open-set H"} <= {column.title for column in columns(board)}
    (said,) = [note for note in remarks(board) if note.startswith("open set")]
    assert said.startswith("open set: 3 classes, drawn by the seed, are withheld from all clients")


def problems_of(out: Path) -> list[str]:
    """Of runs: there is no table beside them."""
    return [str(each) for each in validate(out, Path(".")).problems if each.file != "README.md"]


def test_validation_sees_lines_that_are_others(finished: Path) -> None:
    assert problems_of(finished) == []
    (file,) = finished.glob("*/run.json")
    document, written = json.loads(file.read_text()), file.read_text()
    was = document["open_set"]["4"]

    def problems(line: str | None) -> list[str]:
        told = {**document["open_set"], "4": line}
        file.write_text(json.dumps({**document, "open_set": {k: v for k, v in told.items() if v is not None}}))
        found = problems_of(finished)
        file.write_text(written)
        return found

    better = "+" * was.count("+") + "-" * was.count("-") + "|" + "?" * was.count("?")
    assert any("metrics.unseen.auroc" in each for each in problems(better))
    assert any("open_set.4" in each and "images of known and of open classes" in each for each in problems(was + "??"))
    assert any("open_set.4" in each for each in problems(None))
    assert any("is no line of an open-set test" in each for each in problems("good"))


def test_closed_is_how_often_the_nearest_mean_of_shots_is_of_an_images_own_class() -> None:
    dataset, setting = toy.Toy(), replace(toy.SETTING, rounds=2, unseen=3, open_classes=2, shots=2)
    splits = dataset.load()
    split = make_split(splits.labels, 6, setting, 0)
    run = toy.finish(Run(Job(ALGORITHMS["fedavg"](), dataset, splits, split, setting, 0, "serial")))
    population, server = run.population, run.progress.server
    for client, written in run.progress.open_set.items():
        asked = population.episode(client)
        assert asked is not None
        shots, tests = population.index[client][asked.shots], population.tests[client][asked.known]
        support, z = (
            run.task.model.features(server["body"], images.plain(rows))
            for images, rows in ((population.images, shots), (population.test, tests))
        )
        labels = population.images.y[shots]
        means = torch.stack([support[labels == label].mean(0) for label in labels.unique()])
        taken = labels.unique()[(z[:, None] - means).square().sum(2).argmin(1)]
        assert of_client(written)[0] == pytest.approx(float((taken == population.test.y[tests]).float().mean()))


def test_both_engines_and_a_run_that_went_on_have_the_same_lines(tmp_path: Path) -> None:
    dataset, setting = toy.Toy(), replace(toy.SETTING, rounds=2, unseen=3, open_classes=2, shots=2)
    splits = dataset.load()
    split = make_split(splits.labels, 6, setting, 0)

    def run(engine: str, checkpoint: Path | None = None) -> Any:
        return Run(Job(ALGORITHMS["fedavg"](), dataset, splits, split, setting, 0, engine), checkpoint)

    one, other = (toy.finish(run(engine)).outcome() for engine in ("serial", "stacked"))
    assert one.open_set.keys() == other.open_set.keys() and len(one.open_set) == 3
    assert one.metrics["unseen.auroc"] == pytest.approx(other.metrics["unseen.auroc"], abs=0.02)
    first = toy.finish(run("serial", tmp_path / "checkpoint.pt")).outcome()
    again = run("serial", tmp_path / "checkpoint.pt")
    assert again.resumed and again.outcome().open_set == first.open_set == one.open_set


# What is said ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"open_classes": 3}, "clients held out of training are asked about them; say how many with --set unseen=4"),
        (
            {**FEW, "unseen_labels": False},
            "open_classes = 3: shots have labels, and unseen_labels = False knows of none",
        ),
        ({**FEW, "attack": "pgd"}, "open_classes = 3: no attack looks at classes that are withheld"),
        ({"shots": 3}, "shots = 3: there is no open-set test; leave it out, or say how many with --set open_classes=3"),
        ({"ways": 3}, "ways = 3: there is no open-set test"),
        ({**FEW, "ways": 1}, "ways = 1: must be a whole number"),
    ],
)
def test_what_would_do_nothing_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        sweep(overrides).expand()
    assert said in str(caught.value)


def test_known_rows_are_those_of_no_open_class() -> None:
    assert known_rows(torch.tensor([3, 1, 2, 3, 0]), torch.tensor([1, 3])).tolist() == [2, 4]
    assert known_rows(torch.tensor([3, 1]), torch.tensor([], dtype=torch.int64)).tolist() == [0, 1]
