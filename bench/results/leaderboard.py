"""From records to leaderboards: what may stand in one table, averaged over seeds."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from bench.protocol.identity import canonical, identify
from bench.protocol.words import dataset_in_words, spell_imbalance
from bench.results import older
from bench.results.groups import Group, groups_of, stands, submission_of
from bench.results.record import Record
from bench.results.spent import with_derived
from bench.results.standing import RANKED, ranked_with
from bench.results.statistics import FEWEST, NOTHING, Estimate, estimates
from bench.results.versions import lasting, stale, variant, version
from bench.system.text import plain

METRICS = ("last", "last10", "best")
"""Which evaluation counts: the last round, the mean of the last ten, or the best one, which is optimistic."""
RANKS_BY = ("personal.balanced", "generic")
"""What rows are ordered by: the first, then the second."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One algorithm with one set of hyper-parameters, over its seeds, of one submission or run again by the board."""

    label: str
    """As on the command line, without fields at their defaults: `fedrep(head_epochs=5)`. What tells it from others of
    the leaderboard follows: `fedrep #1f0a` is another version, `fedrep @pack-1f0a` another submission's."""
    words: str
    """The label without that."""
    submission: str | None
    """The pack that it was handed in with; None: runs of the folder itself, or of several submissions, all run again.
    """
    standing: str
    """The weakest of its runs': one of `bench.results.standing.ORDER`."""
    standings: tuple[str, ...]
    """Of the finished runs, in the order of the seeds."""
    algorithm: str
    call: str
    """The algorithm with all its fields."""
    lr: float | None
    """Learning rate of a preset, of this algorithm alone; None: the setting's."""
    version: str
    """Of the algorithm, and of its parts after a plus, as `bench.results.versions.version` writes it."""
    stale: bool
    """Whether the results hold a newer version of the same row."""
    hidden: int
    """Older versions of the same row that the results hold and no leaderboard shows."""
    finished: str | None
    """When the newest of its runs ended, in ISO 8601."""
    tier: str
    seeds: tuple[int, ...]
    """Finished ones, ascending."""
    splits: tuple[str, ...]
    """Fingerprints of the splits of these seeds."""
    values: Mapping[str, tuple[float | None, ...]]
    """What was measured with each of these seeds: fractions 0-1, by key; not all rows have the same keys."""
    metrics: Mapping[str, Estimate]
    """The means of these."""
    spent: Mapping[str, tuple[float | None, ...]]
    """With each of these seeds, of a whole run: the recorded costs, and what they add up to: "bytes" sent in both
    directions, "samples" and "flops" of training, adaptation and the server."""
    cost: Mapping[str, Estimate]
    """The means of these."""
    tested: tuple[Mapping[str, Any], ...]
    """On what the personal metrics rest, with each of these seeds: as `Record.tested`."""
    failures: tuple[tuple[int, str], ...]
    """Seed and reason of each failed run."""
    ids: tuple[str, ...]
    """Of the runs, finished and failed."""
    runs: tuple[str, ...]
    """Ids of the finished ones, in the order of the seeds."""
    screened: bool = False
    """Whether it has too few seeds for an interval, in a leaderboard where others have enough."""

    @property
    def chosen(self) -> bool:
        """Whether its seeds may have been chosen, and its numbers by them: they are not 0 to n - 1."""
        tried = {*self.seeds, *(seed for seed, _ in self.failures)}
        return tried != {*range(len(tried))}

    @property
    def ranks(self) -> bool:
        """Whether it is ranked: no seeds were chosen, and others' means do not rest on more splits than an interval
        wants where its own do not.
        """
        return not self.chosen and not self.screened


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Algorithms that were run under one protocol, engine, precision and kind of device, and are believed alike."""

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
    standing: str
    """Whom its numbers are believed of: one of `bench.results.standing.RANKED`."""
    metric: str
    """One of `METRICS`."""
    seeds: tuple[int, ...]
    """All seeds of any row, ascending."""
    rows: tuple[Row, ...]
    """By the means of `RANKS_BY`, best first and absent last; best rounds never rank. Those that do not rank come after
    those that do: first screened ones, then those with other seeds than 0 to n - 1."""
    fingerprints: Mapping[int, tuple[str, ...]]
    """Of the split, by seed; more than one means that the rows did not see the same data."""
    commits: tuple[str, ...]
    finished: tuple[str, ...]
    """Days (ISO 8601) on which runs ended, ascending."""
    hardware: tuple[str, ...]
    """Processors, or GPUs where those computed."""
    packages: Mapping[str, tuple[str, ...]]
    """Versions of each package that the runs were made with, ascending."""
    dataset_facts: Mapping[str, object]
    """Version, source and fields of the dataset, as the runs' identities have them."""
    apart: Mapping[str, object]
    """What tells it from the others of the same `base`: fields of the protocol, engine, precision, device."""
    lacks: tuple[str, ...]
    """What runs of earlier formats do not have, a sentence each."""
    shown: tuple[str, ...] = ()
    """Keys of the metrics and costs that were asked for, in this order; none: the usual columns."""

    @property
    def base(self) -> str:
        """What it compares on; several leaderboards may be called so."""
        alpha = [] if self.alpha is None else [f"alpha {self.alpha:g}"]
        known = (dataset_in_words(self.dataset), f"imbalance {spell_imbalance(self.imbalance)}", *alpha)
        return ", ".join((*known, f"setting {' or '.join(self.names)}"))


