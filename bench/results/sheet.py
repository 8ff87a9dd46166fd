"""Leaderboards as CSV: the table as a spreadsheet wants it, and every number there is, a line each.

Accuracies are fractions 0-1, costs in the units of their names; what is absent is empty.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

from bench.results.columns import ACCURACY, columns
from bench.results.leaderboard import Leaderboard, Row, suffix
from bench.results.statistics import NOTHING
from bench.system.text import cell

_PROTOCOL = (
    "model", "norm", "partition", "client_test", "participation", "rounds", "epochs", "batch_size", "lr",
)  # fmt: skip
"""Fields of the setting that are always a column; others are where leaderboards differ in them."""
_CELL = ("engine", "precision", "device", "protocol")
_ROW = ("algorithm", "call", "version", "tier", "standing", "submission", "finished")


def sheet(boards: Sequence[Leaderboard], per_seed: bool = False) -> str:
    """Write the table: a line an algorithm, or one a run, with the fields of the protocol as columns.

    Args:
        boards: In the order in which they are to appear.
        per_seed: A line for each seed that was run, with its run's id and split, in place of the mean of them.

    Returns:
        CSV with a heading. The accuracies are the columns of the tables; beside a mean stand the ends of what the seeds
        span, whose `interval` is the kind of `bench.results.statistics.Estimate`.
    """
    fields = _fields(boards)
    usual = {column.title for board in boards for column in columns(board)}
    asked = {column.key: column for board in boards if board.shown for column in columns(board) if column.unit is None}
    shown = list(asked.values()) or [column for column in ACCURACY if column.title in usual]
    costs = list(dict.fromkeys(each.key for b in boards for each in columns(b) if each.unit is not None))
    ends = ("", " low", " high")
    accuracies = [f"{column.title}{end}" for column in shown for end in ("",) * per_seed or ends]
    runs = ("seed", "run", "split", "failure") if per_seed else ("seeds", "failed", "interval")
    heading = ["dataset", "imbalance", "alpha", "setting", "clients", *fields, *_CELL, *_ROW, *runs]
    lines: list[Sequence[object]] = []
    for board in boards:
        start: list[object] = [board.dataset, board.imbalance, board.alpha, " or ".join(board.names), board.clients]
        start += [{**board.setting, **board.dataset_facts}.get(field) for field in fields]
        start += [getattr(board, key) for key in _CELL]
        keys = [column.key if asked else column.key + suffix(board.metric) for column in shown]
        for row in board.rows:
            own = [*start, row.label, *(getattr(row, key) for key in _ROW[1:])]
            made = _runs(row, keys, costs) if per_seed else [_means(row, keys, costs)]
            lines += [[*own, *line] for line in made]
    return _csv([*heading, *accuracies, *costs], lines)


def _fields(boards: Sequence[Leaderboard]) -> list[str]:
    """Choose the fields of the protocol that are columns."""
    settings = [board.setting for board in boards]
    used = dict.fromkeys(key for own in settings for key in own)
    differing = [key for key in used if any(own.get(key) != settings[0].get(key) for own in settings)]
    of_dataset = [key for board in boards for key in board.apart if key in board.dataset_facts]
    known = [field for field in _PROTOCOL if any(field in board.setting for board in boards)]
    named = ("imbalance", "alpha", "clients")
    return [field for field in dict.fromkeys((*known, *differing, *of_dataset)) if field not in named]


def _means(row: Row, keys: Sequence[str], costs: Sequence[str]) -> list[object]:
    found = [row.metrics.get(key, NOTHING) for key in keys]
    kind = next((estimate.kind for estimate in found if estimate.kind), None)
    ends = [value for estimate in found for value in (estimate.mean, estimate.low, estimate.high)]
    return [len(row.seeds), len(row.failures), kind, *ends, *(row.cost.get(key, NOTHING).mean for key in costs)]


def _runs(row: Row, keys: Sequence[str], costs: Sequence[str]) -> list[list[object]]:
    done = [
        (seed, run, split, None, *_at(place, row.values, keys), *_at(place, row.spent, costs))
        for place, (seed, run, split) in enumerate(zip(row.seeds, row.runs, row.splits, strict=True))
    ]
    failed = [(seed, None, None, reason, *[None] * (len(keys) + len(costs))) for seed, reason in row.failures]
    return [list(line) for line in sorted([*done, *failed], key=lambda line: int(str(line[0])))]


def _at(place: int, values: Mapping[str, Sequence[float | None]], keys: Sequence[str]) -> list[float | None]:
    return [values[key][place] if key in values else None for key in keys]


_BOARD = ("dataset", "imbalance", "alpha", "protocol", "engine", "precision", "device")


def long(boards: Sequence[Leaderboard]) -> str:
    """Write every metric there is: a line per leaderboard, algorithm and metric, or cost as "cost.NAME"; `kind` says
    what low and high are, see `bench.results.statistics.Estimate`.
    """
    heading = (
        *_BOARD,
        "setting",
        "algorithm",
        "call",
        "version",
        "standing",
        "metric",
        "mean",
        "n",
        "low",
        "high",
        "kind",
    )
    lines = []
    for board in boards:
        start = [*(getattr(board, key) for key in _BOARD), " or ".join(board.names)]
        for row in board.rows:
            costs = {f"cost.{key}": value for key, value in row.cost.items()}
            for key, number in {**row.metrics, **costs}.items():
                cells = [row.label, row.call, row.version, row.standing, key, number.mean, number.n]
                lines.append([*start, *cells, number.low, number.high, number.kind])
    return _csv(heading, lines)


def _csv(heading: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(map(cell, heading))
    writer.writerows(map(cell, line) for line in lines)
    return sink.getvalue()
