"""Pictures as Vega-Lite specifications.

A page's script sets fonts, colours and widths. Series differ by shape or dash, never by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.results.statistics import Ranking
from bench.site.counts import OTHERS, Part

Spec = dict[str, Any]

PERCENT: Mapping[str, Any] = {"domain": [0, 100], "nice": False}
_SERIES = {
    "personal": ("circle", [1, 0]),
    "masked": ("diamond", [6, 3]),
    "generic": ("square", [2, 2]),
    "unseen": ("triangle-up", [8, 2, 2, 2]),
    "balanced": ("cross", [4, 1]),
}
"""What a curve or dot stands for, its shape and its dash."""


def percent(share: float | None) -> float | None:
    """Turn a fraction into a percentage with as many digits as a picture shows."""
    return None if share is None or math.isnan(share) else round(100 * share, 3)


def lines(values: list[dict[str, Any]], names: list[str], height: int) -> Spec:
    """Draw curves.

    Args:
        values: A mapping with "round", "model" and "value" (percent) for each point.
        names: The models, all of them known to `_SERIES`.
        height: In pixels.
    """
    return {
        "data": {"values": values},
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": height,
        "encoding": {
            "x": {"field": "round", "type": "quantitative", "title": "round", "axis": {"tickMinStep": 1}},
            "y": {"field": "value", "type": "quantitative", "title": "accuracy, %", "scale": PERCENT},
            **_by_model(names),
            "tooltip": [{"field": "model"}, {"field": "round"}, {"field": "value", "format": ".1f"}],
        },
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.75},
                "encoding": {
                    "strokeDash": {
                        "field": "model",
                        "type": "nominal",
                        "scale": {"domain": names, "range": [_SERIES[name][1] for name in names]},
                        "legend": _LEGEND,
                    }
                },
            },
            {"mark": {"type": "point", "filled": True, "size": 28}},
        ],
    }


_LEGEND = {"orient": "top", "title": None, "symbolSize": 60, "offset": 20}


def _by_model(names: list[str]) -> Spec:
    """Tell models apart by colour and shape."""
    hues = {name: f"var(--series-{number})" for number, name in enumerate(_SERIES, start=1)}
    return {
        "color": {
            "field": "model",
            "type": "nominal",
            "scale": {"domain": names, "range": [hues[name] for name in names]},
            "legend": _LEGEND,
        },
        "shape": {
            "field": "model",
            "type": "nominal",
            "scale": {"domain": names, "range": [_SERIES[name][0] for name in names]},
            "legend": _LEGEND,
        },
    }


def dots_and_bars(
    values: list[dict[str, Any]],
    dots: list[dict[str, Any]],
    order: list[str],
    noun: str = "algorithm",
    title: str = "accuracy, %",
    domain: Mapping[str, Any] = PERCENT,
) -> Spec:
    """Draw a line an algorithm, or something else: its mean, its interval, its seeds.

    Args:
        values: The noun, "mean", "low" and "high", in percent; None for an end that there is not.
        dots: The noun, "seed" and "value", in percent.
        order: The lines from top to bottom.
        noun: What a line is.
        title: Of the axis.
        domain: Its scale.
    """
    y = {"field": noun, "type": "nominal", "sort": order, "title": None, "axis": {"labelLimit": 190}}
    scale = {"scale": domain, "title": title}
    return {
        "data": {"values": values},
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 22 * len(order),
        "encoding": {"y": y},
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 5, "color": "var(--band)"},
                "encoding": {
                    "x": {"field": "low", "type": "quantitative", **scale},
                    "x2": {"field": "high"},
                    "tooltip": [{"field": noun}, *({"field": end, "format": ".1f"} for end in ("low", "high"))],
                },
            },
            {
                "data": {"values": dots},
                "mark": {"type": "tick", "thickness": 1.5, "size": 11, "color": "var(--muted)"},
                "encoding": {
                    "x": {"field": "value", "type": "quantitative", **scale},
                    "tooltip": [{"field": noun}, {"field": "seed"}, {"field": "value", "format": ".1f"}],
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 55, "color": "var(--series-1)", "opacity": 1},
                "encoding": {
                    "x": {"field": "mean", "type": "quantitative", **scale},
                    "tooltip": [{"field": noun}, {"field": "mean", "format": ".1f"}],
                },
            },
        ],
    }


def rank_lines(ranking: Ranking) -> Spec:
    """Lay the diagram out downwards, a line an algorithm, so that it fits a narrow page."""
    scale = "critical difference"
    while scale in ranking.labels:
        scale += " "
    last = max(float(len(ranking.labels)), 1 + ranking.critical_difference)
    step = 0.035 * last
    lines = [
        {"group": number, "algorithm": end, "place": last + step * (1.5 + number)}
        for number, group in enumerate(ranking.groups)
        for end in (group[0], group[-1])
    ]
    dots = [
        {"algorithm": name, "first": 1, "rank": round(rank, 3)}
        for name, rank in zip(ranking.labels, ranking.ranks, strict=True)
    ]
    every = 1 if len(ranking.labels) <= 8 else 2
    end = last + step * (1.5 + max(len(ranking.groups), 1))
    x = {
        "type": "quantitative",
        "title": "average rank",
        "scale": {"domain": [0.8, end], "nice": False},
        "axis": {"orient": "top", "values": list(range(1, len(ranking.labels) + 1, every))},
    }
    y = {
        "field": "algorithm",
        "type": "nominal",
        "scale": {"domain": [scale, *ranking.labels]},
        "title": None,
        "axis": {"labelLimit": 190},
    }
    return {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 22 * (1 + len(ranking.labels)),
        "encoding": {"y": y},
        "layer": [
            {
                "data": {"values": [{"algorithm": scale, "from": 1, "to": 1 + ranking.critical_difference}]},
                "layer": [
                    {
                        "mark": {"type": "rule", "strokeWidth": 2, "color": "var(--ink)"},
                        "encoding": {"x": {"field": "from", **x}, "x2": {"field": "to"}},
                    },
                    *(
                        {
                            "mark": {"type": "tick", "thickness": 2, "size": 11, "color": "var(--ink)"},
                            "encoding": {"x": {"field": field, **x}},
                        }
                        for field in ("from", "to")
                    ),
                ],
            },
            {
                "data": {"values": lines},
                "mark": {"type": "line", "strokeWidth": 5, "strokeCap": "round", "color": "var(--band)"},
                "encoding": {"x": {"field": "place", **x}, "detail": {"field": "group"}},
            },
            {
                "data": {"values": dots},
                "layer": [
                    {
                        "mark": {"type": "rule", "strokeDash": [1, 3], "color": "var(--rule)"},
                        "encoding": {"x": {"field": "first", **x}, "x2": {"field": "rank"}},
                    },
                    {
                        "mark": {"type": "point", "filled": True, "size": 60, "color": "var(--series-1)", "opacity": 1},
                        "encoding": {
                            "x": {"field": "rank", **x},
                            "tooltip": [{"field": "algorithm"}, {"field": "rank", "format": ".2f"}],
                        },
                    },
                ],
            },
        ],
    }


def scatter(points: list[dict[str, Any]], title: str, key: str) -> Spec:
    """Draw cost against accuracy.

    Args:
        points: "algorithm", "cost", "accuracy" (percent), whether it is on the "front", and whether it is "named".
        title: Of the cost.
        key: What the accuracy is of.
    """
    largest = max(point["cost"] for point in points)
    heights = [point["accuracy"] for point in points]
    margin = max(2.0, 0.12 * (max(heights) - min(heights)))
    within = [max(0.0, min(heights) - margin), min(100.0, max(heights) + margin)]
    tooltip = [
        {"field": "algorithm"},
        {"field": "accuracy", "title": key, "format": ".1f"},
        {"field": "cost", "title": title, "format": ",.3~g"},
    ]
    near = f"datum.cost > {0.55 * largest!r}"
    names = [
        {
            "transform": [{"filter": f"datum.named && {condition}"}],
            "mark": {"type": "text", "align": align, "dx": offset, "dy": -7, "limit": 150, "fontSize": 11},
            "encoding": {"text": {"field": "algorithm"}, "color": {"value": "var(--ink)"}},
        }
        for condition, align, offset in ((f"!({near})", "left", 4), (near, "right", 4))
    ]
    return {
        "data": {"values": points},
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 200,
        "encoding": {
            "x": {
                "field": "cost",
                "type": "quantitative",
                "title": title,
                "scale": {"domain": [0, 1.08 * largest or 1.0], "nice": False},
                "axis": {"tickCount": 4, "format": "~s"},
            },
            "y": {
                "field": "accuracy",
                "type": "quantitative",
                "title": f"{key}, %",
                "scale": {"domain": within, "nice": False},
                "axis": {"tickCount": 5},
            },
            "tooltip": tooltip,
        },
        "layer": [
            {
                "transform": [{"filter": "!datum.front"}],
                "mark": {"type": "point", "size": 45, "strokeWidth": 1.5, "color": "var(--muted)", "filled": False},
            },
            {
                "transform": [{"filter": "datum.front"}],
                "mark": {"type": "point", "size": 65, "filled": True, "color": "var(--series-1)", "opacity": 1},
            },
            *names,
        ],
    }


AXIS = {"minExtent": 46, "maxExtent": 46, "tickCount": 4}
"""Of pictures one above the other, so that their columns meet."""


def places(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Number parts from one on."""
    return [{"place": place, "name": part.label, "group": part.group} for place, part in enumerate(parts, start=1)]


