"""Which results are of code that was changed since: one edits a plug-in and runs again, and the newest is meant.

Runs are of one *row* if they were asked for by the same words: the algorithm's label, under one protocol, on one kind
of machine. What else their identities have, version, source and the values of defaults, makes *variants* of the row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from bench.protocol.identity import canonical
from bench.results.record import Record


def stale(records: Iterable[Record]) -> set[str]:
    """Find the runs of which the records hold a newer variant, the one with the run that ended last.

    Returns:
        Their ids.
    """
    rows: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        rows[lasting(record)][variant(record)].append(record)
    found: set[str] = set()
    for variants in rows.values():
        *older, _ = sorted(variants.values(), key=_age)
        found |= {record.id for members in older for record in members}
    return found


def variant(record: Record) -> str:
    """Name what runs have in common that differ by seed only: their identity without it, in JSON."""
    return canonical({key: value for key, value in record.identity.items() if key != "seed"})


def lasting(record: Record) -> str:
    """Name what runs have in common whose plug-ins were edited in between, by whoever handed them in."""
    rest = {key: _unversioned(value) for key, value in record.identity.items() if key not in ("seed", "algorithm")}
    dataset = record.dataset if "source" in _mapping(record.identity.get("dataset")) else None
    words = {"algorithm": record.algorithm, "label": record.label or record.call, "dataset": dataset}
    words |= {"submission": record.submission}
    return canonical({**words, "rest": rest})


def version(record: Record) -> str:
    """Write the version of a run's algorithm, and of its parts after a plus: `2+1`; of a file of one's own with the
    beginning of its digest: `1/3f9a1c`. Empty if not recorded.
    """
    method = _mapping(record.identity.get("algorithm"))
    pieces = [method, *map(_mapping, method.get("parts", ()))] if method else []
    return "+".join(f"{piece.get('version', '')}{_digest(piece)}" for piece in pieces)


def _digest(piece: Mapping[str, Any]) -> str:
    return f"/{piece['source'][:6]}" if "source" in piece else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _unversioned(value: object) -> object:
    """Leave out what an edit changes of a described plug-in: version and source, and with a source its fields."""
    if not isinstance(value, dict):
        return value
    if {"name", "version", "fields"} <= value.keys():
        fields = None if "source" in value else value["fields"]
        value = {**{key: inner for key, inner in value.items() if key not in ("version", "source")}, "fields": fields}
    return {key: _unversioned(inner) for key, inner in value.items()}


def _age(records: Iterable[Record]) -> tuple[str, list[int], str]:
    """Order variants by when they were run; those of the same second by version, and at last by anything."""
    members = list(records)
    first = members[0]
    numbers = [number for piece in version(first).split("+") if (number := piece.partition("/")[0]).isdigit()]
    return max(each.finished or "" for each in members), list(map(int, numbers)), variant(first)
