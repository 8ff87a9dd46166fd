"""Leaderboards as text: Markdown, LaTeX, JSON, HTML, and for the terminal; CSV is `bench.results.sheet`'s.

Accuracies are percentages in tables and fractions 0-1 in CSV and JSON. The same records give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from bench.results.among import best_rows
from bench.results.columns import ABSENT, Column, main_columns
from bench.results.comparison import part_over_datasets
from bench.results.footnotes import footnotes
from bench.results.layout import BRIEF, LEGEND, NO_RUNS, best, details, grid, order, remarks, title, warnings
from bench.results.leaderboard import METRICS as METRICS
from bench.results.leaderboard import RANKS_BY, Row, suffix
from bench.results.leaderboard import Leaderboard as Leaderboard
from bench.results.leaderboard import leaderboards as leaderboards
from bench.results.sheet import long, sheet
from bench.results.statistics import FEWEST
from bench.system.text import code, html_text, latex, markdown, notes, plain

if TYPE_CHECKING:
    from rich.console import RenderableType


def render(boards: Sequence[Leaderboard], format: str, *, per_seed: bool = False) -> str:
    """Write leaderboards as text.

    Args:
        boards: In the order in which they are to appear.
        format: One of `FORMATS`.
        per_seed: A line a run in place of the means; of the format "csv" only.

    Raises:
        ValueError: Unknown format, or one that has no lines of runs.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: must be one of {', '.join(FORMATS)}")
    if per_seed and format != "csv":
        raise ValueError(f"format {format!r} has no line per seed; csv has")
    return sheet(boards, per_seed) if per_seed else FORMATS[format](boards)


def results_readme(boards: Sequence[Leaderboard], prose: str | None, command: str = "bench table --out results") -> str:
    """Write the README.md of a folder of results.

    Args:
        boards: What the folder holds.
        prose: What a person says about it (Markdown); stands above the tables.
        command: What generates the file again.
    """
    origin = (
        f"Generated from the folders beside this file by `{command}`; do not edit it. What a person has to "
        "say about the results goes into `NOTES.md`, and appears here."
    )
    parts = ["# Results", origin, *([notes(prose.strip())] if prose and prose.strip() else []), _markdown(boards)]
    return "\n\n".join(parts)


FRONT = "<!-- leaderboard -->", "<!-- end of leaderboard -->"
"""Between these lines of a front page stands the table."""


def front_page(text: str, boards: Sequence[Leaderboard], most: int | None = None) -> str:
    """Put the main columns of leaderboards between the two lines of a front page, of rows that have enough seeds.

    Args:
        text: The page as it is.
        boards: In their order.
        most: Rows of each, the best; None: all.

    Raises:
        ValueError: The text does not have the two lines of `FRONT`, each once, in this order.
    """
    head, begin, rest = text.partition(FRONT[0] + "\n")
    _, end, tail = rest.partition(FRONT[1] + "\n")
    if not begin or not end or FRONT[0] in tail or FRONT[1] in tail:
        raise ValueError(f"it must have the lines {FRONT[0]} and {FRONT[1]}, once, in this order")
    enough = [(replace(board, rows=best_rows(board, most)), len(best_rows(board))) for board in boards]
    shown = [(board, of) for board, of in enough if of]
    parts = []
    for board, of in shown:
        chosen = main_columns(board)
        rows = [[code(row.label), *(column.show(row) for column in chosen)] for row in board.rows]
        heading, sides = ["algorithm", *(markdown(each.title) for each in chosen)], ["left", *["right"] * len(chosen)]
        seeds = " or ".join(map(str, sorted({len(row.seeds) for row in board.rows})))
        best = f", the {len(rows)} best of {of} rows" if len(rows) < of else ""
        parts += [f"**{markdown(title(board))}**, {seeds} seeds{best}", _pipe(heading, rows, sides)]
    parts += [order(board) for board, _ in shown[:1]]
    left_out = len(boards) - len(shown)
    if left_out:
        noun, have = ("comparison", "has") if left_out == 1 else ("comparisons", "have")
        parts.append(f"{left_out} {'more ' * bool(shown)}{noun} {have} fewer than {FEWEST} seeds, and no table here.")
    return "".join((head, begin, "\n", "".join(f"{part}\n\n" for part in parts), end, tail))


