"""Precision, recall and F1, of what the models of a run took its test images for in the last evaluation.

For a class with tp images recognised, fn taken for others and fp of others taken for it: recall is tp / (tp + fn),
precision tp / (tp + fp), F1 2 tp / (2 tp + fp + fn). A class without test images has neither recall nor F1, one that
nothing was taken for no precision: both are absent, and stay out of means (scikit-learn's `zero_division=nan`). The F1
of a class that has test images and is never recognised is 0. Macro means are over the classes that are tested.

    generic.f1              the mean over classes, on the official test set; also .precision and .recall
    personal.f1             the mean over a client's classes on its own test images, and then over clients
    personal.pooled_f1      the mean over classes, the test images of all clients put together

and alike for every other model: `personal.masked.f1`, `unseen.f1`, `generic:NAME.f1`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.results.record import Record

if TYPE_CHECKING:
    import pandas

MEASURES = ("f1", "precision", "recall")
SAYS = (
    "f1, precision, recall: means over the classes that are tested; of personal models over a client's classes and "
    "then over clients, pooled_ ones over the classes of all clients' test images together. The precision of a class "
    "that nothing is taken for is absent and out of the mean; the F1 of one that is never recognised is 0."
)


@dataclass(frozen=True, kw_only=True)
class Class:
    """How well a model knows a class; fractions 0-1, None where that is no question."""

    label: int
    images: int
    """Test images, of all clients together."""
    predicted: int
    """Test images that were taken for it."""
    precision: float | None
    recall: float | None
    f1: float | None


def by_class(record: Record, model: str) -> list[Class]:
    """Measure a model class by class, the test images of all clients put together.

    Args:
        record: A finished run.
        model: "generic", "personal", "personal.masked" ...

    Raises:
        Lacking: Runs of this format do not say, or there is no such model.
        DamagedResult: The stored predictions are not what was written.
    """
    counted = record.confusion(model)
    return [
        Class(
            label=label,
            images=images,
            predicted=taken,
            precision=right / taken if taken else None,
            recall=right / images if images else None,
            f1=2 * right / (images + taken) if images else None,
        )
        for label, (right, images, taken) in enumerate(
            zip(counted.diagonal().tolist(), counted.sum(1).tolist(), counted.sum(0).tolist(), strict=True)
        )
    ]


def measured(record: Record) -> dict[str, float | None]:
    """Compute all that is derived of a run's predictions; nothing where its format has none, or it failed.

    Raises:
        DamagedResult: The stored predictions are not what was written.
    """
    if record.status != "done" or "predictions" not in record.companions:
        return {}
    frame = record.predictions()
    found: dict[str, float | None] = {}
    for model in sorted(frame["model"].unique()):
        rows = frame[frame["model"] == model]
        pooled = _macro(rows.assign(client=0))
        if str(model).startswith("generic"):
            found |= {f"{model}.{measure}": pooled[measure] for measure in MEASURES}
        else:
            found |= {f"{model}.{measure}": value for measure, value in _macro(rows).items()}
            found |= {f"{model}.pooled_{measure}": pooled[measure] for measure in MEASURES}
    return found


def with_derived(records: Iterable[Record]) -> list[Record]:
    """Put what is derived of predictions among the metrics of records."""
    return [replace(record, metrics={**record.metrics, **measured(record)}) for record in records]


def is_derived(key: str) -> bool:
    """Tell whether a metric is computed of predictions when it is asked for."""
    return key.rpartition(".")[2].removeprefix("pooled_") in MEASURES


def _macro(rows: pandas.DataFrame) -> dict[str, float | None]:
    """Average over the classes of a client's test, and then over clients."""
    hit = rows["class"] == rows["predicted"]
    images = rows.groupby(["client", "class"])["count"].sum()
    taken = rows.groupby(["client", "predicted"])["count"].sum().rename_axis(["client", "class"])
    right = rows[hit].groupby(["client", "class"])["count"].sum()
    right, taken = (sums.reindex(images.index, fill_value=0) for sums in (right, taken))
    each = {
        "f1": 2 * right / (images + taken),
        "precision": (right / taken.where(taken > 0)).dropna(),
        "recall": right / images,
    }
    return {name: _mean([_mean(part.tolist()) for _, part in cells.groupby("client")]) for name, cells in each.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
