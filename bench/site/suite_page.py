"""The page of a suite: what it is for, what all its cells say together, and their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.protocol import suites
from bench.protocol.suites import Suite
from bench.results.among import separated_among_best
from bench.results.comparison import part_over_datasets
from bench.results.layout import NOT_INDEPENDENT
from bench.results.leaderboard import Leaderboard
from bench.site import charts
from bench.site.methods import Method
from bench.site.rendering import render
from bench.site.rows import COLUMNS, Comparison, entries_of, headings, is_measured
from bench.site.run_page import Results

FOLDER = "suites"


def known(comparisons: Sequence[Comparison]) -> list[Suite]:
    """Give the suites that any comparison is of."""
    return [suites.suite(name) for name in sorted({name for each in comparisons for name in each.suites})]


def page(results: Results, comparisons: Sequence[Comparison], suite: Suite, methods: Mapping[str, Method]) -> str:
    """Show a suite.

    Args:
        results: What the site is made of.
        comparisons: All of the site.
        suite: One of those that are known.
        methods: That have a page, by name.
    """
    cells = [comparison for comparison in comparisons if suite.name in comparison.suites]
    wanted = {"overview", "unseen"}
    shown = [column for column, views in COLUMNS if wanted & {*views.split()} and is_measured(column, cells)]
    words = [("shows", suite.shows), ("does not show", suite.hides), ("costs", suite.costs)]
    words += [("needs", need) for need in suite.needs]
    ranks = over_datasets([cell.leaderboard for cell in cells])
    return render(
        "suite.html",
        "../",
        suite=suite,
        facts=[*words, ("run it", f"bench run --suite {suite.name}")],
        cells=[(cell, separated_among_best(cell.leaderboard)) for cell in cells],
        ranks=ranks,
        apart=None if ranks else _apart({cell.leaderboard.dataset for cell in cells}),
        figures=[[figure] for cell in cells for figure in _cost(cell)],
        columns=headings(shown),
        entries=[entry for cell in cells for entry in entries_of(results, cell, shown, methods)],
    )


def over_datasets(boards: Sequence[Leaderboard]) -> list[charts.Figure]:
    """Draw the ranks of algorithms over several datasets, a block a dataset; nothing if there are not."""
    parts = {name: part_over_datasets(boards, key) for name, key in charts.GRADES.items()}
    figures = [charts.ranks(part, name) for name, part in parts.items() if part is not None]
    return [figure for figure in figures if figure is not None]


def _apart(datasets: set[str]) -> str:
    """Say why nothing is ranked over all cells."""
    if len(datasets) < 2:
        return f"There are no ranks over its cells, which are all of one dataset. {NOT_INDEPENDENT}"
    return "There are no ranks over its datasets: no two algorithms were run on each of them."


def _cost(cell: Comparison) -> list[charts.Figure]:
    """Draw cost against accuracy, under names of the cell's own."""
    return [
        replace(figure, name=f"{figure.name}-{cell.place}", title=f"{figure.title}: {cell.title}")
        for figure in charts.cost(cell.leaderboard)
    ]
