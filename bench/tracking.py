"""A live mirror of a sweep in MLflow: a parent run per sweep, a child per run.

The mirror works in a thread of its own, so that neither its start nor a slow server delays a run; whatever
goes wrong with it is said once and changes nothing else, because results are files. Only this module imports
mlflow.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import queue
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.results import records
from bench.rounds import Report
from bench.spelling import label, name

if TYPE_CHECKING:
    from bench.config import Run

EXPERIMENT = "bench"
RUN_TAG, PROTOCOL_TAG = "bench.run_id", "bench.protocol"
PARENT_TAG = "mlflow.parentRunId"
_MOST_METRICS, _MOST_PARAMS = 1000, 100
"""What MLflow takes in one request."""
_CLOSE_SECONDS = 60.0

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Set before mlflow is imported, unless the user has set them: give up soon, and be quiet."""


def has_mlflow() -> bool:
    """Tell whether mlflow is installed, without importing it."""
    return importlib.util.find_spec("mlflow") is not None


def default_uri(out: Path) -> str:
    """Give the address of the SQLite database beside the results."""
    return f"sqlite:///{out / 'mlflow.db'}"


def interface_command(uri: str) -> str:
    """Give the command that opens MLflow's interface on a database, or the address of a server."""
    if uri.startswith(("http://", "https://")):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def metric_name(key: str) -> str:
    """Spell a metric with the characters that MLflow allows: `generic@last10` becomes `generic_last10`."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)


class Mirror:
    """A watcher that writes to MLflow.

    Args:
        uri: Where to; `default_uri` or any tracking URI.
        out: The folder of all results. With the default URI artifacts lie there too.
        about: Parameters of the sweep, for the parent run.
        warn: Told in a sentence, at most once, that tracking has failed.
    """

    def __init__(self, uri: str, out: Path, about: Mapping[str, str], warn: Callable[[str], None]) -> None:
        self.uri, self.out, self.about, self.warn = uri, out, about, warn
        self.tasks: queue.SimpleQueue[Callable[[_Store], None] | None] = queue.SimpleQueue()
        self.healthy = True
        self.thread = threading.Thread(target=self._work, name="mlflow mirror", daemon=True)

    def begin(self, runs: Sequence[Run], cached: Sequence[Run]) -> None:
        """Open the parent run; finished runs that MLflow does not have yet are copied there."""
        self.thread.start()
        self.tasks.put(lambda store: store.open_parent(self.about))
        for run in cached:
            self.tasks.put(lambda store, run=run: store.copy(run))  # type: ignore[misc]

    def started(self, run: Run) -> None:
        """Open a child run."""
        self.tasks.put(lambda store: store.open_child(run))

    def progressed(self, run: Run, report: Report) -> None:
        """Log the metrics of a round."""
        now = _milliseconds()
        if report.metrics is not None:
            values = {**report.metrics, "seconds": report.seconds}
            self.tasks.put(lambda store: store.log_round(run, report.round, values, now))

    def ended(self, run: Run, reason: str | None) -> None:
        """Complete and close a child run."""
        self.tasks.put(lambda store: store.close_child(run, reason))

    def finish(self, status: str, tables: Mapping[str, str]) -> None:
        """Close the parent run and wait until everything is written.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
            tables: File name to content, kept as artifacts.
        """
        if not self.thread.is_alive():
            return
        self.tasks.put(lambda store: store.close_parent(status, tables))
        self.tasks.put(None)
        self.thread.join(_CLOSE_SECONDS)
        if self.thread.is_alive():
            self._fail("it does not answer")

    def _work(self) -> None:
        store: _Store | None = None
        while (task := self.tasks.get()) is not None:
            if not self.healthy:
                continue
            try:
                if store is None:
                    store = _Store(self.uri, self.out)
                task(store)
            except Exception as error:  # a mirror must not break what it shows, whatever MLflow raises
                self._fail(_first_sentence(error))

    def _fail(self, why: str) -> None:
        if self.healthy:
            self.healthy = False
            said = f"MLflow at {self.uri} is not written any more: {why}"
            self.warn(f"{said}. The runs go on, and their results are in {self.out}")


class _Store:
    """What the mirror does in MLflow; in its thread."""

    def __init__(self, uri: str, out: Path) -> None:
        self.out = out
        self.client = _client(uri)
        self.children: dict[str, str] = {}
        self.logged: dict[str, set[int]] = {}
        self.parent = ""
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self.client.get_experiment_by_name(experiment_name)
        if experiment is None:
            beside = (out / "mlflow-artifacts").resolve().as_uri() if uri == default_uri(out) else None
            self.experiment: str = self.client.create_experiment(experiment_name, artifact_location=beside)
        else:
            self.experiment = experiment.experiment_id

    def open_parent(self, about: Mapping[str, str]) -> None:
        title = time.strftime("sweep %Y-%m-%d %H:%M:%S")
        self.parent = self.client.create_run(self.experiment, run_name=title).info.run_id
        self._log_params(self.parent, about)

    def open_child(self, run: Run) -> None:
        self._close_stale(run)
        tags = {
            PARENT_TAG: self.parent,
            RUN_TAG: run.id,
            PROTOCOL_TAG: run.protocol,
            "algorithm": name(run.algorithm),
            "dataset": name(run.dataset),
            "seed": str(run.seed),
        }
        title = f"{label(run.algorithm)} {label(run.dataset)} seed {run.seed}"
        child = self.client.create_run(self.experiment, tags=tags, run_name=title).info.run_id
        self.children[run.id], self.logged[run.id] = child, set()
        self._log_params(child, _params(run))

    def log_round(self, run: Run, completed: int, values: Mapping[str, float | None], now: int) -> None:
        self.logged[run.id].add(completed)
        self._log_metrics(self.children[run.id], values, completed, now)

    def close_child(self, run: Run, reason: str | None) -> None:
        child = self.children.pop(run.id)
        if reason is None:
            self._log_record(child, records.read(self.out / run.id), self.logged[run.id])
        else:
            self.client.set_tag(child, "reason", reason[:5000])
        self.client.set_terminated(child, "FINISHED" if reason is None else "FAILED")

    def copy(self, run: Run) -> None:
        """Show a run that was finished earlier, unless it is shown already."""
        if not self._search(run, "FINISHED"):
            self.open_child(run)
            self.close_child(run, None)

    def close_parent(self, status: str, tables: Mapping[str, str]) -> None:
        for child in self.children.values():
            self.client.set_terminated(child, "KILLED")
        for file_name, content in tables.items():
            self.client.log_text(self.parent, content, file_name)
        self.client.set_terminated(self.parent, status)

    def _log_record(self, child: str, record: records.Record, logged: set[int]) -> None:
        """Log the rounds that were not logged on the way, and what is known only at the end."""
        for completed, values in _curves(record):
            if completed not in logged:
                self._log_metrics(child, values, completed, _milliseconds())
        last = int(str(record.setting["rounds"]))
        final = {key: value for key, value in record.metrics.items() if "@" in key}
        final |= {f"cost.{key}": value for key, value in record.cost.items()}
        self._log_metrics(child, final, last, _milliseconds())
        versions = record.document.get("versions")
        tags = {
            "bench.fingerprint": str(record.fingerprint),
            "bench.digest": str(record.document.get("digest")),
            "bench.commit": str(record.commit),
            **{f"version.{key}": str(value) for key, value in dict(versions or {}).items()},  # type: ignore[call-overload]
        }
        self.client.log_batch(child, tags=[_entity("RunTag")(key, value) for key, value in tags.items()])

    def _close_stale(self, run: Run) -> None:
        """End what a killed sweep left open for the same run."""
        for stale in self._search(run, "RUNNING"):
            self.client.set_terminated(stale.info.run_id, "KILLED")
            parent = stale.data.tags.get(PARENT_TAG)
            if parent and parent != self.parent:
                self.client.set_terminated(parent, "KILLED")

    def _search(self, run: Run, status: str) -> list[Any]:
        query = f"tags.`{RUN_TAG}` = '{run.id}' and attributes.status = '{status}'"
        return list(self.client.search_runs([self.experiment], query, max_results=10))

    def _log_params(self, mlflow_run: str, params: Mapping[str, str]) -> None:
        entities = [_entity("Param")(key, value[:6000]) for key, value in params.items()]
        for start in range(0, len(entities), _MOST_PARAMS):
            self.client.log_batch(mlflow_run, params=entities[start : start + _MOST_PARAMS])

    def _log_metrics(self, mlflow_run: str, values: Mapping[str, float | None], step: int, now: int) -> None:
        entities = [
            _entity("Metric")(metric_name(key), float(value), now, step)
            for key, value in values.items()
            if value is not None and math.isfinite(value)
        ]
        for start in range(0, len(entities), _MOST_METRICS):
            self.client.log_batch(mlflow_run, metrics=entities[start : start + _MOST_METRICS])


def _client(uri: str) -> Any:
    """Import mlflow, quietly, and connect."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for library in ("alembic", "mlflow"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _entity(kind: str) -> Any:
    from mlflow import entities

    return getattr(entities, kind)


def _params(run: Run) -> dict[str, str]:
    """Give everything that a run was told, flat."""
    parts = {
        "algorithm": asdict(run.algorithm),  # type: ignore[call-overload]
        "dataset": asdict(run.dataset),  # type: ignore[call-overload]
        "setting": asdict(run.setting),
    }
    params = {f"{part}.{key}": str(value) for part, values in parts.items() for key, value in values.items()}
    params |= {"algorithm": name(run.algorithm), "dataset": name(run.dataset), "setting": run.setting.name}
    return params | {
        "seed": str(run.seed),
        "engine": run.engine,
        "precision": run.precision,
        "device": run.device,
    }


def _curves(record: records.Record) -> Iterator[tuple[int, dict[str, float | None]]]:
    """Give the rounds and metrics of a finished run."""
    for row in record.rounds().to_dict("records"):
        yield int(row["round"]), {str(key): float(value) for key, value in row.items() if key != "round"}


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _first_sentence(error: Exception) -> str:
    """Shorten what a library says to its first line, at most 200 characters."""
    if "Max retries exceeded" in str(error):
        return "nobody answers there"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(". ")
