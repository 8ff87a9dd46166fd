"""The three tables beside a run.json: the curves, the right answers of all evaluations but the last, and what the last
one took every image for, of which its right answers follow.

Counts and predictions are in the order of model, client, class (predicted class) and round, in which they take least
room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.results import storage
from bench.system.reading import TooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow
    from pyarrow import parquet

ROUNDS, COUNTS, PREDICTIONS = "rounds", "counts", "predictions"
NAMES = (ROUNDS, COUNTS, PREDICTIONS)
COUNT_COLUMNS = ("round", "model", "client", "class", "correct", "total", "drawn")
PREDICTION_COLUMNS = ("round", "model", "client", "class", "predicted", "count", "drawn")
_KEYS = {
    COUNTS: ("model", "client", "class", "round"),
    PREDICTIONS: ("model", "client", "class", "predicted", "round"),
}
"""What tells the rows of a table apart, in the order in which it is sorted."""

# What a file may make of little: a row of runs of equal cells takes no room in it, and some 40 bytes in memory.
MOST_ROWS = 30_000_000
"""Of a table: of 1,000 clients with 10 classes each 500 evaluations of six models, or a GB."""
MOST_BYTES = 256 << 20
"""Of a table's file; so many rows take some 60 MB in it."""
_MOST_MEMORY = 1 << 30
"""Bytes that a table's pages, or its texts, may take when they are unpacked."""
_MOST_COLUMNS = 5_000
_MOST_GROUPS = 1_000
_HEADER = {"thrift_string_size_limit": 16 << 20, "thrift_container_size_limit": 200_000}


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


def parse(content: bytes, rows: int = MOST_ROWS) -> pyarrow.Table:
    """Read the content of a Parquet file; texts are texts, however they are written.

    Args:
        content: Of the file.
        rows: As many as there may be.

    Raises:
        TooLarge: There are more, or they would take more memory than they can honestly take. Besides, whatever pyarrow
            makes of a file that was made up.
    """
    import pyarrow

    file = opened(pyarrow.BufferReader(content))
    if file.metadata.num_rows > min(rows, MOST_ROWS):
        raise TooLarge(f"it has {file.metadata.num_rows:,} rows, and can have {min(rows, MOST_ROWS):,} at most")
    # One of its threads would let go of the content when it likes, and abort a process that ends just then.
    return plain(file.read(use_threads=False))


def opened(source: pyarrow.NativeFile, groups: int = _MOST_GROUPS) -> parquet.ParquetFile:
    """Open a Parquet file, and see by its footer that no row group of it holds more than it honestly can.

    Args:
        source: Of its bytes.
        groups: Row groups that there may be.

    Raises:
        TooLarge: Besides, what pyarrow raises.
    """
    from pyarrow import parquet

    said = parquet.ParquetFile(source, **_HEADER).metadata
    if said.num_columns > _MOST_COLUMNS or said.num_row_groups > groups:
        raise TooLarge(f"it has {said.num_columns:,} columns in {said.num_row_groups:,} row groups")
    texts = []
    for place in range(said.num_columns):
        column = said.schema.column(place)
        if column.max_repetition_level:
            raise TooLarge(f"its column {column.path} holds lists, which tell nothing of how much is in them")
        texts += [column.path] if column.physical_type == "BYTE_ARRAY" else []
    for rows, unpacked in _groups(said):
        if rows > MOST_ROWS or unpacked > _MOST_MEMORY:
            raise TooLarge(f"it has {rows:,} rows of {unpacked:,} bytes, and can have {MOST_ROWS:,} at most")
    # The texts stay as they are stored, once each: written out, one of a megabyte may stand in each of a million rows.
    return parquet.ParquetFile(source, read_dictionary=texts, **_HEADER)


def _groups(said: parquet.FileMetaData) -> Iterator[tuple[int, int]]:
    """Give the rows of each row group, and its bytes when it is unpacked."""
    for place in range(said.num_row_groups):
        group = said.row_group(place)
        yield group.num_rows, sum(group.column(k).total_uncompressed_size for k in range(group.num_columns))


def plain(table: pyarrow.Table) -> pyarrow.Table:
    """Write out the texts of a table that was read from `opened`.

    Raises:
        TooLarge: They would take more memory than texts honestly take.
    """
    import pyarrow
    from pyarrow import compute

    for place, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):
            column = table.column(place)
            lengths = (compute.binary_length(part.dictionary).take(part.indices) for part in column.chunks)
            nbytes = sum(compute.sum(each).as_py() or 0 for each in lengths)
            if nbytes > _MOST_MEMORY:
                raise TooLarge(f"its column {field.name} holds texts of {nbytes:,} bytes")
            table = table.set_column(place, field.name, column.cast(field.type.value_type))
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
