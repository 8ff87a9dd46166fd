"""Rows of leaderboards as pages show them: which columns there are, what stands in a cell, where it links to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.protocol.identity import identify
from bench.protocol.words import spell_imbalance
from bench.results.columns import Column
from bench.results.footnotes import footnotes
from bench.results.layout import best, details, remarks, title, warnings
from bench.results.leaderboard import Leaderboard, Row
from bench.results.standing import SIGNS
from bench.site.methods import Method, pieces
from bench.site.run_page import Results, Run

RUN_PAGE = "run.html"
"""Shows the run whose id stands behind "?" in its address."""
COLUMNS: tuple[tuple[Column, str], ...] = (
    (Column("generic", "generic"), "overview generic"),
    (Column("many", "generic.many"), "generic"),
    (Column("medium", "generic.medium"), "generic"),
    (Column("few", "generic.few"), "overview generic"),
    (Column("balanced", "personal.balanced"), "overview personal cost"),
    (Column("personal", "personal"), "overview personal"),
    (Column("tail", "personal.few"), "overview personal"),
    (Column("masked", "personal.masked"), "personal"),
    (Column("drawn", "personal.drawn"), "personal"),
    (Column("never", "personal.never"), "personal"),
    (Column("worst decile", "personal.worst_decile"), "overview personal"),
    (Column("after", "personal:after"), "personal"),
    (Column("unseen", "unseen"), "unseen"),
    (Column("unseen, balanced", "unseen.balanced"), "unseen"),
    (Column("unseen, masked", "unseen.masked"), "unseen"),
    (Column("robust", "generic.robust"), "overview generic"),
    (Column("robust few", "generic.robust.few"), "generic"),
    (Column("robust balanced", "personal.robust.balanced"), "overview personal"),
    (Column("robust personal", "personal.robust"), "personal"),
    (Column("robust worst decile", "personal.robust.worst_decile"), "personal"),
    (Column("closed", "unseen.closed"), "unseen"),
    (Column("AUROC", "unseen.auroc"), "unseen"),
    (Column("OSCR", "unseen.oscr"), "unseen"),
    (Column("open-set H", "unseen.h"), "unseen"),
    (Column("k samples", "samples", 1e3), "overview cost"),
    (Column("k training samples", "train_samples", 1e3), "cost"),
    (Column("k adaptation samples", "adaptation_samples", 1e3), "cost"),
    (Column("k server samples", "server_samples", 1e3), "cost"),
    (Column("MB", "bytes", 1e6), "overview cost"),
    (Column("TFLOP", "flops", 1e12), "cost"),
    (Column("training TFLOP", "train_flops", 1e12), "cost"),
    (Column("adaptation TFLOP", "adaptation_flops", 1e12), "cost"),
    (Column("server TFLOP", "server_flops", 1e12), "cost"),
    (Column("seconds", "wall_seconds", 1.0), "overview cost"),
    (Column("peak MiB", "peak_memory_bytes", 2.0**20), "cost"),
    (Column("state MiB", "client_state_bytes", 2.0**20), "cost"),
    (Column("k parameters", "parameters", 1e3), "cost"),
    (Column("model kB", "model_bytes", 1e3), "cost"),
    (Column("MFLOP an image", "forward_flops", 1e6), "cost"),
    (Column("kB down a client and round", "payload_bytes_down", 1e3), "cost"),
    (Column("kB up a client and round", "payload_bytes_up", 1e3), "cost"),
)
"""Of the leaderboard of all comparisons, hence in the same units for all; and the views that show them."""

FILTERS = ("dataset", "imbalance", "alpha", "setting", "tier", "standing")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of a table: as people read it, and as it is sorted by ("" if there is none)."""

    text: str
    order: str
    bold: bool
    """Whether tests set it apart from all others of its column."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a leaderboard."""

    label: str
    id: str
    """Within its comparison, in addresses."""
    marks: str
    """Of footnotes: " [1]", or nothing."""
    tier: str
    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]
    standing: str
    """One of `bench.results.standing.ORDER`; how many of its runs are better, if some are."""
    sign: str
    board: Comparison
    filters: Mapping[str, str]
    method: Method | None
    """What its method's file says, if it is one of ours."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A leaderboard and its page."""

    leaderboard: Leaderboard
    place: int
    title: str
    details: str
    page: str
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]
    suites: tuple[str, ...] = ()
    """That any of its runs is of."""

    @property
    def name(self) -> str:
        """In addresses."""
        return self.page.partition("/")[2].removesuffix(".html")

    @property
    def warned(self) -> bool:
        """Whether its rows did not all see the same data."""
        return bool(self.warnings)


