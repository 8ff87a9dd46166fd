"""Many runs in one folder of three Parquet files, read run by run.

    PACK/runs.parquet           a row a run, by id: id, its run.json to the letter, and the SHA-256 of that
    PACK/counts.parquet         the rows of all runs' counts.parquet; `run` is the run's place in runs.parquet
    PACK/predictions.parquet    the same of predictions.parquet

Each document vouches for its own tables, as in a run's folder; runs.parquet says besides which documents and which two
files it was written with. Curves are not stored: they are computed of the counts, to the digit. A row group holds whole
runs, so that one run is read without the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from bench.protocol.identity import canonical
from bench.results import content, tables
from bench.results.record import DamagedResult, OtherFormat, Record, check, parse
from bench.system import reading

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

RUNS = "runs.parquet"
TABLES = (tables.COUNTS, tables.PREDICTIONS)
FILES = (*map(tables.file, TABLES), RUNS)
"""In the order in which they are written."""
PLUGINS = "plugins"
"""Folder of the files of plug-ins that the runs were made with, for whoever runs them again; nothing reads it."""
FORMAT = 1
NOTE = b"bench.pack"
"""Key of the metadata of runs.parquet that say what belongs to it, as JSON."""
_MOST_BYTES = 256 << 20
"""Of runs.parquet: 55 runs of the digits take 38 kB."""
_MEND = "put the pack's files back as they were published"


def is_pack(folder: Path) -> bool:
    """Tell a pack from any other folder."""
    return (folder / RUNS).is_file()


def packs(out: Path) -> list[Path]:
    """Give the packs of a folder of results: itself, if it is one, or those in it that are no links."""
    inside = (path.parent for path in out.glob(f"*/{RUNS}"))
    return [out] if is_pack(out) else sorted(pack for pack in inside if not pack.is_symlink())


def links(out: Path) -> list[Path]:
    """Give the links to packs in a folder of results: nothing is read there, as it is not the folder's own."""
    return sorted(path.parent for path in out.glob(f"*/{RUNS}") if path.parent.is_symlink())


def documents(pack: Path) -> dict[str, bytes]:
    """Read all runs' run.json, by id.

    Raises:
        DamagedResult: runs.parquet cannot be read, or is not what was written.
    """
    return opened(pack).documents


def table(pack: Path, id: str, name: str) -> pyarrow.Table:
    """Read a table of a run: "counts", "predictions", or "rounds", which is computed of these.

    Raises:
        DamagedResult: The pack lacks the run, its file cannot be read, or the table is not what was packed.
    """
    whole = opened(pack)
    if id not in whole.documents:
        raise DamagedResult(f"{pack / RUNS} holds no run {id}; {_MEND}")
    try:
        stamps = [_stamp(whole.path(name)) for name in TABLES]
    except OSError as error:
        raise DamagedResult(f"{error.filename or pack} cannot be read: {reading.why(error)}; {_MEND}") from error
    return _table(whole, id, name, *stamps)


@lru_cache(maxsize=16)  # all that is asked of a run is asked one after the other
def _table(whole: Pack, id: str, name: str, *_: tuple[int, ...]) -> pyarrow.Table:
    from bench.results.curves import curves

    record = whole.record(id)
    if name == tables.ROUNDS:
        counts = record.counts()
        try:
            found = tables.curves(curves(counts, len(record.class_counts), record.groups))
        except (ValueError, IndexError, TypeError, MemoryError) as error:  # of counts that were made up
            told = f"the curves of run {id} cannot be computed ({reading.why(error)})"
            raise DamagedResult(f"{whole.folder}: {told}; {_MEND}") from error
    else:
        found = whole.table(name, whole.places[id])
    if content.digest(found) != record.tables.get(name):
        raise DamagedResult(f"{whole.folder}: the {name} of run {id} are not what it was packed with; {_MEND}")
    return found


def read(pack: Path) -> tuple[list[Record], list[str]]:
    """Read all runs of a pack that are what was written.

    Returns:
        The runs by id, and a sentence for each that is damaged, or for the pack if nothing of it can be believed.
    """
    found, damaged = [], []
    try:
        whole = opened(pack)
        altered = [name for name in TABLES if not whole.companion(name)]
        for id in whole.documents:
            try:
                record = whole.record(id)
                for name in altered if record.status == "done" else ():
                    record.table(name)
                found.append(record)
            except DamagedResult as error:
                damaged.append(str(error))
        if altered and not damaged:  # every run is whole, and yet a file is another
            names = " and ".join(map(tables.file, altered))
            damaged.append(f"{pack}: {names} is not the file that {RUNS} was written with; {_MEND}")
    except DamagedResult as error:
        return [], [str(error)]
    return found, damaged


def opened(pack: Path) -> Pack:
    """Open a pack, once for as long as its file stays the same.

    Raises:
        DamagedResult: runs.parquet cannot be read, or is not what was written.
    """
    try:
        at = _stamp(pack / RUNS)
    except OSError as error:
        raise DamagedResult(f"{pack / RUNS} cannot be read: {reading.why(error)}; {_MEND}") from error
    return _open(pack, *at)


