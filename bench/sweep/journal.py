"""What a driver is doing, for those who look from elsewhere: OUT/sweeps/<pid>-<start>.json.

The driver of a sweep writes there which runs it is to do and how they stand. Rounds are not noted, a run's own progress
file has them. The file of a driver that was killed stays and says what was left to do.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval

from bench.sweep.schedule import Forecast, cell
from bench.system import reading
from bench.system.durable import put

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from bench.sweep.run import Run
    from bench.training.outcome import Report

FOLDER = "sweeps"
_FORMAT = 1
_SIGN_OF_LIFE_SECONDS = 5.0
_MOST_BYTES = 64 << 20
"""Of a driver's file: 400 bytes a run."""

Moment = Annotated[float, Interval(ge=0, le=10**11)]
State = Literal["waiting", "running", "done", "failed", "cached"]


@dataclass
class Entry:
    """A run of a sweep."""

    title: str
    cell: str
    """Hash of what its time depends on, see `bench.sweep.schedule.cell`."""
    rounds: int
    forecast: float | None = None
    """Seconds."""
    state: State = "waiting"
    began: float | None = None
    """When it began last, in seconds since 1970; so for `ended`."""
    ended: float | None = None
    seconds: float | None = None
    """What it took in all, if it has ended well and this driver's workers did it."""
    starts: int = 0
    """How often a worker has taken it."""
    reason: str | None = None
    """Why it failed, in a sentence; while it waits or runs again, why it had to."""


@dataclass(kw_only=True)
class Sweep:
    """A driver and its runs."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    pid: Annotated[int, Interval(ge=1, lt=2**31)]
    host: str
    born: str | None
    """What tells this process from a later one of the same number; None on systems that do not say."""
    began: Moment
    """In seconds since 1970."""
    ended: Moment | None = None
    """None while it is at work, and for ever if it was killed."""
    command: str
    """As it can be typed again."""
    runs: dict[str, Entry] = field(default_factory=dict)
    """By id."""

    @property
    def fate(self) -> Literal["working", "ended", "died", "unknown"]:
        """What has become of the driver; unknown if it works on another machine."""
        if self.ended is not None:
            return "ended"
        if self.host != socket.gethostname():
            return "unknown"
        return "working" if alive(self.pid, self.born) else "died"


class Journal:
    """A watcher that keeps the file of this driver; as a context it notes the end. A disk that is full stops nothing.

    Args:
        out: The folder of all results.
        command: What was typed.
        forecasts: By a run's id, as far as they are known; looked at whenever something happens.
    """

    def __init__(self, out: Path, command: str, forecasts: Mapping[str, Forecast] | None = None) -> None:
        pid, now = os.getpid(), time.time()
        self.file = out / FOLDER / f"{pid}-{int(now)}.json"
        self.forecasts = forecasts if forecasts is not None else {}
        self.sweep = Sweep(pid=pid, host=socket.gethostname(), born=birth(pid), began=now, command=command)
        self._alive = 0.0

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sweep.ended = time.time()
        if self.sweep.runs:
            self._write()

    def begin(self, runs: Sequence[Run], cached: Sequence[Run]) -> None:
        """Note the plan."""
        states: tuple[tuple[State, Sequence[Run]], ...] = (("cached", cached), ("waiting", runs))
        for state, several in states:
            for run in several:
                entry = Entry(title=str(run), cell=cell(run), rounds=run.trained_by().rounds, state=state)
                self.sweep.runs[run.id] = entry
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._tidy()

    def started(self, run: Run) -> None:
        """Note that a worker has taken a run."""
        entry = self.sweep.runs[run.id]
        entry.state, entry.began, entry.ended = "running", time.time(), None
        entry.starts += 1
        self._write()

    def progressed(self, run: Run, report: Report) -> None:
        """Give a sign of life: the file's time."""
        if report.round == report.rounds:
            self.sweep.runs[run.id].seconds = report.seconds
        now = time.monotonic()
        if now - self._alive > _SIGN_OF_LIFE_SECONDS:
            self._alive = now
            with suppress(OSError):
                os.utime(self.file)

    def retried(self, run: Run, reason: str) -> None:
        """Note why a run waits, which may have begun already."""
        entry = self.sweep.runs[run.id]
        entry.state, entry.reason = "waiting", reason
        self._write()

    def found(self, run: Run, metrics: Mapping[str, float | None]) -> None:
        """Note that another process has done a run."""
        entry = self.sweep.runs[run.id]
        entry.state, entry.reason = "cached", None
        self._write()

    def ended(self, run: Run, reason: str | None) -> None:
        """Note how a run ended."""
        entry = self.sweep.runs[run.id]
        entry.state, entry.reason, entry.ended = "done" if reason is None else "failed", reason, time.time()
        self._write()

    def _write(self) -> None:
        for run_id, entry in self.sweep.runs.items():
            forecast = self.forecasts.get(run_id)
            entry.forecast = None if forecast is None else forecast.seconds
        document = {"format": _FORMAT, **asdict(self.sweep)}
        with suppress(OSError):
            put(self.file, (json.dumps(document) + "\n").encode())

    def _tidy(self) -> None:
        """Remove what earlier sweeps left: those that ended, and those killed whose runs are all among ours."""
        for file, sweep in read_files(self.file.parent):
            left = {run_id for run_id, entry in sweep.runs.items() if entry.state not in ("done", "cached")}
            over = sweep.fate == "ended" or (sweep.fate == "died" and left <= self.sweep.runs.keys())
            if file != self.file and over:
                with suppress(OSError):
                    file.unlink()


def read(out: Path) -> list[Sweep]:
    """Read what drivers have noted in a folder of results, the newest last; what cannot be read is passed over."""
    return sorted((sweep for _, sweep in read_files(out / FOLDER)), key=lambda sweep: sweep.began)


def read_files(folder: Path) -> list[tuple[Path, Sweep]]:
    """Read the files of a folder, each with its path."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, RecursionError):  # of another version, or gone meanwhile
            found.append((file, _parse(reading.contents(file, _MOST_BYTES, links=False))))
    return found


def _parse(content: bytes) -> Sweep:
    document = json.loads(content)
    if not isinstance(document, dict) or document.pop("format", None) != _FORMAT:
        raise ValueError("another format")
    sweep = _adapter().validate_json(json.dumps(document))
    if not all(re.fullmatch("[0-9a-f]{12}", run_id) for run_id in sweep.runs):
        raise ValueError("runs have other ids")
    return sweep


@cache
def _adapter() -> TypeAdapter[Sweep]:
    from pydantic import TypeAdapter

    return TypeAdapter(Sweep)


def birth(pid: int) -> str | None:
    """Give what tells a process from others that had its number: the clock tick in which it began.

    None if there is no such process, it has ended and nobody has asked how, or the system does not say.
    """
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    fields = content.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else fields[19]


def alive(pid: int, born: str | None) -> bool:
    """Tell whether a process of this machine is still there.

    Args:
        pid: Its number.
        born: What `birth` said of it.
    """
    if born is not None:
        return birth(pid) == born
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
