"""Which state of a store's images was compared with its checksums, so that it is done once and not for every sweep."""

from __future__ import annotations

import json
from contextlib import closing, suppress
from typing import Any

from bench.dataset import DataDamaged
from bench.files.prepared import PARTS, Store
from bench.system import reading
from bench.system.durable import put

FILE = "compared.json"
"""In the store's folder; where that cannot be written, every sweep compares."""


def require_whole(store: Store) -> None:
    """Make sure that a store's images are what was written: all are read, unless this state of the files was found
    whole before. That takes as long as the disk does, or SHA-256 on four threads: seconds for 10 GB, once.

    Raises:
        DataDamaged: They are not; the message names the first rows, and says what to do.
    """
    state = _state(store)
    if _found_whole(store) == state:
        return
    with closing(store.verify()) as problems:
        for problem in problems:
            raise DataDamaged(problem)
    with suppress(OSError):  # the state before: what was written meanwhile gives another
        put(store.folder / FILE, json.dumps(state).encode())


def _state(store: Store) -> dict[str, Any]:
    """Tell this state of the files from others, as far as the system notes that they were written."""
    stats = {part: (store.folder / f"{part}.bin").stat() for part in PARTS}
    seen = {part: [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for part, stat in stats.items()}
    return {"index": store.index, **seen}


def _found_whole(store: Store) -> object:
    try:
        return json.loads(reading.contents(store.folder / FILE))
    except (OSError, ValueError, RecursionError):
        return None
