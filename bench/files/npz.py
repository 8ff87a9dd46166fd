"""Arrays of plain numbers in an npz file: headers are compared with the file before memory is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from bench.system import reading

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class BadArray(ValueError):
    """A member is no array of plain numbers, or not as large as it says. The message names it, not the file."""


@dataclass(frozen=True)
class Header:
    """What a member says of itself, and is large enough for."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    """Bytes of the member before its numbers."""


@contextmanager
def opened(path: Path | str) -> Iterator[ZipFile]:
    """Open an npz file; errors of `bench.system.reading.opened`, and of ZipFile if it is none."""
    with reading.opened(path) as file, ZipFile(file) as archive:
        yield archive


def header(archive: ZipFile, key: str) -> Header:
    """Read how large an array is, and of which type.

    Raises:
        BadArray: It is none of plain numbers, or the file does not hold as much as it says.
        KeyError, BadZipFile, ...: It is not there, or the archive is damaged.
    """
    info = archive.getinfo(f"{key}.npy")
    packed = min(info.compress_size, archive.start_dir)  # of its own size it may say anything
    honest = {ZIP_STORED: packed, ZIP_DEFLATED: reading.allowed(packed)}.get(info.compress_type, 0)
    if info.file_size > honest:
        raise BadArray(f"{key} is said to have {info.file_size:,} bytes, and has {packed:,} in the file")
    with archive.open(info) as member:
        try:
            shape, _, dtype = _HEADERS[npy.read_magic(member)](member)
        except (ValueError, KeyError) as error:
            raise BadArray(f"{key} does not begin as an array does") from error
        start = member.tell()
    if dtype.hasobject:
        raise BadArray(f"{key} holds Python objects, which are not read, as they can run code")
    size = start + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != info.file_size or (dtype.itemsize == 0 and 0 not in shape):
        raise BadArray(f"{key} is said to be {dtype} of {shape}, and has {info.file_size - start:,} bytes for it")
    return Header(shape, dtype, start)


def read(archive: ZipFile, key: str) -> npt.NDArray[Any]:
    """Read an array; errors of `header`."""
    header(archive, key)
    with archive.open(f"{key}.npy") as member:
        array: npt.NDArray[Any] = npy.read_array(member, allow_pickle=False)
    return array
