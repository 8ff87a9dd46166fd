"""A loss of power, imitated: what a disk may hold at each moment of which nothing but `fsync` has made sure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Files = dict[str, bytes | None]
"""Content by path; None: a folder."""

_CALLS = ("fsync", "replace", "rename", "pwrite", "unlink", "rmdir")
_SECTOR = 512


@dataclass(frozen=True)
class Moment:
    """What a loss of power may leave."""

    safe: int
    """What `Disk.safe` was then."""
    files: Files


class Disk:
    """Watches a folder: before and after each call that changes it, notes what a loss of power could leave there.

    Names are those of the last `fsync` of their folder, or the newest. Of content that was not fsynced nothing is
    there, or its length, with zeros where nothing was, or that and every second sector. A sector is the old or the new
    one.

    Args:
        folder: Must be there, and count as safe.
        patch: Undoes the watching.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.safe = folder, 0
        self.moments: list[Moment] = []
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._folders: set[int] = set()
        self._held: list[int] = []  # open, so that no number of a file is used again
        self._sync(folder)
        for name in _CALLS:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            self.note()
            answer = call(*given, **named)
            if name == "fsync":
                number = os.fstat(given[0]).st_ino
                for path in (self.folder, *self.folder.rglob("*")):
                    if path.lstat().st_ino == number:
                        self._sync(path)
            self.note()
            return answer

        return watched

    def _sync(self, path: Path) -> None:
        number = path.stat().st_ino
        if path.is_dir():
            self._names[number] = {each.name: each.lstat().st_ino for each in path.iterdir()}
            for each in path.iterdir():
                self._hold(each)
        else:
            self._content[number] = path.read_bytes()
        self._hold(path)

    def _hold(self, path: Path) -> None:
        if path.is_dir():
            self._folders.add(path.stat().st_ino)
        self._held.append(os.open(path, os.O_RDONLY))

    def note(self) -> None:
        """Note what a loss of power could leave now."""
        for content in (_lost, _zeroed, _torn):
            for files in (dict(self._now(content)), dict(self._then(self.folder.stat().st_ino, "", content))):
                moment = Moment(self.safe, files)
                if moment not in self.moments[-12:]:
                    self.moments.append(moment)

    def _now(self, content: Callable[[bytes, bytes], bytes]) -> Iterator[tuple[str, bytes | None]]:
        """Give the files by their newest names."""
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            safe = self._content.get(path.stat().st_ino, b"")
            yield name, None if path.is_dir() else content(safe, path.read_bytes())

    def _then(
        self, number: int, above: str, content: Callable[[bytes, bytes], bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        """Give the files by the names that are safe."""
        newest = {path.lstat().st_ino: path for path in self.folder.rglob("*")}
        for name, each in sorted(self._names.get(number, {}).items()):
            if each in self._folders:
                yield above + name, None
                yield from self._then(each, f"{above}{name}/", content)
            else:
                safe = self._content.get(each, b"")
                yield above + name, content(safe, newest[each].read_bytes() if each in newest else safe)

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._held:
            os.close(handle)


def _lost(safe: bytes, newest: bytes) -> bytes:
    return safe


def _zeroed(safe: bytes, newest: bytes) -> bytes:
    return safe[: len(newest)].ljust(len(newest), b"\0")


def _torn(safe: bytes, newest: bytes) -> bytes:
    torn = bytearray(_zeroed(safe, newest))
    for place in range(0, len(newest), 2 * _SECTOR):
        torn[place : place + _SECTOR] = newest[place : place + _SECTOR]
    return bytes(torn)


def restore(files: Files, folder: Path) -> None:
    """Make a folder of what a loss of power has left."""
    folder.mkdir()
    for name, content in files.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
