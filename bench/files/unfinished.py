"""How a prepared store is made: chunk by chunk, by several processes, going on where it was killed.

It is made in a folder beside its place, `inat-2018-64px.part-<digest of the plan>`, which takes the name of the store
when it is complete. There, `parts/train-00012.json` says that a chunk of rows is on disk: it is written after them, so
that a preparation that is killed, wherever it is, goes on with the chunks that have no such file.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.dataset import Labels
from bench.files.prepared import FORMAT, INDEX, LABELS, PARTS, Chunk, Plan, Store, checksum, find, sha256_of
from bench.system.durable import flush, put

try:
    import fcntl
except ImportError:  # a system without it: nothing keeps two preparations apart there
    fcntl = None  # type: ignore[assignment]

_MARKERS = "parts"


class StoreUnwritable(OSError):
    """A store cannot be written where it should be. The message says why and what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


class StoreBusy(StoreUnwritable):
    """Another process is preparing the same store."""


@dataclass(frozen=True)
class Marker:
    """What is known of a chunk that was written."""

    sha256: str
    broken: Mapping[int, str]
    """Rows that have no image, which are zeros, and why."""


@dataclass(frozen=True)
class Unfinished:
    """A store that is being made; it can be sent to other processes. Made by `writing`."""

    target: Path
    """Where the store will be."""
    plan: Plan

    @cached_property
    def folder(self) -> Path:
        """Where it is made: a worker left over from another plan finds nothing to write to."""
        return self.target.with_name(f"{self.target.name}.part-{self.plan.digest}")

    def todo(self) -> list[Chunk]:
        """List the chunks that are not written, or that have broken rows."""
        chunks = [chunk for part in PARTS for chunk in self.plan.chunks(part)]
        markers = ((chunk, self.marker(chunk)) for chunk in chunks)
        return [chunk for chunk, marker in markers if marker is None or marker.broken]

    def marker(self, chunk: Chunk) -> Marker | None:
        """Tell what is known of a chunk, None if it is not written."""
        try:
            document = json.loads(self._marker_file(chunk).read_bytes())
            return Marker(document["sha256"], {int(row): why for row, why in document["broken"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def read(self, chunk: Chunk) -> npt.NDArray[Any] | None:
        """Read a chunk that was written: (n, height, width, channels); None if it is not what its marker says."""
        marker = self.marker(chunk)
        try:
            with self._images(chunk.part).open("rb") as file:
                file.seek(chunk.start * self.plan.row_bytes)
                content = file.read(len(chunk) * self.plan.row_bytes)
        except OSError:
            return None
        if marker is None or sha256_of(content) != marker.sha256:
            return None
        return np.frombuffer(bytearray(content), dtype=self.plan.dtype).reshape(self._shape(chunk))

    def write(self, chunk: Chunk, images: npt.NDArray[Any], broken: Mapping[int, str] | None = None) -> None:
        """Write a chunk; when this returns it survives a loss of power.

        Args:
            chunk: One of the plan's.
            images: (n, height, width, channels) of the plan's dtype.
            broken: Rows of the part that have no image, and why.

        Raises:
            StoreUnwritable: The disk is full, or the folder cannot be written.
            ValueError: The images have another shape or dtype.
        """
        if images.shape != self._shape(chunk) or images.dtype != self.plan.dtype:
            expected = f"{self.plan.dtype} of {self._shape(chunk)}"
            raise ValueError(f"images are {images.dtype} of {images.shape}; {expected} are wanted")
        content = np.ascontiguousarray(images).reshape(-1).view(np.uint8).data
        marker = {"sha256": sha256_of(content), "broken": {str(row): why for row, why in (broken or {}).items()}}
        with explained(self.target):
            with self._images(chunk.part).open("r+b", buffering=0) as file:
                file.seek(chunk.start * self.plan.row_bytes)
                rest = content
                while len(rest):
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            put(self._marker_file(chunk), json.dumps(marker).encode())

    def finish(self, labels: Labels) -> Store:
        """Make a store of it, in place of an older one, which lasts until then.

        Raises:
            StoreUnwritable: The disk is full, or the folder cannot be written.
            ValueError: Chunks are not written or have broken rows, or the labels are not as many as the images.
        """
        markers = {part: [self.marker(chunk) for chunk in self.plan.chunks(part)] for part in PARTS}
        if not all(marker is not None and not marker.broken for part in PARTS for marker in markers[part]):
            raise ValueError(f"{self.folder} is not complete: {len(self.todo())} chunks are to do")
        if (len(labels.train), len(labels.test)) != (self.plan.train, self.plan.test):
            raise ValueError(f"{len(labels.train)} and {len(labels.test)} labels: there are other numbers of images")
        columns = {name: column for name, column in vars(labels).items() if column is not None}
        packed = io.BytesIO()
        np.savez(packed, **{name: column.numpy() for name, column in columns.items()})
        document = {
            "format": FORMAT,
            "plan": asdict(self.plan),
            "chunks": {part: [marker.sha256 for marker in markers[part] if marker] for part in PARTS},
            "labels": sha256_of(packed.getvalue()),
        }
        document["sha256"] = checksum(document)
        with explained(self.target):
            put(self.folder / LABELS, packed.getvalue())
            put(self.folder / INDEX, json.dumps(document, indent=1).encode())
            flush(self.folder)
            _move_aside(self.target)
            self.folder.rename(self.target)
            flush(self.target.parent)
            tidy(self.target)
        store = find(self.target)
        assert store is not None
        return store

    def begin(self, say: Callable[[str], None]) -> None:
        """Make the folder, or take what is there of the same plan; clear away what other plans have left."""
        for other in self.target.parent.glob(f"{escape(self.target.name)}.part-*"):
            if other != self.folder:
                say(f"{other} was begun from other lists, options or versions; it is deleted, and begun anew")
                shutil.rmtree(other)
        if _aside(self.target).exists() and not self.target.exists():
            _aside(self.target).rename(self.target)  # killed while a new one took its place
        sizes = [_stat(self._images(part), "st_size") for part in PARTS]
        if sizes == [self.plan.part_bytes(part) for part in PARTS]:
            for leftover in self.folder.glob(".*"):  # of a process that was killed
                leftover.unlink()
            self._check_space()
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / _MARKERS).mkdir(parents=True)
        try:
            self._check_space()
            for part in PARTS:
                _allocate(self._images(part), self.plan.part_bytes(part))
        except OSError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _check_space(self) -> None:
        taken = sum(512 * max(_stat(self._images(part), "st_blocks"), 0) for part in PARTS)
        free, wanted = shutil.disk_usage(self.folder).free, self.plan.nbytes - taken
        if wanted > free:
            older = f", or delete the older {self.target}" if self.target.exists() else ""
            raise StoreUnwritable(
                f"{self.target} needs {in_words(wanted)}, and its disk has {in_words(free)} free; free some{older}, "
                "and run the same command again"
            )

    def _images(self, part: str) -> Path:
        return self.folder / f"{part}.bin"

    def _marker_file(self, chunk: Chunk) -> Path:
        return self.folder / _MARKERS / f"{chunk.part}-{chunk.number:05}.json"

    def _shape(self, chunk: Chunk) -> tuple[int, int, int, int]:
        channels, height, width = self.plan.shape
        return len(chunk), height, width, channels


@contextmanager
def writing(target: Path, plan: Plan, say: Callable[[str], None] = lambda sentence: None) -> Iterator[Unfinished]:
    """Begin or continue a store, and keep other processes from doing so meanwhile.

        with writing(folder, plan) as unfinished:
            for chunk in unfinished.todo():
                unfinished.write(chunk, images[chunk.start : chunk.stop])
            unfinished.finish(labels)

    Args:
        target: The store's folder. What is there stays until `finish`.
        plan: What it is to hold.
        say: Told if something unfinished is deleted.

    Raises:
        StoreUnwritable: The disk is full, or the folder cannot be written.
        StoreBusy: Another process does the same.
    """
    unfinished = Unfinished(target, plan)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = (target.parent / f".{target.name}.lock").open("a")
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreBusy(f"{target} is being prepared by another process; wait for it, or end it") from error
            except OSError:  # a file system without locks
                pass
        with explained(target):
            unfinished.begin(say)
        yield unfinished


def tidy(target: Path) -> None:
    """Remove what is of no use beside and in a complete store, as far as that can be done: also after a kill."""
    for folder in (target / _MARKERS, _aside(target)):
        shutil.rmtree(folder, ignore_errors=True)


def in_words(nbytes: int) -> str:
    """Write a number of bytes for a person: "5.7 GB"."""
    power = min((len(str(nbytes)) - 1) // 3, 4)
    return f"{nbytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn what the system says when something cannot be written into what to do."""
    try:
        yield
    except StoreUnwritable:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "what is prepared is kept; free some space, and run the same command again"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = (
                "make a folder of your own, put links to the official files into it (ln -s), and name it with "
                "--data-root; nothing that was prepared is lost"
            )
        else:
            advice = "what is prepared is kept, and the same command goes on"
        raise StoreUnwritable(f"{target} cannot be written: {why}; {advice}") from error


def _allocate(file: Path, size: int) -> None:
    """Make a file of zeros, with its blocks where the system can, so that a full disk is noticed at once."""
    with file.open("wb") as stream:
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        stream.truncate(size)


def _aside(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")


def _move_aside(target: Path) -> None:
    if target.exists():
        shutil.rmtree(_aside(target), ignore_errors=True)
        target.rename(_aside(target))


def _stat(file: Path, what: str) -> int:
    """Give a number of `stat`, -1 if there is none."""
    try:
        return int(getattr(file.stat(), what, -1))
    except OSError:
        return -1
