"""The best rows of a leaderboard: which they are, and how far they are told apart."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from bench.results.layout import resolution
from bench.results.leaderboard import RANKS_BY, Leaderboard, Row, measured
from bench.results.statistics import FEWEST, pairwise

BEST = 10
"""Rows among which pairs are tested: twelve seeds separate some of their 45 pairs, and none of all pairs of 25 rows."""


def best_rows(board: Leaderboard, most: int | None = None) -> tuple[Row, ...]:
    """Choose the first rows of a leaderboard, of those that have enough seeds for an interval; None: all of these."""
    return tuple(row for row in board.rows if len(row.seeds) >= FEWEST)[:most]


def separated_among_best(board: Leaderboard) -> str:
    """Say how many pairs among the best rows the corrected test separates, by what ranks them first.

    The correction is for these pairs alone; that the same seeds chose the rows is said beside it.
    """
    known = measured(board, RANKS_BY[0])
    ranked = [row.label for row in board.rows if row.ranks and row.label in known][:BEST]
    if len(ranked) < 2:
        return "Fewer than two of its rows are ranked: there is no pair to separate."
    best: Mapping[str, Mapping[Hashable, float]] = {label: known[label] for label in ranked}
    pairs = pairwise(best)
    separated = sum(pair.separated for pair in pairs)
    counted = "The only pair" if len(pairs) == 1 else f"{separated} of the {len(pairs)} pairs"
    verb = ("is" if separated else "is not") if len(pairs) == 1 else ("is" if separated == 1 else "are")
    says = (
        f"{counted} among its {len(ranked)} best rows {verb} separated by the signed-rank test of balanced accuracy, "
        "corrected (Holm) for these pairs alone; the same seeds chose the rows."
    )
    return says if separated else f"{says} {resolution(max(pair.n for pair in pairs), len(ranked))}"
