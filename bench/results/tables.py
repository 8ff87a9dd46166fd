"""The three tables beside a run.json: the curves, the right answers of all evaluations but the last, and what the last
one took every image for, of which its right answers follow.

Counts and predictions are in the order of model, client, class (predicted class) and round, in which they take least
room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.results import storage

if TYPE_CHECKING:
    import pyarrow

ROUNDS, COUNTS, PREDICTIONS = "rounds", "counts", "predictions"
NAMES = (ROUNDS, COUNTS, PREDICTIONS)
COUNT_COLUMNS = ("round", "model", "client", "class", "correct", "total", "drawn")
PREDICTION_COLUMNS = ("round", "model", "client", "class", "predicted", "count", "drawn")
_KEYS = {
    COUNTS: ("model", "client", "class", "round"),
    PREDICTIONS: ("model", "client", "class", "predicted", "round"),
}
"""What tells the rows of a table apart, in the order in which it is sorted."""


def file(name: str) -> str:
    """Name a table's file."""
    return f"{name}.parquet"


def curves(rows: Sequence[Mapping[str, float | int | None]]) -> pyarrow.Table:
    """Lay out metrics, a row an evaluated round, as `storage.columns` does."""
    import pyarrow

    laid_out = storage.columns(rows, first="round")
    return pyarrow.table({name: pyarrow.array(cells, type=kind) for name, (kind, cells) in laid_out.items()})


def tally(name: str, columns: Mapping[str, Sequence[int | str]]) -> pyarrow.Table:
    """Lay out counts or predictions, sorted.

    Args:
        name: `COUNTS` or `PREDICTIONS`.
        columns: Those of `COUNT_COLUMNS` or `PREDICTION_COLUMNS`, all of one length.
    """
    import pyarrow

    wanted = COUNT_COLUMNS if name == COUNTS else PREDICTION_COLUMNS
    table = pyarrow.table({column: pyarrow.array(columns[column], type=_kind(column)) for column in wanted})
    return table.sort_by([(key, "ascending") for key in _KEYS[name]])


def parse(content: bytes) -> pyarrow.Table:
    """Read the content of a Parquet file; texts are texts, however they are written."""
    import pyarrow
    from pyarrow import parquet

    table = parquet.ParquetFile(pyarrow.BufferReader(content)).read()
    for place, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def right(predictions: pyarrow.Table) -> pyarrow.Table:
    """Count right answers and test images of what images were taken for: rows of `COUNT_COLUMNS`."""
    import pyarrow
    from pyarrow import compute

    hits = compute.equal(predictions["class"], predictions["predicted"])
    cells = predictions.append_column("correct", compute.if_else(hits, predictions["count"], 0))
    keys = ["model", "client", "class", "round", "drawn"]
    sums = cells.group_by(keys).aggregate([("correct", "sum"), ("count", "sum")])
    named = sums.select([*keys, "correct_sum", "count_sum"]).rename_columns([*keys, "correct", "total"])
    return named.select(COUNT_COLUMNS).cast(pyarrow.schema([(name, _kind(name)) for name in COUNT_COLUMNS]))


def together(counts: pyarrow.Table, predictions: pyarrow.Table | None) -> pyarrow.Table:
    """Give the right answers of all evaluations, sorted; predictions, of the last one, are None in earlier formats."""
    import pyarrow

    if predictions is not None:
        counts = pyarrow.concat_tables([counts, right(predictions)])
    return counts.sort_by([(key, "ascending") for key in _KEYS[COUNTS]])


def _kind(column: str) -> str:
    return "string" if column == "model" else "int32"
