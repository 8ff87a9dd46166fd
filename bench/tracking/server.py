"""MLflow itself: a database or server, and the few things that are asked of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.results.claims import Claimed, claim
from bench.system import collector
from bench.tracking import database
from bench.tracking.described import Point

EXPERIMENT = "bench"
_MOST_POINTS = 800
"""In a request; MLflow takes 1000 of points, params and tags together."""
_LONGEST_TAG, _LONGEST_PARAM = 5000, 6000
_MAKING_SECONDS = 30.0
"""How long a process waits for another one to make the tables of a new database."""

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Set before mlflow is imported, unless the user has set them: give up soon, and be quiet."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class TrackingFailed(RuntimeError):
    """MLflow cannot be written. The message says where, why and what to do."""


class Refused(RuntimeError):
    """MLflow cannot be written before somebody does what the message says."""


def has_mlflow() -> bool:
    """Tell whether mlflow is installed, without importing it."""
    return importlib.util.find_spec("mlflow") is not None


def default_uri(out: Path) -> str:
    """Give the address of the SQLite database beside the results."""
    return database.address(out / "mlflow.db")


def is_remote(uri: str) -> bool:
    """Tell a server from a database or folder that this process writes by itself."""
    return uri.startswith(("http://", "https://"))


def interface_command(uri: str) -> str:
    """Give the command that opens MLflow's interface on a database, or the address of a server."""
    if is_remote(uri):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def import_command(uri: str, out: Path) -> str:
    """Give the command that imports what MLflow lacks."""
    where = [] if uri == default_uri(out) else ["--tracking-uri", uri]
    return shlex.join(["bench", "track", "--out", str(out), *where])


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run that MLflow has."""

    mlflow_run: str
    status: str
    started: int
    """In milliseconds since 1970."""
    tags: Mapping[str, str]


class Server:
    """A connection to MLflow.

    Args:
        uri: A tracking URI.
        out: The folder of results. With the default URI artifacts lie there too.

    Everything raises what MLflow raises, which may be anything.

    Raises:
        Refused: The experiment was deleted, or the database cannot lie there, or is damaged and not the default one.
    """

    def __init__(self, uri: str, out: Path) -> None:
        self.uri, self.is_remote = uri, is_remote(uri)
        self.name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        connect = import_mlflow()
        file = _database(uri)
        beside = None
        if uri == default_uri(out):
            if file != out / "mlflow.db":
                raise Refused(
                    f"this SQLAlchemy finds no database in {out}, because of ? or % in its name: upgrade it "
                    "(pip install 'sqlalchemy>=2.1'), or use another --out or --tracking-uri"
                )
            beside = (out / "mlflow-artifacts").resolve().as_uri()
        self.moved: str | None = None
        """What is to be told of a damaged database, in whose place there is a new one now: it was moved away."""
        if file is None:
            self._enter(connect, beside)
            return
        with _alone(file):
            try:
                self._open(connect, file, beside)
            except Refused:
                raise
            except Exception as error:  # of our own checks, or whatever MLflow raises
                if database.passes(error):
                    raise
                if beside is None:  # somebody's own, with who knows what in it
                    raise Refused(
                        f"the database {file} cannot be opened ({why(error)}): move it away or use another "
                        f"--tracking-uri, and {import_command(uri, out)} imports everything"
                    ) from error
                moved = database.move_away(file)
                self._open(connect, file, beside)
                self.moved = (
                    f"MLflow's database {file} is damaged ({why(error)}): it was moved to {moved.name}, and what is "
                    "finished is shown in a new one"
                )

    def _open(self, connect: Any, file: Path, beside: str | None) -> None:
        """Open a database, which is made if it is not there; the default one is looked over."""
        version = importlib.metadata.version("mlflow")
        is_new = not file.exists()
        if is_new or not (database.look_over(file, version) or beside is None):
            database.complete(file, version, connect)
        self._enter(connect, beside, is_new)

    def _enter(self, connect: Any, beside: str | None, is_new: bool = False) -> None:
        self.client = connect(tracking_uri=self.uri)
        if is_new:  # MLflow may still have connections to one that was there before
            with suppress(AttributeError):
                self.client._tracking_client.store.engine.dispose()
        self.experiment: str = self.find() or self._make(beside)

    def find(self) -> str | None:
        """Look the experiment up: its id, or None if there is none yet.

        Raises:
            Refused: It was deleted.
        """
        experiment = self.client.get_experiment_by_name(self.name)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            where = f"MLFLOW_TRACKING_URI={shlex.quote(self.uri)}"
            raise Refused(
                f"the experiment {self.name} was deleted in MLflow: restore it ({where} mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}) or use another --tracking-uri"
            )
        return None if experiment is None else str(experiment.experiment_id)

    def _make(self, beside: str | None) -> str:
        try:
            return str(self.client.create_experiment(self.name, artifact_location=beside))
        except Exception:  # another sweep has made it since
            if (made := self.find()) is None:
                raise
            return made

    def create(self, title: str, tags: Mapping[str, str], started: int) -> str:
        """Begin an MLflow run, and give its id."""
        cut = {key: value[:_LONGEST_TAG] for key, value in tags.items()}
        created = self.client.create_run(self.experiment, start_time=started, tags=cut, run_name=title[:250])
        return str(created.info.run_id)

    def log(
        self,
        mlflow_run: str,
        points: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write to an MLflow run in as few requests as it takes, the tags with the last of them.

        What is there already is not written twice.
        """
        from mlflow.entities import Metric, Param, RunTag

        with nullcontext() if self.is_remote else collector.paused():  # of points, a quarter of the time
            metrics = [Metric(point.metric, point.value, point.milliseconds, point.step) for point in points]
            parameters = [Param(key, value[:_LONGEST_PARAM]) for key, value in (params or {}).items()]
            while len(metrics) > _MOST_POINTS:
                self.client.log_batch(mlflow_run, metrics=metrics[:_MOST_POINTS], params=parameters)
                metrics, parameters = metrics[_MOST_POINTS:], []
            last = [RunTag(key, value[:_LONGEST_TAG]) for key, value in (tags or {}).items()]
            self.client.log_batch(mlflow_run, metrics=metrics, params=parameters, tags=last)

    def end(self, mlflow_run: str, status: Status, ended: int) -> None:
        """End an MLflow run, at a time in milliseconds since 1970."""
        self.client.set_terminated(mlflow_run, status, end_time=ended)

    def keep(self, mlflow_run: str, files: Mapping[str, str]) -> None:
        """Store texts as artifacts, by file name."""
        for file_name, content in files.items():
            self.client.log_text(mlflow_run, content, file_name)

    def logged(self, mlflow_run: str) -> set[tuple[str, int]]:
        """Look up which points an MLflow run has, as metric and step."""
        metrics = self.client.get_run(mlflow_run).data.metrics
        return {(key, point.step) for key in metrics for point in self.client.get_metric_history(mlflow_run, key)}

    def search(self, query: str) -> Iterator[Shown]:
        """Find MLflow runs of the experiment, the newest first."""
        token = None
        while True:
            page = self.client.search_runs([self.experiment], query, max_results=1000, page_token=token)
            for found in page:
                info = found.info
                yield Shown(mlflow_run=info.run_id, status=info.status, started=info.start_time, tags=found.data.tags)
            token = page.token
            if not token:
                return

    def open_in(self, folder: str) -> list[Shown]:
        """Find what sweeps of a folder of results have begun and not ended, the newest first."""
        running = self.search("attributes.status = 'RUNNING'")
        return [shown for shown in running if shown.tags.get("bench.folder") == folder]


