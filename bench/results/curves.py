"""From stored counts to curves: every evaluation as tables of numbers, and every metric after every round."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from bench.training import metrics

if TYPE_CHECKING:
    import pandas


def evaluations(frame: pandas.DataFrame, num_classes: int) -> Iterator[tuple[int, metrics.Counts, torch.Tensor | None]]:
    """Turn the rows of a run's counts into a pair of tables for each model and round.

    Args:
        frame: As `Record.counts` has it; a row without test images may be missing.
        num_classes: C.

    Returns:
        By round, ascending: the round, model name to (correct, total), each (K, C) int64, in which clients ascend, and
        (K,) bool, which of the clients with personal models were drawn by then; None where nobody says.
    """
    codes, names = frame["model"].factorize()
    round, client, drawn = (frame[column].to_numpy() for column in ("round", "client", "drawn"))
    order = np.lexsort((client, codes, round))
    codes, round, client, drawn = (column[order] for column in (codes, round, client, drawn))
    label, correct, total = (frame[column].to_numpy()[order] for column in ("class", "correct", "total"))
    changes = np.flatnonzero(np.diff(round, prepend=-1) | np.diff(codes, prepend=-1))
    counts: dict[int, metrics.Counts] = defaultdict(dict)
    told: dict[int, torch.Tensor] = {}
    for start, stop in itertools.pairwise([*changes, len(order)]):
        rows = slice(start, stop)
        first = np.diff(client[rows], prepend=client[start] - 1) != 0
        k = np.cumsum(first) - 1
        pair = np.zeros((2, k[-1] + 1, num_classes), dtype=np.int64)
        pair[0, k, label[rows]], pair[1, k, label[rows]] = correct[rows], total[rows]
        now, model = int(round[start]), str(names[codes[start]])
        counts[now][model] = torch.from_numpy(pair[0]), torch.from_numpy(pair[1])
        if drawn[start] != -1 and now not in told:
            told[now] = torch.from_numpy(drawn[rows][first] == 1)
    for now, tables in counts.items():
        yield now, tables, told.get(now)


def curves(
    frame: pandas.DataFrame, num_classes: int, groups: Mapping[str, Sequence[int]]
) -> list[dict[str, float | int | None]]:
    """Compute all metrics after each evaluated round, as `Record.rounds` has them.

    Args:
        frame: As for `evaluations`.
        num_classes: C.
        groups: "many", "medium", "few" to their classes.
    """
    members = {name: torch.tensor(classes, dtype=torch.int64) for name, classes in groups.items()}
    return [
        {"round": round, **metrics.summarise(counts, members, drawn)}
        for round, counts, drawn in evaluations(frame, num_classes)
    ]
