"""What was compared, as rows and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from bench.results.statistics import estimate

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
HEADINGS = ("method", "case", "authors' code", "metric", "seeds", "theirs", "ours", "difference", "apart", "FedAvg")
Values = list[float | None]


@dataclass
class Row:
    """One metric of one case, a value a seed."""

    method: str
    case: str
    code: str
    metric: str
    theirs: Values = field(default_factory=list)
    ours: Values = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    fedavg: Values = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        """What there is one row of."""
        return self.method, self.case, self.metric


def read(file: Path | None) -> list[Row]:
    """Read rows; none where there is no file."""
    return [Row(**row) for row in json.loads(file.read_text())] if file is not None and file.exists() else []


def put(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Put new rows in the place of those that are the same, by method and then in their order."""
    all_rows = {row.key: row for row in rows} | {row.key: row for row in new}
    return sorted(all_rows.values(), key=lambda row: row.method)


def table(rows: Sequence[Row]) -> str:
    """Lay rows out: percent, means with the range of the seeds, and the mean difference with its 95 % interval."""
    cells = [
        [
            row.method,
            row.case,
            row.code,
            row.metric,
            len(row.ours),
            _ranged(row.theirs),
            _ranged(row.ours),
            _difference(row),
            f"{max(row.apart):.0e}",
            _ranged(row.fedavg),
        ]
        for row in rows
    ]
    return tabulate(cells, HEADINGS, "pipe", disable_numparse=True, colalign=["left"] * 4 + ["right"] * 6)


def write(file: Path, rows: Sequence[Row]) -> None:
    """Put the table between its marks in a file, at whose end they are made if there are none."""
    text = file.read_text() if file.exists() else ""
    if BEGIN not in text:
        text += f"\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}")


def _known(values: Values) -> list[float]:
    return [100 * value for value in values if value is not None]


def _ranged(values: Values) -> str:
    known = _known(values)
    return f"{sum(known) / len(known):.1f} ({min(known):.1f}–{max(known):.1f})"


def _difference(row: Row) -> str:
    apart = [a - b for a, b in zip(_known(row.ours), _known(row.theirs), strict=True)]
    found = estimate(apart)
    left, right = "()" if found.kind == "range" else "[]"
    ends = (
        "" if found.low is None or found.high is None else f" {left}{_signed(found.low)}, {_signed(found.high)}{right}"
    )
    return f"{_signed(found.mean or 0.0)}{ends}"


def _signed(value: float) -> str:
    """Round, and write no minus before a zero."""
    return f"{round(value, 1) + 0:.1f}"
