"""Generic accuracy by class, head to tail: which rows are drawn, and what of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import vl_convert

from bench.results import records
from bench.results.leaderboard import Leaderboard, leaderboards
from bench.site.charts import Figure
from bench.site.run_page import Shown
from bench.site.shelves import drawn
from bench.site.tails import chosen, tails
from tests.test_site import made, pages, plant


def figure(out: Path) -> tuple[Leaderboard, Figure | None]:
    found = {record.id: record for record in records.read_all(out)[0]}
    (board,) = leaderboards(found.values())
    shown = (Shown(record=each, label="", siblings=(), title="", page="") for each in found.values())
    return board, tails(board, found, drawn(shown))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FedRoD above FedAvg by the seeds, its control, a reference above all, and a row without a generic model."""
    out = tmp_path_factory.mktemp("tails") / "results"
    for name, seeds, label in (
        ("fedrod", 3, None), ("fedavg", 2, None), ("fedrod+cross_entropy", 1, "fedrod+cross_entropy"),
        ("centralised", 4, None), ("gamma", 2, None),
    ):  # fmt: skip
        for seed in range(seeds):
            plant(out, name, seed, label=label)
    return out


def test_the_best_method_is_drawn_beside_fedavg_and_its_control(out: Path) -> None:
    board, drawn_ = figure(out)
    means = {row.label: row.metrics["generic"].mean or 0.0 for row in board.rows if row.label != "gamma"}
    assert max(means, key=lambda label: means[label]) == "centralised" and means["fedrod"] > means["fedavg"]
    assert [row.label for row in chosen(board)] == ["fedrod", "fedavg", "fedrod+cross_entropy"]
    assert drawn_ is not None and drawn_.heading[2:] == ("fedrod", "fedavg", "fedrod+cross_entropy")
    assert "fedrod, the best of all rows but references; fedavg; fedrod+cross_entropy, a control of it." in drawn_.says
    text = next(text for name, text in pages(made(out, out.parent / "site")).items() if name.startswith("comparisons"))
    assert 'id="tails"' in text.source and "Generic accuracy by class, head to tail" in text.text


def test_a_class_is_a_mean_over_the_seeds_of_a_row(out: Path) -> None:
    _, shown = figure(out)
    assert shown is not None
    runs = [record for record in records.read_all(out)[0] if record.algorithm == "fedrod"]
    assert [row[:2] for row in shown.rows] == [("0", "400"), ("1", "90"), ("2", "30"), ("3", "8")]
    for label, cells in enumerate(shown.rows):
        right = [run.confusion("generic")[label, label] / 50 for run in runs]
        assert len(right) == 3 and cells[2] == f"{100 * math.fsum(right) / 3:.1f}"
    assert "put together" not in shown.says
    (spec,) = shown.specs
    assert "<svg" in vl_convert.vegalite_to_svg({**spec, "width": 400})


def test_of_a_hundred_classes_ten_neighbours_are_one_dot_and_that_is_said(tmp_path: Path) -> None:
    run = plant(tmp_path, "fedavg", counts=[500 - place for place in range(100)])
    _, shown = figure(tmp_path)
    assert shown is not None and "in 10 groups of neighbours, as equal as can be" in shown.says
    assert [row[0] for row in shown.rows] == [f"{first} to {first + 9}" for first in range(1, 101, 10)]
    assert shown.rows[0][1] == "496" and shown.rows[-1][1] == "406"
    right = records.read(tmp_path / run).confusion("generic").diagonal() / 50
    assert [row[2] for row in shown.rows] == [f"{100 * right[at : at + 10].mean():.1f}" for at in range(0, 100, 10)]


def test_without_generic_models_there_is_no_such_picture(tmp_path: Path) -> None:
    plant(tmp_path, "gamma")
    assert figure(tmp_path)[1] is None
