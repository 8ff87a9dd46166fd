"""Where runs are executed, here one after the other; and which one is next, wherever they are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from bench.results import records
from bench.results.claims import is_claimed
from bench.sweep.cluster import DEATHS_OF_RAY, RayDied
from bench.sweep.schedule import Schedule
from bench.sweep.watch import Watcher
from bench.training.outcome import Report

if TYPE_CHECKING:
    from bench.sweep.run import Run

Execute = Callable[["Run", Path, Callable[[Report], None] | None], "Failure | None"]
"""What is done with a run: (run, output directory, report) -> why it failed. It writes the run's folder."""

POLL_SECONDS = 0.2
ELSEWHERE_SECONDS = 2.0
"""Between two looks whether another process is still doing a run."""
DEATHS = 3
"""Workers that may die over one round of a run before it is given up."""
GOES_ON = "the run goes on from what was saved"


@dataclass(frozen=True)
class Failure:
    """Why a run has not been finished."""

    reason: str
    """In a sentence."""
    again: Literal["never", "alone", "later", "found", "sent"] = "never"
    """"alone": memory ran out, so that it may end with all of it; "later": another process is doing it; "found": it has
    done it; "sent": its machine lacked the data, which go along now.
    """


class Pool(Protocol):
    """A way to get runs done."""

    def __call__(self, schedule: Schedule, out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute the runs of a schedule and tell the watcher; one that fails does not keep the others."""


class InProcess:
    """Runs one after the other, here."""

    def __call__(self, schedule: Schedule, out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute all runs.

        Raises:
            RayDied: Ray did, again and again, where it had been started for the other processes of runs.
        """
        queue, deaths = Queue(schedule, out, watcher), 0
        while not queue.is_over():
            run = queue.take(lambda run: True)
            if run is None:
                time.sleep(POLL_SECONDS)
                continue
            watcher.started(run)
            try:
                failure = attempt(execute, run, out, partial(watcher.progressed, run))
            except RayDied as error:
                deaths += 1
                queue.wait(run, f"{error}; {GOES_ON}")
                if deaths > DEATHS_OF_RAY:
                    raise
                continue
            if failure is not None and failure.again in ("later", "found"):
                queue.again(run, failure)
            else:
                watcher.ended(run, None if failure is None else failure.reason)


class Queue:
    """The runs that have not begun or begin again: what is next, and what another process is doing meanwhile."""

    def __init__(self, schedule: Schedule, out: Path, watcher: Watcher) -> None:
        self.schedule, self.out, self.watcher = schedule, out, watcher
        self.alone: set[str] = set()
        """Runs that begin only when nothing else is running."""
        self.elsewhere: list[Run] = []
        self._anew = {run.id for run in schedule if self._is_done(run)}
        """Runs that were done before, and are to be done again."""
        self._looked = time.monotonic()
        self._deaths: Counter[str] = Counter()
        self._rounds: dict[str, int] = {}

    def take(self, fits: Callable[[Run], bool]) -> Run | None:
        """Give the next run that fits and that nobody else is doing."""
        self._look_elsewhere()
        while (run := self.schedule.take(fits)) is not None:
            if self.has_been_done(run):
                self.find(run)
            elif is_claimed(self.out / run.id):
                self.wait_for_another(run)
            else:
                return run
        return None

    def has_been_done(self, run: Run) -> bool:
        """Tell whether another process has done a run since the sweep began."""
        return run.id not in self._anew and self._is_done(run)

    def is_over(self) -> bool:
        """Tell whether no run will begin any more."""
        return self.schedule.exhausted() and not self.elsewhere

    def wait_for_another(self, run: Run) -> None:
        """Set a run aside while another process is doing it; what that leaves will be found then."""
        self.watcher.retried(run, "another process is doing it")
        self.elsewhere.append(run)

    def find(self, run: Run) -> None:
        """Tell that another process has done a run."""
        self.watcher.found(run, records.read(self.out / run.id).metrics)

    def again(self, run: Run, failure: Failure) -> bool:
        """Have a run wait again whose worker had no memory left, not if it had all there is; see what another process
        is doing or has done.
        """
        if failure.again == "found":
            self.find(run)
            return True
        if failure.again == "later":
            self.wait_for_another(run)
            return True
        if failure.again == "sent":
            self.wait(run, failure.reason)
            return True
        if failure.again == "never" or run.id in self.alone:
            return False
        self.alone.add(run.id)
        self.wait(run, f"{failure.reason}; it will go on alone")
        return True

    def wait(self, run: Run, why: str) -> None:
        """Have a run wait again for a reason that is not its own."""
        self.watcher.retried(run, why)
        self.schedule.put_back(run)

    def survives(self, run: Run, reason: str, completed: int) -> bool:
        """Have a run wait again whose worker died; not if too many have died since it last got on.

        Args:
            run: Which.
            reason: How the worker died.
            completed: Rounds that the run has completed.
        """
        if completed > self._rounds.get(run.id, 0):
            self._deaths[run.id] = 0
        self._rounds[run.id] = completed
        self._deaths[run.id] += 1
        if self._deaths[run.id] >= DEATHS:
            return False
        self.wait(run, f"{reason}; another one will go on")
        return True

    def _is_done(self, run: Run) -> bool:
        """Tell whether there is a result; one that is damaged is for who does the run."""
        try:
            return records.status(self.out, run.id) == "done"
        except records.DamagedResult:
            return False

    def _look_elsewhere(self) -> None:
        now = time.monotonic()
        if not self.elsewhere or now - self._looked < ELSEWHERE_SECONDS:
            return
        self._looked = now
        for run in [run for run in self.elsewhere if not is_claimed(self.out / run.id)]:
            self.elsewhere.remove(run)
            self.schedule.put_back(run)


def attempt(execute: Execute, run: Run, out: Path, report: Callable[[Report], None] | None) -> Failure | None:
    """Execute a run; give why it failed, in its folder or before it could be written."""
    try:
        return execute(run, out, report)
    except OSError as error:  # its folder cannot be written, so nothing is recorded there
        return Failure(str(error))