def borders(parts: Sequence[Part]) -> list[Spec]:
    """Draw where groups of classes or clients begin, and name them; nothing where there are no groups."""
    begins = [
        {"place": place - 0.5, "named": "" if part.group == OTHERS else part.group}
        for place, part in enumerate(parts, start=1)
        if part.group and (place == 1 or part.group != parts[place - 2].group)
    ]
    marks: list[Spec] = [
        {"mark": {"type": "rule", "strokeDash": [1, 3], "color": "var(--muted)"}},
        {
            "mark": {"type": "text", "align": "left", "baseline": "bottom", "dx": 2, "fontStyle": "italic"},
            "encoding": {"text": {"field": "named"}, "y": {"value": -5}, "color": {"value": "var(--muted)"}},
        },
    ]
    return [{"data": {"values": begins}, **mark} for mark in marks] if begins else []


def dots(parts: Sequence[Part], models: list[str], noun: str) -> Spec:
    """Draw accuracies of classes or clients side by side, by model, above where `bars` draws their images."""
    apart = 0.24 if len(parts) <= 70 else 0.0  # of models, as equal accuracies would hide each other
    values = [
        {**place, "place": place["place"] + apart * (side - (len(models) - 1) / 2), "model": name, "value": value}
        for place, part in zip(places(parts), parts, strict=True)
        for side, name in enumerate(models)
        if (value := percent(part.accuracy.get(name))) is not None
    ]
    x = {"field": "place", "type": "quantitative", "scale": {"domain": [0.5, len(parts) + 0.5], "nice": False}}
    return {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 190,
        "encoding": {"x": {**x, "axis": None}},
        "layer": [
            *borders(parts),
            {
                "data": {"values": values},
                "mark": {"type": "point", "filled": True, "size": 42 if len(parts) <= 60 else 22, "opacity": 0.9},
                "encoding": {
                    "y": {
                        "field": "value",
                        "type": "quantitative",
                        "title": "accuracy, %",
                        "scale": PERCENT,
                        "axis": AXIS,
                    },
                    **_by_model(models),
                    "tooltip": [
                        {"field": "name", "title": noun},
                        {"field": "model"},
                        {"field": "value", "format": ".1f"},
                    ],
                },
            },
        ],
    }


