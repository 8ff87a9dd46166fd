"""One run from start to end, or from its checkpoint on: train, and write its folder."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from bench.algorithm import Misnamed
from bench.dataset import Dataset, Labels, Splits
from bench.files import source
from bench.plugins import blame
from bench.plugins.registry import call, plugin_files
from bench.protocol import provenance
from bench.protocol.settings import BadConfig
from bench.protocol.spelling import label, name
from bench.results import records, tables
from bench.results.claims import Claimed, claim
from bench.splits.split import Split, describe, group_classes, make_split
from bench.sweep.actors import hire
from bench.sweep.cluster import RayDied, WorkersDied
from bench.sweep.pool import Failure
from bench.sweep.run import Run
from bench.sweep.watch import append, progress_file
from bench.system import durable
from bench.training.crew import Surroundings
from bench.training.engine import CannotStack
from bench.training.job import Job, surroundings
from bench.training.outcome import Outcome, Report, Tally
from bench.training.rounds import BadCohort, Diverged, train
from bench.training.states import StatesUnwritable


class OtherNumbers(RuntimeError):
    """A finished run, done again for its models, has come out otherwise; the message says what to do."""


_EXPECTED = (
    BadCohort, BadConfig, CannotStack, Diverged, Misnamed, OtherNumbers, StatesUnwritable, WorkersDied,
    records.OutputUnwritable,
)  # fmt: skip
"""Errors whose message is a whole sentence."""
_GOES_ON = (MemoryError, torch.OutOfMemoryError, StatesUnwritable, WorkersDied)
"""Errors after which a run goes on from its checkpoint, with more memory or space."""
_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Errors that a run may not have when it has all memory for itself."""


def finished(run: Run, out: Path, models: bool = False) -> bool:
    """Tell whether a run's folder is complete, with its models if they are wanted.

    Raises:
        DamagedResult: It was, and its files are not what was written.
    """
    if records.status(out, run.id) != "done":
        return False
    return not models or records.read(out / run.id).has_models


def execute(
    run: Run,
    out: Path,
    report: Callable[[Report], None] | None = None,
    force: bool = False,
    keep_models: bool = False,
) -> Failure | None:
    """Do one run from start to end, or from its checkpoint on, and write its folder.

    Args:
        run: What to do.
        out: The folder of all results.
        report: Called after each round, besides the line in the progress file.
        force: Whether a finished result may be replaced.
        keep_models: Whether the models are written beside it; a finished result without them is replaced by itself.

    Returns:
        None, or why the run failed; that is recorded too. Nothing is done if another process does it, or has done it,
        and this is said instead.

    Raises:
        OutputUnwritable: The run's folder cannot be written.
        RayDied: Ray did, which had been started for the run's other processes; it goes on from its checkpoint.
    """
    folder = records.prepare(out / run.id)
    try:
        with claim(folder):
            if not force and finished(run, out, keep_models):
                return Failure("another process has done it", "found")  # since it was looked up
            return _execute(run, out, report, force, keep_models)
    except Claimed as error:
        return Failure(str(error), "later")


def _execute(
    run: Run, out: Path, report: Callable[[Report], None] | None, force: bool, keep_models: bool
) -> Failure | None:
    torch.set_num_threads(1)
    started = _now()
    progress = progress_file(out, run)
    durable.remove(progress)  # of a process that was killed

    def tell(news: Report) -> None:
        with suppress(OSError):  # of the run nothing is lost; on a full disk it will say so itself
            append(progress, news)
        if report is not None:
            report(news)

    described = document(run, started)
    again = not force and finished(run, out)
    models = out / run.id / "checkpoint.models" if keep_models else None
    try:
        with hire(run.workers, run.device, run.plugins, partial(_surroundings, run)) as crew:
            needed = job(run)
            described |= _describe_split(run, needed.splits.labels, needed.split)
            checkpoint = out / run.id / "checkpoint.pt"
            outcome = train(needed, checkpoint=checkpoint, report=tell, crew=crew, models=models)
        if again:
            _require_the_same(records.read(out / run.id), outcome.digest)
        described |= {"metrics": outcome.metrics, "cost": outcome.cost, "digest": outcome.digest}
        described |= {"tested": outcome.tested, "sent": outcome.sent}
        described |= {"open_set": outcome.open_set} if run.setting.open_classes else {}
        if models is not None:
            described["models"] = outcome.models
        _write(out, run, described, outcome, models, force or again)
    except (records.OutputUnwritable, RayDied):
        raise
    except (Exception, SystemExit) as error:  # a plug-in may raise anything; the other runs of the sweep go on
        reason = reason_of(error, _EXPECTED)
        trace = None if isinstance(error, _EXPECTED) else traceback.format_exc()
        records.fail(out, run.id, {**described, "finished": _now(), "traceback": trace}, reason)
        if not isinstance(error, _GOES_ON):
            forget_checkpoint(out, run)
        return Failure(reason, "alone" if isinstance(error, _MEMORY) else "never")
    forget_checkpoint(out, run)
    return None