def _pipe(heading: Sequence[str], rows: Sequence[Sequence[str]], sides: Sequence[str]) -> str:
    from tabulate import tabulate

    return tabulate(rows, heading, tablefmt="pipe", disable_numparse=True, colalign=sides)


def terminal(boards: Sequence[Leaderboard]) -> list[RenderableType]:
    """Make tables for the terminal: the main columns, with what the seeds span below the means that rank."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not boards:
        return [Text(NO_RUNS)]
    parts: list[RenderableType] = []
    for board in boards:
        marks, _ = footnotes(board)
        shown, first = main_columns(board), best(board)
        table = Table(title=Text(title(board)), box=SIMPLE_HEAD, title_justify="left", padding=0, show_edge=False)
        table.add_column("algorithm", overflow="fold")  # the one column that gives way in a narrow terminal
        for column in shown:
            table.add_column(Text(plain(column.title).replace(" ", "\n")), justify="right", no_wrap=True)
        for row in board.rows:
            cells = [
                Text(_narrow(column, row), style="bold" if first.get(column.title) == row.label else "")
                for column in shown
            ]
            table.add_row(Text(row.label + marks[row.label]), *cells)
        parts += [table, *(Text(line, style="dim") for line in remarks(board))]
    summary = averages(boards)
    if summary is not None:
        table = Table(title=Text(summary.title), box=SIMPLE_HEAD, title_justify="left", padding=0)
        table.add_column(summary.heading[0], overflow="fold")
        for heading in summary.heading[1:]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row_cells in summary.cells:
            table.add_row(*map(Text, row_cells))
        parts += [table, *(Text(line, style="dim") for line in summary.says)]
    legend = f"Percent; {BRIEF}. Bold: the best by a corrected test. {ABSENT}: the algorithm has no such model."
    parts.append(Text(legend, style="dim"))
    return parts


def _narrow(column: Column, row: Row) -> str:
    """Write a number, and below it what the seeds span where it is one that ranks."""
    estimate = column.estimate(row)
    number = column.show(row, interval=False)
    if column.key.partition("@")[0] not in RANKS_BY or estimate.low is None or estimate.high is None:
        return number
    return f"{number}\n{100 * estimate.low:.1f}–{100 * estimate.high:.1f}"


# Average ranks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Averages:
    """The average ranks of algorithms over several datasets, as a table."""

    title: str
    heading: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    """A row an algorithm, best first by the first metric that any has."""
    says: tuple[str, ...]


def averages(boards: Sequence[Leaderboard]) -> Averages | None:
    """Rank the algorithms that datasets have in common, by `RANKS_BY`; None if there are none."""
    if not boards or boards[0].metric == "best":
        return None
    found = {key: part_over_datasets(boards, key + suffix(boards[0].metric)) for key in RANKS_BY}
    ranks = {key: part.ranking for key, part in found.items() if part is not None and part.ranking is not None}
    if not ranks:
        return None
    counts = sorted({ranking.blocks for ranking in ranks.values()})
    labels = dict.fromkeys(label for ranking in ranks.values() for label in ranking.labels)
    shown = {key: dict(zip(ranking.labels, ranking.ranks, strict=True)) for key, ranking in ranks.items()}
    return Averages(
        title=f"Average ranks over {' or '.join(map(str, counts))} datasets",
        heading=("algorithm", *(key.rpartition(".")[2] for key in ranks)),
        cells=tuple(
            (label, *(f"{shown[key][label]:.2f}" if label in shown[key] else ABSENT for key in ranks))
            for label in labels
        ),
        says=tuple(f"{key.rpartition('.')[2]}: {line}" for key in ranks if (part := found[key]) for line in part.says),
    )


# Formats ----------------------------------------------------------------------------------------------------


def _tabulate(heading: Sequence[str], cells: Sequence[Sequence[str]], style: str, left: int = 2) -> str:
    from tabulate import tabulate

    alignment = [*["left"] * left, *["right"] * (len(heading) - left)]
    return tabulate(cells, heading, tablefmt=style, disable_numparse=True, colalign=alignment)


def _markdown(boards: Sequence[Leaderboard]) -> str:
    if not boards:
        return NO_RUNS + "\n"
    parts = []
    for board in boards:
        table = _tabulate(*grid(board, markdown, "**{}**".format, label=code), "pipe")
        parts += [f"## {markdown(title(board))}", markdown(details(board)), table]
        parts.append(_bullets(map(markdown, remarks(board))))
    summary = averages(boards)
    if summary is not None:
        cells = [(code(label), *numbers) for label, *numbers in summary.cells]
        parts += [f"## {summary.title}", _tabulate(summary.heading, cells, "pipe", 1)]
        parts.append(_bullets(map(markdown, summary.says)))
    return "\n\n".join((*parts, "## How to read the tables", _bullets(LEGEND))) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _json(boards: Sequence[Leaderboard]) -> str:
    content = [
        {**asdict(board), "title": title(board), "warnings": warnings(board), "best": best(board)} for board in boards
    ]
    summary = averages(boards)
    document = {"format": 1, "leaderboards": content, "averages": summary and asdict(summary)}
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _latex(boards: Sequence[Leaderboard]) -> str:
    parts = ["% needs \\usepackage{booktabs}" if boards else f"% {NO_RUNS}"]
    for board in boards:
        tabular = _tabular(*grid(board, latex, r"\textbf{{{}}}".format, number=latex))
        caption = rf"\caption{{{latex(f'{title(board)}: {details(board)}')}}}"
        below = [rf"\par {latex(line)}" for line in remarks(board)]
        parts.append("\n".join((r"\begin{table}", caption, tabular, *below, r"\end{table}")))
    summary = averages(boards)
    if summary is not None:
        tabular = _tabular(summary.heading, [[*map(latex, line)] for line in summary.cells], 1)
        below = [rf"\par {latex(line)}" for line in summary.says]
        parts.append("\n".join((r"\begin{table}", rf"\caption{{{summary.title}}}", tabular, *below, r"\end{table}")))
    return "\n\n".join(parts) + "\n"


def _tabular(heading: Sequence[str], cells: Sequence[Sequence[str]], left: int = 2) -> str:
    """Lay out what is written for LaTeX already, with the lines of booktabs."""
    text = _tabulate(heading, cells, "latex_raw", left)
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        text = text.replace(r"\hline", rule, 1)
    return text


def fragment(boards: Sequence[Leaderboard]) -> str:
    """Write leaderboards as a piece of HTML, for a page or a notebook: tables, what stands below them, and how they are
    read, folded in.
    """
    parts = [] if boards else [_paragraph(NO_RUNS)]
    for board in boards:
        parts += [f"<h2>{html_text(title(board))}</h2>", _paragraph(details(board))]
        table = _tabulate(*grid(board, html_text, "<strong>{}</strong>".format), "unsafehtml")
        parts += [table, *map(_paragraph, remarks(board))]
    summary = averages(boards)
    if summary is not None:
        parts += [f"<h2>{html_text(summary.title)}</h2>", _tabulate(summary.heading, summary.cells, "html", 1)]
        parts += map(_paragraph, summary.says)
    if boards:
        parts += ["<details><summary>How to read the tables</summary>", *map(_paragraph, LEGEND), "</details>"]
    return "\n".join(parts) + "\n"


def _html(boards: Sequence[Leaderboard]) -> str:
    head = '<head><meta charset="utf-8"><title>Results</title></head>'
    return f'<!doctype html>\n<html lang="en">\n{head}\n<body>\n{fragment(boards)}</body>\n</html>\n'


def _paragraph(text: str) -> str:
    return f"<p>{html_text(text)}</p>"


FORMATS: dict[str, Callable[[Sequence[Leaderboard]], str]] = {
    "md": _markdown,
    "csv": sheet,
    "long": long,
    "latex": _latex,
    "json": _json,
    "html": _html,
}
"""Name to the function that writes leaderboards so."""
