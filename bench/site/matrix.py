"""Which classes a model takes for which: the picture, and precision, recall and F1 class by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.results import classes
from bench.results.columns import ABSENT
from bench.results.record import Record
from bench.site.charts import Figure
from bench.site.drawing import Spec, percent

MOST = 100
"""Classes that are drawn one by one; of more, neighbours are put together."""
_NAMED = 30
"""So many have room for a name at the axes,"""
_NUMBERED = 12
"""and so many for a number in each cell."""
_MODELS = {"generic": "the generic model", "personal": "the clients' own models, on all their test images together"}
_SHADE = 50.0
"""What a share is multiplied by before its logarithm is drawn: few mistakes are to be seen beside many."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A class, or neighbours of one group."""

    name: str
    group: str
    members: tuple[int, ...]


def matrices(record: Record) -> list[Figure]:
    """Draw what the models of a run take each class for, a figure a model; nothing where its format does not say."""
    if "predictions" not in record.companions:
        return []
    models = [name for name in _MODELS if name in set(record.predictions()["model"])]
    return [_figure(record, model) for model in models]


def _figure(record: Record, model: str) -> Figure:
    places = _places(record)
    counted = record.confusion(model)
    together = np.array([[counted[np.ix_(row.members, column.members)].sum() for column in places] for row in places])
    several = len(places) < len(record.class_counts)
    order = [label for place in places for label in place.members]
    groups = {label: place.group for place in places for label in place.members}
    known = classes.by_class(record, model)
    return Figure(
        name=f"confusion-{model}",
        title=f"What {model} takes for what",
        says=f"{len(order):,} classes in the order of their training images{', neighbours together' * several}, the "
        f"rows, and what their test images are taken for by {_MODELS[model]}, the columns. The fuller a cell, the "
        "larger a share of the row, on a logarithmic scale; what is right lies on the diagonal. In the table, "
        f"precision is the share that is right of what is taken for a class, {ABSENT} where nothing is.",
        specs=(_drawn(places, together),),
        heading=("class", "group", "test images", "precision", "recall", "F1", "mostly mistaken for"),
        rows=tuple(
            (
                str(label),
                groups[label],
                f"{known[label].images:,}",
                *(_spell(value) for value in (known[label].precision, known[label].recall, known[label].f1)),
                _mistaken(counted[label].tolist(), label),
            )
            for label in order
        ),
    )


def _places(record: Record) -> list[_Place]:
    """Put classes in the order of their training images, and neighbours together where there are too many."""
    groups = {label: name for name, members in record.groups.items() for label in members}
    order = sorted(range(len(record.class_counts)), key=lambda label: (-record.class_counts[label], label))
    width = -(-len(order) // MOST)
    runs: list[list[int]] = []
    for label in order:
        if not runs or len(runs[-1]) == width or groups.get(runs[-1][0]) != groups.get(label):
            runs.append([])
        runs[-1].append(label)
    return [
        _Place(
            name=str(run[0]) if len(run) == 1 else f"{run[0]} and {len(run) - 1} more",
            group=groups.get(run[0], ""),
            members=tuple(run),
        )
        for run in runs
    ]


def _mistaken(row: Sequence[int], label: int) -> str:
    """Name the class that most images are wrongly taken for, and how many; the first of equals."""
    others = [(count, -other) for other, count in enumerate(row) if other != label]
    count, other = max(others, default=(0, 0))
    return f"{-other} ({count:,})" if count else ABSENT


def _spell(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


def _drawn(places: Sequence[_Place], counted: Any) -> Spec:
    """Draw a square of cells, of which those that never happened are left out."""
    n, images = len(places), counted.sum(1)
    cells: list[dict[str, Any]] = []
    for row, column in zip(*(index.tolist() for index in counted.nonzero()), strict=True):
        share = float(counted[row, column] / images[row])
        cells.append(
            {
                "row": row + 1,
                "column": column + 1,
                "count": int(counted[row, column]),
                "share": percent(share),
                "shade": round(math.log1p(_SHADE * share) / math.log1p(_SHADE), 3),
            }
        )
    names = [place.name for place in places]
    label = f"{names!r}[datum.value - 1]"
    borders = [
        {"place": place + 0.5, "start": 0.5, "end": n + 0.5, "named": here.group}
        for place, here in enumerate(places)
        if here.group and (place == 0 or here.group != places[place - 1].group)
    ]

    def axis(title: str, **more: Any) -> dict[str, Any]:
        values = list(range(1, n + 1)) if n <= _NAMED else []
        return {
            "type": "quantitative",
            "title": title,
            "axis": {"values": values, "labelExpr": label, "grid": False, "domain": False, "ticks": False, **more},
        }

    x = {**axis("taken for", labelAngle=0), "scale": {"domain": [0.5, n + 0.5], "nice": False, "zero": False}}
    y = {**axis("class"), "scale": {"domain": [n + 0.5, 0.5], "nice": False, "zero": False}}
    rule = {"type": "rule", "strokeDash": [1, 3], "color": "var(--muted)"}
    layers: list[Spec] = [
        {
            "data": {"values": cells},
            "transform": [
                {"calculate": f"datum.{name} {sign} 0.5", "as": f"{name}{end}"}
                for name in ("row", "column")
                for sign, end in (("-", 0), ("+", 1))
            ]
            + [{"calculate": f"{names!r}[datum.{name} - 1]", "as": f"{name} name"} for name in ("row", "column")],
            "mark": {"type": "rect", "color": "var(--series-1)"},
            "encoding": {
                "x": {"field": "column0", **x},
                "x2": {"field": "column1"},
                "y": {"field": "row0", **y},
                "y2": {"field": "row1"},
                "opacity": {
                    "field": "shade",
                    "type": "quantitative",
                    "scale": {"domain": [0, 1], "range": [0, 1]},
                    "legend": None,
                },
                "tooltip": [
                    {"field": "row name", "title": "class"},
                    {"field": "column name", "title": "taken for"},
                    {"field": "count", "title": "images", "format": ",.0f"},
                    {"field": "share", "title": "of the class, %", "format": ".1f"},
                ],
            },
        },
    ]
    if borders:
        layers += [
            {
                "data": {"values": borders[1:]},
                "mark": rule,
                "encoding": {"x": {"field": "place", **x}, "y": {"field": "start", **y}, "y2": {"field": "end"}},
            },
            {
                "data": {"values": borders[1:]},
                "mark": rule,
                "encoding": {"y": {"field": "place", **y}, "x": {"field": "start", **x}, "x2": {"field": "end"}},
            },
            {
                "data": {"values": borders},
                "mark": {"type": "text", "align": "left", "baseline": "bottom", "dx": 2, "fontStyle": "italic"},
                "encoding": {
                    "text": {"field": "named"},
                    "x": {"field": "place", **x},
                    "y": {"value": -4},
                    "color": {"value": "var(--muted)"},
                },
            },
        ]
    if n <= _NUMBERED:
        layers.append(
            {
                "data": {"values": cells},
                "mark": {"type": "text", "fontSize": 10.5},
                "encoding": {
                    "x": {"field": "column", **x},
                    "y": {"field": "row", **y},
                    "text": {"field": "count", "type": "quantitative", "format": ",.0f"},
                    "color": {
                        "condition": {"test": "datum.shade > 0.6", "value": "var(--paper)"},
                        "value": "var(--ink)",
                    },
                },
            }
        )
    return {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 380,
        "layer": layers,
    }
