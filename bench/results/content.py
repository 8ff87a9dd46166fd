"""What a table says, apart from how it is written: one digest for the same content in any Parquet file.

Bytes of a Parquet file depend on the writer's version, its row groups, encodings and compression. The digest depends on
names, kinds, values, absences and the order of rows, and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow


def digest(table: pyarrow.Table) -> str:
    """Give the SHA-256 of a table's content, as hexadecimal digits.

    The same for any order of columns, width of numbers, chunks and dictionaries, and without the columns that hold
    nothing at all. A float is its eight bytes, so that 0.0 and -0.0 differ, while one NaN is like another.

    Args:
        table: Columns of whole numbers, floats and texts, each cell possibly absent.

    Raises:
        ValueError: A column is of another kind, or two have one name.
    """
    names = table.column_names
    if len(set(names)) < len(names):
        raise ValueError("two columns have one name; rename one of them")
    whole = hashlib.sha256(f"{table.num_rows}\n".encode())
    for name in sorted(names):
        column = table.column(name)
        if column.null_count < len(column):
            for part in _column(name, column):
                whole.update(part)
    return whole.hexdigest()


def _column(name: str, column: pyarrow.ChunkedArray) -> list[bytes]:
    """Write a column: a line that says its kind and what follows, then which cells are there, then all cells."""
    import pyarrow
    from pyarrow import compute, types

    texts: list[str] = []
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_integer(kind):
        column, word = column.cast("int64"), "whole number"
    elif types.is_floating(kind):
        column, word = column.cast("float64"), "float"
    elif types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        # Numbered as they appear first: what a dictionary in the file says of the order is forgotten.
        encoded = pyarrow.concat_arrays(column.cast("large_string").chunks).dictionary_encode()
        column, texts, word = encoded.indices.cast("int64"), encoded.dictionary.to_pylist(), "text"
    else:
        raise ValueError(f"column {name!r} holds {kind}; allowed are whole numbers, floats and texts")
    there = compute.is_valid(column).to_numpy(zero_copy_only=False) if column.null_count else None
    cells = compute.fill_null(column, 0).to_numpy()
    if word == "float":
        cells = np.where(np.isnan(cells), np.nan, cells).astype("<f8")
    else:
        least = np.min_scalar_type(min(int(cells.min()), -1 - int(cells.max())))  # a signed type that holds both ends
        cells = cells.astype(least.newbyteorder("<"))
    head = [name, word, cells.dtype.str.lstrip("<|"), there is not None, texts]
    line = json.dumps(head, ensure_ascii=True, separators=(",", ":"))
    return [f"{line}\n".encode(), b"" if there is None else np.packbits(there).tobytes(), cells.tobytes()]
