"""Data on disk: where it lies, how it is downloaded, listed, decoded once and read back."""

from __future__ import annotations

import os
from pathlib import Path


def data_root(option: Path | None = None) -> Path:
    """Choose the folder of all datasets: the option, else $BENCH_DATA, else `bench` in the user's cache."""
    if option is not None:
        return option.expanduser()
    if os.environ.get("BENCH_DATA"):
        return Path(os.environ["BENCH_DATA"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "bench"
