"""Files that survive a kill and a loss of power: there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

Content = bytes | Callable[[BinaryIO], object]
"""Of a file: bytes, or what writes them to a stream, when they are too many to be held twice."""


def put(file: Path, content: Content) -> None:
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


def write(file: Path, content: Content) -> None:
    """Write a file; when this returns its content is on the disk."""
    with file.open("wb") as stream:
        if callable(content):
            content(stream)
        else:
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


def remove(path: Path) -> None:
    """Remove what has a name: a file, a link, or a folder with all in it; what cannot be removed stays."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def tidy(file: Path) -> None:
    """Remove what processes that were killed have left of writing a file; nobody else may be writing it."""
    for part in file.parent.glob(f".{escape(file.name)}.*"):
        remove(part)
