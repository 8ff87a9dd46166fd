"""The prepared store of a dataset: decoded images in flat files, written once and read by rows.

    inat-2018-64px/train.bin     (N, height, width, channels): uint8 pixels, or float16 features
    inat-2018-64px/test.bin      (M, ...), likewise
    inat-2018-64px/labels.npz    train, test, and where there are any users, test_users
    inat-2018-64px/index.json    what the others hold, and their checksums

`bench.files.unfinished` makes one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.dataset import DataDamaged, Labels, Splits
from bench.files import npz
from bench.system import reading

FORMAT = 1
PARTS = ("train", "test")
DTYPES = {"uint8": torch.uint8, "float16": torch.float16}

INDEX, LABELS = "index.json", "labels.npz"
_AHEAD = 128 * 2**10
"""Bytes of one call for read-ahead: Linux reads no more than its window for a call, 128 KiB unless set otherwise."""
_AT_ONCE = 4
"""Chunks that are compared with their checksums at once, each by a thread: SHA-256 lets others run."""
_NEAR = 16 * 2**10
"""Bytes between two rows below which reading ahead takes them for neighbours."""


# What a store holds -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a part, written together."""

    part: str
    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a store is to hold; with the same inputs, two stores of one plan are equal to the byte."""

    listing: str
    """Digest of what it is made from."""
    shape: tuple[int, int, int]
    """Channels, height, width."""
    train: int
    """Rows of the training part."""
    test: int
    dtype: str = "uint8"
    """One of `DTYPES`."""
    chunk: int = 128
    """Rows of a chunk: what is lost at most, for each worker, when a preparation is killed."""
    made_by: Mapping[str, str] = field(default_factory=dict)
    """Versions of what the values depend on: what another version began is not continued."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        channels, height, width = self.shape
        return channels * height * width * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return sum(self.part_bytes(part) for part in PARTS)

    def rows(self, part: str) -> int:
        """Count the rows of a part."""
        return self.train if part == "train" else self.test

    def part_bytes(self, part: str) -> int:
        """Count the bytes of a part."""
        return self.rows(part) * self.row_bytes

    def chunks(self, part: str) -> list[Chunk]:
        """Cut a part into chunks, in order."""
        rows = self.rows(part)
        starts = range(0, rows, self.chunk)
        return [Chunk(part, number, start, min(start + self.chunk, rows)) for number, start in enumerate(starts)]

    @property
    def digest(self) -> str:
        """8 hexadecimal digits that tell this plan from others."""
        return checksum(asdict(self))[:8]


# Reading ----------------------------------------------------------------------------------------------------


