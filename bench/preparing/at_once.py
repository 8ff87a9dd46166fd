"""One's own photographs, where they are few: prepared when something first needs them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.dataset import DataDamaged, Dataset
from bench.files.photographs import Photographs
from bench.files.prepared import find
from bench.plugins.registry import label

if TYPE_CHECKING:
    from bench.preparing.preparation import Progress

MOST = 10_000
"""Photographs that are prepared without being asked for: a minute or two on one core."""


def prepare_few(datasets: Iterable[Dataset], root: Path, progress: Progress) -> None:
    """Prepare those of the datasets that are somebody's own photographs, are at most `MOST` and are not prepared as
    they are now. Of larger ones `Dataset.require` says what to do.

    Args:
        datasets: That will be read; of other kinds nothing is done.
        root: The data root; nothing is done for a pack.
        progress: Told what is done.

    Raises:
        DataMissing: There are none. DataDamaged: Some cannot be decoded. StoreUnwritable: There is no space.
    """
    for dataset in dict.fromkeys(datasets):
        if root.is_file() or not isinstance(dataset, Photographs) or not dataset.mutable:
            continue
        listing = dataset.listing(root)
        number = len(listing.train.paths) + len(listing.test.paths)
        if number > MOST or _is_prepared(dataset, root, listing.digest()):
            continue
        progress.say(f"{label(dataset)}: {number:,} photographs are few, and are prepared now; that is done once")
        from bench.preparing.preparation import prepare

        done = prepare(dataset, root, None, progress)
        if done.store is None:
            raise DataDamaged(done.complaint(label(dataset)))


def _is_prepared(dataset: Photographs, root: Path, digest: str) -> bool:
    try:
        store = find(dataset.store(root))
    except DataDamaged:
        return False
    return store is not None and store.listing == digest
