"""A live mirror of a sweep in MLflow.

It works in a thread of its own and sends what has gathered over seconds in one request, so that neither its start, nor
a slow server, nor many rounds delay a run. While the server is lost nothing is kept for it: when it answers again, or
when `bench track` is called, what is missing is read from the results.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results import records
from bench.tracking.described import (
    FOLDER_TAG,
    PARENT_TAG,
    PROTOCOL_TAG,
    RUN_TAG,
    Described,
    Point,
    of_record,
    of_run,
    places,
    points,
    record_times,
)
from bench.tracking.importing import show_record
from bench.tracking.server import Server, Shown, Status, import_command, import_mlflow, is_remote, refused, why
from bench.training.outcome import Report

if TYPE_CHECKING:
    from bench.results.record import Record
    from bench.sweep.run import Run

_GATHER_SECONDS = 5.0
"""How old a round may get before it is sent."""
_LOOK_SECONDS = 0.5
"""How often it looks whether that is so."""
_REST_SECONDS = 30.0
"""Between two tries to reach a server that was lost."""
_CLOSE_SECONDS, _KILLED_CLOSE_SECONDS = 60.0, 10.0
"""How long the end of a sweep waits for what is not written yet, as long as it moves; and the end of one that was
interrupted.
"""
_SILENT_SECONDS, _LOST_SILENT_SECONDS = 10.0, 3.0
"""How long it waits for one answer of a server; and of one that was lost. A database is always given the whole time: to
make its tables takes seconds.
"""


@dataclass
class _Child:
    """A run, and how much of it MLflow has."""

    described: Described
    started: int
    """In milliseconds since 1970."""
    mlflow_run: str | None = None
    has_params: bool = False
    waiting: list[Point] = field(default_factory=list)
    since: float = 0.0
    """When the oldest of the waiting came."""
    logged: set[tuple[str, int]] = field(default_factory=set)
    """Points that were sent or wait, as metric and step."""
    in_doubt: bool = False
    """Whether only the server knows what has arrived."""
    ended: int | None = None
    reason: str | None = None


class Mirror:
    """A watcher that writes to MLflow.

    Args:
        uri: Where to; `default_uri` or any tracking URI.
        out: The folder of all results. With the default URI artifacts lie there too.
        about: Parameters of the sweep, for the parent run.
        warn: Told in a sentence, at most once, that MLflow is not written, and what to do; and that a damaged database
            was moved away.
    """

    def __init__(self, uri: str, out: Path, about: Mapping[str, str], warn: Callable[[str], None]) -> None:
        self.uri, self.out, self.warn = uri, out, warn
        self.healthy = True
        """Whether MLflow has all that it should have by now."""
        self._warned = False
        self._moved: float | None = None
        """When the server last answered, or was asked first."""
        self._patience = _SILENT_SECONDS if is_remote(uri) else _CLOSE_SECONDS
        self._try_at = 0.0
        self._events: queue.SimpleQueue[Callable[[_Sweep], None]] = queue.SimpleQueue()
        self._sweep = _Sweep(out, about, warn)
        self._thread = threading.Thread(target=self._work, name="mlflow mirror", daemon=True)

    def begin(self, runs: Sequence[Run], cached: Sequence[Run]) -> None:
        """Open the parent run; finished runs that MLflow does not have yet are copied there."""
        self._events.put(lambda sweep: sweep.plan(runs, cached))
        self._thread.start()

    def started(self, run: Run) -> None:
        """Open a child run."""
        now = _milliseconds()
        self._events.put(lambda sweep: sweep.start(run, now))

    def progressed(self, run: Run, report: Report) -> None:
        """Show the metrics of a round within seconds."""
        if report.metrics is not None:
            now = _milliseconds()
            self._events.put(lambda sweep: sweep.note(run, report, now))

    def retried(self, run: Run, reason: str) -> None:
        """Leave a child run open: it goes on from its checkpoint."""

    def found(self, run: Run, metrics: Mapping[str, float | None]) -> None:
        """Copy a run that another process has done, unless that has shown it."""
        self._events.put(lambda sweep: sweep.find(run))

    def ended(self, run: Run, reason: str | None) -> None:
        """Complete and close a child run."""
        now = _milliseconds()
        self._events.put(lambda sweep: sweep.end(run, reason, now))

    def finish(self, status: Status, tables: Mapping[str, str]) -> None:
        """Close the parent run and wait until everything is written, or nobody seems to write it.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
            tables: File name to content, kept as artifacts.
        """
        if not self._thread.is_alive():
            return
        self._events.put(lambda sweep: sweep.close(status, tables))
        asked = time.monotonic()
        limit = asked + (_KILLED_CLOSE_SECONDS if status == "KILLED" else _CLOSE_SECONDS)
        while self._thread.is_alive():
            self._thread.join(0.05)
            now = time.monotonic()
            moved = now if self._moved is None else self._moved if self.healthy else max(self._moved, asked)
            if now - moved > (self._patience if self.healthy else _LOST_SILENT_SECONDS):
                self._fail("it does not answer")
                return
            if now > limit:
                self._fail("it takes too long")
                return

    def _work(self) -> None:
        sweep = self._sweep
        while not sweep.is_written:
            self._listen(0.0 if self.healthy and sweep.has_backlog else _LOOK_SECONDS)
            if sweep.status is None and time.monotonic() < self._try_at:
                continue
            try:
                import_mlflow()
                self._moved = self._moved or time.monotonic()
                for _ in sweep.write(self.uri):
                    self._moved = time.monotonic()
            except Exception as error:  # a mirror must not break what it shows, whatever MLflow raises
                refusal = refused(error, sweep.server)
                self._fail(why(refusal or error), by_itself=refusal is None)
                sweep.forget()
                self._try_at = time.monotonic() + _REST_SECONDS
                if sweep.status is not None:
                    return
            else:
                self._moved = time.monotonic()
                self.healthy = True

    def _listen(self, seconds: float) -> None:
        """Take in what has happened."""
        try:
            event = self._events.get(timeout=seconds) if seconds else self._events.get_nowait()
            while True:
                event(self._sweep)
                event = self._events.get_nowait()
        except queue.Empty:
            return

    def _fail(self, reason: str, by_itself: bool = True) -> None:
        """Say once that MLflow is not written, and what is to be done; more than a command, where not `by_itself`."""
        self.healthy = False
        if not self._warned:
            self._warned = True
            said = f"MLflow at {self.uri} is not written any more: {reason}"
            rest = "bench track imports what MLflow lacks once that is done"
            if by_itself:
                rest = f"what it lacks is imported afterwards by: {import_command(self.uri, self.out)}"
            self.warn(f"{said}. The runs go on, and their results are in {self.out}; {rest}")


class _Sweep:
    """What MLflow is to show, and how much of that it has; in the mirror's thread."""

    def __init__(
        self, out: Path, about: Mapping[str, str], warn: Callable[[str], None] = lambda sentence: None
    ) -> None:
        self.out, self.about, self.warn, self.folder = out, about, warn, str(out.resolve())
        self.began = _milliseconds()
        self.server: Server | None = None
        self.parent: str | None = None
        self.has_about = False
        self.stale: list[Shown] = []
        """What earlier sweeps of the folder left open."""
        self.going: dict[str, _Child] = {}
        self.ended: deque[_Child] = deque()
        self.planned: set[str] = set()
        """Runs that are to be done, by id."""
        self.cached: deque[Run | Record] = deque()
        self.copied: set[str] | None = None
        """Finished runs that MLflow has, by id."""
        self.status: Status | None = None
        self.tables: Mapping[str, str] = {}
        self.is_written = False
        """Whether MLflow has everything, to the end."""

    # What happens -------------------------------------------------------------------------------------------

    def plan(self, runs: Sequence[Run], cached: Sequence[Run]) -> None:
        self.planned |= {run.id for run in runs}
        self.cached.extend(cached)

    def start(self, run: Run, now: int) -> None:
        if run.id not in self.going:  # a worker may take it once more after another died
            self.going[run.id] = _Child(of_run(run), now)

    def note(self, run: Run, report: Report, now: int) -> None:
        child = self.going.get(run.id)
        if child is None or report.metrics is None or ("seconds", report.round) in child.logged:
            return
        if not child.waiting:
            child.since = time.monotonic()
        fresh = points({**report.metrics, "seconds": report.seconds}, now, report.round)
        child.waiting += fresh
        child.logged |= places(fresh)

    def end(self, run: Run, reason: str | None, now: int) -> None:
        child = self.going.pop(run.id, None) or _Child(of_run(run), now)
        child.ended, child.reason = now, reason
        self.ended.append(child)

    def find(self, run: Run) -> None:
        self.cached.append(run)
        self.copied = None  # it may have been shown since

    def close(self, status: Status, tables: Mapping[str, str]) -> None:
        self.status, self.tables = status, tables

    def forget(self) -> None:
        """Keep nothing for a server that was lost, nor trust what it has."""
        self.server = None
        for child in (*self.going.values(), *self.ended):
            child.waiting, child.in_doubt, child.has_params = [], True, False

    def begin_anew(self) -> None:
        """Have everything shown in a database that is new: what is going on, and all that the folder holds."""
        self.parent, self.has_about, self.copied = None, False, None
        for child in (*self.going.values(), *self.ended):
            child.mlflow_run, child.in_doubt, child.has_params = None, False, False
            child.waiting, child.logged = [], set()
        found, _ = records.read_all(self.out)
        known = {run.id for run in self.cached} | self.going.keys() | {child.described.id for child in self.ended}
        self.cached.extend(
            record
            for record in found
            if record.id not in known and (record.status == "done" or record.id not in self.planned)
        )

    # What is written ----------------------------------------------------------------------------------------

    @property
    def has_backlog(self) -> bool:
        return bool(self.ended or self.cached or self.status)

    def write(self, uri: str) -> Iterator[None]:
        """Write what is due and at most one run of the backlog; stops after each answer."""
        if self.server is None:
            self.server = Server(uri, self.out)
            if self.server.moved is not None:
                self.warn(self.server.moved)
                self.begin_anew()
        server = self.server
        yield
        if self.parent is None or not self.has_about:
            yield from self._open(server)
        for child in self.going.values():
            yield from self._advance(server, child)
        if self.ended:
            yield from self._close(server, self.ended[0])
            self.ended.popleft()
        elif self.cached:
            yield from self._copy(server, self.cached[0])
            self.cached.popleft()
        elif self.status is not None:
            yield from self._close_parent(server, self.status)
            self.is_written = True

    def _open(self, server: Server) -> Iterator[None]:
        if self.parent is None:
            self.stale = server.open_in(self.folder)
            yield
            title = time.strftime("sweep %Y-%m-%d %H:%M:%S", time.localtime(self.began / 1000))
            self.parent = server.create(title, {FOLDER_TAG: self.folder}, self.began)
            yield
        server.log(self.parent, params=self.about)
        self.has_about = True
        yield

    def _advance(self, server: Server, child: _Child) -> Iterator[None]:
        """Show a run that is going on."""
        if child.mlflow_run is None:
            yield from self._end_stale(server, child.described.id)
            child.mlflow_run = self._create(server, child.described, child.started)
            yield
        if child.waiting and (self.status is not None or time.monotonic() - child.since > _GATHER_SECONDS):
            server.log(child.mlflow_run, child.waiting, {} if child.has_params else child.described.params)
            child.waiting, child.has_params = [], True
            yield

    def _close(self, server: Server, child: _Child) -> Iterator[None]:
        """Show a run that has ended, whole."""
        if child.mlflow_run is None:
            yield from self._end_stale(server, child.described.id)
            child.mlflow_run = self._create(server, child.described, child.started)
            yield
        params = {} if child.has_params else child.described.params
        now = child.ended or _milliseconds()
        try:
            record = records.read(self.out / child.described.id)
        except records.DamagedResult as error:
            why_not = child.reason or str(error)
            server.log(child.mlflow_run, child.waiting, params, {"reason": why_not})
            server.end(child.mlflow_run, "FAILED", now)
        else:
            logged = child.logged
            if child.in_doubt:
                logged = server.logged(child.mlflow_run) | places(child.waiting)
                yield
            show_record(
                server,
                child.mlflow_run,
                record,
                logged=logged,
                waiting=child.waiting,
                params=params,
                started=child.started,
            )
        yield

    def _copy(self, server: Server, run: Run | Record) -> Iterator[None]:
        """Show a run that was finished earlier, unless it is shown already."""
        if self.copied is None:
            protocols = {each.protocol for each in self.cached}
            queries = [f"tags.`{PROTOCOL_TAG}` = '{each}' and attributes.status = 'FINISHED'" for each in protocols]
            self.copied = {shown.tags[RUN_TAG] for query in queries for shown in server.search(query)}
            yield
        if run.id in self.copied:
            return
        record = records.read(self.out / run.id)
        begun = next((shown for shown in self.stale if shown.tags.get(RUN_TAG) == run.id), None)
        described = of_record(record)
        if begun is None:
            started, _ = record_times(record)
            mlflow_run, logged = self._create(server, described, started), set[tuple[str, int]]()
        else:
            started, mlflow_run, logged = begun.started, begun.mlflow_run, server.logged(begun.mlflow_run)
        yield
        show_record(server, mlflow_run, record, logged=logged, params=described.params, started=started)
        yield

    def _close_parent(self, server: Server, status: Status) -> Iterator[None]:
        now = _milliseconds()
        assert self.parent is not None
        for child in self.going.values():
            if child.mlflow_run is not None:
                server.end(child.mlflow_run, "KILLED", now)
                yield
        try:
            server.keep(self.parent, self.tables)
        finally:  # artifacts may lie where they cannot be reached from here
            server.end(self.parent, status, now)
        yield

    def _create(self, server: Server, described: Described, started: int) -> str:
        assert self.parent is not None
        tags = {**described.tags, PARENT_TAG: self.parent, FOLDER_TAG: self.folder}
        return server.create(described.title, tags, started)

    def _end_stale(self, server: Server, run_id: str) -> Iterator[None]:
        """End what a killed sweep of this folder left open for the same run, and that sweep."""
        for stale in [shown for shown in self.stale if shown.tags.get(RUN_TAG) == run_id]:
            dead = {stale.mlflow_run, stale.tags.get(PARENT_TAG, stale.mlflow_run)}
            for shown in [shown for shown in self.stale if shown.mlflow_run in dead]:
                server.end(shown.mlflow_run, "KILLED", _milliseconds())
                self.stale.remove(shown)
                yield


def _milliseconds() -> int:
    return int(time.time() * 1000)
