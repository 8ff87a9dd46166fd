"""In which order runs begin, and which no longer do: longest first, and nothing that would end after the time is up."""

from __future__ import annotations

import heapq
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from bench.protocol.identity import identify

if TYPE_CHECKING:
    from bench.sweep.run import Run

_DURATION = re.compile(r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s)?")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take."""

    seconds: float
    """Wall time from loading its data to writing its result."""
    peak_bytes: float | None
    """Resident memory of its process (CPU) or its tensors on the GPU, at the highest; None where nobody measured it."""
    how: Literal["measured", "probed"]
    """"measured": the mean of finished runs that differ in the seed only. "probed": from a few rounds."""


def cell(run: Run) -> str:
    """Give 12 hexadecimal digits of what a run's time and memory depend on: all of its identity but the seed, and how
    many processes do it.
    """
    algorithm = run.identity()["algorithm"]
    return cell_of(algorithm, run.protocol, run.engine, run.precision, run.device, run.workers)


def cell_of(algorithm: object, protocol: str, engine: str, precision: str, device: str, workers: int) -> str:
    """Give the same from the parts of a stored result."""
    return identify(
        {
            "algorithm": algorithm,
            "protocol": protocol,
            "engine": engine,
            "precision": precision,
            "device": device,
            "workers": workers,
        }
    )


_LONGEST = 10 * 365 * 24 * 3600.0


def parse_duration(text: str, option: str) -> float:
    """Read a duration such as 90m, 2h, 45s or 1h30m, in seconds.

    Args:
        text: As typed.
        option: Where, for the message.

    Raises:
        BadConfig: It is not written so, or nothing is left of it.
    """
    match = _DURATION.fullmatch(text.replace(" ", "").lower())
    hours, minutes, seconds = (float(part or 0) for part in match.group("h", "m", "s")) if match else (0.0, 0.0, 0.0)
    total = 3600 * hours + 60 * minutes + seconds
    if not 0 < total <= _LONGEST:
        from bench.protocol.settings import (
            BadConfig,  # torch comes with it, and people who look at a sweep do not wait for that
        )

        raise BadConfig(
            f"{option} {text!r}: a duration above zero is wanted, such as 45s, 90m, 2h or 1h30m, ten years at most"
        )
    return total


class Budget:
    """Time that a sweep may take, from now on.

    Args:
        seconds: How much.
        clock: Gives seconds; tests have their own.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Give the seconds that are left; below zero when the time is over."""
        return self._end - self._clock()


class Schedule:
    """The runs of a sweep that have not begun: whoever has room takes the next.

    The longest comes first, so that none is left to run alone at the end. Runs of which nothing is known come before
    the others, in the order given: when the first seed of a cell has ended, the other seeds are known.

    Args:
        runs: What is to be done.
        forecasts: By a run's id, as far as they are known.
        budget: None: all the time in the world.
    """

    def __init__(
        self, runs: Sequence[Run], forecasts: Mapping[str, Forecast] | None = None, budget: Budget | None = None
    ) -> None:
        self.forecasts = dict(forecasts or {})
        """By a run's id; grows as runs end."""
        self.budget = budget
        self._waiting = list(runs)
        self._cells = {run.id: cell(run) for run in runs}
        self._learnt: dict[str, list[Forecast]] = {}

    def __iter__(self) -> Iterator[Run]:
        """Give the runs that have not begun, in time or not."""
        return iter(list(self._waiting))

    def __len__(self) -> int:
        """Count them."""
        return len(self._waiting)

    def take(self, fits: Callable[[Run], bool] = lambda run: True) -> Run | None:
        """Give the next run, which is then the caller's to do; None if there is none that ends in time and fits.

        Args:
            fits: Tells whether there is room for a run now; one for which there is none stays.
        """
        for run in order(self._waiting, self.forecasts):
            if self._ends_in_time(run) and fits(run):
                self._waiting.remove(run)
                return run
        return None

    def put_back(self, run: Run) -> None:
        """Have a run wait again, which was taken and has to be tried anew."""
        self._waiting.insert(0, run)

    def exhausted(self) -> bool:
        """Tell whether no waiting run can still begin, however much room there is."""
        return not any(self._ends_in_time(run) for run in self._waiting)

    @property
    def left_out(self) -> list[Run]:
        """The runs that wait and would not end in time, in the order given."""
        return [run for run in self._waiting if not self._ends_in_time(run)]

    def learn(self, run: Run, seconds: float, peak_bytes: float | None = None) -> None:
        """Note what a finished run took: the other seeds of its cell will take as much.

        Args:
            run: One of the runs given at the start.
            seconds: Wall time.
            peak_bytes: Memory at its highest, if somebody measured it.
        """
        of_cell = self._learnt.setdefault(self._cells[run.id], [])
        of_cell.append(Forecast(seconds=seconds, peak_bytes=peak_bytes, how="measured"))
        mean = average(of_cell)
        for other in self._waiting:
            if self._cells[other.id] == self._cells[run.id]:
                self.forecasts[other.id] = mean

    def _ends_in_time(self, run: Run) -> bool:
        """Tell whether a run that began now would end in time; of one that nobody knows, whether any is left."""
        if self.budget is None:
            return True
        known = self.forecasts.get(run.id)
        return self.budget.left() > (0.0 if known is None else known.seconds)