def page_of(board: Leaderboard, place: int) -> Comparison:
    """Say what stands on the page of a leaderboard; its address stays, whatever it must be told from."""
    named = re.sub(r"[^a-z0-9.]+", "-", board.base.lower()).strip("-.")[:80]
    what = [board.protocol, board.imbalance, board.alpha, board.engine, board.precision, board.device]
    what += [board.standing] * (board.standing != "self-reported")
    own = warnings(board)
    return Comparison(
        leaderboard=board,
        place=place,
        title=title(board),
        details=details(board),
        page=f"comparisons/{named}-{identify({'comparison': what})[:6]}.html",
        warnings=tuple(own),
        remarks=tuple(line for line in remarks(board) if line not in own),
    )


def is_measured(column: Column, comparisons: Sequence[Comparison]) -> bool:
    """Tell whether any row of these comparisons has a number in a column."""
    return any(column.estimate(row).n for comparison in comparisons for row in comparison.leaderboard.rows)


def entries_of(
    results: Results, comparison: Comparison, shown: Sequence[Column], methods: Mapping[str, Method]
) -> list[Entry]:
    """Give the rows of a comparison, with these columns, in its order."""
    board = comparison.leaderboard
    marks, _ = footnotes(board)
    first = best(board)
    entries = []
    for row in board.rows:
        runs = runs_of(results, row)
        entries.append(
            Entry(
                label=row.label,
                id=id_of(row),
                marks=marks[row.label],
                tier=row.tier,
                cells=tuple(_cell(column, row, first.get(column.title) == row.label) for column in shown),
                runs=runs,
                standing=_standing(row),
                sign=SIGNS.get(row.standing, ""),
                board=comparison,
                filters={
                    "dataset": board.dataset,
                    "imbalance": spell_imbalance(board.imbalance),
                    "alpha": "none" if board.alpha is None else f"{board.alpha:g}",
                    "setting": " or ".join(board.names),
                    "tier": row.tier,
                    "standing": row.standing,
                },
                method=methods.get(pieces(row.words)[0]),
            )
        )
    return entries


def id_of(row: Row) -> str:
    """Name a row within its comparison; it stays as long as the label does."""
    return identify({"row": row.label})[:8]


def _standing(row: Row) -> str:
    better = sum(kind != row.standing for kind in row.standings)
    return f"{row.standing}, {better} of {len(row.standings)} runs better" if better else row.standing


def _cell(column: Column, row: Row, bold: bool) -> Cell:
    mean = column.estimate(row).mean
    return Cell(text=column.show(row), order="" if mean is None else repr(mean), bold=bold)


def runs_of(results: Results, row: Row) -> tuple[Run, ...]:
    """Give the runs of a row as pages link to them, by seed."""
    records = sorted((results.records[run] for run in row.ids), key=lambda record: record.seed)
    return tuple(
        Run(id=record.id, seed=record.seed, page=f"{RUN_PAGE}?{record.id}", failed=record.status == "failed")
        for record in records
    )


def headings(shown: Sequence[Column]) -> list[dict[str, object]]:
    """Say of columns what the head of a table says, where there are no views to choose."""
    return [
        {"title": column.title, "name": column.key, "cost": column.unit is not None, "views": ()} for column in shown
    ]
