"""Results of earlier formats: what they do not hold, and what they hold that is counted otherwise now.

1   personal models of clients that no cohort drew were no newcomers, samples were those of training alone, FLOP too:
    generic metrics, bytes and times are as today, the rest is absent
2   right answers of all evaluations, and not what images were taken for
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.results.record import Record

FILES = {"rounds": "rounds.parquet", "counts": "clients.parquet"}
"""Table to its file, in formats 1 and 2."""
_LACKS = {
    1: ("counts by predicted class", "personal numbers", "samples", "FLOP that can be compared with later ones"),
    2: ("counts by predicted class",),
}
_COSTS_OF_1 = (
    "bytes_down", "bytes_up", "device_seconds", "wall_seconds", "peak_memory_bytes", "client_state_bytes"
)  # fmt: skip


def lacks(format: int) -> tuple[str, ...]:
    """Name what results of a format do not have, or have in another sense that would be misread."""
    return _LACKS.get(format, ())


def legible(document: Mapping[str, Any]) -> dict[str, Any]:
    """Give a run.json without what would be misread."""
    if document.get("format") != 1 or document.get("status") != "done":
        return dict(document)
    metrics, cost = (document.get(key) for key in ("metrics", "cost"))
    kept = {"metrics": metrics, "cost": cost}
    if isinstance(metrics, dict):
        kept["metrics"] = {key: value for key, value in metrics.items() if is_legible(1, key)}
    if isinstance(cost, dict):
        kept["cost"] = {key: value for key, value in cost.items() if key in _COSTS_OF_1}
    return {**document, **kept}


def is_legible(format: int, name: str) -> bool:
    """Tell whether a model, or a metric, of a format means what it means today."""
    return format > 1 or name == "round" or name.startswith("generic")


def remarks(records: Iterable[Record]) -> tuple[str, ...]:
    """Say in a sentence for each earlier format what its runs lack."""
    formats = Counter(record.format for record in records if record.lacks)
    return tuple(
        f"{number} {'run' if number == 1 else 'runs'} of format {format} {'has' if number == 1 else 'have'} no "
        f"{_listed(lacks(format))}."
        for format, number in sorted(formats.items())
    )


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
