"""A subset of a dataset in one file, for machines without a network: `bench data pack`, then `--data-root pack.npz`.

    header.npy      JSON: what was packed, and the shape, type and SHA-256 of each array
    train_y.npy     labels of the whole official training part, hence also users.npy, if there are any
    held.npy        the official rows whose images are here, ascending
    train_x.npy     those images
    test_x.npy, test_y.npy, test_users.npy      the whole test part

All labels are there, so that splits and their fingerprints are those of the official files. It is an npz file, which
NumPy opens as well, and is not compressed: photographs hardly shrink, and images can be read from it by rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from bench.dataset import DataDamaged, DataMissing, Dataset, Labels, Splits, Streamed
from bench.files import npz
from bench.plugins.registry import label, name, source_digest
from bench.system import durable

FORMAT = 1
_PIECE = 1 << 24
"""Bytes of images held at a time while packing."""
_TYPES = {torch.int64: "<i8", torch.uint8: "|u1", torch.float16: "<f2", torch.float32: "<f4"}
_TENSORS = {descr: dtype for dtype, descr in _TYPES.items()}


@dataclass(frozen=True)
class Pack:
    """What the header of a pack says."""

    path: Path
    header: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 over the header, and so over all that was packed."""
        return _fingerprint(self.header)

    def __str__(self) -> str:
        """Say what it holds: "cifar10, exponential imbalance 100: 12,406 of 50,000 training images"."""
        arrays = self.header["arrays"]
        held, everything = arrays["held"]["shape"][0], arrays["train_y"]["shape"][0]
        tail = "" if self.header["imbalance"] is None else f"{self.header['profile']} imbalance "
        tail += "whole" if self.header["imbalance"] is None else f"{self.header['imbalance']:g}"
        return f"{self.header['label']}, {tail}: {held:,} of {everything:,} training images"


def write(path: Path, dataset: Dataset, splits: Splits, rows: Tensor, profile: str, imbalance: float | None) -> Pack:
    """Write a pack, whole or not at all. The same inputs give the same bytes.

    Args:
        path: Of the pack; replaced if it is there.
        dataset: Which the splits were loaded from.
        splits: Official parts; streamed images are copied by slices.
        rows: (n,) int64, official training rows to pack, in any order.
        profile: Shape of the long tail that the rows are, for messages.
        imbalance: Its factor; None if the rows are the whole training part.

    Raises:
        DataMissing: The splits are of a pack themselves and do not hold all rows.
        OSError: It cannot be written.
    """
    rows = rows.sort().values
    held = torch.arange(len(splits.train_y)) if splits.held is None else splits.held
    if not torch.isin(rows, held).all():
        raise DataMissing(f"{name(dataset)}: not all images of that subset are here; pack from the official files")
    contents: list[tuple[str, Tensor | Streamed | None, Tensor | None]] = [
        ("train_y", splits.train_y, None),
        ("test_y", splits.test_y, None),
        ("users", splits.users, None),
        ("test_users", splits.test_users, None),
        ("held", rows, None),
        ("train_x", splits.train_x, torch.searchsorted(held, rows)),
        ("test_x", splits.test_x, None),
    ]
    header = {
        "format": FORMAT,
        "dataset": _describe(dataset),
        "label": label(dataset),
        "profile": profile,
        "imbalance": imbalance,
        "streamed": not isinstance(splits.train_x, Tensor),
    }

    def put(stream: IO[bytes]) -> None:
        with ZipFile(stream, "w") as archive:
            header["arrays"] = {
                key: _put(archive, key, values, chosen) for key, values, chosen in contents if values is not None
            }
            header["fingerprint"] = _fingerprint(header)
            text = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
            _put(archive, "header", text, None)

    path.parent.mkdir(parents=True, exist_ok=True)
    durable.put(path, put)
    durable.flush(path.parent)
    return Pack(path, header)


