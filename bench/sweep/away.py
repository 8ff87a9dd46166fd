"""Runs on machines that share nothing with this one but Ray: what they take along, and what comes home.

A run takes along what its folder here holds, its checkpoint above all. A worker does it in a folder of its own, and
sends home each round's news, each checkpoint that is due, and in the end the whole folder. Only the driver writes
results; it claims a run's folder as long as the run is away.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.dataset import DataDamaged, DataMissing
from bench.protocol.settings import BadConfig
from bench.results import records, storage
from bench.results.claims import FILE as CLAIM
from bench.results.claims import claim
from bench.results.record import DOCUMENT, MODELS
from bench.sweep import scratch
from bench.sweep.cluster import Payload, unpacked
from bench.sweep.freight import Freight, Lacks, located, packed
from bench.sweep.pool import Failure, attempt
from bench.sweep.watch import PROGRESS, append, progress_file
from bench.system import durable
from bench.training.outcome import Report

if TYPE_CHECKING:
    from bench.sweep.run import Run

PREFIX = "bench-run-"
_CHECKPOINT = "checkpoint."
"""Begins the names of what only an unfinished run needs."""
_UNFINISHED_MODELS = f"{_CHECKPOINT}models"
_SHARE = 20
"""Sending checkpoints home takes at most one part in so many of a run's time, and one second."""

Files = dict[str, bytes]
"""Of a run's folder: path below it to content."""


@dataclass(frozen=True)
class Letter:
    """News of a run that is away."""

    run: str
    report: Report
    checkpoint: Files
    """Empty where none was due."""


@dataclass(frozen=True)
class Returned:
    """A run that has come home."""

    failure: Failure | None
    files: Files
    """All that its folder holds."""
    fetched: int = 0
    """Bytes of data that its machine sent for."""
    lacks: bool = False
    """Whether it could not begin, as its machine has not the data."""


class Postbox:
    """An actor beside the driver, to whom workers write."""

    def __init__(self) -> None:
        self._letters: list[Letter] = []

    def put(self, letter: Letter) -> None:
        """Take a letter."""
        self._letters.append(letter)

    def take(self) -> list[Letter]:
        """Give the letters since the last time, in the order in which they came."""
        letters, self._letters = self._letters, []
        return letters


# At home ----------------------------------------------------------------------------------------------------


@dataclass
class Home:
    """Where runs come home to: the folder of all results, which the driver alone writes.

    Args:
        ray: The module, connected.
        out: The folder.
    """

    ray: Any
    out: Path
    travelled: dict[str, int] = field(default_factory=lambda: {"results": 0, "data": 0})
    """Bytes of files of runs, there and back, and of data."""
    _freight: dict[tuple[object, ...], Freight] = field(default_factory=dict)
    _claims: dict[str, ExitStack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        beside = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)
        actor = self.ray.remote(num_cpus=0)(Postbox).options(scheduling_strategy=beside)
        self.postbox = actor.remote()

    def sends(self, run: Run) -> tuple[Files, Freight | None]:
        """Claim a run's folder, and give what the run takes along: files, and data that its machine may send for.

        Raises:
            Claimed: Another process is doing it.
            OutputUnwritable: The folder cannot be written.
        """
        folder, held = records.prepare(self.out / run.id), ExitStack()
        held.enter_context(claim(folder))
        self._claims[run.id] = held
        durable.remove(progress_file(self.out, run))  # of a worker that was killed
        taken = contents(folder, models=False)
        self.travelled["results"] += size(taken)
        return taken, self._freight.get(_read(run))

    def _packs(self, run: Run) -> Failure:
        """Have data sent along with this run, and with others that read the same; say so, or why they cannot be."""
        try:
            if _read(run) not in self._freight:
                self._freight[_read(run)] = packed(self.ray, run)
        except (BadConfig, DataMissing, DataDamaged) as error:
            return Failure(str(error))
        return Failure("its machine lacks the data; they go along now", "sent")

    def collect(self) -> None:
        """Write down what workers have written home."""
        for letter in self.ray.get(self.postbox.take.remote()):
            if letter.run in self._claims:  # else it was given up, and a letter of its has come late
                folder = self.out / letter.run
                with suppress(OSError):  # a full disk: a later one will do, or the run's end will say so
                    place_checkpoint(folder, letter.checkpoint)
                    append(folder / PROGRESS, letter.report)
                self.travelled["results"] += size(letter.checkpoint)

    def receives(self, run: Run, returned: Returned) -> Failure | None:
        """Put a run's folder in its place; give why it has not been finished."""
        if returned.lacks:
            return self._packs(run)
        self.collect()
        self.travelled["results"] += size(returned.files)
        self.travelled["data"] += returned.fetched
        try:
            place(self.out / run.id, returned.files)
        except OSError as error:
            return Failure(str(error))
        finally:
            self.loses(run)
        return returned.failure

    def loses(self, run: Run) -> None:
        """Give back the claim on the folder of a run that will not come home."""
        if (held := self._claims.pop(run.id, None)) is not None:
            held.close()


