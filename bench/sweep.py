"""From a list of runs to finished folders: skip what is done, execute the rest, tell who watches."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from bench import provenance, weights
from bench.actors import hire
from bench.claims import Claimed, claim, is_claimed
from bench.config import Run
from bench.crew import Surroundings
from bench.dataset import Dataset, Labels, Splits
from bench.engine import CannotStack
from bench.files import source
from bench.models import build
from bench.pool import Failure, Pool, WorkersDied
from bench.results import records
from bench.rounds import Diverged, Report, Tally, surroundings, train
from bench.schedule import Schedule
from bench.settings import BadConfig
from bench.spelling import label, name
from bench.split import Split, describe, group_classes, make_split
from bench.states import StatesUnwritable
from bench.tree import Tree
from bench.watch import Watcher, append, progress_file

Status = Literal["done", "cached", "failed", "waiting"]

_EXPECTED = (Diverged, CannotStack, StatesUnwritable, WorkersDied, BadConfig, records.OutputUnwritable)
"""Errors whose message is a whole sentence."""
_GOES_ON = (MemoryError, torch.OutOfMemoryError, StatesUnwritable, WorkersDied)
"""Errors after which a run goes on from its checkpoint, with more memory or space."""
_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Errors that a run may not have when it has all memory for itself."""


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    run: Run
    status: Status
    """"waiting": it has not begun, or not ended, in the time that there was."""
    reason: str | None = None
    """Why it failed."""


def finished(run: Run, out: Path) -> bool:
    """Tell whether a run's folder is complete.

    Raises:
        DamagedResult: It was, and its files are not what was written.
    """
    return records.status(out, run.id) == "done"


def check_data(runs: Sequence[Run]) -> None:
    """Make every split that runs will need, from labels alone: what is wrong shows before any work is done.

    Raises:
        DataMissing: A dataset's files are not there, or a pack lacks images of a split.
        DataDamaged: They are not what they should be.
        PartitionFailed: The data cannot be split so.
        BadWeights: A file of weights is not for a run's model.
    """
    labels: dict[tuple[Dataset, Path], Labels] = {}
    seen: set[tuple[str, int]] = set()
    for run in runs:
        if (run.protocol, run.seed) in seen:
            continue
        seen.add((run.protocol, run.seed))
        key = (run.dataset, run.data_root)
        if key not in labels:
            labels[key] = source.labels(run.dataset, run.data_root)
            source.require(run.dataset, run.data_root, [])
        split = make_split(labels[key], run.dataset.num_classes, run.setting, run.seed)
        source.require(run.dataset, run.data_root, split.clients)
        _weights(run)


def run(
    runs: Sequence[Run],
    out: Path,
    *,
    pool: Pool,
    watchers: Sequence[Watcher] = (),
    force: bool = False,
    schedule: Callable[[Sequence[Run]], Schedule] = Schedule,
) -> list[Result]:
    """Do what is not done.

    Args:
        runs: Those that are done already are left as they are.
        out: The folder of all results.
        pool: Where they execute.
        watchers: Who is told.
        force: Whether finished runs are done again, from their first round.
        schedule: Makes of the runs that are to be done the order in which they begin, and the end.

    Returns:
        One result per run, in order.

    Raises:
        OutputUnwritable: Results cannot be written there.
        DamagedResult: A finished run's files are not what was written, and `force` is not set.
    """
    records.prepare(out)
    results = {run.id: Result(run, "cached") for run in runs if not force and finished(run, out)}
    cached = [result.run for result in results.values()]
    rest = [run for run in runs if run.id not in results]
    for each in runs:
        if force and not is_claimed(out / each.id):
            _forget_checkpoint(out, each)
    waiting = schedule(rest)
    collector = _Collector(out, watchers, results, waiting)
    for watcher in watchers:
        watcher.begin(rest, cached)
    if rest:
        pool(waiting, out, partial(execute, force=force), collector)
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

    def ended(self, run: Run, reason: str | None) -> None:
        if reason is None:
            self._learn(run)
        elif not self._is_recorded(run, reason):
            self._record_death(run, reason)
        _remove(progress_file(self.out, run))  # the pool has read it to its end
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
            records.fail(self.out, run.id, document(run, started=None), reason)
        except records.OutputUnwritable:  # then standard error is all there is to say it on
            return


def execute(run: Run, out: Path, report: Callable[[Report], None] | None = None, force: bool = False) -> Failure | None:
    """Do one run from start to end, or from its checkpoint on, and write its folder.

    Args:
        run: What to do.
        out: The folder of all results.
        report: Called after each round, besides the line in the progress file.
        force: Whether a finished result may be replaced.

    Returns:
        None, or why the run failed; that is recorded too. Nothing is done if another process does it, or has done it.

    Raises:
        OutputUnwritable: The run's folder cannot be written.
    """
    folder = records.prepare(out / run.id)
    try:
        with claim(folder):
            if not force and finished(run, out):
                return None  # by another process, since it was looked up
            return _execute(run, out, report, force)
    except Claimed as error:
        return Failure(str(error), "later")