def _database(uri: str) -> Path | None:
    """Give the file of an SQLite database; None of anything else."""
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    in_memory = url.database in (None, "", ":memory:") or "uri" in url.query
    return None if in_memory else Path(str(url.database))


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep other processes from making the tables of a database meanwhile: two that do it at once break it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + _MAKING_SECONDS
    with ExitStack() as held:
        while time.monotonic() < until:
            try:
                held.enter_context(claim(file.parent, f"{file.name}.claim"))
                break
            except Claimed:
                time.sleep(0.1)
        yield


def refused(error: Exception, server: Server | None) -> Refused | None:
    """Give what somebody has to do before MLflow can be written, if an error says so: the experiment may have been
    deleted since it was opened.
    """
    if isinstance(error, Refused):
        return error
    if server is not None and "must be in the 'active' state" in str(error):
        try:
            server.find()
        except Refused as deleted:
            return deleted
        except Exception:  # whatever MLflow raises; the first error is told
            return None
    return None


def why(error: Exception) -> str:
    """Shorten what a library says to its first line, at most 200 characters; our own words are left whole."""
    if isinstance(error, Refused):
        return str(error)
    if "Max retries exceeded" in str(error):
        return "nobody answers there"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")


def import_mlflow() -> Any:
    """Import mlflow, quietly, which takes seconds; give the class of its client."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for library in ("alembic", "mlflow"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # errors are told by us, without a trace
    from mlflow import MlflowClient

    return MlflowClient
