"""How official files come from the network: in pieces that survive an interruption, checked, and unpacked.

By `urllib`: torch and torchvision's downloaders and pooch start over after a cut connection, Hugging Face's goes on but
takes only its own hub.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from bench.dataset import DataDamaged, DataMissing
from bench.files.archives import BROKEN, members

PAUSES = (1.0, 3.0, 9.0)
"""Seconds before the next attempt, after so many in a row that brought nothing; then it is given up."""
TIMEOUT = 60.0
"""Seconds that a server may be silent."""
_PIECE = 1 << 18
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may have another one a moment later."""

Report = Callable[[str, int, int | None], None]
"""Told what is being done ("cifar-10-python.tar.gz"), how many bytes of it are done, and of how many, if known."""


@dataclass(frozen=True)
class Remote:
    """A file on the network."""

    url: str
    name: str
    """Of the file below the dataset's folder, with `/`."""
    md5: str | None = None
    """Of its contents; None: not published."""
    bytes: int | None = None
    """Its size; None: the server says."""
    unpack: bool = False
    """Whether it is an archive (tar, packed or not, or zip) whose contents are wanted, beside it."""
    sha256: str | None = None
    """Of its contents, where it was in our hands: compared in place of the MD5."""

    @property
    def checksum(self) -> str | None:
        """What its contents are compared with: SHA-256, else MD5, else nothing."""
        return self.sha256 or self.md5


class _Failed(Exception):
    """A download that another attempt may bring further, or not. The message says why."""


_REPORT: ContextVar[Report] = ContextVar("report", default=lambda what, done, total: None)


@contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Have downloads within the block tell how far they are."""
    token = _REPORT.set(report)
    try:
        yield
    finally:
        _REPORT.reset(token)


def free(folder: Path) -> int:
    """Count the free bytes where a folder is, or would be made."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free


def fetch_all(remotes: Sequence[Remote], folder: Path, report: Report | None = None) -> None:
    """Download and unpack what is not there yet, and go on where an earlier call was interrupted.

    A file is called `<name>.part` until it is complete and its checksum right. Of an archive `<name>.unpacked` stays,
    the list of its files; the archive itself is removed, unless it was there before.

    Args:
        remotes: What is wanted.
        folder: The dataset's, made if need be.
        report: Told of progress; else who was given to `reporting`.

    Raises:
        DataMissing: The network, the disk or the server does not allow it; what was downloaded is kept.
        DataDamaged: A file is not what its checksum says, or an archive is broken.
    """
    tell = report or _REPORT.get()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [remote for remote in remotes if not _is_there(remote, folder, tell)]
        needed = sum(_needed(remote, folder) for remote in wanted)
        _require_space(needed, folder)
        for remote in wanted:
            _fetch(remote, folder, tell)
    except OSError as error:
        if isinstance(error, DataMissing):
            raise
        raise DataMissing(
            f"downloads to {folder} cannot be written ({error}); what is there is kept, the same command goes on"
        ) from error


def _fetch(remote: Remote, folder: Path, tell: Report) -> None:
    path = folder / remote.name
    part, validator = _beside(path, ".part"), _beside(path, ".part.validator")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        try:
            _download(remote, part, validator, tell)
        except _Failed as error:
            raise DataMissing(
                f"{remote.url} cannot be downloaded to {folder}: {error}; try again, which goes on where this stopped, "
                f"or get it by other means and put it there as {remote.name}"
            ) from error
        wrong = _difference(remote, part, tell)
        if wrong:
            part.unlink()  # nothing can be made of it
            validator.unlink(missing_ok=True)
            raise DataDamaged(f"{remote.url} is not the official file, {wrong}; it was removed again, try once more")
    if remote.unpack:
        _unpack(remote, path if path.is_file() else part, folder, tell)
        part.unlink(missing_ok=True)
    else:
        os.replace(part, path)
    validator.unlink(missing_ok=True)


def _is_there(remote: Remote, folder: Path, tell: Report) -> bool:
    """Tell whether nothing need be done, if what is there is right."""
    path = folder / remote.name
    if remote.unpack and _is_unpacked(remote, folder):
        return True
    if not path.is_file():
        return False
    wrong = _difference(remote, path, tell)
    if wrong:
        raise DataDamaged(f"{path} is not the official file, {wrong}; delete it and run the same command again")
    return not remote.unpack


def _difference(remote: Remote, path: Path, tell: Report) -> str:
    """Say in what a complete file differs from what it should be; nothing if it does not."""
    size = path.stat().st_size
    if remote.checksum is None:
        return "" if remote.bytes in (None, size) else f"it has {size:,} bytes, and not {remote.bytes:,}"
    digest = hashlib.md5(usedforsecurity=False) if remote.sha256 is None else hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            tell(f"checking {remote.name}", file.tell(), size)
    found = digest.hexdigest()
    name = "MD5" if remote.sha256 is None else "SHA-256"
    return "" if found == remote.checksum else f"its {name} is {found}, and not {remote.checksum}"


# Space ------------------------------------------------------------------------------------------------------


