"""Files that others made: regular ones only, whole, and unpacked to no more than they can honestly hold."""

from __future__ import annotations

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
_PIECE = 1 << 20


class TooLarge(ValueError):
    """More bytes would come out of a file than it can honestly hold. The message says how many, without its path."""


def opened(path: Path | str) -> io.BufferedReader:
    """Open a file for reading; links are followed, and a pipe is not waited for.

    Raises:
        OSError: It cannot be opened, or is a folder, pipe, socket or device.
    """
    file = open(path, "rb", opener=_at_once)  # noqa: SIM115 - the caller closes it
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError("it is a pipe or a device, and no file")


def contents(path: Path) -> bytes:
    """Read a file whole.

    Raises:
        OSError: It cannot be read. TooLarge: It has more than `MOST` bytes.
    """
    with opened(path) as file:
        return _all(file, MOST)


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


def _all(stream: io.BufferedReader | gzip.GzipFile | lzma.LZMAFile, most: int) -> bytes:
    pieces, read = [], 0
    while piece := stream.read(_PIECE):
        read += len(piece)
        if read > most:
            raise TooLarge(f"more than {most:,} bytes would come out of it")
        pieces.append(piece)
    return b"".join(pieces)
