"""Leaderboards as text: Markdown, CSV, LaTeX, JSON, HTML, and for the terminal.

Accuracies are percentages in tables and fractions 0-1 in CSV and JSON. The same records give the same bytes.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from bench.results.layout import (
    ABSENT,
    INTERVAL,
    LEGEND,
    MAIN,
    NO_RUNS,
    columns,
    details,
    footnotes,
    grid,
    remarks,
    title,
    warnings,
)
from bench.results.leaderboard import METRICS as METRICS
from bench.results.leaderboard import Leaderboard as Leaderboard
from bench.results.leaderboard import leaderboards as leaderboards

if TYPE_CHECKING:
    from rich.console import RenderableType


def render(boards: Sequence[Leaderboard], format: str) -> str:
    """Write leaderboards as text.

    Args:
        boards: In the order in which they are to appear.
        format: One of `FORMATS`.

    Raises:
        ValueError: Unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: must be one of {', '.join(FORMATS)}")
    return FORMATS[format](boards)


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
    parts = ["# Results", origin, *([prose.strip()] if prose and prose.strip() else []), _markdown(boards)]
    return "\n\n".join(parts)


_BRIEF = (*MAIN, "many", "medium", "few", "worst decile", "MB", "seconds")


def terminal(boards: Sequence[Leaderboard]) -> list[RenderableType]:
    """Make tables for the terminal: the main columns, with intervals for the first three of them."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not boards:
        return [Text(NO_RUNS)]
    parts: list[RenderableType] = []
    for board in boards:
        marks, _ = footnotes(board)
        shown = [column for column in columns(board) if column.title in _BRIEF]
        table = Table(title=Text(title(board)), box=SIMPLE_HEAD, title_justify="left", padding=0)
        table.add_column("algorithm", overflow="fold")  # the one column that gives way in a narrow terminal
        for column in shown:
            table.add_column(column.title.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in board.rows:
            cells = [column.show(row, interval=column.title in MAIN).replace(" ± ", "±") for column in shown]
            table.add_row(Text(row.label + marks[row.label]), *cells)
        parts += [table, *(Text(line, style="dim") for line in remarks(board))]
    parts.append(Text(f"Percent; {INTERVAL}. {ABSENT}: the algorithm has no such model.", style="dim"))
    return parts


def _tabulate(board: Leaderboard, style: str, label: Callable[[str], str] = str) -> str:
    from tabulate import tabulate

    heading, cells = grid(board, label)
    alignment = ["left", "left", *["right"] * (len(heading) - 2)]
    return tabulate(cells, heading, tablefmt=style, disable_numparse=True, colalign=alignment)


def _markdown(boards: Sequence[Leaderboard]) -> str:
    if not boards:
        return NO_RUNS + "\n"
    parts = []
    for board in boards:
        parts += [f"## {_plain(title(board))}", _plain(details(board)), _tabulate(board, "pipe", _code)]
        parts.append(_bullets(_plain(line) for line in remarks(board)))
    return "\n\n".join((*parts, "## How to read the tables", _bullets(LEGEND))) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _code(text: str) -> str:
    """Set text as code, so that Markdown takes no character of it for its own."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def _plain(text: str) -> str:
    """Take the meaning from characters that Markdown would read as its own."""
    return "".join(f"\\{character}" if character in "\\`*_<>[]#|" else character for character in text)


_CSV_BOARD = ("dataset", "imbalance", "alpha", "protocol", "engine", "precision", "device")
_CSV_ROW = ("setting", "algorithm", "call", "version", "metric", "mean", "half_width", "n")


def _csv(boards: Sequence[Leaderboard]) -> str:
    """One line per leaderboard, algorithm and metric, or cost as "cost.NAME"; what is absent is empty."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow((*_CSV_BOARD, *_CSV_ROW))
    for board in boards:
        start = [*(getattr(board, key) for key in _CSV_BOARD), " or ".join(board.names)]
        for row in board.rows:
            costs = {f"cost.{key}": value for key, value in row.cost.items()}
            for key, number in {**row.metrics, **costs}.items():
                cells = [row.label, row.call, row.version, key, number.mean, number.half_width, number.n]
                writer.writerow([*start, *cells])
    return sink.getvalue()


def _json(boards: Sequence[Leaderboard]) -> str:
    content = [{**asdict(board), "title": title(board), "warnings": warnings(board)} for board in boards]
    document = {"format": 1, "leaderboards": content}
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "–": "--",
}


def _latex(boards: Sequence[Leaderboard]) -> str:
    parts = ["% needs \\usepackage{booktabs}" if boards else f"% {NO_RUNS}"]
    for board in boards:
        tabular = _tabulate(board, "latex_booktabs").replace("±", _LATEX["±"]).replace("–", _LATEX["–"])
        caption = rf"\caption{{{_escaped(f'{title(board)}: {details(board)}')}}}"
        below = [rf"\par {_escaped(line)}" for line in remarks(board)]
        parts.append("\n".join((r"\begin{table}", caption, tabular, *below, r"\end{table}")))
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _html(boards: Sequence[Leaderboard]) -> str:
    body = [] if boards else [_paragraph(NO_RUNS)]
    for board in boards:
        body += [f"<h2>{html.escape(title(board))}</h2>", _paragraph(details(board))]
        body += [_tabulate(board, "html"), *map(_paragraph, remarks(board))]
    body += map(_paragraph, LEGEND if boards else ())
    head = '<head><meta charset="utf-8"><title>Results</title></head>'
    return "\n".join(("<!doctype html>", '<html lang="en">', head, "<body>", *body, "</body>", "</html>\n"))


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


FORMATS: dict[str, Callable[[Sequence[Leaderboard]], str]] = {
    "md": _markdown,
    "csv": _csv,
    "latex": _latex,
    "json": _json,
    "html": _html,
}
"""Name to the function that writes leaderboards so."""
