"""Pictures of two rows' paired differences: by seed, by client, by class. What is drawn are percentage points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.results.compared import difference
from bench.results.statistics import FEWEST, Estimate, Pair
from bench.site import drawing
from bench.site.charts import Figure, spell
from bench.site.counts import Part
from bench.site.drawing import Spec, percent

_ZERO: Spec = {"mark": {"type": "rule", "color": "var(--rule)"}, "data": {"values": [{}]}}
_BINS = 20
"""Of the difference by client, at most."""
_WIDTHS = (0.5, 1, 2, 2.5, 5, 10, 20)
"""Of a bin, in points."""


def points(share: float) -> str:
    """Write a difference of two fractions in percentage points, with its sign."""
    return difference(Estimate(share, 1))


def by_seed(pairs: Mapping[str, Pair], singles: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw the differences of every seed, their mean and its interval, a line a measure.

    Args:
        pairs: By the measure's name; of each there is a common seed.
        singles: By the measure's name and the seed, fractions.
    """
    values = [
        {
            "measure": name,
            "mean": percent(pair.difference.mean),
            "low": percent(pair.difference.low),
            "high": percent(pair.difference.high),
        }
        for name, pair in pairs.items()
    ]
    dots = [
        {"measure": name, "seed": seed, "value": percent(value)}
        for name in pairs
        for seed, value in singles[name].items()
    ]
    drawn = [value for each in values for end in ("mean", "low", "high") if isinstance(value := each[end], float)]
    drawn += [value for dot in dots if isinstance(value := dot["value"], float)]
    domain = {"domain": [min(0.0, *drawn), max(0.0, *drawn) or 1.0], "nice": True}  # of one seed there are no ends
    spec = drawing.dots_and_bars(values, dots, list(pairs), "measure", "difference, points", domain)
    spec["layer"].insert(0, {**_ZERO, "encoding": {"x": {"datum": 0}, "y": None}})
    seeds = sorted({seed for name in pairs for seed in singles[name]})
    return Figure(
        name="seeds",
        title="Seed by seed",
        says="Differences in percentage points, of runs with the same seed on the same split: a tick is one seed, the "
        f"dot their mean, the bar the 95 % interval of the mean, or with fewer than {FEWEST} seeds their range. The "
        "line is at no difference.",
        specs=(spec,),
        heading=("seed", *pairs),
        rows=tuple(
            (str(seed), *(points(singles[name][seed]) if seed in singles[name] else spell(None) for name in pairs))
            for seed in seeds
        ),
    )


