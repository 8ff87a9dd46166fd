"""Accuracy at equal bytes: `generic@5MB` is a metric after the last evaluation by which a run has sent so much at most.

Bytes are those of all clients together, up and down, prologues included, from the first round on. A run that has sent
more by its first evaluation has no such number, nor has one that does not say what it had sent by then, or one whose
data are pooled, where nothing is sent. Evaluations are `eval_every` rounds apart: what lies between two is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.results.record import Record

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
SAYS = (
    "NAME@5MB: the metric after the last evaluation by which all clients together had been sent, and had sent, at most "
    "so many bytes; absent where the first one comes later."
)
_BUDGET = re.compile(r"(?P<metric>.+)@(?P<amount>\d+(?:\.\d+)?)(?P<unit>kB|MB|GB)")


def asked(key: str) -> tuple[str, float] | None:
    """Read a key as a metric and the bytes that may be sent for it; None: it is not of this form."""
    found = _BUDGET.fullmatch(key)
    return None if found is None else (found["metric"], float(found["amount"]) * UNITS[found["unit"]])


def with_budgets(records: Iterable[Record], keys: Sequence[str]) -> list[Record]:
    """Put among the metrics of finished records those that are asked for by their bytes.

    Raises:
        DamagedResult: The stored curves are not what was written.
    """
    wanted = {key: budget for key in keys if (budget := asked(key)) is not None}
    return [replace(record, metrics={**record.metrics, **_within(record, wanted)}) for record in records]


def _within(record: Record, wanted: dict[str, tuple[str, float]]) -> dict[str, float | None]:
    """Look up, of the metrics that a record has."""
    there = {key: budget for key, budget in wanted.items() if budget[0] in record.metrics}
    if record.status != "done" or not there:
        return {}
    curves = record.rounds() if record.sent else None
    found: dict[str, float | None] = dict.fromkeys(there)
    for key, (metric, most) in there.items():
        rounds = [int(round) for round, sent in record.sent.items() if sent <= most]
        if curves is not None and rounds and metric in curves:
            (value,) = curves.loc[curves["round"] == max(rounds), metric].tolist()
            found[key] = None if value is None or math.isnan(value) else float(value)
    return found
