"""From records to leaderboards: what may stand in one table, averaged over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.protocol.identity import canonical, identify
from bench.results.record import Record
from bench.results.statistics import NOTHING, Estimate, estimates

METRICS = ("last", "last10", "best")
"""Which evaluation counts: the last round, the mean of the last ten, or the best one, which is optimistic."""
RANKS_BY = ("personal.balanced", "generic")
"""What rows are ordered by: the first, then the second."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One algorithm with one set of hyper-parameters, over its seeds."""

    label: str
    """As on the command line, without fields at their defaults: `fedrep(head_epochs=5)`."""
    algorithm: str
    call: str
    """The algorithm with all its fields."""
    lr: float | None
    """Learning rate of a preset, of this algorithm alone; None: the setting's."""
    version: str
    """Of the algorithm, and of its parts after a plus; empty if not recorded."""
    tier: str
    seeds: tuple[int, ...]
    """Finished ones, ascending."""
    splits: tuple[str, ...]
    """Fingerprints of the splits of these seeds."""
    values: Mapping[str, tuple[float | None, ...]]
    """What was measured with each of these seeds: fractions 0-1, by key; not all rows have the same keys."""
    metrics: Mapping[str, Estimate]
    """The means of these."""
    cost: Mapping[str, Estimate]
    """Of a whole run: the recorded costs, and what they add up to: "bytes" sent in both directions, "samples" and
    "flops" of training, adaptation and the server."""
    tested: tuple[Mapping[str, Any], ...]
    """On what the personal metrics rest, with each of these seeds: as `Record.tested`."""
    failures: tuple[tuple[int, str], ...]
    """Seed and reason of each failed run."""
    ids: tuple[str, ...]
    """Of the runs, finished and failed."""


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Algorithms that were run under one protocol, engine, precision and kind of device."""

    dataset: str
    """As on the command line, without options at their defaults: `inat(version=2019)`."""
    imbalance: float | None
    alpha: float | None
    names: tuple[str, ...]
    """Settings that the protocol was asked for by."""
    setting: Mapping[str, object]
    """The protocol's fields, without the name."""
    clients: int | None
    """All clients; None if no run came far enough to know."""
    overrides: Mapping[str, object]
    """Fields that differ from those of the setting of the first name, apart from imbalance and alpha."""
    protocol: str
    engine: str
    precision: str
    device: str
    metric: str
    """One of `METRICS`."""
    seeds: tuple[int, ...]
    """All seeds of any row, ascending."""
    rows: tuple[Row, ...]
    """By the means of `RANKS_BY`, best first and absent last; best rounds never rank."""
    fingerprints: Mapping[int, tuple[str, ...]]
    """Of the split, by seed; more than one means that the rows did not see the same data."""
    commits: tuple[str, ...]
    finished: tuple[str, ...]
    """Days (ISO 8601) on which runs ended, ascending."""
    hardware: tuple[str, ...]
    """Processors, or GPUs where those computed."""


def leaderboards(records: Iterable[Record], metric: str = "last") -> list[Leaderboard]:
    """Sort records into tables.

    Runs stand in one table only if dataset, imbalance, alpha, protocol, engine, precision and device are
    equal. The setting's name does not count: the same fields under two names are one protocol.

    Args:
        records: Finished and failed runs, in any order.
        metric: One of `METRICS`: what is shown.

    Returns:
        Leaderboards in the order of dataset, imbalance, alpha, setting, protocol, engine, precision, device.

    Raises:
        ValueError: Unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: must be one of {', '.join(METRICS)}")
    tables: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record.id):
        place = (record.imbalance, record.alpha, record.protocol)  # the protocol says which dataset, wherever it lay
        tables[(*place, record.engine, record.precision, record.device)].append(record)
    boards = [_leaderboard(members, metric) for members in tables.values()]
    return sorted(boards, key=_place)


def measured(board: Leaderboard, key: str) -> dict[str, dict[Hashable, float]]:
    """Give what the rows of a leaderboard were measured at, for `bench.results.statistics`.

    Args:
        board: The leaderboard.
        key: Of a metric: "personal", "generic.few", "personal@last10".

    Returns:
        By label, of the rows that have the metric: its value by (seed, fingerprint of the split), so that what stands
        beside each other was measured on the same images.
    """
    found: dict[str, dict[Hashable, float]] = {}
    for row in board.rows:
        blocks = zip(
            zip(row.seeds, row.splits, strict=True), row.values.get(key, (None,) * len(row.seeds)), strict=True
        )
        known: dict[Hashable, float] = {block: value for block, value in blocks if value is not None}
        if known:
            found[row.label] = known
    return found


def suffix(metric: str) -> str:
    """Give what follows a metric's key: "" for the last round, "@last10", "@best"."""
    return "" if metric == "last" else f"@{metric}"


