"""From records to pages: which there are, and what stands on each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bench.plugins.ledger import LETTERS
from bench.results import table
from bench.results.columns import columns
from bench.results.comparison import compare
from bench.results.layout import LEGEND
from bench.results.leaderboard import Leaderboard
from bench.results.membership import suites_of
from bench.results.standing import BELIEVED, ORDER, WORDS
from bench.site import charts, family_tree, suite_page, versus
from bench.site.methods import Method, described, facts, pieces
from bench.site.rendering import many, markdown, render, spell
from bench.site.rows import (
    COLUMNS,
    FILTERS,
    RUN_PAGE,
    Comparison,
    Entry,
    entries_of,
    headings,
    is_measured,
    page_of,
    runs_of,
)
from bench.site.run_page import Drawn, Results, Shown
from bench.site.shelves import drawn, shelves
from bench.site.tails import tails

LEAD = (
    "Every method of a comparison got the same clients, the same cohorts, rounds and batches, and the same initial "
    "weights; what each spent on training, adaptation and at the server is counted beside its accuracy. The official "
    "test set never entered training; the last round is what ranks."
)
VIEWS = ("overview", "personal", "generic", "unseen", "cost", "everything")
"""Which columns the leaderboard can show."""
_MOST_SIBLINGS = 20


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
        yield comparison.page, _comparison_page(results, comparison, runs, methods)
    for method in methods.values():
        yield method.page, _method_page(results, comparisons, method, methods)
    yield family_tree.PAGE, family_tree.page(methods)
    for suite in suite_page.known(comparisons):
        yield f"{suite_page.FOLDER}/{suite.name}.html", suite_page.page(results, comparisons, suite, methods)
    for comparison in comparisons:
        yield from versus.scripts(comparison, results.records, runs)
    for page in (RUN_PAGE, versus.PAGE):
        yield page, render(page, "")
    yield from shelves({run: each.content for run, each in runs.items()})


def _members(results: Results, board: Leaderboard) -> tuple[str, ...]:
    runs = [results.records[run] for row in board.rows for run in row.ids]
    return tuple(sorted({name for run in runs for name in suites_of(run)}))


def _index(results: Results, comparisons: Sequence[Comparison], methods: Mapping[str, Method]) -> str:
    boards = [comparison.leaderboard for comparison in comparisons]
    known = [(column, views.split()) for column, views in COLUMNS if is_measured(column, comparisons)]
    shown = tuple(column for column, _ in known)
    entries = [entry for comparison in comparisons for entry in entries_of(results, comparison, shown, methods)]
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
        suites=suite_page.known(comparisons),
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
        figures=[ranks] if (ranks := suite_page.over_datasets(boards)) else [],
        legend=(*LEGEND, *(f"{WORDS[kind]}." for kind in ORDER), BELIEVED),
        notes=markdown(results.notes) if results.notes else None,
    )


def _filters(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """Give the values of each filter, numbers in their order."""

    def order(value: str) -> tuple[bool, float, str]:
        try:
            return False, float(value), value
        except ValueError:
            return True, 0.0, value

    return [
        {"name": name, "title": name, "options": sorted({entry.filters[name] for entry in entries}, key=order)}
        for name in FILTERS
    ]


def _shown(results: Results, comparison: Comparison) -> Iterator[Shown]:
    for row in comparison.leaderboard.rows:
        runs = runs_of(results, row)
        for run in runs:
            yield Shown(
                record=results.records[run.id],
                label=row.label,
                siblings=tuple(other for other in runs if other != run) if len(runs) <= _MOST_SIBLINGS else (),
                title=comparison.title,
                page=comparison.page,
            )


def _comparison_page(
    results: Results, comparison: Comparison, runs: Mapping[str, Drawn], methods: Mapping[str, Method]
) -> str:
    board = comparison.leaderboard
    shown = columns(board)
    ranked = {name: compare([board], key).parts for name, key in charts.GRADES.items()}
    ranks = [charts.ranks(part, name) for name, parts in ranked.items() for part in parts]
    wide = [tails(board, results.records, runs), *charts.cost(board)]
    wide += [charts.progress(board, {run: each.curve for run, each in runs.items()})]
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
        columns=headings(shown),
        entries=entries_of(results, comparison, shown, methods),
        against=f"{versus.PAGE}?{comparison.name}",
        compared=len(versus.compared(board)),
        figures=[[figure for figure in group if figure is not None] for group in figures],
        protocol=protocol,
    )


def _method_page(
    results: Results, comparisons: Sequence[Comparison], method: Method, methods: Mapping[str, Method]
) -> str:
    """Show what a method's or a part's file says, and the rows that it stands in."""
    shown = [column for column, views in COLUMNS if "overview" in views and is_measured(column, comparisons)]
    rows = {
        (comparison.place, row.label): row
        for comparison in comparisons
        for row in comparison.leaderboard.rows
        if method.name in pieces(row.words)
    }
    entries = [
        entry
        for comparison in comparisons
        for entry in entries_of(results, comparison, shown, methods)
        if (comparison.place, entry.label) in rows
    ]
    return render(
        "method.html",
        "../",
        method=method,
        facts=facts(method, sorted({row.tier for row in rows.values()})),
        letters=LETTERS,
        reproduction=markdown(told) if (told := results.reproductions.get(method.name)) else None,
        fields=[(f"{field.name} = {field.default}", field.doc) for field in method.text.fields],
        controls=[(row, methods.get(pieces(row)[0]), answer) for row, answer in method.controls],
        columns=headings(shown),
        entries=entries,
    )
