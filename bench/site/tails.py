"""The generic accuracy of a comparison's chosen rows by class, head to tail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from bench.plugins import declared
from bench.plugins.registry import ALGORITHMS
from bench.results.comparison import controls
from bench.results.entrants import entrants
from bench.results.leaderboard import Leaderboard, Row
from bench.results.record import Record
from bench.results.statistics import NOTHING
from bench.site.charts import Figure, spell
from bench.site.counts import Part, head_to_tail
from bench.site.drawing import PERCENT, Spec, percent
from bench.site.methods import pieces
from bench.site.run_page import Drawn

_POINTS = 10
"""Of a line, at most: of more classes, neighbours are put together."""
_USUAL = "fedavg"
"""The row that everybody knows."""
_STYLES = (("circle", [1, 0]), ("square", [6, 3]), ("diamond", [2, 2]))
"""Shape and dash of each line."""


def tails(board: Leaderboard, records: Mapping[str, Record], drawn: Mapping[str, Drawn]) -> Figure | None:
    """Draw a line for each chosen row, means over its seeds; nothing if no row has a generic model.

    Args:
        board: The comparison's.
        records: The runs, by id.
        drawn: The same runs, by id.
    """
    rows = chosen(board)
    if not rows:
        return None
    places = _together(head_to_tail([records[run] for row in rows for run in row.runs]))
    known = {row.label: _by_class([drawn[run].generic for run in row.runs]) for row in rows}
    lines = {
        label: [_mean([found[int(part.label)] for part in parts if int(part.label) in found]) for parts in places]
        for label, found in known.items()
    }
    names = [_named(parts, sum(map(len, places[:place])), places) for place, parts in enumerate(places)]
    sizes = [f"{math.fsum(part.size for part in parts) / len(parts):,.0f}" for parts in places]
    classes = sum(map(len, places))
    together = (
        f" They are put together in {len(places)} groups of neighbours, as equal as can be, and each dot is the mean "
        "over the classes of a group."
    )
    return Figure(
        name="tails",
        title="Generic accuracy by class, head to tail",
        says=f"Generic accuracy in percent of {classes:,} classes, from most to fewest training images, a mean over "
        f"seeds: {_who(rows)}.{together * (len(places) < classes)}",
        specs=(_drawn(lines, names, sizes),),
        heading=("classes", "training images", *lines),
        rows=tuple(
            (name, size, *(spell(percent(values[place])) for values in lines.values()))
            for place, (name, size) in enumerate(zip(names, sizes, strict=True))
        ),
    )


def chosen(board: Leaderboard) -> list[Row]:
    """Choose the best row by generic accuracy that is no reference, FedAvg's, and the first control of the best that is
    there; those that have a generic model.
    """
    known = [row for row in board.rows if row.metrics.get("generic", NOTHING).n]
    methods = [row for row in known if row.ranks and _family(row) != "references"] or known
    if not methods:
        return []
    best = max(methods, key=lambda row: row.metrics["generic"].mean or 0.0)
    names = {id(row): label for label, rows in entrants([board]).items() for row in rows}
    told = [control.label for control in controls([board], [names[id(best)]])]
    answers = [row for row in known if names[id(row)] in told]
    rows = [best, *(row for row in known if row.words == _USUAL), *answers[:1]]
    return [row for place, row in enumerate(rows) if row not in rows[:place]]


def _family(row: Row) -> Any:
    method, *_ = pieces(row.words)
    return declared.declared(ALGORITHMS, method, "family") if method in ALGORITHMS else None


def _who(rows: Sequence[Row]) -> str:
    best, *others = rows
    said = [f"{best.label}, the best of all rows but references"]
    said += [row.label if row.words == _USUAL else f"{row.label}, a control of it" for row in others]
    return "; ".join(said)


def _together(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Part classes in at most so many groups as there are points."""
    groups = min(_POINTS, len(parts))
    edges = [round(place * len(parts) / groups) for place in range(groups + 1)]
    return [parts[start:stop] for start, stop in pairwise(edges)]


def _named(parts: Sequence[Part], before: int, places: Sequence[Sequence[Part]]) -> str:
    """Name a class by its label, and classes that are put together by their places from the head on."""
    if len(places) == sum(map(len, places)):
        return parts[0].label
    return f"{before + 1} to {before + len(parts)}"


def _by_class(runs: Sequence[Mapping[int, float]]) -> dict[int, float]:
    labels = dict.fromkeys(label for run in runs for label in run)
    return {label: _mean([run[label] for run in runs if label in run]) or 0.0 for label in labels}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _drawn(lines: Mapping[str, Sequence[float | None]], names: Sequence[str], sizes: Sequence[str]) -> Spec:
    values = [
        {"algorithm": label, "place": name, "images": size, "value": percent(value)}
        for label, shares in lines.items()
        for name, size, value in zip(names, sizes, shares, strict=True)
        if value is not None
    ]
    legend = {"orient": "top", "title": None, "symbolSize": 60, "labelLimit": 300, "columns": 1, "offset": 12}

    def scale(ranged: Sequence[object]) -> dict[str, Any]:
        return {
            "field": "algorithm",
            "type": "nominal",
            "scale": {"domain": list(lines), "range": list(ranged)[: len(lines)]},
            "legend": legend,
        }

    return {
        "data": {"values": values},
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 240,
        "encoding": {
            "x": {
                "field": "place",
                "type": "ordinal",
                "sort": list(names),
                "title": "classes, from most to fewest training images",
                "axis": {"labelAngle": 0, "labelOverlap": True},
            },
            "y": {"field": "value", "type": "quantitative", "title": "accuracy, %", "scale": PERCENT},
            "color": scale([f"var(--series-{number})" for number in range(1, len(_STYLES) + 1)]),
            "shape": scale([shape for shape, _ in _STYLES]),
            "tooltip": [
                {"field": "algorithm"},
                {"field": "place", "title": "classes"},
                {"field": "images", "title": "training images"},
                {"field": "value", "format": ".1f"},
            ],
        },
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.75},
                "encoding": {"strokeDash": scale([dash for _, dash in _STYLES])},
            },
            {"mark": {"type": "point", "filled": True, "size": 40}},
        ],
    }
