"""From stored counts to curves: every metric after every round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bench.training import metrics

if TYPE_CHECKING:
    import pandas


def curves(
    frame: pandas.DataFrame, num_classes: int, groups: Mapping[str, Sequence[int]]
) -> list[dict[str, float | int | None]]:
    """Compute all metrics after each evaluated round, as `Record.rounds` has them.

    Args:
        frame: As `Record.counts` has it; a row without test images may be missing.
        num_classes: C.
        groups: "many", "medium", "few" to their classes.
    """
    members = {name: np.array(classes, dtype=np.int64) for name, classes in groups.items()}
    rounds, at = np.unique(frame["round"].to_numpy(), return_inverse=True)
    rows: list[dict[str, float | int | None]] = [{"round": round} for round in rounds.tolist()]
    codes, names = frame["model"].factorize()
    places = {str(name): np.flatnonzero(codes == code) for code, name in enumerate(names)}
    cells = {column: frame[column].to_numpy() for column in ("client", "class", "correct", "total", "drawn")}
    for name in dict.fromkeys((*metrics.STANDARD, *places)):
        here = places.get(name)
        if here is not None:
            when, r = np.unique(at[here], return_inverse=True)
            drawn, *pair = _dense(r, num_classes, {column: cell[here] for column, cell in cells.items()})
            found = metrics.over_time(name, (pair[0], pair[1]), members, drawn == 1 if drawn.max() != -1 else None)
            for key, values in found.items():
                for k, value in zip(when.tolist(), values, strict=True):
                    rows[k][key] = value
        if name in metrics.STANDARD:
            for key in metrics.over_time(name, None, members):
                for row in rows:
                    row.setdefault(key, None)
    return rows


def _dense(
    r: npt.NDArray[np.int64], num_classes: int, cells: Mapping[str, npt.NDArray[np.int64]]
) -> tuple[npt.NDArray[np.int64], ...]:
    """Lay out a model's rows: drawn (R, K), correct and total (R, K, C), in which clients ascend."""
    clients, k = np.unique(cells["client"], return_inverse=True)
    drawn = np.full((r.max() + 1, len(clients)), -1)
    drawn[r, k] = cells["drawn"]
    pair = np.zeros((2, *drawn.shape, num_classes), dtype=np.int64)
    pair[:, r, k, cells["class"]] = cells["correct"], cells["total"]
    return drawn, pair[0], pair[1]
