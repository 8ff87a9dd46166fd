"""The figures of a page: which numbers are drawn, what is said of them, and the same numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.results import comparison
from bench.results.columns import ABSENT, columns
from bench.results.leaderboard import Leaderboard, Row
from bench.results.statistics import FEWEST, NOTHING
from bench.site import drawing
from bench.site.counts import Counted, Part
from bench.site.drawing import Spec, percent

if TYPE_CHECKING:
    import pandas

GRADES = {"balanced": "personal.balanced", "generic": "generic"}
"""What rows are ordered by and pictures show: title to key."""
Curve = Mapping[int, Mapping[str, float | None]]
"""By round what `GRADES` names, fractions 0-1."""
_COSTS = ("samples", "bytes", "wall_seconds")
_CURVES = {
    "personal.balanced": "balanced",
    "personal": "personal",
    "personal.masked": "masked",
    "generic": "generic",
    "unseen": "unseen",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One or more pictures side by side, what they show in words, and their numbers."""

    name: str
    """Anchor within the page."""
    title: str
    says: str
    """What is drawn and how it is to be read; also what a screen reader says."""
    specs: tuple[Spec, ...]
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Cells of the table; the first of a row names it."""
    remarks: tuple[str, ...] = ()
    """Sentences below."""
    layout: str = "stack"
    """How several pictures stand: "stack", one above the other, or "row"."""


def spell(value: float | None, digits: int = 1) -> str:
    """Write a number, or a dash for what is absent."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def curves(frame: pandas.DataFrame) -> Figure | None:
    """Draw a run's accuracies by round, of its `Record.rounds`; nothing if it was evaluated once only."""
    known = {key: name for key, name in _CURVES.items() if key in frame and frame[key].notna().any()}
    if len(frame) < 2 or not known:
        return None
    cells = [
        {"round": int(line["round"]), **{name: percent(float(line[key])) for key, name in known.items()}}
        for line in frame.to_dict("records")
    ]
    values = [
        {"round": line["round"], "model": name, "value": line[name]}
        for name in known.values()
        for line in cells
        if line[name] is not None
    ]
    return Figure(
        name="curves",
        title="Accuracy by round",
        says=f"Accuracy in percent at each of {len(cells)} evaluated rounds, for {_list(known.values())}.",
        specs=(drawing.lines(values, list(known.values()), 240),),
        heading=("round", *known.values()),
        rows=tuple((str(line["round"]), *(spell(line[name]) for name in known.values())) for line in cells),
    )


def ranks(part: comparison.Part, key: str) -> Figure | None:
    """Draw average ranks, what they must differ by, and which algorithms are not told apart; nothing without ranks."""
    ranking = part.ranking
    if ranking is None:
        return None
    groups = list(enumerate(ranking.groups, start=1))
    return Figure(
        name=f"ranks-{key}",
        title=f"Average ranks, {key}",
        says=f"A critical-difference diagram of {key} accuracy over {ranking.blocks} {ranking.unit}s: a dot is an "
        "average rank, 1 the best. Two algorithms differ if their dots are further apart than the bar at the top, "
        f"{ranking.critical_difference:.2f} ranks (Nemenyi), and Friedman's test finds a difference at all. Thick "
        "lines at the right join algorithms that are not told apart.",
        specs=(drawing.rank_lines(ranking),),
        heading=("algorithm", "average rank", "groups not told apart"),
        rows=tuple(
            (label, f"{value:.2f}", ", ".join(str(number) for number, group in groups if label in group) or ABSENT)
            for label, value in zip(ranking.labels, ranking.ranks, strict=True)
        ),
        remarks=part.says,
    )


def progress(board: Leaderboard, curves: Mapping[str, Curve]) -> Figure | None:
    """Draw the curves of all algorithms in panels, means over seeds; nothing if all were evaluated once only.

    Args:
        board: The leaderboard.
        curves: As `graded` has them, by run.
    """
    names = list(GRADES)
    values: list[dict[str, Any]] = []
    rows = []
    for row in board.rows:
        table = _mean_curves(curves[run] for run in row.ids)
        for number, means in table.items():
            values += [
                {"algorithm": row.label, "round": number, "model": name, "value": mean}
                for name, mean in means.items()
                if mean is not None
            ]
            rows.append((row.label, str(number), *(spell(means[name]) for name in names)))
    if len({value["round"] for value in values}) < 2:
        return None
    order = [row.label for row in board.rows]
    panel = {key: part for key, part in drawing.lines(values, names, 110).items() if key not in ("data", "autosize")}
    return Figure(
        name="progress",
        title="Accuracy by round",
        says="Accuracy in percent at each evaluated round, a mean over seeds; a panel an algorithm.",
        specs=(
            {
                "data": {"values": values},
                "facet": {"field": "algorithm", "type": "nominal", "sort": order, "title": None},
                "spec": panel,
                "usermeta": {"panel": 210},
            },
        ),
        heading=("algorithm", "round", *names),
        rows=tuple(rows),
    )