def _place(board: Leaderboard) -> tuple[object, ...]:
    none_first = [(number is not None, number or 0.0) for number in (board.imbalance, board.alpha)]
    return (
        board.dataset, *none_first, board.names, board.protocol, board.engine, board.precision, board.device
    )  # fmt: skip


def _leaderboard(records: Sequence[Record], metric: str) -> Leaderboard:
    first = records[0]
    names = sorted({str(record.setting["name"]) for record in records})
    fingerprints: dict[int, set[str]] = defaultdict(set)
    for record in records:
        if record.fingerprint is not None:
            fingerprints[record.seed].add(record.fingerprint)
    return Leaderboard(
        dataset=first.dataset,
        imbalance=first.imbalance,
        alpha=first.alpha,
        names=tuple(names),
        setting={key: value for key, value in first.setting.items() if key != "name"},
        clients=next((each.clients for each in records if each.clients is not None), _asked_clients(first)),
        overrides=_overrides(records, names[0]),
        protocol=first.protocol,
        engine=first.engine,
        precision=first.precision,
        device=first.device,
        metric=metric,
        seeds=tuple(sorted({record.seed for record in records})),
        rows=_rows(records, metric),
        fingerprints={seed: tuple(sorted(known)) for seed, known in sorted(fingerprints.items())},
        commits=tuple(sorted({record.commit for record in records if record.commit})),
        finished=tuple(sorted({record.finished[:10] for record in records if record.finished})),
        hardware=tuple(sorted(filter(None, {_hardware(record) for record in records}))),
    )


def _asked_clients(record: Record) -> int | None:
    asked = record.setting.get("clients")
    return asked if isinstance(asked, int) else None


def _hardware(record: Record) -> str:
    recorded = record.document.get("hardware")
    if not isinstance(recorded, dict):
        return ""
    return str(recorded.get("gpu") or recorded.get("cpu") or "")


def _overrides(records: Sequence[Record], name: str) -> dict[str, object]:
    """Say how the protocol departs from the setting that a run asked for by this name."""
    named = next(record for record in records if record.setting["name"] == name)
    return {key: value for key, value in named.overrides.items() if key not in ("imbalance", "alpha")}


def _rows(records: Sequence[Record], metric: str) -> tuple[Row, ...]:
    """Make one row of the runs that differ by seed only."""
    runs: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        runs[canonical({key: value for key, value in record.identity.items() if key != "seed"})].append(record)
    labels = {key: members[0].label or members[0].call for key, members in runs.items()}
    shared = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    rows = [
        _row(f"{label} #{identify({'row': key})[:4]}" if label in shared else label, runs[key])
        for key, label in labels.items()
    ]
    ranking = "@last10" if metric == "last10" else ""

    def rank(row: Row) -> tuple[object, ...]:
        means = [row.metrics.get(f"{key}{ranking}", NOTHING).mean for key in RANKS_BY]
        return (*((mean is None, -(mean or 0.0)) for mean in means), row.label)

    return tuple(sorted(rows, key=rank))


def _row(label: str, records: Sequence[Record]) -> Row:
    done = sorted((record for record in records if record.status == "done"), key=lambda record: record.seed)
    failed = sorted((record.seed, record.reason or "") for record in records if record.status == "failed")
    method: Any = records[0].identity.get("algorithm")
    method = method if isinstance(method, dict) else {}
    pieces = [method, *method.get("parts", ())] if method else []
    values = _by_key([record.metrics for record in done])
    return Row(
        label=label,
        algorithm=records[0].algorithm,
        call=records[0].call,
        lr=method.get("lr"),
        version="+".join(str(piece.get("version", "")) for piece in pieces),
        tier=records[0].tier,
        seeds=tuple(record.seed for record in done),
        splits=tuple(record.fingerprint or "" for record in done),
        values=values,
        metrics=estimates(values, scale=(0.0, 1.0)),
        cost=estimates(_by_key([{**record.cost, **_totals(record.cost)} for record in done])),
        tested=tuple(record.tested for record in done),
        failures=tuple(failed),
        ids=tuple(sorted(record.id for record in records)),
    )


def _by_key(runs: Sequence[Mapping[str, float | None]]) -> dict[str, tuple[float | None, ...]]:
    return {key: tuple(run.get(key) for run in runs) for key in sorted({key for run in runs for key in run})}


_TOTALS = {
    "bytes": ("bytes_down", "bytes_up"),
    "samples": ("train_samples", "adaptation_samples", "server_samples"),
    "flops": ("train_flops", "adaptation_flops", "server_flops"),
}


def _totals(cost: Mapping[str, float | None]) -> dict[str, float | None]:
    """Add costs up; a sum of which a part is absent is absent."""
    parts = {total: [cost.get(key) for key in keys] for total, keys in _TOTALS.items()}
    return {
        total: None if None in amounts else math.fsum(amount or 0.0 for amount in amounts)
        for total, amounts in parts.items()
    }
