"""From a list of runs to finished folders: skip what is done, have the rest executed, tell who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from bench.dataset import Dataset, Labels
from bench.files import source
from bench.results import records
from bench.results.claims import Claimed, claim, is_claimed
from bench.splits.split import make_split
from bench.sweep.execution import document, execute, finished, forget_checkpoint
from bench.sweep.pool import Pool
from bench.sweep.run import Run
from bench.sweep.schedule import Schedule
from bench.sweep.watch import Watcher, progress_file
from bench.system import durable
from bench.training.outcome import Report

Status = Literal["done", "cached", "failed", "waiting"]


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    run: Run
    status: Status
    """"waiting": it has not begun, or not ended, in the time that there was."""
    reason: str | None = None
    """Why it failed."""


def check_data(runs: Sequence[Run]) -> None:
    """Make every split that runs will need, from labels alone: what is wrong shows before any work is done.

    Raises:
        BadConfig: There are not enough images for the server of an algorithm that needs some, or all clients are held
            out of training.
        DataMissing: A dataset's files are not there, or a pack lacks images of a split.
        DataDamaged: They are not what they should be.
        PartitionFailed: The data cannot be split so.
        BadWeights: A file of weights is not for a run's model.
        BadTeacher: A file of a teacher's features is not for a run's dataset.
    """
    labels: dict[tuple[Dataset, Path], Labels] = {}
    seen: set[tuple[object, ...]] = set()
    for run in runs:
        of_server = run.setting.auxiliary, run.setting.auxiliary and run.algorithm.needs
        read = run.protocol, run.seed, *of_server, run.teacher
        if read in seen:
            continue
        seen.add(read)
        key = (run.dataset, run.data_root)
        if key not in labels:
            labels[key] = source.labels(run.dataset, run.data_root)
            source.require(run.dataset, run.data_root, [])
        split = make_split(labels[key], run.dataset.num_classes, run.setting, run.seed)
        run.setting.training_clients(len(split.clients))  # natural users are counted only now
        source.require(run.dataset, run.data_root, [*split.clients, *run.reserved(labels[key])])
        run.read_weights()
        run.read_teacher(len(labels[key].train))


def verify_data(runs: Iterable[Run]) -> None:
    """Compare all images that runs will read with their checksums, each dataset's once; see `source.verify`.

    Raises:
        DataDamaged: Some are not what was written; that is no run's failure.
    """
    for dataset, root in dict.fromkeys((dataset, run.data_root) for run in runs for dataset in run.datasets):
        source.verify(dataset, root)


def run(
    runs: Sequence[Run],
    out: Path,
    *,
    pool: Pool,
    watchers: Sequence[Watcher] = (),
    force: bool = False,
    keep_models: bool = False,
    schedule: Callable[[Sequence[Run]], Schedule] = Schedule,
) -> list[Result]:
    """Do what is not done.

    Args:
        runs: Those that are done already are left as they are.
        out: The folder of all results.
        pool: Where they execute.
        watchers: Who is told.
        force: Whether finished runs are done again, from their first round.
        keep_models: Whether models are kept; finished runs without them are done again.
        schedule: Makes of the runs that are to be done the order in which they begin, and the end.

    Returns:
        One result per run, in order.

    Raises:
        OutputUnwritable: Results cannot be written there.
        DamagedResult: A finished run's files are not what was written, and `force` is not set.
    """
    records.prepare(out)
    with suppress(Claimed), claim(out):  # where there are no locks, this says so; a worker would not be heard
        pass
    results = {run.id: Result(run, "cached") for run in runs if not force and finished(run, out, keep_models)}
    cached = [result.run for result in results.values()]
    rest = [run for run in runs if run.id not in results]
    for each in runs:
        if force and not is_claimed(out / each.id):
            forget_checkpoint(out, each)
    waiting = schedule(rest)
    collector = _Collector(out, watchers, results, waiting)
    for watcher in watchers:
        watcher.begin(rest, cached)
    if rest:
        pool(waiting, out, partial(execute, force=force, keep_models=keep_models), collector)
    return [results.get(each.id, Result(each, "waiting")) for each in runs]


class _Collector:
    """Notes how runs end, and passes all news on."""

    def __init__(self, out: Path, watchers: Sequence[Watcher], results: dict[str, Result], schedule: Schedule) -> None:
        self.out, self.watchers, self.results, self.schedule = out, watchers, results, schedule

    def begin(self, runs: Sequence[Run], cached: Sequence[Run]) -> None:
        for watcher in self.watchers:
            watcher.begin(runs, cached)

    def started(self, run: Run) -> None:
        for watcher in self.watchers:
            watcher.started(run)

    def progressed(self, run: Run, report: Report) -> None:
        for watcher in self.watchers:
            watcher.progressed(run, report)

    def retried(self, run: Run, reason: str) -> None:
        for watcher in self.watchers:
            watcher.retried(run, reason)

    def found(self, run: Run, metrics: Mapping[str, float | None]) -> None:
        self._learn(run)
        self.results[run.id] = Result(run, "cached")
        for watcher in self.watchers:
            watcher.found(run, metrics)

    def ended(self, run: Run, reason: str | None) -> None:
        if reason is None:
            self._learn(run)
        elif not self._is_recorded(run, reason):
            self._record_death(run, reason)
        durable.remove(progress_file(self.out, run))  # the pool has read it to its end
        self.results[run.id] = Result(run, "done" if reason is None else "failed", reason)
        for watcher in self.watchers:
            watcher.ended(run, reason)

    def _learn(self, run: Run) -> None:
        """Let the other seeds of a cell be expected to take what this one took."""
        with suppress(records.DamagedResult):
            cost = records.read(self.out / run.id).cost
            if (seconds := cost.get("wall_seconds")) is not None:
                self.schedule.learn(run, seconds, cost.get("peak_memory_bytes"))

    def _is_recorded(self, run: Run, reason: str) -> bool:
        """Tell whether the run's worker could write why it failed."""
        try:
            return records.read(self.out / run.id).reason == reason
        except records.DamagedResult:  # or there is nothing to read
            return False

    def _record_death(self, run: Run, reason: str) -> None:
        """Record the failure of a run whose worker died before it could."""
        try:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            records.fail(self.out, run.id, {**document(run, started=None), "finished": now}, reason)
        except records.OutputUnwritable:  # then standard error is all there is to say it on
            return