def _put(archive: ZipFile, key: str, values: Tensor | Streamed, rows: Tensor | None) -> dict[str, Any]:
    """Write rows of an array piece by piece, and describe it."""
    rows = torch.arange(len(values)) if rows is None else rows
    shape = (len(rows), *values.shape[1:])
    descr, sha = _TYPES[values.dtype], hashlib.sha256()
    step = max(_PIECE // max(int(np.prod(shape[1:])) * values.dtype.itemsize, 1), 1)
    # A date of its own would make two packs of the same data differ.
    with archive.open(ZipInfo(f"{key}.npy"), "w", force_zip64=True) as file:
        npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        for chosen in rows.split(step):
            piece = values[chosen].contiguous().numpy().astype(descr, copy=False).tobytes()
            sha.update(piece)
            file.write(piece)
    return {"shape": list(shape), "dtype": descr, "sha256": sha.hexdigest()}


# Reading ----------------------------------------------------------------------------------------------------


def load(path: Path, dataset: Dataset) -> Splits:
    """Read a pack, and compare it with its checksums.

    Returns:
        Splits with `held`; images stay in the file if they were streamed when they were packed.

    Raises:
        DataMissing: It is a pack of something else.
        DataDamaged: It is no pack, or not what was written.
    """
    with _opened(path) as (archive, pack):
        _require_same(pack, dataset)
        tensors = {key: _read(archive, pack, key) for key in pack.header["arrays"] if not key.endswith("_x")}
        images = _stream if pack.header["streamed"] else _read
        return Splits(
            train_x=images(archive, pack, "train_x"),
            train_y=tensors["train_y"],
            test_x=images(archive, pack, "test_x"),
            test_y=tensors["test_y"],
            users=tensors.get("users"),
            test_users=tensors.get("test_users"),
            held=tensors["held"],
        )


def labels(path: Path, dataset: Dataset) -> Labels:
    """Read the labels and users of the whole official parts; same errors as `load`."""
    with _opened(path) as (archive, pack):
        _require_same(pack, dataset)
        present = pack.header["arrays"]
        keys = ("train_y", "test_y", "users", "test_users")
        train, test, users, test_users = (_read(archive, pack, key) if key in present else None for key in keys)
        assert train is not None and test is not None
        return Labels(train, test, users, test_users)


def require(path: Path, clients: Sequence[Tensor]) -> None:
    """Make sure that a pack holds the images of a split.

    Args:
        path: Of the pack.
        clients: Official training rows of each client.

    Raises:
        DataMissing: It does not; the message says what it holds.
        DataDamaged: It is no pack, or not what was written.
    """
    with _opened(path) as (archive, pack):
        held = _read(archive, pack, "held")
    wanted = torch.cat([held[:0], *clients])  # no client at all is possible
    lacking = int((~torch.isin(wanted, held)).sum())
    if lacking:
        raise DataMissing(
            f"{path} lacks {lacking:,} images of this run: it holds {pack}; ask for the same profile and at least that "
            "imbalance, or pack what you need with 'bench data pack'"
        )


def verify(path: Path) -> None:
    """Compare all of a pack with its checksums, piece by piece.

    Raises:
        DataDamaged: It is no pack, or not what was written.
    """
    with _opened(path) as (archive, pack):
        for key, expected in pack.header["arrays"].items():
            sha, start = hashlib.sha256(), npz.header(archive, key).start
            with archive.open(f"{key}.npy") as member:
                member.read(start)
                while piece := member.read(_PIECE):
                    sha.update(piece)
            if sha.hexdigest() != expected["sha256"]:
                raise ValueError(f"the checksum of {key} is wrong")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[ZipFile, Pack]]:
    try:
        with npz.opened(path) as archive:
            header = json.loads(npz.read(archive, "header").tobytes())
            if header["format"] != FORMAT:
                raise DataDamaged(f"{path} is a pack of format {header['format']}, and this version reads {FORMAT}")
            if header["fingerprint"] != _fingerprint(header):
                raise ValueError("its header is not what was written")
            yield archive, Pack(path, header)
    except (DataMissing, DataDamaged, MemoryError):
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise DataDamaged(
            f"{path} is not a file of 'bench data pack', or a damaged one ({error}); copy it or pack it again"
        ) from error


