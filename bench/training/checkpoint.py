"""The file that an unfinished run goes on from: what was written there, or nothing.

    bench checkpoint 2          a line that says how it is written
    SHA-256                     32 bytes, of all that follows
    what was saved              as `torch.save` writes it

torch does not compare the checksums of what it reads, and pickles of other content are other content: nothing is read
before the digest is right, and then only what has the form of a run's state is taken up.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from bench import tree
from bench.system import durable
from bench.tree import Tree

DAMAGED = "is damaged"
_FORMAT = b"bench checkpoint 2\n"
_EARLIER = b"PK"
"""Begins the files of earlier versions: the bare archive of `torch.save`, without a digest."""
_DIGEST_BYTES = hashlib.sha256().digest_size


class Unfit(Exception):
    """A checkpoint cannot be gone on from; the message completes "the checkpoint of this run ..."."""


def save(file: Path, saved: Mapping[str, Any]) -> None:
    """Write a checkpoint; when this returns it survives a loss of power, and until then the one before does.

    Args:
        file: Where to; its folder is made.
        saved: Tensors, numbers, texts, and lists and dictionaries of them.

    Raises:
        OSError, RuntimeError: It cannot be written; the latter is what torch says of a full disk.
    """

    def write(stream: BinaryIO) -> None:
        hashed = _Hashed(stream)
        stream.write(_FORMAT + bytes(_DIGEST_BYTES))
        torch.save(saved, cast("BinaryIO", hashed))  # which needs `write` alone
        stream.seek(len(_FORMAT))
        stream.write(hashed.sha256.digest())

    file.parent.mkdir(parents=True, exist_ok=True)
    durable.put(file, write)
    durable.flush(file.parent)


def load(file: Path, device: str) -> dict[str, Any]:
    """Read what was saved.

    Args:
        file: Must be there.
        device: Where tensors go.

    Raises:
        Unfit: It is of another format, or not what was written. Whatever else is raised means the same.
        MemoryError: There is not enough for it.
    """
    with open(file, "rb", opener=_open) as stream:
        form = stream.read(len(_FORMAT))
        if form != _FORMAT:
            raise Unfit("is of an earlier version" if form.startswith(_EARLIER) else DAMAGED)
        wanted = stream.read(_DIGEST_BYTES)
        begin = stream.tell()
        if hashlib.file_digest(stream, "sha256").digest() != wanted:
            raise Unfit(DAMAGED)
        stream.seek(begin)
        saved: dict[str, Any] = torch.load(stream, map_location=device, weights_only=True)
        return saved


def require(fit: bool) -> None:
    """Take a checkpoint for damaged where something is not as a run leaves it."""
    if not fit:
        raise Unfit(DAMAGED)


def is_like(found: Tree, wanted: Tree) -> bool:
    """Tell whether a tree has another's paths, shapes and dtypes."""
    leaves, others = tree.flatten(found), tree.flatten(wanted)
    return leaves.keys() == others.keys() and all(
        isinstance(leaf, Tensor) and (leaf.shape, leaf.dtype) == (others[path].shape, others[path].dtype)
        for path, leaf in leaves.items()
    )


def are_numbers(found: Mapping[str, Any]) -> bool:
    """Tell whether all values are finite numbers, by name."""
    return all(type(name) is str and type(n) in (int, float) and math.isfinite(n) for name, n in found.items())


class _Hashed:
    """A stream that hashes what goes through it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self._write: Callable[[Any], int] = stream.write
        self.flush = stream.flush

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return self._write(content)


def _open(path: str, flags: int) -> int:
    """Open a file that is no link, whose content is somebody else's; and wait for nobody at the end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