def _needed(remote: Remote, folder: Path) -> int:
    """Count the bytes still to be written, as far as is known; contents of an archive as much as it has itself."""
    whole = remote.bytes or 0
    if not remote.unpack:
        return max(whole - _size(_beside(folder / remote.name, ".part")), 0)
    present = max(_size(_beside(folder / remote.name, ".part")), _size(folder / remote.name))
    return max(whole - present, 0) + whole


def _require_space(needed: int, folder: Path) -> None:
    available = free(folder)
    if needed > available:
        raise DataMissing(
            f"{needed:,} more bytes do not fit on the disk of {folder}, where {available:,} are free; make room, or "
            "choose another folder (--data-root or $BENCH_DATA)"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


# Transfer ---------------------------------------------------------------------------------------------------


def _download(remote: Remote, part: Path, validator: Path, tell: Report) -> None:
    """Complete a partial file, in as many attempts as bring it further.

    Raises:
        _Failed: Several in a row did not, or the server has no such file.
    """
    most, failures = _size(part), 0
    if remote.bytes is not None and most == remote.bytes:
        return  # interrupted after the last byte
    while True:
        try:
            _transfer(remote, part, validator, tell)
            return
        except HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            error.close()
            if error.code not in _PASSING:
                raise _Failed(reason) from error
        except _Failed as error:
            reason = str(error)
        except (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 0 if _size(part) > most else failures + 1
        most = max(most, _size(part))
        if failures > len(PAUSES):
            raise _Failed(reason)
        time.sleep(PAUSES[max(failures - 1, 0)])


def _transfer(remote: Remote, part: Path, validator: Path, tell: Report) -> None:
    """Ask the server once for what is missing, and write what comes.

    Without a checksum, pieces are joined only if the server vouches, by an `ETag` or a date, that its file is still
    the same.

    Raises:
        _Failed: It was not all. Other errors are urllib's.
    """
    known = validator.read_text(encoding="utf-8") if validator.is_file() else ""
    start = _size(part) if known or remote.checksum else 0
    headers = {"User-Agent": "pfl-lt-bench"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if known:
            headers["If-Range"] = known
    try:
        response = urlopen(Request(remote.url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if start and error.code == 416:  # nothing comes after what is there
            whole = error.headers.get("Content-Range", "").rpartition("/")[2]
            error.close()
            if whole == str(start):
                return
            part.unlink()
            raise _Failed("more is there than the server has") from error
        raise
    with response:
        if response.status != 206:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise _Failed("the server sends another part than it was asked for")
        length = response.headers.get("Content-Length")
        total = remote.bytes if length is None else start + int(length)
        if total is not None:
            _require_space(total - start, part.parent)
        elif remote.checksum is None:
            raise _Failed("the server does not say how long the file is, and no checksum is known")
        etag = response.headers.get("ETag", "")
        validator.write_text(
            etag if etag.startswith('"') else response.headers.get("Last-Modified", ""), encoding="utf-8"
        )
        with part.open("ab" if start else "wb") as file:
            while piece := response.read(_PIECE):
                file.write(piece)
                tell(remote.name, file.tell(), total)
            reached = file.tell()
    if total is not None and reached != total:
        raise _Failed(f"the connection was cut after {reached:,} of {total:,} bytes")


# Archives ---------------------------------------------------------------------------------------------------


def _unpack(remote: Remote, archive: Path, folder: Path, tell: Report) -> None:
    """Write the files of an archive into its folder, each whole or not at all, and last their list."""
    place = (folder / remote.name).parent
    size, written = archive.stat().st_size, []
    try:
        with archive.open("rb") as raw:
            for name, content in members(raw, size):
                path = place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with _beside(path, ".part").open("wb") as file:
                    shutil.copyfileobj(content, file, _PIECE)
                    written.append(f"{file.tell()} {name}")
                os.replace(_beside(path, ".part"), path)
                tell(f"unpacking {remote.name}", raw.tell(), size)
    except BROKEN as error:
        raise DataDamaged(
            f"{archive} cannot be unpacked ({error}); delete it and run the same command again"
        ) from error
    marker = _beside(folder / remote.name, ".unpacked")
    _beside(marker, ".part").write_text("\n".join([_title(remote), *written]), encoding="utf-8")
    os.replace(_beside(marker, ".part"), marker)


def _is_unpacked(remote: Remote, folder: Path) -> bool:
    """Tell whether all files of an archive are there, each of its size."""
    marker = _beside(folder / remote.name, ".unpacked")
    try:
        title, *written = marker.read_text(encoding="utf-8").split("\n")
        members = [line.split(" ", 1) for line in written]
        sizes = [(marker.parent / name).stat().st_size == int(size) for size, name in members]
    except (OSError, ValueError):  # no list, or a file of it is missing
        return False
    return _bare(title) == _bare(_title(remote)) and all(sizes)


def _title(remote: Remote) -> str:
    return f"{remote.url} {remote.checksum}"


def _bare(title: str) -> str:
    """Leave out http or https: a host may have learnt the latter since."""
    return title.partition("://")[2]