def _read(archive: ZipFile, pack: Pack, key: str) -> Tensor:
    """Read an array into memory."""
    expected = pack.header["arrays"][key]
    array = npz.read(archive, key)
    if list(array.shape) != expected["shape"] or array.dtype.str != expected["dtype"]:
        raise ValueError(f"{key} has another shape or type")
    if hashlib.sha256(array.data.cast("B") if array.size else b"").hexdigest() != expected["sha256"]:
        raise ValueError(f"the checksum of {key} is wrong")
    return torch.from_numpy(array)


def _stream(archive: ZipFile, pack: Pack, key: str) -> Streamed:
    """Open an array whose rows are read when they are needed."""
    expected = pack.header["arrays"][key]
    info, header = archive.getinfo(f"{key}.npy"), npz.header(archive, key)
    shape, dtype = header.shape, header.dtype
    if list(shape) != expected["shape"] or dtype.str != expected["dtype"] or info.compress_type != 0:
        raise ValueError(f"{key} has another shape or type")
    with pack.path.open("rb") as file:
        file.seek(info.header_offset + 26)
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + header.start
        file.seek(offset)
        sha, left = hashlib.sha256(), int(np.prod(shape)) * dtype.itemsize
        while left and (piece := file.read(min(left, _PIECE))):
            sha.update(piece)
            left -= len(piece)
        if sha.hexdigest() != expected["sha256"]:
            raise ValueError(f"the checksum of {key} is wrong")
        return Packed(pack.path, offset, tuple(shape), _TENSORS[expected["dtype"]], _stamp(file))


class Packed:
    """Images of a pack, as a `bench.dataset.Streamed`: rows are read from the file when they are asked for.

    Args:
        path: Of the pack.
        offset: Where in it the first row begins, in bytes.
        shape: (N, channels, height, width).
        dtype: Of the elements.
        stamp: Of the file when its checksum was compared.
    """

    def __init__(
        self, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, stamp: tuple[int, ...]
    ) -> None:
        self.path, self.offset, self.shape, self.dtype, self.stamp = path, offset, shape, dtype, stamp

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        content = torch.empty(len(rows) * size, dtype=torch.uint8)
        view = content.numpy().data
        with self.path.open("rb", buffering=0) as file:
            if _stamp(file) != self.stamp:
                raise DataDamaged(f"{self.path} was replaced while it was in use; start again")
            for place, row in enumerate(rows.tolist()):
                file.seek(self.offset + row * size)
                if file.readinto(view[place * size : (place + 1) * size]) != size:
                    raise DataDamaged(f"{self.path} was cut short while it was in use; copy it again")
        return content.view(self.dtype).view(len(rows), *self.shape[1:])

    def prefetch(self, rows: Tensor) -> None:
        """Do nothing: the system's own reading ahead has to do."""


def _stamp(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


# What was packed --------------------------------------------------------------------------------------------


def _describe(dataset: Dataset) -> dict[str, Any]:
    """Give all that tells this dataset's images from others, as JSON has it."""
    described = {
        "name": name(dataset),
        "revision": dataset.revision,
        "fields": dataset.identity(),
        "source": source_digest(type(dataset)),
    }
    return json.loads(json.dumps(described))  # type: ignore[no-any-return]


def _require_same(pack: Pack, dataset: Dataset) -> None:
    packed, asked = pack.header["dataset"], _describe(dataset)
    if packed == asked:
        return
    if (packed["name"], packed["fields"]) != (asked["name"], asked["fields"]):
        raise DataMissing(
            f"{pack.path} holds {pack}, and not {label(dataset)}; choose that dataset, or pack this one with "
            "'bench data pack'"
        )
    raise DataMissing(f"{pack.path} was made by another revision of {asked['name']}; pack it again")


def _fingerprint(header: dict[str, Any]) -> str:
    content = {key: value for key, value in header.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
