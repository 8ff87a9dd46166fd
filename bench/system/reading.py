"""Files that others made: regular ones only, whole, and unpacked to no more than they can honestly hold."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import stat
import zlib
from pathlib import Path

MOST = 4 << 30
"""Bytes of a file that is read whole into memory; the largest that we know has half a gigabyte."""
RATIO, SMALL = 100, 64 << 20
"""What is packed becomes at most so many times larger, unless it stays below so many bytes: lists and numbers become
20 times as large, a bomb 1,000 times."""
TEXT = 16 << 20
"""Bytes of a text that people or their commands write: notes, a table, trials of a search."""
_PIECE = 1 << 20


class TooLarge(ValueError):
    """More comes out of a file than it can honestly hold. The message says how much, without its path."""


def opened(path: Path | str, *, links: bool = True) -> io.BufferedReader:
    """Open a file for reading; a pipe is not waited for.

    Args:
        path: Of the file.
        links: Whether a link is followed: not where somebody else may have made it.

    Raises:
        OSError: It cannot be opened, or is a folder, pipe, socket or device; or a link, unless these are followed.
    """
    if not links and os.path.islink(path):
        raise OSError(errno.ELOOP, "it is a link, and no file of its own", str(path))
    file = open(path, "rb", opener=_at_once if links else _itself)  # noqa: SIM115 - the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError("it is a pipe or a device, and no file")


def contents(path: Path, most: int | None = None, *, links: bool = True) -> bytes:
    """Read a file whole.

    Args:
        path: Of the file.
        most: Bytes that it may have; None: `MOST`.
        links: As for `opened`.

    Raises:
        OSError: It cannot be read. TooLarge: It has more bytes.
    """
    with opened(path, links=links) as file:
        return _all(file, MOST if most is None else most, os.fstat(file.fileno()).st_size)


def why(error: Exception) -> str:
    """Say why a file could not be read, in a line and without its path."""
    told = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return told.partition("\n")[0]


def unpacked(stored: bytes, ending: str) -> bytes:
    """Unpack what was read from a file, if its name ends in .gz or .xz.

    Raises:
        OSError: It is damaged. TooLarge: See `RATIO`, and `MOST`.
    """
    if ending not in (".gz", ".xz"):
        return stored
    packed = io.BytesIO(stored)
    try:
        with gzip.GzipFile(fileobj=packed) if ending == ".gz" else lzma.LZMAFile(packed) as stream:
            return _all(stream, min(allowed(len(stored)), MOST))
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise OSError(str(error)) from error


def allowed(packed: int) -> int:
    """Say how many bytes may come out of so many packed ones."""
    return max(RATIO * packed, SMALL)


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _itself(path: str, flags: int) -> int:
    return _at_once(path, flags | getattr(os, "O_NOFOLLOW", 0))


def _all(stream: io.BufferedReader | gzip.GzipFile | lzma.LZMAFile, most: int, told: int = 0) -> bytes:
    """Read to the end; `told` is how many bytes there are, if that is known."""
    pieces, read = [], 0
    while told <= most and (piece := stream.read(_PIECE)):
        read += len(piece)
        told = max(told, read)
        pieces.append(piece)
    if told > most:
        raise TooLarge(f"more than {most:,} bytes would come out of it")
    return b"".join(pieces)