def job(run: Run) -> Job:
    """Read what a run trains on."""
    splits = _load(run.dataset, run.data_root)
    split = make_split(splits.labels, run.dataset.num_classes, run.setting, run.seed)
    source.require(run.dataset, run.data_root, [*split.clients, *run.reserved(splits.labels)])
    return Job(
        run.algorithm, run.dataset, splits, split, run.trained_by(), run.seed, run.engine, run.precision, run.device,
        run.read_weights(), run.reserve(splits), run.read_teacher(len(splits.train_y)),
    )  # fmt: skip


def _surroundings(run: Run) -> Surroundings:
    """Set up another process of a run's crew."""
    return surroundings(job(run))


def document(run: Run, started: str | None) -> dict[str, Any]:
    """Describe a run before anything is known of its split, as run.json has it."""
    return {
        "protocol": run.protocol,
        "identity": run.identity(),
        "algorithm": name(run.algorithm),
        "call": call(run.algorithm),
        "label": run.label,
        "preset": run.preset,
        "tier": run.algorithm.tier,
        "dataset": label(run.dataset),
        "imbalance": run.setting.imbalance,
        "alpha": run.setting.alpha,
        "seed": run.seed,
        "setting": run.fields(),
        "overrides": run.overrides(),
        **({} if run.teacher is None else {"teacher": run.teacher.file.name}),
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
    groups = group_classes(split.class_counts, run.setting.groups, split.open)
    described = describe(labels, split, run.dataset.num_classes, run.setting.groups)
    return {
        "fingerprint": split.fingerprint,
        "clients": len(split.clients),
        "class_counts": split.class_counts.tolist(),
        "groups": {group: classes.tolist() for group, classes in groups.items()},
        "heterogeneity": described["heterogeneity"],
    }


@lru_cache(maxsize=1)
def _load(dataset: Dataset, root: Path) -> Splits:
    """Load a dataset, once for consecutive runs on it."""
    return source.load(dataset, root)


def _columns(tallies: Sequence[Tally], cells: Sequence[str]) -> dict[str, list[Any]]:
    """Lay tallies out as columns: round, model, and those of their rows."""
    columns: dict[str, list[Any]] = {column: [] for column in ("round", "model", *cells)}
    for tally in tallies:
        n = tally.rows.shape[1]
        columns["round"] += [tally.round] * n
        columns["model"] += [tally.model] * n
        for column, values in zip(cells, tally.rows.tolist(), strict=True):
            columns[column] += values
    return columns


def _require_the_same(stored: records.Record, digest: str) -> None:
    """Require that a finished run came out as before, so that kept models are those of its stored numbers."""
    if stored.document["digest"] != digest:
        raise OtherNumbers(
            "run again for its models, it came out with another digest than the stored result, as on another machine "
            "or with other versions; the result is left as it is, and --force --keep-models replaces it"
        )


def _write(
    out: Path, run: Run, described: dict[str, Any], outcome: Outcome, models: Path | None, replace: bool
) -> None:
    last = outcome.predictions[-1].round
    before = [tally for tally in outcome.counts if tally.round < last]  # those of the last follow from predictions
    counts = _columns(before, tables.COUNT_COLUMNS[2:])
    predictions = _columns(outcome.predictions, tables.PREDICTION_COLUMNS[2:])
    whole = {**described, "finished": _now()}
    try:
        records.write(out, run.id, whole, outcome.rounds, counts, predictions, models=models, replace=replace)
    except records.AlreadyDone:  # another process did the same run meanwhile, with the same numbers
        return


def reason_of(error: Exception | SystemExit, expected: tuple[type[Exception], ...]) -> str:
    """Say in a sentence what went wrong; for errors that are not expected what `blame.told` tells."""
    if isinstance(error, expected):
        return (str(error).strip() or "no message").splitlines()[0]
    return blame.told(error, plugin_files())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def forget_checkpoint(out: Path, run: Run) -> None:
    """Remove what only an unfinished run needs."""
    for file in (out / run.id).glob("checkpoint.*"):
        durable.remove(file)