def _execute(run: Run, out: Path, report: Callable[[Report], None] | None, force: bool) -> Failure | None:
    torch.set_num_threads(1)
    started = _now()
    progress = progress_file(out, run)
    _remove(progress)  # of a process that was killed

    def tell(news: Report) -> None:
        with suppress(OSError):  # of the run nothing is lost; on a full disk it will say so itself
            append(progress, news)
        if report is not None:
            report(news)

    described = document(run, started)
    try:
        with hire(run.workers, run.device, run.plugins, partial(_surroundings, run)) as crew:
            needed = _needed(run)
            described |= _describe_split(run, needed["splits"].labels, needed["split"])
            outcome = train(**needed, checkpoint=out / run.id / "checkpoint.pt", report=tell, crew=crew)
        described |= {"metrics": outcome.metrics, "cost": outcome.cost, "digest": outcome.digest}
        _write(out, run, described, outcome.rounds, _columns(outcome.counts), force)
    except records.OutputUnwritable:
        raise
    except Exception as error:  # a plug-in may raise anything; the other runs of the sweep go on
        reason = _reason(error)
        trace = None if isinstance(error, _EXPECTED) else traceback.format_exc()
        records.fail(out, run.id, {**described, "finished": _now(), "traceback": trace}, reason)
        if not isinstance(error, _GOES_ON):
            _forget_checkpoint(out, run)
        return Failure(reason, "alone" if isinstance(error, _MEMORY) else "never")
    _forget_checkpoint(out, run)
    return None


def _needed(run: Run) -> dict[str, Any]:
    """Read what training takes, as `train` calls it."""
    splits = _load(run.dataset, run.data_root)
    split = make_split(splits.labels, run.dataset.num_classes, run.setting, run.seed)
    source.require(run.dataset, run.data_root, split.clients)
    return {
        "algorithm": run.algorithm,
        "dataset": run.dataset,
        "splits": splits,
        "split": split,
        "setting": run.trained_by(),
        "seed": run.seed,
        "engine": run.engine,
        "precision": run.precision,
        "device": run.device,
        "weights": _weights(run),
    }


def _surroundings(run: Run) -> Surroundings:
    """Set up another process of a run's crew."""
    return surroundings(**_needed(run))


def document(run: Run, started: str | None) -> dict[str, Any]:
    """Describe a run before anything is known of its split, as run.json has it."""
    return {
        "protocol": run.protocol,
        "identity": run.identity(),
        "algorithm": name(run.algorithm),
        "call": repr(run.algorithm),
        "label": run.label,
        "preset": run.preset,
        "tier": run.algorithm.tier,
        "dataset": label(run.dataset),
        "imbalance": run.setting.imbalance,
        "alpha": run.setting.alpha,
        "seed": run.seed,
        "setting": asdict(run.setting),
        "overrides": run.overrides(),
        "engine": run.engine,
        "precision": run.precision,
        "device": run.device,
        "workers": run.workers,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(run.device),
        "commit": provenance.commit(),
        "started": started,
    }


def _describe_split(run: Run, labels: Labels, split: Split) -> dict[str, Any]:
    groups = group_classes(split.class_counts, run.setting.groups)
    described = describe(labels, split, run.dataset.num_classes, run.setting.groups)
    return {
        "fingerprint": split.fingerprint,
        "clients": len(split.clients),
        "class_counts": split.class_counts.tolist(),
        "groups": {group: classes.tolist() for group, classes in groups.items()},
        "heterogeneity": described["heterogeneity"],
    }


def _weights(run: Run) -> Tree | None:
    """Read the body that a run's models start from, if there is one."""
    if run.weights is None:
        return None
    dataset, setting = run.dataset, run.setting
    return weights.read(run.weights, build(setting.model, dataset.num_classes, dataset.image_shape, setting.norm))


@lru_cache(maxsize=1)
def _load(dataset: Dataset, root: Path) -> Splits:
    """Load a dataset, once for consecutive runs on it."""
    return source.load(dataset, root)


def _columns(tallies: Sequence[Tally]) -> dict[str, list[Any]]:
    """Lay tallies out as columns, a row for each model, client and class."""
    columns: dict[str, list[Any]] = {"round": [], "model": [], "client": [], "class": [], "correct": [], "total": []}
    for tally in tallies:
        n = tally.rows.shape[1]
        columns["round"] += [tally.round] * n
        columns["model"] += [tally.model] * n
        for column, cells in zip(("client", "class", "correct", "total"), tally.rows.tolist(), strict=True):
            columns[column] += cells
    return columns


def _write(out: Path, run: Run, described: dict[str, Any], rounds: Any, counts: Any, force: bool) -> None:
    try:
        records.write(out, run.id, {**described, "finished": _now()}, rounds, counts, replace=force)
    except records.AlreadyDone:  # another process did the same run meanwhile, with the same numbers
        return


def _forget_checkpoint(out: Path, run: Run) -> None:
    """Remove what only an unfinished run needs."""
    for file in (out / run.id).glob("checkpoint.*"):
        _remove(file)


def _remove(file: Path) -> None:
    """Remove a file if it is there; in a folder that cannot be written, the run will say what is wrong."""
    with suppress(OSError):
        file.unlink()


def _reason(error: Exception) -> str:
    """Say in a sentence what went wrong; for unexpected errors also where."""
    message = str(error).strip()
    first = message.splitlines()[0] if message else "no message"
    if isinstance(error, _EXPECTED):
        return first
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first} ({Path(frame.filename).name}, line {frame.lineno})"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
