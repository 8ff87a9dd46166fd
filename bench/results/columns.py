"""Columns of a table, where each finds its number and how it writes it: the place of a new metric, or a new cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bench.results.leaderboard import Leaderboard, Row, suffix
from bench.results.statistics import NOTHING, Estimate

ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """A number per row: where it is found and how it is shown."""

    title: str
    key: str
    """In `Row.metrics`, or in `Row.cost` if there is a unit."""
    unit: float | None = None
    """What the cost is divided by; None for an accuracy, shown in percent with its interval."""

    def estimate(self, row: Row) -> Estimate:
        """Look the number up; nothing where the row has none."""
        return (row.metrics if self.unit is None else row.cost).get(self.key, NOTHING)

    def show(self, row: Row, interval: bool = True) -> str:
        """Write the number for people."""
        estimate = self.estimate(row)
        if estimate.mean is None:
            return ABSENT
        if self.unit is not None:
            return _amount(estimate.mean / self.unit)
        return spell(estimate) if interval else f"{100 * estimate.mean:.1f}"


def spell(estimate: Estimate) -> str:
    """Write a mean in percent with its range, `56.1 (54.0–58.2)`, or its interval: `56.1 ± 2.1` or `56.1 [53.9, 58.0]`.

    An interval that is cut off is written by its ends.
    """
    if estimate.mean is None:
        return ABSENT
    mean = f"{100 * estimate.mean:.1f}"
    if estimate.low is None or estimate.high is None:
        return mean
    low, high = f"{100 * estimate.low:.1f}", f"{100 * estimate.high:.1f}"
    if estimate.kind == "range":
        return f"{mean} ({low}–{high})"
    below, above = estimate.mean - estimate.low, estimate.high - estimate.mean
    if estimate.kind == "student" and math.isclose(below, above, abs_tol=1e-9):
        return f"{mean} ± {100 * above:.1f}"
    return f"{mean} [{low}, {high}]"


ACCURACY = (
    Column("generic", "generic"),
    Column("many", "generic.many"),
    Column("medium", "generic.medium"),
    Column("few", "generic.few"),
    Column("balanced", "personal.balanced"),
    Column("personal", "personal"),
    Column("tail", "personal.few"),
    Column("masked", "personal.masked"),
    Column("drawn", "personal.drawn"),
    Column("never", "personal.never"),
    Column("worst decile", "personal.worst_decile"),
    Column("after", "personal:after"),
    Column("unseen", "unseen"),
)
"""In the order of a table."""
ROBUST = (
    Column("robust", "generic.robust"),
    Column("robust few", "generic.robust.few"),
    Column("robust balanced", "personal.robust.balanced"),
    Column("robust personal", "personal.robust"),
    Column("robust worst decile", "personal.robust.worst_decile"),
)
"""Of tests under attack, behind the others: there are none where nobody asked for an attack."""
OPEN = (
    Column("closed", "unseen.closed"),
    Column("AUROC", "unseen.auroc"),
    Column("OSCR", "unseen.oscr"),
    Column("open-set H", "unseen.h"),
)
"""Of an open-set test, likewise."""
_WORK = (
    ("", "samples", "flops"),
    ("training", "train_samples", "train_flops"),
    ("adaptation", "adaptation_samples", "adaptation_flops"),
    ("server", "server_samples", "server_flops"),
)
"""In all, and of what."""
_TIME_AND_MEMORY = (
    Column("seconds", "wall_seconds", 1.0),
    Column("peak MiB", "peak_memory_bytes", 2.0**20),
    Column("state MiB", "client_state_bytes", 2.0**20),
)
ASKED = (
    Column("k parameters", "parameters", 1e3),
    Column("model kB", "model_bytes", 1e3),
    Column("MFLOP an image", "forward_flops", 1e6),
    Column("client rounds", "client_rounds", 1.0),
    Column("kB down", "payload_bytes_down", 1e3),
    Column("kB up", "payload_bytes_up", 1e3),
)
"""That a table has if it is asked for them."""
ASKED_SAYS = (
    "parameters, bytes (running statistics included) and FLOP of a forward pass are the network's, whatever a method "
    "makes of it; client rounds are how often clients took part in rounds, and kB down and up what a client is sent, "
    "and sends, in one of them, on average."
)
_MAIN = (
    "generic", "generic.few", "personal.balanced", "personal", "personal.few", "personal.worst_decile",
    "generic.robust", "personal.robust.balanced", "personal.robust", "unseen.auroc", "unseen.h", "samples", "bytes",
    "wall_seconds",
)  # fmt: skip
_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def columns(board: Leaderboard) -> tuple[Column, ...]:
    """Choose the columns of a leaderboard: all of which any row has a number."""
    followed = suffix(board.metric)
    accuracy = [replace(column, key=column.key + followed) for column in (*ACCURACY, *ROBUST, *OPEN)]
    samples, flops = (_scaled(board, title, place) for place, title in ((1, "{0} {1} samples"), (2, "{1} {0}FLOP")))
    known = (*accuracy, *samples, Column("MB", "bytes", 1e6), *flops, *_TIME_AND_MEMORY)
    if board.shown:
        named = {column.key: column for column in (*known, *ASKED)}
        costs = {key for row in board.rows for key in row.cost}
        return tuple(named.get(key, Column(key, key, 1.0 if key in costs else None)) for key in board.shown)
    return tuple(column for column in known if any(column.estimate(row).n for row in board.rows))


def to_be_asked(word: str) -> str | None:
    """Find the key of a column that only those tables have that are asked for it, by its key or title."""
    return next((column.key for column in ASKED if word in (column.key, column.title)), None)


def main_columns(board: Leaderboard) -> tuple[Column, ...]:
    """Choose those that have room on a terminal and a front page."""
    return tuple(column for column in columns(board) if board.shown or column.key.partition("@")[0] in _MAIN)


def _scaled(board: Leaderboard, title: str, place: int) -> list[Column]:
    """Count in thousands, millions and so on, as far as the largest total of the leaderboard has one."""
    largest = max((row.cost.get(_WORK[0][place], NOTHING).mean or 0.0 for row in board.rows), default=0.0)
    prefix, unit = next(((prefix, unit) for prefix, unit in _PREFIXES if largest >= unit), ("", 1.0))
    titles = [" ".join(title.format(prefix, part).split()) for part, *_ in _WORK]
    return [Column(title, work[place], unit) for title, work in zip(titles, _WORK, strict=True)]


def _amount(value: float) -> str:
    """Write a cost with two or three digits."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:#.2g}"
