"""This very package, as other machines of a cluster are given it, whether it is a checkout or installed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bench
import bench.algorithms
import bench.datasets

_LEFT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


@contextmanager
def staged() -> Iterator[Path]:
    """Give a folder `bench` with the whole package; in a checkout its plug-ins lie beside it, here they lie inside.

    Ray sends it to a machine once, and knows it there by what it holds.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "bench"
        for module, place in ((bench, package), (bench.algorithms, "algorithms"), (bench.datasets, "datasets")):
            for source in reversed(list(module.__path__)):
                shutil.copytree(source, package / place, ignore=_LEFT, dirs_exist_ok=True)
        yield package
