"""Stored counts, class by class and client by client, few enough to be looked at; and one by one, for pairs of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bench.results.record import Record

MOST = 200
"""Classes or clients that are shown one by one; of more, neighbours are put together."""

OTHERS = "others"
"""The group of clients that are not in the worst decile."""

_NAMES = {"generic": "generic", "personal": "personal", "personal.masked": "masked", "generic.robust": "robust"}
_OF_CLIENTS = ("personal", "masked")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A class or a client, or several neighbours of which the numbers are means."""

    label: str
    members: int
    group: str
    """"many", "medium" or "few" of a class; "worst decile" or `OTHERS` of a client."""
    size: float
    """Training images of a class, test images of a client."""
    accuracy: Mapping[str, float | None]
    """Fractions 0-1 by model; None without such a model or without test images."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What the models of a run got right."""

    classes: tuple[Part, ...]
    """By training images, most first."""
    clients: tuple[Part, ...]
    """By the accuracy of their own models, lowest first; empty without such models."""
    generic: Mapping[int, float]
    """The generic model's accuracy by class, a fraction 0-1; empty without such a model."""
    balanced: Mapping[int, float]
    """The balanced accuracy of a client's own model on its own test images, by client; empty without such models."""


def count(record: Record) -> Counted:
    """Sum a finished run's last counts by class, over all clients, and by client, over all classes.

    Raises:
        DamagedResult: The stored counts are not what was written.
    """
    frame = record.counts()
    frame = frame[(frame["round"] == frame["round"].max()) & (frame["total"] > 0)]
    sums: dict[str, dict[str, dict[int, tuple[int, int]]]] = {"class": {}, "client": {}}
    for axis, tables in sums.items():
        grouped = frame.groupby(["model", axis], sort=True)[["correct", "total"]].sum()
        for (model, place), correct, total in grouped.itertuples(name=None):
            if model in _NAMES:
                tables.setdefault(_NAMES[model], {})[int(place)] = (int(correct), int(total))
    classes = [replace(part, accuracy=_accuracies(sums["class"], int(part.label))) for part in head_to_tail([record])]
    tests = sums["client"].get("personal", {})
    ranked = sorted(tests, key=lambda client: (tests[client][0] / tests[client][1], client))
    worst = math.ceil(len(ranked) / 10)
    clients = [
        Part(
            label=str(client),
            members=1,
            group="worst decile" if place < worst else OTHERS,
            size=tests[client][1],
            accuracy={
                name: value for name, value in _accuracies(sums["client"], client).items() if name in _OF_CLIENTS
            },
        )
        for place, client in enumerate(ranked)
    ]
    own = frame[frame["model"] == "personal"]
    balanced = (own["correct"] / own["total"]).groupby(own["client"]).mean()
    return Counted(
        classes=fewer(classes),
        clients=fewer(clients),
        generic={label: right / total for label, (right, total) in sums["class"].get("generic", {}).items()},
        balanced={int(client): float(share) for client, share in balanced.items()},
    )


def head_to_tail(records: Sequence[Record]) -> list[Part]:
    """Give the classes of runs in the order of their training images, means over the runs, most first.

    Args:
        records: Finished runs of as many classes, one at least.
    """
    groups = {label: name for name, members in records[0].groups.items() for label in members}
    sizes = [math.fsum(counts) / len(records) for counts in zip(*(each.class_counts for each in records), strict=True)]
    order = sorted(range(len(sizes)), key=lambda label: (-sizes[label], label))
    return [
        Part(label=str(label), members=1, group=groups.get(label, ""), size=sizes[label], accuracy={})
        for label in order
    ]


def _accuracies(tables: Mapping[str, Mapping[int, tuple[int, int]]], place: int) -> dict[str, float | None]:
    pairs = {name: table.get(place) for name, table in tables.items()}
    return {name: pair[0] / pair[1] if pair else None for name, pair in pairs.items()}


def fewer(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Put neighbours of one group together until there are about `MOST`."""
    width = -(-len(parts) // MOST)
    if width <= 1:
        return tuple(parts)
    runs: list[list[Part]] = []
    for part in parts:
        if not runs or len(runs[-1]) == width or runs[-1][0].group != part.group:
            runs.append([])
        runs[-1].append(part)
    return tuple(map(_together, runs))


def _together(parts: Sequence[Part]) -> Part:
    names = dict.fromkeys(name for part in parts for name in part.accuracy)
    known = {name: [value for part in parts if (value := part.accuracy.get(name)) is not None] for name in names}
    return Part(
        label=parts[0].label if len(parts) == 1 else f"{parts[0].label} and {len(parts) - 1} more",
        members=len(parts),
        group=parts[0].group,
        size=math.fsum(part.size for part in parts) / len(parts),
        accuracy={name: math.fsum(values) / len(values) if values else None for name, values in known.items()},
    )
