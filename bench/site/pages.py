"""From records to pages: which there are, and what stands on each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.plugins.ledger import LETTERS
from bench.protocol import suites
from bench.protocol.identity import identify
from bench.protocol.suites import Suite
from bench.protocol.words import spell_imbalance
from bench.results import table
from bench.results.comparison import compare, part_over_datasets
from bench.results.layout import LEGEND, Column, best, columns, details, footnotes, remarks, title, warnings
from bench.results.leaderboard import Leaderboard, Row
from bench.results.membership import suites_of
from bench.results.standing import BELIEVED, ORDER, SIGNS, WORDS
from bench.site import charts
from bench.site.methods import Method, described, facts, pieces
from bench.site.rendering import many, markdown, render, spell
from bench.site.run_page import Results, Run, Shown
from bench.site.shelves import drawn, shelves

LEAD = (
    "Every method of a comparison got the same clients, the same cohorts, rounds and batches, and the same initial "
    "weights; what each spent on training, adaptation and at the server is counted beside its accuracy. The official "
    "test set never entered training; the last round is what ranks."
)
_MOST_SIBLINGS = 20
SUITES = "suites"
"""Folder of the pages of suites."""
RUN_PAGE = "run.html"
"""Shows the run whose id stands behind "?" in its address."""
VIEWS = ("overview", "personal", "generic", "unseen", "cost", "everything")
"""Which columns the leaderboard can show."""
_COLUMNS: tuple[tuple[Column, str], ...] = (
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
)
"""Of the leaderboard of all comparisons, hence in the same units for all; and the views that show them."""

_FILTERS = ("dataset", "imbalance", "alpha", "setting", "tier", "standing")


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
    def warned(self) -> bool:
        """Whether its rows did not all see the same data."""
        return bool(self.warnings)


def write(results: Results, boards: Sequence[Leaderboard]) -> Iterator[tuple[str, str]]:
    """Give the path of every page within the site, and its text.

    Args:
        results: The runs of the leaderboards.
        boards: In their order.
    """
    comparisons = [
        replace(page_of(board, place), suites=_members(results, board)) for place, board in enumerate(boards)
    ]
    methods = described(row.words for board in boards for row in board.rows)
    runs = drawn(run for comparison in comparisons for run in _shown(results, comparison))
    yield "index.html", _index(results, comparisons, methods)
    yield "leaderboard.csv", table.render(boards, "csv")
    yield "leaderboard.json", table.render(boards, "json")
    for comparison in comparisons:
        curves = {run: each.curve for run, each in runs.items()}
        yield comparison.page, _comparison_page(results, comparison, curves, methods)
    for method in methods.values():
        yield method.page, _method_page(results, comparisons, method, methods)
    for suite in _suites(comparisons):
        yield f"{SUITES}/{suite.name}.html", _suite_page(results, comparisons, suite, methods)
    yield RUN_PAGE, render(RUN_PAGE, "")
    yield from shelves({run: each.content for run, each in runs.items()})


def _members(results: Results, board: Leaderboard) -> tuple[str, ...]:
    runs = [results.records[run] for row in board.rows for run in row.ids]
    return tuple(sorted({name for run in runs for name in suites_of(run)}))


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


def _ranks(boards: Sequence[Leaderboard]) -> list[list[charts.Figure]]:
    """Draw the ranks of algorithms over several datasets; nothing if there are not."""
    parts = {name: part_over_datasets(boards, key) for name, key in charts.GRADES.items()}
    figures = [charts.ranks(part, name) for name, part in parts.items() if part is not None]
    drawn = [figure for figure in figures if figure is not None]
    return [drawn] if drawn else []


def _index(results: Results, comparisons: Sequence[Comparison], methods: Mapping[str, Method]) -> str:
    boards = [comparison.leaderboard for comparison in comparisons]
    known = [(column, views.split()) for column, views in _COLUMNS if _measured(column, comparisons)]
    shown = tuple(column for column, _ in known)
    entries = [entry for comparison in comparisons for entry in _entries(results, comparison, shown, methods)]
    used = {view for _, views in known for view in views}
    days = sorted(day for comparison in comparisons for day in comparison.leaderboard.finished)
    stand = Counter(entry.filters["standing"] for entry in entries)
    parts = [
        many(len(entries), "entry", "entries"),
        many(len(results.records), "run"),
        many(len(comparisons), "comparison"),
        ", ".join(f"{stand[kind]} {kind}" for kind in ORDER if stand[kind]),
        *([f"latest run {days[-1]}"] if days else []),
    ]
    return render(
        "index.html",
        "",
        lead=LEAD,
        tally=" · ".join(parts),
        entries=entries,
        boards=comparisons,
        methods=methods.values(),
        suites=_suites(comparisons),
        columns=[
            {
                "title": column.title,
                "name": column.key,
                "cost": column.unit is not None,
                "views": (*views, "everything"),
            }
            for column, views in known
        ],
        views=[{"name": view, "empty": view != "everything" and view not in used} for view in VIEWS],
        filters=_filters(entries),
        figures=_ranks(boards),
        legend=(*LEGEND, *(f"{WORDS[kind]}." for kind in ORDER), BELIEVED),
        notes=markdown(results.notes) if results.notes else None,
    )


def _measured(column: Column, comparisons: Sequence[Comparison]) -> bool:
    return any(column.estimate(row).n for comparison in comparisons for row in comparison.leaderboard.rows)


def _filters(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """Give the values of each filter, numbers in their order."""

    def order(value: str) -> tuple[bool, float, str]:
        try:
            return False, float(value), value
        except ValueError:
            return True, 0.0, value

    return [
        {"name": name, "title": name, "options": sorted({entry.filters[name] for entry in entries}, key=order)}
        for name in _FILTERS
    ]


def _entries(
    results: Results, comparison: Comparison, shown: Sequence[Column], methods: Mapping[str, Method]
) -> list[Entry]:
    board = comparison.leaderboard
    marks, _ = footnotes(board)
    first = best(board)
    entries = []
    for row in board.rows:
        runs = _runs(results, row)
        entries.append(
            Entry(
                label=row.label,
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


def _standing(row: Row) -> str:
    better = sum(kind != row.standing for kind in row.standings)
    return f"{row.standing}, {better} of {len(row.standings)} runs better" if better else row.standing


def _cell(column: Column, row: Row, bold: bool) -> Cell:
    mean = column.estimate(row).mean
    return Cell(text=column.show(row), order="" if mean is None else repr(mean), bold=bold)


def _runs(results: Results, row: Row) -> tuple[Run, ...]:
    records = sorted((results.records[run] for run in row.ids), key=lambda record: record.seed)
    return tuple(
        Run(id=record.id, seed=record.seed, page=f"{RUN_PAGE}?{record.id}", failed=record.status == "failed")
        for record in records
    )


def _shown(results: Results, comparison: Comparison) -> Iterator[Shown]:
    for row in comparison.leaderboard.rows:
        runs = _runs(results, row)
        for run in runs:
            yield Shown(
                record=results.records[run.id],
                label=row.label,
                siblings=tuple(other for other in runs if other != run) if len(runs) <= _MOST_SIBLINGS else (),
                title=comparison.title,
                page=comparison.page,
            )


def _comparison_page(
    results: Results, comparison: Comparison, curves: Mapping[str, charts.Curve], methods: Mapping[str, Method]
) -> str:
    board = comparison.leaderboard
    shown = columns(board)
    ranked = {name: compare([board], key).parts for name, key in charts.GRADES.items()}
    ranks = [charts.ranks(part, name) for name, parts in ranked.items() for part in parts]
    wide = [*charts.cost(board), charts.progress(board, curves)]
    figures: list[list[charts.Figure | None]] = [[*charts.spread(board)], ranks]
    figures += [[figure] for figure in wide]
    protocol = [
        ("setting", " or ".join(board.names)),
        *((key, spell(value)) for key, value in board.setting.items()),
        ("engine, precision, device", f"{board.engine}, {board.precision}, {board.device}"),
        ("protocol", board.protocol),
        *((f"split of seed {seed}", ", ".join(prints)) for seed, prints in board.fingerprints.items()),
    ]
    return render(
        "comparison.html",
        "../",
        board=comparison,
        columns=_headings(shown),
        entries=_entries(results, comparison, shown, methods),
        figures=[[figure for figure in group if figure is not None] for group in figures],
        protocol=protocol,
    )


def _headings(shown: Sequence[Column]) -> list[dict[str, object]]:
    return [
        {"title": column.title, "name": column.key, "cost": column.unit is not None, "views": ()} for column in shown
    ]


def _method_page(
    results: Results, comparisons: Sequence[Comparison], method: Method, methods: Mapping[str, Method]
) -> str:
    """Show what a method's or a part's file says, and the rows that it stands in."""
    shown = [column for column, views in _COLUMNS if "overview" in views and _measured(column, comparisons)]
    rows = {
        (comparison.place, row.label): row
        for comparison in comparisons
        for row in comparison.leaderboard.rows
        if method.name in pieces(row.words)
    }
    entries = [
        entry
        for comparison in comparisons
        for entry in _entries(results, comparison, shown, methods)
        if (comparison.place, entry.label) in rows
    ]
    return render(
        "method.html",
        "../",
        method=method,
        facts=facts(method, sorted({row.tier for row in rows.values()})),
        letters=LETTERS,
        fields=[(f"{field.name} = {field.default}", field.doc) for field in method.text.fields],
        controls=[(row, methods.get(pieces(row)[0]), answer) for row, answer in method.controls],
        columns=_headings(shown),
        entries=entries,
    )


def _suites(comparisons: Sequence[Comparison]) -> list[Suite]:
    """Give the suites that any comparison is of."""
    return [suites.suite(name) for name in sorted({name for each in comparisons for name in each.suites})]


def _suite_page(
    results: Results, comparisons: Sequence[Comparison], suite: Suite, methods: Mapping[str, Method]
) -> str:
    """Show what a suite is for, and its comparisons."""
    boards = [comparison for comparison in comparisons if suite.name in comparison.suites]
    wanted = {"overview", "unseen"}
    shown = [column for column, views in _COLUMNS if wanted & {*views.split()} and _measured(column, boards)]
    words = [("shows", suite.shows), ("does not show", suite.hides), ("costs", suite.costs)]
    words += [("needs", need) for need in suite.needs]
    return render(
        "suite.html",
        "../",
        suite=suite,
        facts=[*words, ("run it", f"bench run --suite {suite.name}")],
        boards=boards,
        columns=_headings(shown),
        entries=[entry for board in boards for entry in _entries(results, board, shown, methods)],
    )