def by_client(differences: Sequence[float], seeds: int) -> Figure:
    """Draw how the differences in balanced accuracy are distributed over the clients of all seeds."""
    bins = _binned([100 * value for value in differences])
    better, worse = (sum(sign * value > 1e-12 for value in differences) for sign in (1, -1))
    n = len(differences)
    middle = sorted(differences)[n // 2] if n % 2 else math.fsum(sorted(differences)[n // 2 - 1 : n // 2 + 1]) / 2
    return Figure(
        name="clients",
        title="Client by client",
        says=f"Differences in balanced accuracy between the two own models of a client, {n:,} of them over {seeds} "
        f"seed{'s' * (seeds != 1)}: how many lie where. The first is better for {_share(better, n)}, equal for "
        f"{_share(n - better - worse, n)}, worse for {_share(worse, n)}; the median is {points(middle)}. Clients of a "
        "seed share one training: there are as many independent differences as seeds, and no test is made of these.",
        specs=(_histogram(bins),),
        heading=("points, from and below", "clients"),
        rows=tuple((f"{low:g} to {high:g}", f"{count:,}") for low, high, count in bins),
    )


def by_class(parts: Sequence[Part], heading: tuple[str, str], seeds: int, classes: int) -> Figure:
    """Draw how much more of each class the first row's generic model recognises, the classes from head to tail.

    Args:
        parts: With "first", "second" and "difference" in `accuracy`.
        heading: The labels of the rows.
        seeds: Over how many the numbers are means.
        classes: How many there are.
    """
    together = f", neighbours together up to {max(part.members for part in parts)}" * (len(parts) < classes)
    return Figure(
        name="classes",
        title="Class by class, head to tail",
        says=f"Differences in the generic model's accuracy, a mean over {seeds} seed{'s' * (seeds != 1)}, for "
        f"{classes:,} classes in the order of their training images, most first{together}: above the line the first "
        "is better.",
        specs=(_columns(parts), drawing.bars(parts, "training images", "class")),
        heading=("class", "group", "training images", *heading, "difference"),
        rows=tuple(
            (
                part.label,
                part.group,
                f"{part.size:,.0f}",
                *(spell(percent(part.accuracy[name])) for name in ("first", "second")),
                points(part.accuracy["difference"] or 0.0),
            )
            for part in parts
        ),
    )


def _share(count: int, n: int) -> str:
    return f"{100 * count / n:.0f} %"


def _binned(values: Iterable[float]) -> list[tuple[float, float, int]]:
    """Count values in bins of one width, with an edge at zero: lower edge, upper edge, how many."""
    known = [round(value, 9) for value in values]
    low, high = min(0.0, *known), max(0.0, *known)
    width = next((width for width in _WIDTHS if (high - low) / width <= _BINS - 2), _WIDTHS[-1])
    first, last = math.floor(low / width), math.floor(high / width)
    counts = dict.fromkeys(range(first, last + 1), 0)
    for value in known:
        counts[math.floor(value / width)] += 1
    return [(place * width, (place + 1) * width, count) for place, count in counts.items()]


def _histogram(bins: Sequence[tuple[float, float, int]]) -> Spec:
    values = [{"from": low, "to": high, "count": count} for low, high, count in bins]
    return {
        "data": {"values": values},
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 150,
        "layer": [
            {
                "mark": {"type": "rect", "color": "var(--series-1)", "stroke": "var(--paper)"},
                "encoding": {
                    "x": {"field": "from", "type": "quantitative", "title": "difference, points"},
                    "x2": {"field": "to"},
                    "y": {"field": "count", "type": "quantitative", "title": "clients", "axis": {"tickMinStep": 1}},
                    "y2": {"datum": 0},
                    "tooltip": [{"field": "from"}, {"field": "to"}, {"field": "count", "title": "clients"}],
                },
            },
            {**_ZERO, "encoding": {"x": {"datum": 0}}},
        ],
    }


def _columns(parts: Sequence[Part]) -> Spec:
    values = [
        {**place, "value": percent(part.accuracy["difference"])}
        for place, part in zip(drawing.places(parts), parts, strict=True)
    ]
    sides: dict[str, Any] = {"condition": {"test": "datum.value < 0", "value": "var(--series-2)"}}
    x = {"type": "quantitative", "scale": {"domain": [0.5, len(parts) + 0.5], "nice": False}, "axis": None}
    return {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 190,
        "layer": [
            *({**layer, "encoding": {**layer.get("encoding", {}), "x": {"field": "place", **x}}}
              for layer in drawing.borders(parts)),
            {
                "data": {"values": values},
                "transform": [
                    {"calculate": "datum.place - 0.42", "as": "from"},
                    {"calculate": "datum.place + 0.42", "as": "to"},
                ],
                "mark": "rect",
                "encoding": {
                    "x": {"field": "from", **x},
                    "x2": {"field": "to"},
                    "y": {
                        "field": "value",
                        "type": "quantitative",
                        "title": "difference, points",
                        "scale": {"zero": True},
                        "axis": drawing.AXIS,
                    },
                    "y2": {"datum": 0},
                    "color": {**sides, "value": "var(--series-1)"},
                    "tooltip": [{"field": "name", "title": "class"}, {"field": "value", "format": "+.1f"}],
                },
            },
            {**_ZERO, "encoding": {"y": {"datum": 0}}},
        ],
    }  # fmt: skip
