"""Files that appear whole or not at all, even if the process is killed, and columns of numbers as Parquet."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from bench.system import durable

if TYPE_CHECKING:
    import pyarrow

Value = float | int | str | None
Columns = dict[str, tuple[str, Sequence[Value]]]
"""Name to Arrow type and values."""


class OutputUnwritable(OSError):
    """Results cannot be written where they should be. The message says why and what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


def prepare(out: Path) -> Path:
    """Make the folder of all results, and try whether it can be written.

    Raises:
        OutputUnwritable: It cannot be made or written.
    """
    probe = out / f".probe.{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        durable.write(probe, b"")
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise _unwritable(out, error) from error
    return out


def place(folder: Path, contents: Mapping[str, bytes], moved: Mapping[str, Path | None] | None = None) -> None:
    """Put files into a folder, which is made; the last of them vouches for the others.

    All are on disk under temporary names before the first old file goes. From then on, for the few system
    calls it takes, the last file is missing.

    Args:
        folder: Where to.
        contents: File name to content, in the order in which they appear.
        moved: By name, folders of the same file system that take their place there before the last file appears; None:
            what has the name goes.

    Raises:
        OutputUnwritable: The disk is full, or the folder cannot be made or written.
    """
    *others, last = contents
    parts = {name: folder / f".{name}.{os.getpid()}.part" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            durable.write(parts[name], content)
        if others:
            (folder / last).unlink(missing_ok=True)
            durable.flush(folder)
        for name in others:
            os.replace(parts[name], folder / name)
        for name, source in (moved or {}).items():
            if (folder / name).exists():
                shutil.rmtree(folder / name)
            if source is not None:
                os.replace(source, folder / name)
        durable.flush(folder)  # the others' names are on disk before the file that vouches for them
        os.replace(parts[last], folder / last)
        durable.flush(folder)
        durable.flush(folder.parent)
        for leftover in folder.glob(".*.part"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        for part in parts.values():
            with suppress(OSError):  # what could not be written; the first error is what counts
                part.unlink()


def absent_is_none(value: object) -> object:
    """Replace NaN by None, within mappings and lists too: JSON and Parquet have a word for absent."""
    if isinstance(value, Mapping):
        return {key: absent_is_none(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [absent_is_none(content) for content in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def columns(rows: Sequence[Mapping[str, float | int | None]], first: str) -> Columns:
    """Turn rows of numbers into columns.

    Args:
        rows: Not all need the same keys; what is missing, None or NaN is absent.
        first: Key of the column that comes first, which every row has.

    Returns:
        Columns in the order in which their keys appear: int64 where all numbers are whole ones, else float64.
    """
    result: Columns = {}
    for name in dict.fromkeys((first, *(key for row in rows for key in row))):
        cells = [row.get(name) for row in rows]
        values: list[Value] = [None if cell is None or math.isnan(cell) else cell for cell in cells]
        there = [value for value in values if value is not None]
        whole = name == first or (bool(there) and all(isinstance(value, int) for value in there))
        result[name] = ("int64" if whole else "float64", values)
    return result


def parquet(table: pyarrow.Table) -> bytes:
    """Write a table as the content of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _unwritable(path: Path, error: Exception) -> OutputUnwritable:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputUnwritable(f"results cannot be written to {path}: {why}; name another folder with --out")