def _read(run: Run) -> tuple[object, ...]:
    """Name what a run reads of its dataset."""
    setting = run.setting
    return run.dataset, run.data_root, setting.profile, setting.imbalance, setting.auxiliary


def contents(folder: Path, models: bool = True) -> Files:
    """Read what a run's folder holds: what tells of its progress and who is at it aside, and models that are not
    finished.
    """
    found: Files = {}
    for path in sorted(folder.rglob("*")):
        first, *_ = path.relative_to(folder).parts
        left = first in (CLAIM, PROGRESS, _UNFINISHED_MODELS) or first.startswith(".")
        if path.is_file() and not path.is_symlink() and not left and (models or first != MODELS):
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def place(folder: Path, files: Files) -> None:
    """Have a run's folder hold these files, whole or not at all; of a checkpoint that they lack nothing is left.

    Raises:
        OSError: They cannot be written.
    """
    kept = {name: content for name, content in files.items() if not name.startswith((_CHECKPOINT, f"{MODELS}/"))}
    place_checkpoint(folder, {name: content for name, content in files.items() if name.startswith(_CHECKPOINT)})
    if DOCUMENT in kept:
        models = None
        if any(name.startswith(f"{MODELS}/") for name in files):
            models = folder / _UNFINISHED_MODELS
            durable.remove(models)
            for name in files.keys() - kept.keys():
                if name.startswith(f"{MODELS}/"):
                    file = models / name.removeprefix(f"{MODELS}/")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    durable.write(file, files[name])
        others = {name: content for name, content in kept.items() if name != DOCUMENT}
        storage.place(folder, {**others, DOCUMENT: kept[DOCUMENT]}, {MODELS: models})
    for left in folder.glob(f"{_CHECKPOINT}*"):
        if left.name not in files:
            durable.remove(left)


def place_checkpoint(folder: Path, files: Files) -> None:
    """Put a checkpoint in its place, its last file last: without that, or with an older one, a run begins anew.

    Raises:
        OSError: It cannot be written.
    """
    for name in sorted(files, key=lambda name: (name.endswith(".pt"), name)):
        durable.put(folder / name, files[name])


def size(files: Files) -> int:
    """Count the bytes of files."""
    return sum(map(len, files.values()))


# Away -------------------------------------------------------------------------------------------------------


def work(payload: Payload, taken: Files, freight: Freight | None, postbox: Any) -> Returned:
    """Do one run, in a worker; what has no place here goes home with it."""
    where = Path(os.environ.get("BENCH_SCRATCH") or tempfile.gettempdir())
    with unpacked(payload) as (execute, run), scratch.folder(where, PREFIX) as out:
        folder = out / run.id
        try:
            run, fetched = located(run, freight)
        except Lacks:
            return Returned(None, {}, lacks=True)
        for name, content in taken.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            durable.write(folder / name, content)
        failure = attempt(execute, run, out, _Courier(postbox, run.id, folder).report)
        return Returned(failure, contents(folder), fetched)


class _Courier:
    """Writes home, from a run's process and between its rounds, so that no file changes meanwhile."""

    def __init__(self, postbox: Any, run: str, folder: Path) -> None:
        self.postbox, self.run, self.folder = postbox, run, folder
        self.stamp, self.due = self._stamp(), 0.0

    def report(self, news: Report) -> None:
        """Write home; nobody there, or no way there, is no reason to end."""
        import ray

        started, stamp = time.monotonic(), self._stamp()
        due = stamp != self.stamp and started >= self.due
        checkpoint = contents(self.folder) if due else {}
        checkpoint = {name: content for name, content in checkpoint.items() if name.startswith(_CHECKPOINT)}
        with suppress(ray.exceptions.RayError):
            reference = self.postbox.put.remote(Letter(self.run, news, checkpoint))
            if due:
                ray.get(reference)  # a worker that dies takes along what is not yet there
                self.stamp, now = stamp, time.monotonic()
                self.due = now + 1.0 + _SHARE * (now - started)

    def _stamp(self) -> int | None:
        try:
            return (self.folder / f"{_CHECKPOINT}pt").stat().st_mtime_ns
        except OSError:
            return None