def order(runs: Iterable[Run], forecasts: Mapping[str, Forecast]) -> list[Run]:
    """Sort runs: those of unknown length, then the longest first; ties keep their order."""
    return sorted(runs, key=lambda run: -forecasts[run.id].seconds if run.id in forecasts else -math.inf)


def average(forecasts: Sequence[Forecast]) -> Forecast:
    """Give the mean time and the highest memory of at least one forecast."""
    peaks = [forecast.peak_bytes for forecast in forecasts if forecast.peak_bytes is not None]
    seconds = fmean(forecast.seconds for forecast in forecasts)
    return Forecast(seconds=seconds, peak_bytes=max(peaks, default=None), how=forecasts[0].how)


def wall_seconds(waiting: Sequence[float], jobs: int, running: Sequence[float] = ()) -> float:
    """Give when the last run ends if each begins, in the order given, as soon as a place is free.

    Args:
        waiting: Seconds of the runs that have not begun.
        jobs: Places, at least one.
        running: Seconds that the runs which have begun still take.
    """
    ends = [*sorted(running), *([0.0] * (jobs - len(running)))]
    heapq.heapify(ends)
    for seconds in waiting:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


@dataclass
class _Going:
    """A run that has begun."""

    since: float
    """When this was known: at its start, and at each report."""
    left: float | None = None
    """Seconds that it needed then; None before its second round, for the first also warms up."""
    total: float | None = None


class Outlook:
    """When a sweep that is going on will have ended, from what its runs have taken so far and are forecast to take.

    Args:
        cells: Of all runs, by id, in the order in which they may begin.
        known: Seconds that runs are forecast to take, by id, as far as somebody has said.
    """

    def __init__(self, cells: Mapping[str, str], known: Mapping[str, float] | None = None) -> None:
        self._cells, self._known = dict(cells), dict(known or {})
        self._waiting = dict.fromkeys(cells)
        self._going: dict[str, _Going] = {}
        self._taken: dict[str, list[float]] = {}
        self._places = 1

    def started(self, run_id: str, now: float) -> None:
        """Learn that a run has begun, or begun again."""
        self._waiting.pop(run_id, None)
        self._going[run_id] = _Going(now)
        self._places = max(self._places, len(self._going))

    def progressed(self, run_id: str, completed: int, rounds: int, seconds: float, now: float) -> None:
        """Learn how far a run is: so many rounds in so many seconds."""
        if completed > 1 and run_id in self._going:
            total = seconds / completed * rounds
            self._going[run_id] = _Going(now, total - seconds, total)

    def waits(self, run_id: str) -> None:
        """Learn that a run which had begun will begin anew."""
        self._going.pop(run_id, None)
        self._waiting[run_id] = None

    def ended(self, run_id: str, seconds: float | None) -> None:
        """Learn that a run has ended, and what it took in all; None if it failed, which says nothing of others."""
        self._waiting.pop(run_id, None)
        self._going.pop(run_id, None)
        if seconds is not None:
            self._taken.setdefault(self._cells[run_id], []).append(seconds)

    def left_of(self, run_id: str, now: float) -> float | None:
        """Give the seconds that a run which has begun still takes; None if nothing is known of it."""
        going = self._going.get(run_id)
        if going is None:
            return None
        needs = going.left if going.left is not None else self._expected(run_id, self._usual())
        return None if needs is None else max(needs - (now - going.since), 0.0)

    def left(self, now: float) -> float | None:
        """Give the seconds until the last run has ended; None while nothing is known of any."""
        usual = self._usual()
        if usual is None:
            return None if self._waiting or self._going else 0.0
        waiting = sorted((self._expected(run_id, usual) or usual for run_id in self._waiting), reverse=True)
        running = [self.left_of(run_id, now) or 0.0 for run_id in self._going]
        return wall_seconds(waiting, self._places, running)

    def _expected(self, run_id: str, usual: float | None) -> float | None:
        """Guess what a run takes in all: what its cell took, what was forecast, what others of its cell are taking,
        what runs usually take.
        """
        cell = self._cells[run_id]
        if cell in self._taken:
            return fmean(self._taken[cell])
        if run_id in self._known:
            return self._known[run_id]
        taking = [going.total for other, going in self._going.items() if self._cells[other] == cell and going.total]
        return fmean(taking) if taking else usual

    def _usual(self) -> float | None:
        """Give the mean of all that is known; None if nothing is."""
        taken = [seconds for several in self._taken.values() for seconds in several]
        taking = [going.total for going in self._going.values() if going.total is not None]
        forecast = [self._known[run_id] for run_id in (*self._waiting, *self._going) if run_id in self._known]
        known = taken + taking or forecast
        return fmean(known) if known else None
