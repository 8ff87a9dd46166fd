"""What is taken out of an archive: files and folders inside it, and no more bytes than it can honestly hold."""

from __future__ import annotations

import gzip
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import PurePosixPath
from typing import IO, Self, cast

from bench.system import reading

BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, LZMAError, struct.error),
    *(EOFError, RuntimeError, ValueError),
)
"""What a broken archive raises."""
_LARGE = 8 << 30
"""Bytes that lists may unpack to; an archive above a third of it holds photographs, which hardly shrink."""
_LONGEST = 1 << 20
"""Bytes of a name and what else a tar archive says of a file."""
_FILE = 4096
"""Bytes that a file takes from a disk, and from us, even if it is empty."""
_PIECE = 1 << 18


def members(raw: IO[bytes], size: int) -> Iterator[tuple[str, IO[bytes]]]:
    """Open the files of an archive one after the other.

    Args:
        raw: The archive: tar, packed or not, or zip.
        size: Its bytes, by which is judged how many may come out.

    Raises:
        One of `BROKEN`: It is damaged, a bomb, or holds anything but files and folders inside.
    """
    allowance = _Allowance(size)
    if zipfile.is_zipfile(raw):
        with zipfile.ZipFile(raw) as packed:
            for info in packed.infolist():
                _require_inside(info.filename)
                allowance.take(_FILE)
                if not info.is_dir():
                    with packed.open(info) as content:
                        yield info.filename, allowance.of(content)
        return
    raw.seek(0)
    try:
        opened = tarfile.open(fileobj=raw, tarinfo=_Header)  # noqa: SIM115 - closed below
    except tarfile.ReadError as error:  # with a line for each way of packing
        raise tarfile.ReadError("it is no archive, or does not begin as one") from error
    with opened as archive:
        for member in archive:
            _require_inside(member.name)
            allowance.take(_FILE)
            content_or_none = archive.extractfile(member) if member.isfile() else None
            if content_or_none is not None:
                yield member.name, allowance.of(content_or_none)
            elif not member.isdir():
                raise tarfile.TarError(f"{member.name!r} in it is neither a file nor a folder")
        while archive.fileobj is not None and (piece := archive.fileobj.read(_PIECE)):
            allowance.take(len(piece))  # to the end, where a packed archive has its checksum


class _Allowance:
    """How many bytes may still come out of an archive; files without any take some as well."""

    def __init__(self, size: int) -> None:
        self.most = min(reading.allowed(size), max(3 * size, _LARGE))
        self.said = f"more than {self.most:,} bytes would come out of its {size:,}"

    def take(self, nbytes: int) -> None:
        self.most -= nbytes
        if self.most < 0:
            raise tarfile.TarError(self.said)

    def of(self, content: IO[bytes]) -> IO[bytes]:
        return cast(IO[bytes], _Counted(content, self))


class _Counted:
    """A file in an archive, of which is counted what is read."""

    def __init__(self, content: IO[bytes], allowance: _Allowance) -> None:
        self.content, self.allowance = content, allowance

    def read(self, nbytes: int) -> bytes:
        piece = self.content.read(nbytes)
        self.allowance.take(len(piece))
        return piece


class _Header(tarfile.TarInfo):
    """A header of a tar archive; what is neither one nor the end mark is an error, where tarfile sees an end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf) == bytes(tarfile.BLOCKSIZE):
                raise
            raise tarfile.ReadError("it is cut short or damaged") from error
        if header.size < 0:
            raise tarfile.ReadError(f"it has a file of {header.size:,} bytes")
        if not (header.isreg() or header.isdir()) and header.size > _LONGEST:
            raise tarfile.ReadError(f"it has a name of {header.size:,} bytes")
        return header


def _require_inside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\n" in name:
        raise tarfile.TarError(f"{name!r} in it would lie elsewhere")