@lru_cache(maxsize=16)
def _open(pack: Path, *_: int) -> Pack:
    path = pack / RUNS
    try:
        rows = tables.parse(reading.contents(path, _MOST_BYTES, links=False))
        note = json.loads((rows.schema.metadata or {})[NOTE])
        if (format := note["format"]) != FORMAT:
            raise OtherFormat(f"has format {format!r}, and this version reads format {FORMAT}; update bench")
        ids, texts, sums = (rows[name].to_pylist() for name in ("id", "document", "sha256"))
        digest, files = note["digest"], dict(note["files"])
        texts = [text.encode() for text in texts]
        if not all(isinstance(id, str) for id in ids):
            raise ValueError("a run has no id")
    except OtherFormat as error:
        raise DamagedResult(f"{path} {error}") from error
    except Exception as error:  # whatever a file that was made up makes of pyarrow
        raise DamagedResult(f"{path} cannot be read ({reading.why(error)}); {_MEND}") from error
    for id, text, sum in zip(ids, texts, sums, strict=True):
        if hashlib.sha256(text).hexdigest() != sum:
            raise DamagedResult(f"{path}: the document of run {id} is not the one that was packed; {_MEND}")
    if ids != sorted(set(ids)) or vouch(dict(zip(ids, sums, strict=True)), files) != digest:
        raise DamagedResult(f"{path} has not the runs that it was written with; {_MEND}")
    return Pack(folder=pack, documents=dict(zip(ids, texts, strict=True)), note=note)


def vouch(documents: Mapping[str, str], files: Mapping[str, str]) -> str:
    """Give a pack's digest, over those of its runs' documents and of its two other files."""
    return hashlib.sha256(canonical({"runs": dict(documents), "files": dict(files)}).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """A pack whose runs.parquet was read."""

    folder: Path
    documents: dict[str, bytes] = field(repr=False)
    """By id, which ascend."""
    note: dict[str, dict[str, str]]
    """What runs.parquet says of the pack: "format", "digest", and "files", the SHA-256 of the two others, and
    "plugins", that of each file in the folder of this name."""
    _groups: dict[str, tuple[int, pyarrow.Table]] = field(default_factory=dict, repr=False)
    _files: dict[str, tuple[tuple[int, int, int], parquet.ParquetFile]] = field(default_factory=dict, repr=False)
    _records: dict[str, Record] = field(default_factory=dict, repr=False)

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each run."""
        return {id: place for place, id in enumerate(self.documents)}

    def record(self, id: str) -> Record:
        """Read a run's document.

        Raises:
            DamagedResult: It is none of a run.
        """
        if id not in self._records:
            try:
                self._records[id] = check(self.folder / id, parse(self.documents[id]), self.folder)
            except OtherFormat as error:
                raise DamagedResult(f"run {id} of {self.folder} {error}") from error
            except (ValueError, RecursionError) as error:
                raise DamagedResult(f"the document of run {id} of {self.folder} {error}; {_MEND}") from error
        return self._records[id]

    def companion(self, name: str) -> bool:
        """Tell whether a file is the one that runs.parquet was written with, to the byte.

        Raises:
            DamagedResult: It cannot be read.
        """
        path = self.path(name)
        try:
            return _checksum(path) == self.note["files"].get(tables.file(name))
        except OSError as error:
            raise DamagedResult(f"{path} cannot be read: {reading.why(error)}; {_MEND}") from error

    def path(self, name: str) -> Path:
        """Give the place of a file, also if whoever added runs was killed before it got its name."""
        path, waiting = self.folder / tables.file(name), self.folder / waiting_name(name)
        if waiting.is_file() and _checksum(waiting) == self.note["files"].get(tables.file(name)):
            return waiting
        return path

    def table(self, name: str, place: int) -> pyarrow.Table:
        """Read the rows of a run.

        Raises:
            DamagedResult: The file cannot be read.
        """
        import pyarrow

        try:
            path = self.path(name)
            at = _stamp(path)
            if name not in self._files or self._files[name][0] != at:  # the file may be replaced meanwhile
                with reading.opened(path, links=False):  # which does not wait for a pipe, as the library would
                    source = pyarrow.OSFile(str(path))
                self._files[name] = at, tables.opened(source, groups=len(self.documents) + 1)
                self._groups.pop(name, None)
            file = self._files[name][1]
            group, rows = self._groups.get(name, (-1, None))
            wanted = _group_of(file.metadata, place)
            if rows is None or group != wanted:
                rows = tables.plain(file.read_row_group(wanted))
                self._groups[name] = wanted, rows
            runs = rows["run"].to_numpy()
            first, behind = runs.searchsorted(place), runs.searchsorted(place, "right")
            return rows.slice(first, behind - first).drop_columns("run")
        except Exception as error:  # whatever a file that was made up makes of pyarrow
            where = self.folder / tables.file(name)
            raise DamagedResult(f"{where} cannot be read ({reading.why(error)}); {_MEND}") from error


def waiting_name(name: str) -> str:
    """Name a table's file that waits for runs.parquet to be written."""
    return f".{tables.file(name)}.waiting"


def _group_of(metadata: parquet.FileMetaData, place: int) -> int:
    """Find the row group that holds a run; the last one if none does."""
    column = metadata.schema.names.index("run")
    low, high = 0, metadata.num_row_groups - 1
    while low < high:
        middle = (low + high) // 2
        if metadata.row_group(middle).column(column).statistics.max < place:
            low = middle + 1
        else:
            high = middle
    return low


def _checksum(path: Path) -> str:
    return _sum(path, *_stamp(path))


def _stamp(path: Path) -> tuple[int, int, int]:
    """Give what changes with a file."""
    at = os.stat(path)
    return at.st_mtime_ns, at.st_size, at.st_ino


@lru_cache(maxsize=64)
def _sum(path: Path, *_: int) -> str:
    with reading.opened(path, links=False) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
