"""Writing packs: runs are put into one, added to one and taken out. `bench.results.packed` says what a pack is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import packed, storage, tables
from bench.results.packed import FORMAT, NOTE, RUNS, TABLES, vouch, waiting_name
from bench.results.record import DOCUMENT, DamagedResult, Record, stored
from bench.results.records import file_of, text_of
from bench.system import durable

if TYPE_CHECKING:
    import pyarrow

_ROWS = 2**17
"""Of a row group, about: one of more has one run. Measured on 110 runs of the digits board (8,500 and 690 rows a run):
dictionaries and zstd 9 take 2.7 and 1.1 kB a run, delta encoding 4.8 and 1.4, byte-stream split 2.5 and 0.9, which not
every reader knows; levels above 9 save 4 % and take three times as long.
"""
_LEVEL = 9


class NotPackable(ValueError):
    """Runs cannot be packed, or a pack cannot be unpacked. The message says why and what to do."""


def packable(records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """Choose the runs that a pack can hold: finished ones with all tables, and failed ones, which have none.

    Returns:
        Those, and a sentence for each other.
    """
    chosen, others = [], []
    for record in records:
        if record.status == "failed" or set(record.tables) >= {*tables.NAMES}:
            chosen.append(record)
        else:
            others.append(f"{record.id} stays a folder: an earlier version of bench wrote it (format {record.format})")
    return chosen, others


def pack(records: Iterable[Record], to: Path) -> list[str]:
    """Put runs into a pack, new or not: the pack is there with all of them, or as it was.

    The same runs give the same bytes, in any order and however many at a time.

    Args:
        records: As `packable` chooses them, from folders or packs.
        to: The pack's folder; new, empty, or a pack.

    Returns:
        The ids of all runs in the pack.

    Raises:
        NotPackable: The folder holds something else, or another run of the same id.
        DamagedResult: A run or the pack is not what was written.
        OutputUnwritable: The disk is full, or the folder cannot be written.
    """
    together: dict[str, tuple[bytes, Record]] = {}
    for record in [*_there(to), *records]:
        text = text_of(record)
        known = together.setdefault(record.id, (text, record))
        if known[0] != text:
            place = known[1].pack or known[1].folder
            raise NotPackable(f"run {record.id} of {record.folder} differs from that of {place}; remove one of them")
    plugins = packed.opened(to).note["plugins"] if packed.is_pack(to) else {}
    contents = written([together[id] for id in sorted(together)], plugins)
    _place(to, contents)
    return sorted(together)


def written(runs: Sequence[tuple[bytes, Record]], plugins: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """Give the content of a pack's files, runs.parquet last.

    Args:
        runs: Documents as bytes, and what they say, by id.
        plugins: Of the files of plug-ins that lie in the pack, their names and SHA-256.

    Raises:
        DamagedResult: A run's table is not what was written.
    """
    import pyarrow

    contents = {tables.file(name): _joined(name, [record for _, record in runs]) for name in TABLES}
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    sums = {record.id: hashlib.sha256(text).hexdigest() for text, record in runs}
    note = json.dumps({"format": FORMAT, "digest": vouch(sums, files), "files": files, "plugins": plugins or {}})
    texts = pyarrow.array([text.decode() for text, _ in runs], pyarrow.string())
    rows = pyarrow.table({"id": [*sums], "document": texts, "sha256": [*sums.values()]})
    kinds = pyarrow.schema([(name, pyarrow.string()) for name in rows.column_names], metadata={NOTE: note})
    return {**contents, RUNS: _parquet([rows.cast(kinds).replace_schema_metadata({NOTE: note})], dictionary=False)}


def _joined(name: str, records: Iterable[Record]) -> bytes:
    """Join the tables of all runs, a few runs a row group."""
    import pyarrow

    def groups() -> Iterator[pyarrow.Table]:
        waiting: list[pyarrow.Table] = []
        for place, record in enumerate(records):
            if record.status == "done":
                rows = record.table(name)
                run = pyarrow.array([place] * rows.num_rows, pyarrow.int32())
                waiting.append(rows.add_column(0, "run", run))
            if sum(rows.num_rows for rows in waiting) >= _ROWS:
                yield pyarrow.concat_tables(waiting)
                waiting = []
        if waiting:
            yield pyarrow.concat_tables(waiting)

    return _parquet(groups(), dictionary=True)


def _parquet(groups: Iterable[pyarrow.Table], *, dictionary: bool) -> bytes:
    """Write tables as the row groups of one file; without any, a file without columns."""
    import pyarrow
    from pyarrow import parquet

    sink, writer = pyarrow.BufferOutputStream(), None
    for rows in groups:
        writer = writer or parquet.ParquetWriter(
            sink, rows.schema, compression="zstd", compression_level=_LEVEL, use_dictionary=dictionary
        )
        writer.write_table(rows, row_group_size=max(1, rows.num_rows))
    (writer or parquet.ParquetWriter(sink, pyarrow.schema([]))).close()
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _there(to: Path) -> list[Record]:
    """Read the runs that are in a pack already."""
    if not packed.is_pack(to):
        if to.exists() and not (to.is_dir() and all(path.name.startswith(".") for path in to.iterdir())):
            raise NotPackable(f"{to} is there and no pack (it has no {RUNS}); name another folder with --to")
        return []
    found, damaged = packed.read(to)
    if damaged:
        raise DamagedResult(damaged[0])
    return found


def _place(to: Path, contents: Mapping[str, bytes]) -> None:
    """Write a pack's files: they belong to it from the moment when runs.parquet, which names them, is replaced."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        if packed.is_pack(to):  # if somebody was killed here, the pack's own files may still lie under another name
            _settle(to, [name for name in TABLES if packed.opened(to).path(name).name == waiting_name(name)])
        for name in TABLES:
            durable.write(to / waiting_name(name), contents[tables.file(name)])
        durable.flush(to)
        durable.put(to / RUNS, contents[RUNS])
        durable.flush(to)
        _settle(to, TABLES)
        durable.flush(to)
        durable.flush(to.parent)
    except OSError as error:
        raise storage.OutputUnwritable(
            f"{to} cannot be written: {error.strerror or error}; name another folder with --to"
        ) from error


def _settle(to: Path, names: Iterable[str]) -> None:
    for name in names:
        os.replace(to / waiting_name(name), to / tables.file(name))


def unpack(pack: Path, to: Path) -> list[str]:
    """Write the runs of a pack as folders, which hold what they held before.

    Returns:
        Their ids.

    Raises:
        NotPackable: A folder of one of the runs is there, with another content.
        DamagedResult: The pack is not what was written.
        OutputUnwritable: The disk is full, or the folder cannot be written.
    """
    found, damaged = packed.read(pack)
    if damaged:
        raise DamagedResult(damaged[0])
    for record in found:
        there = to / record.id / DOCUMENT
        if there.exists() and stored(there.parent) != text_of(record):
            raise NotPackable(f"{there.parent} holds another result of run {record.id}; name another folder with --to")
    for record in found:
        files = (*record.companions.values(), DOCUMENT)
        storage.place(to / record.id, {name: file_of(record, name) for name in files})
    return [record.id for record in found]


def same(one: Record, other: Record) -> bool:
    """Tell whether two copies of a run hold the same, to the bit; their tables are read.

    Raises:
        DamagedResult: One is not what was written.
    """
    return text_of(one) == text_of(other) and all(one.table(name).equals(other.table(name)) for name in one.tables)
