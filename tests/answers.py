"""Of made-up runs: from right answers to what test images were taken for, and from rows to tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.training import metrics

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


def from_rows(rows: Iterable[Mapping[str, str | int]], num_classes: int) -> tuple[metrics.Counts, Tensor | None]:
    """Rebuild the counts of one evaluation from stored rows, row by row.

    Args:
        rows: Mappings with "model", "client" (-1: generic), "class", "correct", "total" and "drawn" (1, 0, or -1 where
            it is no question), all of one round; a row without test images may be missing.
        num_classes: C.

    Returns:
        Model name to a pair of (K, C) int64; clients ascend, and those without any row are left out. And which of the
        clients with personal models were drawn, as `summarise` has it.
    """
    rows = list(rows)
    took_part = {int(row["client"]): int(row["drawn"]) for row in rows if str(row["model"]).startswith("personal")}
    cells: dict[str, dict[int, list[list[int]]]] = {}
    for row in rows:
        empty = [[0] * num_classes, [0] * num_classes]
        correct, total = cells.setdefault(str(row["model"]), {}).setdefault(int(row["client"]), empty)
        correct[int(row["class"])], total[int(row["class"])] = int(row["correct"]), int(row["total"])
    counts: metrics.Counts = {}
    for model, clients in cells.items():
        table = torch.tensor([clients[client] for client in sorted(clients)])  # (K, 2, C)
        counts[model] = (table[:, 0], table[:, 1])
    told = [took_part[client] for client in sorted(took_part)]
    return counts, torch.tensor(told) == 1 if told and min(told) >= 0 else None