def leaderboards(records: Iterable[Record], metric: str = "last", *, all_versions: bool = False) -> list[Leaderboard]:
    """Sort records into tables.

    Runs stand in one table only if dataset, imbalance, alpha, protocol, engine, precision and device are
    equal, and rows only if they are believed alike: what the board has run again is not ranked beside what it has not.
    The setting's name does not count: the same fields under two names are one protocol.

    Args:
        records: Finished and failed runs, in any order.
        metric: One of `METRICS`: what is shown.
        all_versions: Whether older versions of a plug-in stand beside the newest.

    Returns:
        Leaderboards in the order of dataset, imbalance, alpha, setting, and of what tells them apart.

    Raises:
        ValueError: Unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: must be one of {', '.join(METRICS)}")
    known = sorted(records, key=lambda record: record.id)
    old = stale(known)
    tables: dict[tuple[object, ...], list[Group]] = defaultdict(list)
    for group in groups_of(record for record in known if all_versions or record.id not in old):
        first = group[0]
        place = (first.imbalance, first.alpha, first.protocol)  # which dataset it is, wherever it lay
        tables[(*place, first.engine, first.precision, first.device, ranked_with(stands(group)))].append(group)
    hidden = {(lasting(record), variant(record)) for record in known if record.id in old and not all_versions}
    counted = Counter(row for row, _ in hidden)
    boards = [_leaderboard(members, metric, old, counted) for members in tables.values()]
    return sorted(_tell_apart(boards), key=_place)


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
    values = board.apart.values()
    apart = [(value, "") if isinstance(value, int | float) else (-math.inf, str(value)) for value in values]
    return (
        board.dataset, *none_first, board.names, RANKED.index(board.standing), apart, board.protocol, board.engine,
        board.precision, board.device,
    )  # fmt: skip


def _tell_apart(boards: Sequence[Leaderboard]) -> list[Leaderboard]:
    """Say of those that are called alike what they differ in: of fields, as far as these tell them apart."""
    alike: dict[str, list[dict[str, object]]] = defaultdict(list)
    facts = [_facts(board) for board in boards]
    for board, own in zip(boards, facts, strict=True):
        alike[board.base].append(own)
    told = []
    for board, own in zip(boards, facts, strict=True):
        others = alike[board.base]
        fields = [key for key in dict.fromkeys(key for each in others for key in each) if _varies(key, others)]
        if len({canonical({key: each.get(key) for key in fields}) for each in others}) < len(others):
            fields, own = [*fields, "protocol"], {**own, "protocol": board.protocol}
        told.append(replace(board, apart={key: own.get(key) for key in fields}))
    return told


def _varies(key: str, facts: Sequence[Mapping[str, object]]) -> bool:
    return len({canonical({key: each.get(key)}) for each in facts}) > 1


def _facts(board: Leaderboard) -> dict[str, object]:
    """Give all that may tell a leaderboard from another one."""
    where = {key: getattr(board, key) for key in ("engine", "precision", "device", "standing")}
    return {**board.setting, **board.dataset_facts, **where}


def _dataset_facts(record: Record) -> dict[str, object]:
    described = record.identity.get("dataset")
    if not isinstance(described, dict):
        return {}
    fields = described.get("fields")
    facts = {key: described[key] for key in ("version", "source") if key in described}
    facts |= fields if isinstance(fields, dict) else {}
    return {f"dataset {key}": value for key, value in facts.items()}


def _leaderboard(groups: Sequence[Group], metric: str, old: Set[str], hidden: Mapping[str, int]) -> Leaderboard:
    records = sorted((record for group in groups for record in group), key=lambda record: record.id)
    first = records[0]
    names = sorted({str(record.setting["name"]) for record in records})
    fingerprints: dict[int, set[str]] = defaultdict(set)
    for record in records:
        if record.fingerprint is not None:
            fingerprints[record.seed].add(record.fingerprint)
    return Leaderboard(
        dataset=plain(first.dataset),
        imbalance=first.imbalance,
        alpha=first.alpha,
        names=tuple(map(plain, names)),
        setting={key: value for key, value in first.setting.items() if key != "name"},
        clients=next((each.clients for each in records if each.clients is not None), _asked_clients(first)),
        overrides=_overrides(records, names[0]),
        protocol=first.protocol,
        engine=first.engine,
        precision=first.precision,
        device=first.device,
        standing=ranked_with(stands(groups[0])),
        metric=metric,
        seeds=tuple(sorted({record.seed for record in records})),
        rows=_rows(groups, metric, old, hidden),
        fingerprints={seed: tuple(sorted(known)) for seed, known in sorted(fingerprints.items())},
        commits=tuple(sorted({plain(record.commit) for record in records if record.commit})),
        finished=tuple(sorted({plain(record.finished[:10]) for record in records if record.finished})),
        hardware=tuple(sorted(filter(None, {plain(_hardware(record)) for record in records}))),
        packages=_packages(records),
        dataset_facts=_dataset_facts(first),
        apart={},
        lacks=older.remarks(records),
    )


def _asked_clients(record: Record) -> int | None:
    asked = record.setting.get("clients")
    return asked if isinstance(asked, int) else None


def _hardware(record: Record) -> str:
    recorded = record.standing.hardware if record.standing and record.standing.cost else record.document.get("hardware")
    if not isinstance(recorded, dict):
        return ""
    return str(recorded.get("gpu") or recorded.get("cpu") or "")


def _packages(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        recorded = record.document.get("versions")
        for package, number in recorded.items() if isinstance(recorded, dict) else ():
            found[plain(package)].add(plain(number))

    def order(number: str) -> tuple[list[int], str]:
        return [int(digits) for digits in re.findall(r"\d+", number)], number

    return {package: tuple(sorted(found[package], key=order)) for package in sorted(found)}


def _overrides(records: Sequence[Record], name: str) -> dict[str, object]:
    """Say how the protocol departs from the setting that a run asked for by this name."""
    named = next(record for record in records if record.setting["name"] == name)
    return {key: value for key, value in named.overrides.items() if key not in ("imbalance", "alpha")}


def _rows(groups: Sequence[Group], metric: str, old: Set[str], hidden: Mapping[str, int]) -> tuple[Row, ...]:
    """Make the rows, and tell those of one label apart."""
    labels = [plain(group[0].label or group[0].call) for group in groups]
    variants: dict[str, set[str]] = defaultdict(set)
    for label, group in zip(labels, groups, strict=True):
        variants[label].add(variant(group[0]))
    alike = Counter((label, variant(group[0])) for label, group in zip(labels, groups, strict=True))
    rows = []
    for label, group in zip(labels, groups, strict=True):
        key, submission = variant(group[0]), submission_of(group)
        version = f" #{identify({'row': key})[:4]}" if len(variants[label]) > 1 else ""
        whose = f" @{submission}" if alike[label, key] > 1 and submission is not None else ""
        rows.append(_row(label, version + whose, group, old, hidden))
    enough = any(len(row.seeds) >= FEWEST for row in rows)
    rows = [replace(row, screened=enough and len(row.seeds) < FEWEST) for row in rows]
    ranking = "@last10" if metric == "last10" else ""

    def rank(row: Row) -> tuple[object, ...]:
        means = [row.metrics.get(f"{key}{ranking}", NOTHING).mean for key in RANKS_BY]
        return (row.chosen, row.screened, *((mean is None, -(mean or 0.0)) for mean in means), row.label)

    return tuple(sorted(rows, key=rank))


def _row(words: str, apart: str, records: Group, old: Set[str], hidden: Mapping[str, int]) -> Row:
    done = sorted((record for record in records if record.status == "done"), key=lambda record: record.seed)
    failed = sorted((each.seed, _sentence(each.reason)) for each in records if each.status == "failed")
    method: Any = records[0].identity.get("algorithm")
    values = _by_key([record.metrics for record in done])
    spent = _by_key([with_derived(record.cost) for record in done])
    return Row(
        label=words + apart,
        words=words,
        submission=submission_of(records),
        standing=stands(records),
        standings=tuple(record.stands for record in done),
        algorithm=plain(records[0].algorithm),
        call=plain(records[0].call),
        lr=method.get("lr") if isinstance(method, dict) else None,
        version=plain(version(records[0])),
        stale=records[0].id in old,
        hidden=hidden.get(lasting(records[0]), 0),
        finished=max(filter(None, (record.finished for record in records)), default=None),
        tier=plain(records[0].tier),
        seeds=tuple(record.seed for record in done),
        splits=tuple(record.fingerprint or "" for record in done),
        values=values,
        metrics=estimates(values, scale=(0.0, 1.0)),
        spent=spent,
        cost=estimates(spent),
        tested=tuple(record.tested for record in done),
        failures=tuple(failed),
        ids=tuple(sorted(record.id for record in records)),
        runs=tuple(record.id for record in done),
    )


def _sentence(reason: str | None) -> str:
    """Put what has several lines, such as an error of a plug-in, on one."""
    return plain(" ".join((reason or "").split()))


def _by_key(runs: Sequence[Mapping[str, float | None]]) -> dict[str, tuple[float | None, ...]]:
    return {key: tuple(run.get(key) for run in runs) for key in sorted({key for run in runs for key in run})}
