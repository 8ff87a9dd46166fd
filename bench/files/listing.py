"""Which photographs a dataset has: paths, labels and users, known before one photograph is opened."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bench.dataset import Labels


@dataclass(frozen=True)
class Part:
    """The training or the test part of a set of photographs."""

    paths: Sequence[str]
    """(N,) each once, below the listing's folder, with `/`."""
    labels: Tensor
    """(N,) int64, classes 0..C-1."""
    users: Tensor | None = None
    """(N,) int64, natural clients; numbers are common to both parts."""
    sizes: Tensor | None = None
    """(N,) int64, bytes of the files, where files may be replaced under their names (a user's own folder)."""


@dataclass(frozen=True)
class Listing:
    """All photographs of a dataset."""

    folder: Path
    """What the paths are relative to."""
    train: Part
    test: Part

    @property
    def labels(self) -> Labels:
        """What a partition needs to know."""
        return Labels(self.train.labels, self.test.labels, self.train.users, self.test.users)

    def digest(self) -> str:
        """Give the first 16 hexadecimal digits of the SHA-256 over paths, labels, users and sizes, wherever the
        folder is.
        """
        sha = hashlib.sha256()
        for part in (self.train, self.test):
            sha.update("\n".join([str(len(part.paths)), *part.paths]).encode())
            for column in (part.labels, part.users, part.sizes):
                sha.update(b"\nnone" if column is None else b"\n" + column.numpy().astype("<i8").tobytes())
        return sha.hexdigest()[:16]
