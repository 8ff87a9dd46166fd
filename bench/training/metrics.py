"""What is measured: functions of how many test images of each class each model got right.

The words are those of the table. `generic` is the one global model on the official test set, a mean over classes,
`personal` client k's own model on client k's test data, `personal.balanced` the mean over the classes that are there,
and then over clients, `personal.masked` the first with the classes that the client never trained on left out of the
arg-max, `generic.robust` and `personal.robust` the two on attacked test images, `unseen` the personal models of clients
held out of training. Clients' tests may overlap where they are drawn from one official test set: an image serves about
two clients (1.7-2.3 with 20 of them).
All values are fractions 0-1. What was not measured is None, never a number.

Sums are exactly rounded (`math.fsum`), so a metric depends neither on the machine nor on the clients' order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Table = npt.NDArray[np.int64]
Counts = dict[str, tuple[Tensor, Tensor]]
"""Model name to (correct, total), each (K, C) int64, or (1, C) for a generic model."""

STANDARD = ("generic", "personal", "personal.masked", "unseen", "unseen.masked")
"""The models of every result; one that an algorithm does not have is reported as absent."""


FOLLOWED = ("generic", "personal", "personal.balanced", "personal.masked")
"""Metrics of which the mean of the last ten evaluations, `@last10`, and the best one, `@best`, are known too."""


def summarise(counts: Counts, groups: Mapping[str, Tensor], drawn: Tensor | None = None) -> dict[str, float | None]:
    """Turn counts into metrics.

    Args:
        counts: The standard models, as far as there are any, and further ones as "generic:NAME" and
            "personal:NAME".
        groups: "many", "medium", "few" to (n,) int64 class indices, possibly none.
        drawn: (K,) bool, which of the clients with personal models were in the cohort of any round; None: that is not
            known.

    Returns:
        For a generic model NAME and NAME.GROUP; for a personal one also NAME.balanced, NAME.drawn and NAME.never (means
        over the clients that were, and were not), NAME.weighted, NAME.std and NAME.worst_decile; for unseen
        clients NAME and NAME.balanced.

    Raises:
        ValueError: A model's name begins with none of generic, personal and unseen.
    """
    members = {group: classes.cpu().numpy() for group, classes in groups.items()}
    took_part = None if drawn is None else drawn.cpu().numpy()[None]
    found: dict[str, float | None] = {}
    for name in dict.fromkeys((*STANDARD, *counts)):
        pair = counts.get(name)
        tables = None if pair is None else (pair[0].cpu().numpy()[None], pair[1].cpu().numpy()[None])
        found |= {key: values[0] for key, values in over_time(name, tables, members, took_part).items()}
    return found


def over_time(
    name: str,
    counts: tuple[Table, Table] | None,
    groups: Mapping[str, Table],
    drawn: npt.NDArray[np.bool_] | None = None,
) -> dict[str, list[float | None]]:
    """Turn one model's counts in R evaluations into its metrics, a list of R each: see `summarise`.

    Args:
        name: Of the model.
        counts: (correct, total), each (R, K, C) int64; None: the model is absent, in one evaluation.
        groups: "many", "medium", "few" to (n,) int64 class indices, possibly none.
        drawn: (R, K) bool.

    Raises:
        ValueError: The name begins with none of generic, personal and unseen.
    """
    if counts is None:
        num_classes = max((int(classes.max()) + 1 for classes in groups.values() if len(classes)), default=0)
        counts, drawn = (np.zeros((1, 0, num_classes), dtype=np.int64),) * 2, None
    match name.split(":")[0]:
        case "generic" | "generic.robust":
            return _generic(name, *counts, groups)
        case "personal" | "personal.masked" | "personal.robust":
            return _personal(name, *counts, groups, drawn)
        case "unseen" | "unseen.masked":
            correct, total = counts
            return {name: _means(correct.sum(2), total.sum(2)), f"{name}.balanced": _balanced(correct, total)}
        case _:
            raise ValueError(f"model name {name!r} begins with neither generic, personal nor unseen")


def _generic(name: str, correct: Table, total: Table, groups: Mapping[str, Table]) -> dict[str, list[float | None]]:
    """Average over classes: each weighs the same, whatever its number of test images."""
    correct, total = correct.sum(1), total.sum(1)  # (R, C)
    metrics = {name: _means(correct, total)}
    for group, classes in groups.items():
        metrics[f"{name}.{group}"] = _means(correct[:, classes], total[:, classes])
    return metrics


def _personal(
    name: str, correct: Table, total: Table, groups: Mapping[str, Table], drawn: npt.NDArray[np.bool_] | None
) -> dict[str, list[float | None]]:
    """Average over clients with test images: each weighs the same, whatever its size."""
    right, images = correct.sum(2), total.sum(2)  # (R, K)
    accuracies = _fractions(right, images)
    metrics = {name: [_mean(each) for each in accuracies], f"{name}.balanced": _balanced(correct, total)}
    for word, those in (("drawn", drawn), ("never", None if drawn is None else ~drawn)):
        metrics[f"{name}.{word}"] = [None] * len(right) if those is None else _means(right, images * those)
    for group, classes in groups.items():
        metrics[f"{name}.{group}"] = _means(correct[:, :, classes].sum(2), total[:, :, classes].sum(2))
    metrics[f"{name}.weighted"] = _means(right.sum(1, keepdims=True), images.sum(1, keepdims=True))
    metrics[f"{name}.std"] = [_deviation(each) for each in accuracies]
    worst = [sorted(each)[: math.ceil(len(each) / 10)] for each in accuracies]
    metrics[f"{name}.worst_decile"] = [_mean(each) for each in worst]
    return metrics


def _balanced(correct: Table, total: Table) -> list[float | None]:
    """Average over the classes that a client has test images of, then over clients."""
    rounds, clients, classes = total.shape
    means = _means(correct.reshape(rounds * clients, classes), total.reshape(rounds * clients, classes))
    each = [means[r * clients : (r + 1) * clients] for r in range(rounds)]
    return [_mean([mean for mean in those if mean is not None]) for those in each]


def _means(correct: Table, total: Table) -> list[float | None]:
    return [_mean(each) for each in _fractions(correct, total)]


def _fractions(correct: Table, total: Table) -> list[list[float]]:
    """Divide row by row, (n, m) by (n, m), leaving out what has no test image."""
    tested = total > 0
    fractions, ends = (correct[tested] / total[tested]).tolist(), tested.sum(1).cumsum().tolist()
    return [fractions[a:b] for a, b in itertools.pairwise((0, *ends))]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    """Population standard deviation: the clients are all there are, not a sample."""
    mean = _mean(values)
    if mean is None:
        return None
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def last_mean(rows: Sequence[Mapping[str, object]], key: str, n: int = 10) -> float | None:
    """Average a metric over the last n evaluations, or over all if there are fewer.

    Args:
        rows: One mapping per evaluated round, in the order of the rounds.
        key: Name of the metric; None and NaN are absent.
        n: Evaluations, ≥ 1.

    Returns:
        None unless each of these evaluations has the metric: models that are tuned are tested in the last round only,
        and one evaluation is no mean of ten.
    """
    values = _measured(rows[-n:], key)
    return _mean(values) if len(values) == len(rows[-n:]) else None


def best(rows: Sequence[Mapping[str, object]], key: str) -> float | None:
    """Give a metric's largest value over all evaluations: chosen on test data, hence optimistic. None unless each
    evaluation has it.
    """
    values = _measured(rows, key)
    return max(values, default=None) if len(values) == len(rows) else None


def _measured(rows: Iterable[Mapping[str, object]], key: str) -> list[float]:
    values = (row.get(key) for row in rows)
    return [float(value) for value in values if isinstance(value, int | float) and not math.isnan(value)]
