"""What a suite's page says of all its cells together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.protocol.suites import Suite
from bench.results import records
from bench.results.among import BEST, separated_among_best
from bench.results.comparison import part_over_datasets
from bench.results.leaderboard import Leaderboard, Row, leaderboards, measured
from bench.results.statistics import pairwise
from bench.site import suite_page
from bench.site.build import build
from tests.test_site import pages, plant, squeezed

SUITE = Suite(name="planted", version=1, title="Planted.", shows="shows", hides="hides", costs="costs", options={})


@pytest.fixture
def of_a_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs are of one suite, whatever their protocol."""
    monkeypatch.setattr("bench.site.pages.suites_of", lambda record: [SUITE.name])
    monkeypatch.setattr(suite_page, "suites", SimpleNamespace(suite=lambda name: SUITE))


def written(out: Path) -> dict[str, Any]:
    found, _ = records.read_all(out)
    build(found, out.parent / "site")
    return {**pages(out.parent / "site")}


@pytest.mark.usefixtures("of_a_suite")
def test_a_suite_of_several_datasets_has_ranks_costs_and_a_sentence_for_each_cell(tmp_path: Path) -> None:
    for dataset in ("digits", "faces", "flowers"):
        for algorithm in ("alpha", "beta"):
            for seed in range(6):
                plant(tmp_path / "out", algorithm, seed, dataset=dataset, evaluations=1)
    page = written(tmp_path / "out")["suites/planted.html"]
    boards = leaderboards(records.read_all(tmp_path / "out")[0])
    part = part_over_datasets(boards, "personal.balanced")
    assert part is not None and part.ranking is not None and part.ranking.blocks == 3
    assert "over 3 datasets: a dot is an average rank" in page.text
    assert all(sentence in page.text for sentence in part.says)
    for place, board in enumerate(boards):
        assert f'id="cost-balanced-{place}"' in page.source and f'id="cost-generic-{place}"' in page.source
        assert page.text.count(separated_among_best(board)) >= 1
    assert page.text.count("The only pair among its 2 best rows is separated") == 3


@pytest.mark.usefixtures("of_a_suite")
def test_cells_of_one_dataset_are_no_blocks_and_that_is_said(tmp_path: Path) -> None:
    for imbalance in (10.0, 50.0):
        for algorithm in ("alpha", "beta"):
            plant(tmp_path / "out", algorithm, imbalance=imbalance, evaluations=1)
    page = written(tmp_path / "out")["suites/planted.html"]
    assert 'id="ranks-' not in page.source
    assert "There are no ranks over its cells, which are all of one dataset. Settings of one dataset share" in page.text
    assert squeezed("digits, imbalance 50, alpha 0.5, setting quick") in squeezed(page.text)


def board_of(out: Path, methods: int, seeds: int) -> Leaderboard:
    """Plant one run, and make of it rows that are apart on each seed, the first row the highest."""
    plant(out, evaluations=1)
    (board,) = leaderboards(records.read_all(out)[0])
    (row,) = board.rows

    def made(place: int) -> Row:
        values = tuple(0.9 - 0.01 * place - 0.0001 * seed for seed in range(seeds))
        return replace(
            row,
            label=f"m{place:02}",
            seeds=tuple(range(seeds)),
            splits=("",) * seeds,
            values={"personal.balanced": values},
        )

    return replace(board, rows=tuple(map(made, range(methods))))


def test_pairs_among_the_ten_best_are_corrected_for_themselves_alone(tmp_path: Path) -> None:
    board = board_of(tmp_path, methods=12, seeds=11)
    assert BEST == 10
    says = separated_among_best(board)
    assert says.startswith("45 of the 45 pairs among its 10 best rows are separated by the signed-rank test")
    everything = pairwise(measured(board, "personal.balanced"))
    assert not any(pair.separated for pair in everything), "corrected for all 66 pairs none would be"


def test_where_seeds_are_too_few_the_sentence_says_how_many_could(tmp_path: Path) -> None:
    says = separated_among_best(board_of(tmp_path, methods=3, seeds=2))
    assert says.startswith("0 of the 3 pairs among its 3 best rows are separated")
    assert "2 seeds cannot separate any two of 3 algorithms" in says and says.endswith("seeds could.")


def test_one_row_has_no_pair(tmp_path: Path) -> None:
    assert "there is no pair to separate" in separated_among_best(board_of(tmp_path, methods=1, seeds=1))
