"""Pictures of results, with matplotlib: curves, and average ranks."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from bench.plugins.names import near
from bench.protocol.settings import BadConfig
from bench.results.comparison import spell_p
from bench.results.layout import title
from bench.results.leaderboard import Leaderboard
from bench.results.record import Record
from bench.results.statistics import Ranking
from bench.system import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Picture(Figure):
    """A figure of matplotlib, to be changed as one likes; a notebook shows it where a cell ends with it."""

    def save(self, path: Path | str) -> None:
        """Write it to a file; the ending says the format, and the folder is made. The same picture as SVG has the same
        bytes.

        Raises:
            OSError: It cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none"}):
            self.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        self.savefig(sink, format="png", dpi=110)
        return sink.getvalue()


def curves(boards: Sequence[Leaderboard], records: Sequence[Record], metric: str) -> Picture:
    """Draw a metric by round: a panel a leaderboard, a line an algorithm (its mean over seeds), and a band from the
    lowest seed to the highest.

    Raises:
        BadConfig: No run has that metric by round.
    """
    by_id = {record.id: record for record in records}
    panels = [(board, _lines(board, by_id, metric)) for board in boards]
    panels = [(board, lines) for board, lines in panels if lines]
    if not panels:
        known = {column for record in records if record.status == "done" for column in record.rounds().columns}
        raise BadConfig(f"{metric}: no run has that by round; {near(metric, sorted(known - {'round'}))}")
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    picture = Picture(figsize=(4 + 4 * columns, 0.6 + 3.4 * rows), layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False)
    names = list(dict.fromkeys(label for _, lines in panels for label in lines))
    looks = {label: _looks(number) for number, label in enumerate(names)}
    for axes, (board, drawn) in zip(grid.flat, panels, strict=False):
        for label, (rounds, values) in drawn.items():
            _line(axes, label, looks[label], rounds, values)
        axes.set_title(text.picture(title(board)), fontsize="medium")
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(f"{metric}, percent")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    lines = {str(line.get_label()): line for axes in grid.flat for line in axes.get_lines()}
    shown = [text.picture(name) for name in names]
    picture.legend([lines[name] for name in names], shown, loc="outside right upper", frameon=False)
    return picture


_Seeds = list[list[float]]
"""For each round, the seeds' values, in percent."""


def _lines(board: Leaderboard, records: dict[str, Record], metric: str) -> dict[str, tuple[list[int], _Seeds]]:
    """Collect by algorithm the rounds with the metric and each seed's values."""
    lines = {}
    for row in board.rows:
        found: dict[int, list[float]] = {}
        for record in (records[run] for run in row.ids if run in records and records[run].status == "done"):
            frame = record.rounds()
            if metric in frame:
                for number, value in frame[["round", metric]].dropna().itertuples(index=False):
                    found.setdefault(int(number), []).append(100 * float(value))
        if found:
            lines[row.label] = sorted(found), [found[number] for number in sorted(found)]
    return lines


def _looks(number: int) -> tuple[Any, str]:
    """Choose a colour, and beyond ten lines another kind of stroke."""
    return matplotlib.colormaps["tab10"](number % 10), ("-", "--", ":", "-.")[number // 10 % 4]


def _line(axes: Axes, label: str, looks: tuple[Any, str], rounds: list[int], values: _Seeds) -> None:
    colour, stroke = looks
    means = [math.fsum(each) / len(each) for each in values]
    axes.plot(rounds, means, stroke, label=label, color=colour, marker="o" if len(rounds) == 1 else None, linewidth=1.6)
    if max(map(len, values)) > 1:
        axes.fill_between(rounds, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0)


def ranks(ranking: Ranking, metric: str) -> Picture:
    """Draw a critical-difference diagram; bars join algorithms that are not told apart.

    Args:
        ranking: Of two algorithms or more.
        metric: What the ranks are of.
    """
    from pandas import DataFrame
    from scikit_posthocs import critical_difference_diagram

    names = [*map(text.picture, ranking.labels)]
    picture = Picture(figsize=(9, 1.6 + 0.22 * len(names)), layout="constrained")
    axes = picture.add_subplot()
    drawn = critical_difference_diagram(
        dict(zip(names, ranking.ranks, strict=True)),
        DataFrame(ranking.p_values, index=names, columns=names),
        ax=axes,
        text_h_margin=0.01 * len(names),
        label_fmt_left="{label} ({rank:.2f})",
        label_fmt_right="({rank:.2f}) {label}",
        color_palette=dict.fromkeys(names, "black"),
        elbow_props={"linewidth": 0.8},
        marker_props={"s": 12},
    )
    for (bar,) in drawn["crossbars"]:  # its points come from a set, in an order that differs by process
        bar.set_xdata(sorted(bar.get_xdata()))
    if ranking.separates:  # above the numbers of the axis, which the function's own bar would strike out
        start, stop = ranking.ranks[0], ranking.ranks[0] + ranking.critical_difference
        axes.plot([start, stop], [1.4, 1.4], color="black", linewidth=2)
        axes.text(stop, 1.4, f"  critical difference {ranking.critical_difference:.2f}", va="center")
    said = "" if ranking.separates else ", no two told apart"
    axes.set_title(
        f"{metric}: average rank over {ranking.blocks} {ranking.unit}s (Friedman p {spell_p(ranking.p)}){said}"
    )
    return picture
