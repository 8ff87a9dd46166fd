"""Somebody's own photographs, prepared before they are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.face.bar import Bar

if TYPE_CHECKING:
    from bench.dataset import Dataset


def prepare_own(datasets: Iterable[Dataset], root: Path) -> None:
    """Prepare what is somebody's own and small, before it is read; errors of `at_once.prepare_few`."""
    from bench.preparing.at_once import prepare_few

    with Bar("images") as bar:
        prepare_few(datasets, root, bar)