class Stored:
    """One part of a store, as a `bench.dataset.Streamed`: rows are read from the file when they are asked for.

    Args:
        file: The part's file.
        shape: (N, channels, height, width).
        dtype: Of the elements.
        index: SHA-256 of the store's index, by which a store that was replaced in the meantime is noticed.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int, int], dtype: torch.dtype, index: str) -> None:
        self.file, self.shape, self.dtype, self.index = file, shape, dtype, index
        self._row_bytes = shape[1] * shape[2] * shape[3] * dtype.itemsize
        self._stream: io.FileIO | None = None
        self._process = -1
        self._turn = threading.Lock()
        self._superseded = threading.Event()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read images by (n,) int64 rows, in that order.

        Returns:
            (n, channels, height, width), a view of contiguous (n, height, width, channels).

        Raises:
            IndexError: A row is not in 0..N-1. DataDamaged: The file cannot be read, or is not what it was.
        """
        index = rows.detach().cpu().numpy()
        size, (total, channels, height, width) = self._row_bytes, self.shape
        # Read into memory of our own rather than mapped: the touched pages of a mapping count as resident memory of
        # the process until the system takes them back, and a run would seem to hold all that it ever read.
        content = torch.empty(len(index) * size, dtype=torch.uint8)
        if len(index):
            if index.min() < 0 or index.max() >= total:
                raise IndexError(f"rows {index.min()} to {index.max()} of {self.file}: there are {total:,} from 0")
            view = content.numpy().data
            joints = np.flatnonzero(index[1:] != index[:-1] + 1) + 1  # where a run of consecutive rows ends
            starts = np.concatenate(([0], joints))
            begins = (starts * size).tolist()
            handle = self._handle()
            try:
                for begin, end, offset in zip(
                    begins, [*begins[1:], len(view)], (index[starts] * size).tolist(), strict=True
                ):
                    self._fill(handle, view[begin:end], offset)
            except OSError as error:
                raise _damaged(self.file.parent, f"{self.file} cannot be read ({error.strerror})") from error
        return content.view(self.dtype).view(-1, height, width, channels).permute(0, 3, 1, 2)

    def prefetch(self, rows: Tensor) -> None:
        """Have the system read these rows into its cache; returns at once, and takes the place of an earlier call.

        Does nothing where the system has no such request.
        """
        self._superseded.set()
        if not hasattr(os, "posix_fadvise") or not len(rows):
            return
        self._superseded = threading.Event()
        handle = os.dup(self._handle())  # the thread's own, which nobody closes under its hands
        work = (handle, rows.detach().cpu().numpy().copy(), self._row_bytes, self._superseded)
        try:
            threading.Thread(target=_read_ahead, args=work, daemon=True).start()
        except RuntimeError:  # no more threads; it was only advice
            os.close(handle)

    def close(self) -> None:
        """Close the file; the next reading opens it again."""
        self._superseded.set()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.shape, self.dtype, self.index)

    def _handle(self) -> int:
        """Open the file at first use, and again after a fork: a child shares the position of its parent's file."""
        if self._stream is None or self._process != os.getpid():
            self.close()
            self._stream, self._process = self._open(), os.getpid()
        return self._stream.fileno()

    def _open(self) -> io.FileIO:
        folder = self.file.parent
        try:
            stream = io.FileIO(self.file)
        except OSError as error:
            raise _damaged(folder, f"{self.file} cannot be read ({error.strerror})") from error
        try:
            size, expected = os.fstat(stream.fileno()).st_size, self.shape[0] * self._row_bytes
            if size != expected:
                raise _damaged(folder, f"{self.file} has {size:,} bytes instead of {expected:,}")
            with suppress(FileNotFoundError):
                if sha256_of((folder / INDEX).read_bytes()) == self.index:
                    return stream
            raise DataDamaged(f"{folder} was prepared anew while it was in use; start again")
        except BaseException:
            stream.close()
            raise

    def _fill(self, handle: int, view: memoryview, offset: int) -> None:
        """Read as many bytes as the view has; one call reads less at 2 GiB, or at the end of the file."""
        if not hasattr(os, "preadv"):
            return self._fill_by_position(view, offset)
        done = os.preadv(handle, [view], offset)
        while done < len(view):
            more = os.preadv(handle, [view[done:]], offset + done)
            if not more:
                raise OSError(errno.EIO, "it is shorter than it was")
            done += more
        return None

    def _fill_by_position(self, view: memoryview, offset: int) -> None:
        assert self._stream is not None
        with self._turn:  # a file has one position
            self._stream.seek(offset)
            while len(view):
                more = self._stream.readinto(view)
                if not more:
                    raise OSError(errno.EIO, "it is shorter than it was")
                view = view[more:]


def _read_ahead(handle: int, rows: npt.NDArray[np.int64], size: int, superseded: threading.Event) -> None:
    """Ask for rows in pieces, neighbours together, until all are asked for or somebody wants others."""
    try:
        rows = np.unique(rows)
        joints = np.flatnonzero(np.diff(rows) * size > size + _NEAR) + 1
        for begin, end in zip(
            (rows[np.concatenate(([0], joints))] * size).tolist(),
            ((rows[np.concatenate((joints - 1, [len(rows) - 1]))] + 1) * size).tolist(),
            strict=True,
        ):
            for start in range(begin, end, _AHEAD):
                if superseded.is_set():
                    return
                os.posix_fadvise(handle, start, min(_AHEAD, end - start), os.POSIX_FADV_WILLNEED)
    except OSError:  # it was only advice
        return
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Store:
    """A complete store."""

    folder: Path
    plan: Plan
    labels: Labels
    chunks: Mapping[str, tuple[str, ...]]
    """By part, the SHA-256 of each chunk."""
    index: str
    """SHA-256 of the index."""

    @property
    def listing(self) -> str:
        """Digest of the listing it was made from."""
        return self.plan.listing

    def part(self, part: str) -> Stored:
        """Open the images of "train" or "test"."""
        file = self.folder / f"{part}.bin"
        return Stored(file, (self.plan.rows(part), *self.plan.shape), DTYPES[self.plan.dtype], self.index)

    def splits(self) -> Splits:
        """Give the official parts, their images read when they are needed."""
        labels = self.labels
        return Splits(self.part("train"), labels.train, self.part("test"), labels.test, labels.users, labels.test_users)

    def verify(self, told: Callable[[int], None] = lambda rows: None) -> Generator[str]:
        """Read all images and compare them with their checksums.

        Args:
            told: Called with the number of rows that were read, after each chunk.

        Yields:
            A sentence for each chunk that is not what was written.
        """
        for part in PARTS:
            images, chunks = self.part(part), self.plan.chunks(part)
            pool = ThreadPoolExecutor(_AT_ONCE)
            try:
                images._handle()  # which threads would each open
                for chunk, found, expected in zip(
                    chunks, pool.map(partial(_sum, images), chunks), self.chunks[part], strict=True
                ):
                    if found != expected:
                        rows = f"rows {chunk.start:,} to {chunk.stop - 1:,}"
                        yield str(_damaged(self.folder, f"{images.file}, {rows}: not what was written"))
                    told(len(chunk))
            except DataDamaged as error:
                yield str(error)
            finally:
                pool.shutdown(cancel_futures=True)
                images.close()


