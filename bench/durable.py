"""Files that survive a kill and a loss of power: there whole, or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def put(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        OSError: It cannot be written; what was there before is left.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(part, content)
        os.replace(part, file)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write(file: Path, content: bytes) -> None:
    """Write a file; when this returns its content is on the disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def flush(folder: Path) -> None:
    """Have the names in a folder survive a loss of power; nothing on systems that cannot open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