def bars(parts: Sequence[Part], title: str, noun: str) -> Spec:
    """Draw the images of classes or clients side by side."""
    values = [{**place, "size": part.size} for place, part in zip(places(parts), parts, strict=True)]
    uneven = max(part.size for part in parts) > 20 * max(1.0, min(part.size for part in parts))
    return {
        "data": {"values": values},
        "transform": [
            {"calculate": "datum.place - 0.42", "as": "from"},
            {"calculate": "datum.place + 0.42", "as": "to"},
            {"calculate": "max(datum.size, 0.5)", "as": "height"},
            {"calculate": "0.5" if uneven else "0", "as": "ground"},
        ],
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "height": 70,
        "mark": {"type": "rect", "color": "var(--bars)"},
        "encoding": {
            "x": {
                "field": "from",
                "type": "quantitative",
                "title": f"{noun}, in this order",
                "scale": {"domain": [0.5, len(parts) + 0.5], "nice": False},
                "axis": {"tickMinStep": 1, "grid": False},
            },
            "x2": {"field": "to"},
            "y": {
                "field": "height",
                "type": "quantitative",
                "title": title,
                "scale": {"type": "log", "nice": False} if uneven else {"zero": True},
                "axis": {**AXIS, "tickCount": 3, "format": "~s"},
            },
            "y2": {"field": "ground"},
            "tooltip": [
                {"field": "name", "title": noun},
                {"field": "size", "title": title, "format": ",.0f"},
            ],
        },
    }
