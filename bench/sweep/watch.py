"""How news of runs travel: from a worker, through a file beside its results, to whoever watches the sweep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bench.training.outcome import Report

if TYPE_CHECKING:
    from bench.sweep.run import Run


PROGRESS = "progress.jsonl"
"""In the folder of a run that is not finished."""


class Watcher(Protocol):
    """Somebody who is told what happens in a sweep, always by the driver's main thread, which waits."""

    def begin(self, runs: Sequence[Run], cached: Sequence[Run]) -> None:
        """Learn which runs are to be computed, and which are there."""

    def started(self, run: Run) -> None:
        """Learn that a worker has taken a run."""

    def progressed(self, run: Run, report: Report) -> None:
        """Learn of a round, or that the run begins anew although it has a checkpoint."""

    def retried(self, run: Run, reason: str) -> None:
        """Learn that a run waits (again), and in a sentence why; it may not have been started."""

    def found(self, run: Run, metrics: Mapping[str, float | None]) -> None:
        """Learn that another process has done a run since the sweep began, and what came out."""

    def ended(self, run: Run, reason: str | None) -> None:
        """Learn that a run's folder is complete, or in a sentence why it failed."""


def progress_file(out: Path, run: Run) -> Path:
    """Give where a run's worker writes one JSON line a round, while it is not finished."""
    return out / run.id / PROGRESS


def append(file: Path, report: Report) -> None:
    """Add a report to a progress file."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(report)) + "\n")


class Tail:
    """Reads what has been appended to a progress file since the last look.

    Args:
        file: Need not be there yet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.position = 0
        self.first = b""

    def read(self) -> list[Report]:
        """Give the new reports; a line that is still being written waits for the next look."""
        try:
            with self.file.open("rb") as stream:
                if (first := stream.readline()) != self.first:  # begun anew by another worker: the seconds differ
                    self.position, self.first = 0, first
                stream.seek(self.position)
                content = stream.read()
        except FileNotFoundError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self.position += len(complete)
        return list(_reports(complete))


def _reports(lines: bytes) -> Iterator[Report]:
    """Give the reports of whole lines; what a loss of power has made of some tells nothing."""
    for line in lines.splitlines():
        with suppress(ValueError, TypeError):
            yield Report(**json.loads(line))