def seed_by_seed(rows: Sequence[Row], key: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Give the values and dots of `drawing.dots_and_bars`, of the rows that have a metric."""
    values: list[dict[str, Any]] = []
    dots: list[dict[str, Any]] = []
    for row in rows:
        estimate = row.metrics.get(key, NOTHING)
        if estimate.mean is None:
            continue
        ends = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
        values.append({"algorithm": row.label, **{end: percent(share) for end, share in ends.items()}})
        singles = zip(row.seeds, row.values[key], strict=True)
        dots += [{"algorithm": row.label, "seed": seed, "value": percent(share)} for seed, share in singles]
    return values, dots


def spread(board: Leaderboard) -> list[Figure]:
    """Draw mean, interval and the single seeds of every algorithm: a figure for balanced, one for generic."""
    figures = []
    for name, key in GRADES.items():
        values, dots = seed_by_seed(board.rows, key)
        rows = [
            (
                value["algorithm"],
                *(spell(value[end]) for end in ("mean", "low", "high")),
                "; ".join(f"{d['seed']}: {spell(d['value'])}" for d in dots if d["algorithm"] == value["algorithm"]),
            )
            for value in values
        ]
        if values:
            order = [value["algorithm"] for value in values]
            figures.append(
                Figure(
                    name=f"spread-{name}",
                    title=f"{name.capitalize()} accuracy, seed by seed",
                    says=f"{name.capitalize()} accuracy in percent: a dot is the mean over seeds, a tick one seed, the "
                    f"bar the 95 % interval (cut off at 0 and 100), or with fewer than {FEWEST} seeds their range.",
                    specs=(drawing.dots_and_bars(values, dots, order),),
                    heading=("algorithm", "mean", "from", "to", "seed: accuracy"),
                    rows=tuple(rows),
                )
            )
    return figures


def cost(board: Leaderboard) -> list[Figure]:
    """Draw cost against accuracy; what is both dearer and worse than something else is hollow and has no name."""
    figures = []
    for grade, key in GRADES.items():
        specs: list[Spec] = []
        fronts: dict[str, set[str]] = {}
        paying = [column for column in columns(board) if column.key in _COSTS]
        for column in paying:
            title, name, unit = column.title, column.key, column.unit or 1.0
            points = [
                (row.label, paid, got)
                for row in board.rows
                if (paid := _mean(row, "cost", name, unit)) is not None
                and (got := percent(_mean(row, "metrics", key, 1.0))) is not None
            ]
            if not points:
                continue
            fronts[title] = front(points)
            named = _roomy([point for point in points if point[0] in fronts[title]], points)
            values = [
                {
                    "algorithm": label,
                    "cost": paid,
                    "accuracy": got,
                    "front": label in fronts[title],
                    "named": label in named,
                }
                for label, paid, got in points
            ]
            specs.append(drawing.scatter(values, title, grade))
        if not specs:
            continue
        rows = []
        for row in board.rows:
            got = percent(_mean(row, "metrics", key, 1.0))
            if got is not None:
                amounts = [_mean(row, "cost", column.key, column.unit or 1.0) for column in paying]
                cells = [ABSENT if amount is None else f"{amount:.3g}" for amount in amounts]
                best = [title for title, members in fronts.items() if row.label in members]
                rows.append((row.label, spell(got), *cells, ", ".join(best) or ABSENT))
        figures.append(
            Figure(
                name=f"cost-{grade}",
                title=f"Cost against {grade} accuracy",
                says=f"Means over seeds of a whole run's cost and of {grade} accuracy in percent. Filled, and named "
                "where there is room: nothing is both cheaper and at least as accurate. Hollow: something is.",
                specs=tuple(specs),
                layout="row",
                heading=("algorithm", grade, *(column.title for column in paying), "not beaten at"),
                rows=tuple(rows),
            )
        )
    return figures


def front(points: Sequence[tuple[str, float, float]]) -> set[str]:
    """Name the points (name, cost, accuracy) that no other one beats at one of both without losing at the other."""
    return {
        name
        for name, paid, got in points
        if not any(p <= paid and g >= got and (p < paid or g > got) for _, p, g in points)
    }


def classes(counted: Counted) -> Figure | None:
    """Draw the accuracy of each class, the classes in the order of their training images; nothing without a model."""
    models = _counted(counted.classes, ("generic", "personal", "robust"))
    if not models:
        return None
    sizes = [part.size for part in counted.classes]
    return Figure(
        name="classes",
        title="Accuracy by class",
        says=f"{_noun(counted.classes, 'classes')}, in the order of their training images, {max(sizes):,.0f} to "
        f"{min(sizes):,.0f}. Above, the accuracy in percent of {_list(models)}, all test images of a class together; "
        "below, the training images.",
        specs=(
            drawing.dots(counted.classes, models, "class"),
            drawing.bars(counted.classes, "training images", "class"),
        ),
        heading=("class", "group", "training images", *models),
        rows=_lines_of(counted.classes, models),
    )


def clients(counted: Counted) -> Figure | None:
    """Draw the accuracy of each client's own model, from the worst client to the best; nothing without such models."""
    models = _counted(counted.clients, ("personal", "masked"))
    if not models:
        return None
    return Figure(
        name="clients",
        title="Accuracy by client",
        says=f"{_noun(counted.clients, 'clients')} with test images, from the lowest personal accuracy to the highest. "
        f"Above, the accuracy in percent of {_list(models)}; below, the test images.",
        specs=(drawing.dots(counted.clients, models, "client"), drawing.bars(counted.clients, "test images", "client")),
        heading=("client", "group", "test images", *models),
        rows=_lines_of(counted.clients, models),
    )


def _counted(parts: Sequence[Part], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(part.accuracy.get(name) is not None for part in parts)]


def _noun(parts: Sequence[Part], noun: str) -> str:
    together = f" (each dot a mean of up to {max(part.members for part in parts)})"
    return f"{sum(part.members for part in parts):,} {noun}{together if any(p.members > 1 for p in parts) else ''}"


def _lines_of(parts: Sequence[Part], models: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (part.label, part.group, f"{part.size:,.0f}", *(spell(percent(part.accuracy.get(name))) for name in models))
        for part in parts
    )


def _roomy(chosen: Sequence[tuple[str, float, float]], points: Sequence[tuple[str, float, float]]) -> set[str]:
    """Choose, the most accurate first, points whose names do not lie on one another."""
    wide = max(paid for _, paid, _ in points) or 1.0
    high = max(got for _, _, got in points) - min(got for _, _, got in points) or 1.0
    kept: list[tuple[str, float, float]] = []
    for name, paid, got in sorted(chosen, key=lambda point: (-point[2], point[1])):
        if all(abs(paid - p) > 0.6 * wide or abs(got - g) > 0.1 * high for _, p, g in kept):
            kept.append((name, paid, got))
    return {name for name, _, _ in kept}


def _mean(row: Row, table: str, key: str, unit: float) -> float | None:
    estimate = getattr(row, table).get(key)
    return None if estimate is None or estimate.mean is None else float(f"{estimate.mean / unit:.5g}")


def graded(frame: pandas.DataFrame) -> dict[int, dict[str, float | None]]:
    """Give by round what `GRADES` names, of a run's `Record.rounds`."""
    return {
        int(line["round"]): {
            name: None if (value := line.get(key)) is None or math.isnan(value) else float(value)
            for name, key in GRADES.items()
        }
        for line in frame.to_dict("records")
    }


def _mean_curves(runs: Iterable[Curve]) -> dict[int, dict[str, float | None]]:
    """Average over the seeds that were evaluated at a round."""
    found: dict[int, dict[str, list[float]]] = {}
    for curve in runs:
        for number, line in curve.items():
            cell = found.setdefault(number, {name: [] for name in GRADES})
            for name, value in line.items():
                cell[name] += [] if value is None else [value]
    return {
        number: {name: percent(math.fsum(values) / len(values)) if values else None for name, values in cell.items()}
        for number, cell in sorted(found.items())
    }


def _list(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
