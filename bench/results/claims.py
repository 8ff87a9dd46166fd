"""Who works on a run: one process at a time, in whatever sweep, on whatever machine that shares the folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without it: nothing keeps two processes apart there
    fcntl = None  # type: ignore[assignment]

FILE = "claim"


class Claimed(RuntimeError):
    """Another process is doing this run."""


@contextmanager
def claim(folder: Path, file_name: str = FILE) -> Iterator[None]:
    """Keep other processes from doing the run of a folder; a process that dies, however it dies, gives it back.

    Where the file system has no locks, nobody is kept away, and that is said on standard error.

    Args:
        folder: The run's; must be there.
        file_name: Of the file that is locked, and removed afterwards.

    Raises:
        Claimed: Another process has it.
        OSError: The folder cannot be written.
    """
    file = folder / file_name
    handle = _take(file)
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(handle)


def is_claimed(folder: Path) -> bool:
    """Tell whether a process is doing the run of a folder."""
    if fcntl is None:
        return False
    try:
        handle = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        _remark()
        return False
    finally:
        os.close(handle)
    return False


def _take(file: Path) -> int:
    """Open and lock the file that the name stands for: the one before may have been removed while we waited."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is None:
                return handle
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Claimed(f"another process is doing {file.parent}") from error
            except OSError:
                _remark()
                return handle
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), file.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


@cache  # once a process
def _remark() -> None:
    print(
        "the file system has no locks: two sweeps that are at work in one folder are not kept apart there, and may do "
        "the same run; start one at a time",
        file=sys.stderr,
    )