def _sum(images: Stored, chunk: Chunk) -> str:
    content = images[torch.arange(chunk.start, chunk.stop)].permute(0, 2, 3, 1).contiguous()
    return sha256_of(content.view(torch.uint8).numpy().data)


def find(folder: Path) -> Store | None:
    """Open a store.

    Sizes and the checksums of labels and index are compared at each call, those of the images only by `Store.verify`.

    Returns:
        None if it is not there or not complete.

    Raises:
        DataDamaged: It was complete, and is not what was written.
    """
    file = folder / INDEX
    try:
        content = reading.contents(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, reading.TooLarge) as error:
        raise _damaged(folder, f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    plan, chunks, labels_sum = _read_index(file, content)
    for part in PARTS:
        images, expected = folder / f"{part}.bin", plan.part_bytes(part)
        try:
            size = images.stat().st_size
        except OSError as error:
            raise _damaged(folder, f"{images} cannot be read ({error.strerror})") from error
        if size != expected or not images.is_file():
            raise _damaged(folder, f"{images} has {size:,} bytes instead of {expected:,}")
    return Store(folder, plan, _read_labels(folder / LABELS, labels_sum, plan), chunks, sha256_of(content))


def _read_index(file: Path, content: bytes) -> tuple[Plan, dict[str, tuple[str, ...]], str]:
    try:
        document = json.loads(content)
        own, version = document.pop("sha256"), int(document["format"])
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file.parent, f"{file} is not what was written") from error
    if own != checksum(document):
        raise _damaged(file.parent, f"{file} is not what was written")
    if version > FORMAT:
        later = "a later version of bench wrote it, so update bench"
        raise DataDamaged(f"{file} has format {version}, and this version reads {FORMAT}: {later}")
    if version != FORMAT:
        raise _damaged(file.parent, f"{file} has format {version}, and this version reads {FORMAT}")
    try:
        plan = Plan(**{**document["plan"], "shape": tuple(document["plan"]["shape"])})
        whole = min(plan.train, plan.test) >= 0 and min(plan.chunk, *plan.shape) > 0 and plan.dtype in DTYPES
        chunks = {part: tuple(document["chunks"][part]) for part in PARTS}
        # Divided, and not counted out: of rows there may be said to be any number.
        if not whole or any(len(chunks[part]) != -(-plan.rows(part) // plan.chunk) for part in PARTS):
            raise ValueError("numbers that no store has")
        return plan, chunks, document["labels"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(file.parent, f"{file} is of no store that bench writes ({error})") from error


def _read_labels(file: Path, expected: str, plan: Plan) -> Labels:
    try:
        content = reading.contents(file)
    except (OSError, reading.TooLarge) as error:
        raise _damaged(file.parent, f"{file} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if sha256_of(content) != expected:
        raise _damaged(file.parent, f"{file} is not what was written")
    rows = {"train": plan.train, "users": plan.train, "test": plan.test, "test_users": plan.test}
    try:
        with ZipFile(io.BytesIO(content)) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            columns = {name: torch.from_numpy(npz.read(archive, name)) for name in names}
        if not all(column.shape == (rows[name],) and column.dtype == torch.int64 for name, column in columns.items()):
            raise ValueError("not a label for each image")
        return Labels(**columns)
    except (BadZipFile, ValueError, KeyError, TypeError) as error:
        raise _damaged(file.parent, f"{file} is of no store that bench writes ({error})") from error


def _damaged(folder: Path, what: str) -> DataDamaged:
    return DataDamaged(f"{what}; delete {folder} and prepare the dataset again")


def checksum(document: Mapping[str, Any]) -> str:
    """Give the SHA-256 of a document of JSON's types."""
    return sha256_of(json.dumps(document, sort_keys=True).encode())


def sha256_of(content: bytes | memoryview) -> str:
    """Give the SHA-256 of contiguous bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
