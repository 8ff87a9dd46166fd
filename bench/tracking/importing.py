"""Results in MLflow afterwards: what it lacks of a folder is added, and nothing is added twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.results.record import Record
from bench.tracking.database import passes
from bench.tracking.described import (
    FOLDER_TAG,
    PARENT_TAG,
    PROTOCOL_TAG,
    RECORD_TAG,
    RUN_TAG,
    Point,
    of_record,
    record_key,
    record_points,
    record_tags,
    record_times,
)
from bench.tracking.server import Refused, Server, Shown, TrackingFailed, import_command, is_remote, why


@dataclass(kw_only=True)
class Imported:
    """What an import did."""

    present: int = 0
    """Runs that MLflow had, whole."""
    completed: int = 0
    """Runs of which it had a part."""
    added: int = 0


def import_records(
    uri: str,
    out: Path,
    records: Sequence[Record],
    tables: Mapping[str, str],
    tell: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Imported:
    """Show finished and failed runs in MLflow.

    A run that a sweep began to show and could not end, because the server was lost, is completed and stays in its
    sweep; the sweep's other runs join it. Without such a sweep the runs get a parent of their own.

    Args:
        uri: Any tracking URI.
        out: The folder of all results.
        records: Its runs.
        tables: File name to content, kept with the parent if anything is added.
        tell: Called after each run.
        warn: Told in a sentence that a damaged database was moved away.

    Raises:
        TrackingFailed: MLflow does not answer, or refuses. What was imported until then is not imported again.
    """
    try:
        server = Server(uri, out)
        if server.moved is not None:
            warn(server.moved)
        return _Import(server, out, records).run(tables, tell)
    except Refused as error:
        raise TrackingFailed(f"MLflow at {uri} cannot be written: {why(error)}") from error
    except Exception as error:  # whatever MLflow raises
        again = f"what was imported stays, and the same command goes on: {import_command(uri, out)}"
        if not is_remote(uri) and not passes(error):
            again = f"move that away, and the same command imports everything: {import_command(uri, out)}"
        raise TrackingFailed(f"MLflow at {uri} cannot be written: {why(error)}; {again}") from error


def show_record(
    server: Server,
    mlflow_run: str,
    record: Record,
    *,
    logged: Collection[tuple[str, int]] = (),
    waiting: Sequence[Point] = (),
    params: Mapping[str, str] | None = None,
    started: int,
) -> None:
    """Complete an MLflow run with all that a record has, and end it.

    Args:
        server: Where.
        mlflow_run: Its id.
        record: The run's.
        logged: Points that are there or waiting, as metric and step.
        waiting: Points to log besides.
        params: To log besides.
        started: When it began, in milliseconds since 1970; it does not end before.
    """
    rest = [point for point in record_points(record) if (point.metric, point.step) not in logged]
    server.log(mlflow_run, [*waiting, *rest], params, record_tags(record))
    _, ended = record_times(record)
    server.end(mlflow_run, "FINISHED" if record.status == "done" else "FAILED", max(ended, started))


class _Import:
    def __init__(self, server: Server, out: Path, records: Sequence[Record]) -> None:
        self.server, self.records = server, records
        self.folder, self.name = str(out.resolve()), out.resolve().name
        known = (shown for protocol in {record.protocol for record in records} for shown in self._of(protocol))
        self.shown = {shown.tags[RECORD_TAG]: shown for shown in known if RECORD_TAG in shown.tags}
        opened = server.open_in(self.folder)
        self.parents = [shown for shown in opened if RUN_TAG not in shown.tags]
        self.begun = {shown.tags[RUN_TAG]: shown for shown in reversed(opened) if RUN_TAG in shown.tags}
        """The newest for each run."""
        self.left = {shown.mlflow_run: shown for shown in opened if RUN_TAG in shown.tags}
        self.done = Imported()

    def _of(self, protocol: str) -> list[Shown]:
        return list(self.server.search(f"tags.`{PROTOCOL_TAG}` = '{protocol}'"))

    def run(self, tables: Mapping[str, str], tell: Callable[[], None]) -> Imported:
        for record in self.records:
            self._show(record)
            tell()
        for shown in self.left.values():  # of runs that never ended, or were begun anew
            self.server.end(shown.mlflow_run, "KILLED", _now())
        if self.parents:
            self._close_parents(tables)
        return self.done

    def _show(self, record: Record) -> None:
        if (whole := self.shown.get(record_key(record))) is not None:
            self.done.present += 1
            if whole.mlflow_run in self.left:  # the server was lost between its last two words
                self._complete(self.left.pop(whole.mlflow_run), record)
        elif (begun := self.begun.get(record.id)) is not None:
            self._complete(self.left.pop(begun.mlflow_run), record)
            self.done.completed += 1
        else:
            self._add(record)
            self.done.added += 1

    def _complete(self, begun: Shown, record: Record) -> None:
        logged = self.server.logged(begun.mlflow_run)
        params = of_record(record).params
        show_record(self.server, begun.mlflow_run, record, logged=logged, params=params, started=begun.started)

    def _add(self, record: Record) -> None:
        described = of_record(record)
        started, _ = record_times(record)
        tags = {**described.tags, PARENT_TAG: self._parent(), FOLDER_TAG: self.folder}
        child = self.server.create(described.title, tags, started)
        show_record(self.server, child, record, params=described.params, started=started)

    def _parent(self) -> str:
        """Give the newest sweep of the folder that has not ended, or a new one as old as the first run."""
        if not self.parents:
            started = min(record_times(record)[0] for record in self.records)
            title = time.strftime(f"import of {self.name} %Y-%m-%d %H:%M:%S")
            tags = {FOLDER_TAG: self.folder}
            created = self.server.create(title, tags, started)
            self.parents = [Shown(mlflow_run=created, status="RUNNING", started=started, tags=tags)]
        return self.parents[0].mlflow_run

    def _close_parents(self, tables: Mapping[str, str]) -> None:
        newest, *older = self.parents
        ended = max((record_times(record)[1] for record in self.records), default=_now())
        for parent in older:
            self.server.end(parent.mlflow_run, "KILLED", max(ended, parent.started))
        failed = any(record.status == "failed" for record in self.records)
        try:
            self.server.keep(newest.mlflow_run, tables)
        finally:  # artifacts may lie where they cannot be reached from here
            self.server.end(newest.mlflow_run, "FAILED" if failed else "FINISHED", max(ended, newest.started))


def _now() -> int:
    return int(time.time() * 1000)
