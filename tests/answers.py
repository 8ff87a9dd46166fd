"""From right answers to what a made-up run took its test images for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Columns = dict[str, list[Any]]


def parted(counts: Mapping[str, Sequence[Any]]) -> tuple[Columns, Columns]:
    """Part right answers of all rounds into those before the last, and predictions of the last: what was not right was
    taken for another class that the client is tested on, the next one if there is, or else for class 0 or 1.
    """
    names = list(counts)
    rows = [dict(zip(names, cells, strict=True)) for cells in zip(*counts.values(), strict=True)]
    last = max(row["round"] for row in rows)
    before = [row for row in rows if row["round"] < last]
    tested: dict[tuple[Any, Any], list[int]] = {}
    for row in rows:
        if row["round"] == last and row["total"] > 0:
            tested.setdefault((row["model"], row["client"]), []).append(row["class"])
    predictions = []
    for row in rows:
        if row["round"] < last:
            continue
        right, others = row["class"], sorted(set(tested.get((row["model"], row["client"]), [])) - {row["class"]})
        wrong = next((label for label in others if label > right), others[0] if others else int(right == 0))
        for label, count in ((right, row["correct"]), (wrong, row["total"] - row["correct"])):
            if count:
                shared = {key: row[key] for key in ("round", "model", "client", "class", "drawn")}
                predictions.append({**shared, "predicted": label, "count": count})
    keys = ("round", "model", "client", "class", "predicted", "count", "drawn")
    return (
        {name: [row[name] for row in before] for name in names},
        {key: [row[key] for row in predictions] for key in keys},
    )
