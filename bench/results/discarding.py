"""Removing stored runs, so that no half of one is ever taken for a result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable

from bench.results.claims import Claimed, claim
from bench.results.record import DOCUMENT, Record, stored
from bench.results.storage import OutputUnwritable


def size(record: Record) -> int:
    """Give the bytes of a run's folder."""
    return sum(file.stat().st_size for file in record.folder.rglob("*") if file.is_file())


def discard(records: Iterable[Record]) -> list[str]:
    """Remove the folders of finished and failed runs.

    Returns:
        Ids of those that another process is doing, or has done since they were read: they stay.

    Raises:
        OutputUnwritable: A folder cannot be removed.
    """
    kept = []
    for record in records:
        try:
            with claim(record.folder):
                if json.loads(stored(record.folder)) != record.document:
                    kept.append(record.id)
                    continue
                (record.folder / DOCUMENT).unlink()  # first: a folder without it is unfinished, and none is damaged
                shutil.rmtree(record.folder)
        except Claimed:
            kept.append(record.id)
        except FileNotFoundError:  # somebody else has removed it
            continue
        except (OSError, ValueError) as error:
            raise OutputUnwritable(f"{record.folder} cannot be removed: {error}") from error
    return kept
