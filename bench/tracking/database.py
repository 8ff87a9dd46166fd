"""MLflow's SQLite database: there whole or not at all, looked over when it is opened, moved away where it is damaged.

MLflow makes and changes its tables in place, step by step; a process that is killed meanwhile leaves what no other one
opens. So that is done in a copy, which then takes the place of the database.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from bench.system import durable

_BESIDE = ("-journal", "-wal", "-shm")
"""Ends of the names of what SQLite keeps beside a database; they belong to that one and to no other."""
_PASSING = ("locked", "is full", "no space", "readonly", "read-only", "unable to open", "disk i/o", "permission denied")
"""Words of errors that say nothing of a database: it is in use, or its disk is full or broken."""
_WAIT_SECONDS = 20.0
"""For a process that is writing."""


class DatabaseDamaged(RuntimeError):
    """A database is not what MLflow wrote, or it was not written to its end."""


def address(file: Path) -> str:
    """Give the address of a database."""
    path = str(file)
    if not {"?", "%"} & set(path):
        return f"sqlite:///{path}"
    quoted = path.replace("%", "%25").replace("?", "%3F")
    return f"sqlite+pysqlite:///{quoted}"  # without the driver's name MLflow makes a folder that is called as is quoted


def passes(error: BaseException) -> bool:
    """Tell whether an error may be over when the same is tried again, with nothing done to the database."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in _PASSING)


def look_over(file: Path, version: str) -> bool:
    """Look a database over; tell whether it was completed by MLflow of this version.

    Raises:
        DatabaseDamaged: It does not hold together. sqlite3.OperationalError: It cannot be read now.
    """
    if file.is_dir():
        raise DatabaseDamaged("it is a folder")
    try:
        with _opened(file) as database:
            if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise DatabaseDamaged("it has no tables")
            (found,) = database.execute("PRAGMA integrity_check(1)").fetchone()
            if found != b"ok":
                raise DatabaseDamaged("its pages do not hold together")
            if database.execute("PRAGMA user_version").fetchone()[0] != _stamp(version):
                return False
            if not database.execute("SELECT count(*) FROM alembic_version").fetchone()[0]:
                raise DatabaseDamaged("it has lost the version of its tables")  # MLflow would hold on to it
            return True
    except sqlite3.OperationalError as error:
        if passes(error):
            raise
        raise DatabaseDamaged(str(error)) from error
    except sqlite3.DatabaseError as error:
        raise DatabaseDamaged(str(error)) from error


def complete(file: Path, version: str, connect: Callable[..., Any]) -> None:
    """Have MLflow make a database, or bring one to its version; killed meanwhile, that leaves all as it was.

    Args:
        file: Need not be there. Nobody else makes it meanwhile.
        version: MLflow's.
        connect: The class of its client.

    Raises:
        DatabaseDamaged: MLflow cannot do that with what is there. Besides, errors that may pass.
    """
    name = f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}"  # a new one: MLflow never closes what it has opened
    part, whole = file.with_name(name), file.with_name(f"{name}.whole")
    there = file.exists()
    try:
        if there:
            with _opened(file) as database, _opened(part) as copy:
                database.backup(copy)
        try:
            _open(part, connect)
        except Exception as error:  # whatever MLflow raises
            if passes(error) or not there:
                raise
            raise DatabaseDamaged("it was not written to its end, or by another MLflow") from error
        with _opened(part) as database:
            database.execute(f"PRAGMA user_version = {_stamp(version)}")
            database.execute("VACUUM INTO ?", (str(whole),))
        with whole.open("rb") as stream:
            os.fsync(stream.fileno())
        if not there:
            _clear_beside(file)
        os.replace(whole, file)
        durable.flush(file.parent)
    finally:
        durable.tidy(file)


def move_away(file: Path) -> Path:
    """Give a damaged database another name, with what SQLite keeps beside it."""
    number = 1
    while os.path.lexists(moved := file.with_name(f"{file.name}.damaged-{number}")):
        number += 1
    for end in _BESIDE:  # first, or the next database would be taken back to what they hold
        if os.path.lexists(beside := Path(f"{file}{end}")):
            beside.replace(f"{moved}{end}")
    file.replace(moved)
    return moved


def _open(file: Path, connect: Callable[..., Any]) -> None:
    """Have MLflow open a database, which makes its tables if some are missing, and bring it to this version."""
    uri = address(file)
    try:
        connect(tracking_uri=uri)
    except Exception as error:  # MLflow's own, of which only the words tell what is to be done
        if "out-of-date" not in str(error):
            raise
        command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise
        connect(tracking_uri=uri)


def _clear_beside(file: Path) -> None:
    for end in _BESIDE:
        durable.remove(Path(f"{file}{end}"))


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file, timeout=_WAIT_SECONDS, isolation_level=None)) as database:
        database.text_factory = bytes
        yield database


def _stamp(version: str) -> int:
    """Give the number, of those that SQLite keeps for its users, that marks a database as complete for an MLflow."""
    return zlib.crc32(f"bench {version}".encode()) >> 1
