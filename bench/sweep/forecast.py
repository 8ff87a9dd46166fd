"""What the runs of a sweep will take, in time and memory: from finished runs like them, else from a probe.

A probe is the real thing, cut short, in a process of its own: the first round, some in the middle, one evaluation, and
the last round with the evaluation that ends a run. The rest is arithmetic.

    start + first round + rounds between x (their seconds a step) x (their steps) + evaluations + last round

Of a method that does otherwise in some rounds than in others, rounds of each kind are tried.

What was probed is kept in OUT/forecast.json, by cell and machine: the next dry run is instant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import tree
from bench.algorithm import Exchange
from bench.dataset import DataDamaged, DataMissing, Dataset
from bench.files import source
from bench.plugins import blame
from bench.plugins.registry import plugin_files
from bench.protocol import provenance
from bench.protocol.identity import identify
from bench.results.record import stored
from bench.splits.split import make_split
from bench.sweep.apart import begin, told
from bench.sweep.run import Run
from bench.sweep.schedule import Forecast, average, cell, cell_of, order, wall_seconds
from bench.system.durable import put
from bench.training import memory, rounds
from bench.training.job import Job
from bench.training.states import IN_MEMORY_BYTES

FILE = "forecast.json"
_FORMAT = 1
_ENOUGH_SECONDS = 0.5
"""Rounds in the middle, and evaluations, are repeated until they have taken this long together."""
_QUICK_SECONDS = 5.0
_MOST_ROUNDS, _MOST_EVALUATIONS = 10, 3
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Total:
    """What several runs take together."""

    hours: float
    """Of cores, or of GPUs where they compute: each process of a run takes one."""
    wall_seconds: float
    """Until the last has ended, if so many go on at once and the longest begins first."""
    jobs: int
    unknown: int
    """Runs of which nothing is known, and which are not counted."""


def forecast(
    runs: Sequence[Run],
    out: Path,
    *,
    probe: bool = True,
    jobs: int = 1,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Forecast]:
    """Forecast what runs will take: from finished runs of this machine, else probes, else runs of other machines.

    Args:
        runs: Those with equal algorithm, dataset and setting, whatever their seed, are one cell with one forecast.
        out: The folder of all results; what is probed is kept there, if it can be written.
        probe: Whether what is not known is probed now; seconds a cell for small settings, minutes for large ones.
        jobs: Probes at once, as many as runs will be: they are in each other's way as much. On a GPU, one at a time.
        say: Told in sentences what is being probed, and which probes failed; these cells have no forecast.

    Returns:
        By a run's id, as far as there is one.
    """
    cells: dict[str, list[Run]] = {}
    for run in runs:
        cells.setdefault(cell(run), []).append(run)
    here, elsewhere = measured(out, cells)
    cached = _Cache(out / FILE)
    known = {key: forecast for key, (run, *_) in cells.items() if (forecast := cached.get(key, run.device))} | here
    unknown = {key: run for key, (run, *_) in cells.items() if key not in known}
    if probe and unknown:
        on_gpu = any(run.device != "cpu" for run in unknown.values())
        for key, forecast in _probe_all(unknown, 1 if on_gpu else jobs, say):
            cached.put(key, unknown[key], forecast)
            known[key] = forecast
    known = elsewhere | known
    return {run.id: known[key] for key, several in cells.items() if key in known for run in several}


def total(runs: Sequence[Run], forecasts: Mapping[str, Forecast], jobs: int) -> Total:
    """Sum up what runs take.

    Args:
        runs: Those that are to be done.
        forecasts: By id, as far as they are known.
        jobs: How many go on at once.
    """
    begun = [run for run in order(runs, forecasts) if run.id in forecasts]
    known = [forecasts[run.id].seconds for run in begun]
    return Total(
        hours=sum(seconds * run.workers for run, seconds in zip(begun, known, strict=True)) / 3600,
        wall_seconds=wall_seconds(known, jobs),
        jobs=jobs,
        unknown=len(runs) - len(known),
    )


# Runs that have been done -----------------------------------------------------------------------------------


def measured(out: Path, cells: Iterable[str]) -> tuple[dict[str, Forecast], dict[str, Forecast]]:
    """Look at what finished runs of some cells took.

    Returns:
        By cell: from runs on a machine like this one, and from runs on others.
    """
    wanted = set(cells)
    found: tuple[dict[str, list[Forecast]], dict[str, list[Forecast]]] = {}, {}
    for path in sorted(out.glob("*/run.json")) if wanted else []:
        with suppress(Exception):  # damaged: others say so, and stop
            document = json.loads(stored(path.parent))
            key = _cell_of_document(document)
            if document["status"] == "done" and key in wanted:
                here = document["hardware"] == provenance.hardware(document["device"])
                taken = _taken(document)
                found[not here].setdefault(key, []).append(taken)
    here, elsewhere = ({key: average(several) for key, several in part.items()} for part in found)
    return here, elsewhere


def _cell_of_document(document: Mapping[str, Any]) -> str:
    algorithm = document["identity"]["algorithm"]
    how = (document["protocol"], document["engine"], document["precision"], document["device"])
    return cell_of(algorithm, *how, document.get("workers", 1))


def _taken(document: Mapping[str, Any]) -> Forecast:
    """Say what a finished run took: its rounds, and what came before them where nothing interrupted it."""
    began, ended = (datetime.fromisoformat(document[key]).timestamp() for key in ("started", "finished"))
    seconds = float(document["cost"]["wall_seconds"])
    before = max(ended - began - seconds - 1.0, 0.0)  # both are whole seconds
    return Forecast(seconds=seconds + before, peak_bytes=document["cost"].get("peak_memory_bytes"), how="measured")


class _Cache:
    """Probes that were made earlier, by cell and machine."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, cell: str, device: str) -> Forecast | None:
        """Give a probe of this machine."""
        entry = self._read().get(self._key(cell, device))
        if not isinstance(entry, dict) or not isinstance(seconds := entry.get("seconds"), float | int):
            return None
        return Forecast(seconds=seconds, peak_bytes=entry.get("peak_bytes"), how="probed")

    def put(self, cell: str, run: Run, forecast: Forecast) -> None:
        """Keep a probe, if the folder can be written."""
        entry = {"seconds": forecast.seconds, "peak_bytes": forecast.peak_bytes, "of": str(run)}
        probes = {**self._read(), self._key(cell, run.device): entry}
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            put(self.file, (json.dumps({"format": _FORMAT, "probes": probes}, indent=2) + "\n").encode())

    def _read(self) -> dict[str, Any]:
        try:
            document = json.loads(self.file.read_bytes())
        except (OSError, ValueError):
            return {}
        probes = document.get("probes") if isinstance(document, dict) and document.get("format") == _FORMAT else None
        return probes if isinstance(probes, dict) else {}

    def _key(self, cell: str, device: str) -> str:
        return f"{cell} {identify({'hardware': provenance.hardware(device), 'torch': torch.__version__})}"


# Runs that are tried ----------------------------------------------------------------------------------------


def _probe_all(cells: Mapping[str, Run], jobs: int, say: Callable[[str], None]) -> Iterator[tuple[str, Forecast]]:
    """Probe a run of each cell, some at once, and give the forecasts as they come; an interruption stops all."""
    waiting = list(cells)
    going: dict[str, subprocess.Popen[bytes]] = {}
    lacking: set[Dataset] = set()
    try:
        while waiting or going:
            while waiting and len(going) < max(jobs, 1):
                key = waiting.pop(0)
                if cells[key].dataset not in lacking:
                    say(f"probing {_title(cells[key])} ({len(cells) - len(waiting)} of {len(cells)})")
                    going[key] = _start(cells[key])
            time.sleep(_POLL_SECONDS)
            for key in [key for key, process in going.items() if process.poll() is not None]:
                answer = _read(going.pop(key))
                if "error" not in answer:
                    yield key, Forecast(**answer, how="probed")
                elif cells[key].dataset not in lacking:
                    if answer.get("data"):
                        lacking.add(cells[key].dataset)
                    say(f"no forecast for {_title(cells[key])}: {answer['error']}")
    finally:
        for process in going.values():
            process.kill()
            process.communicate()


def _start(run: Run) -> subprocess.Popen[bytes]:
    """Start a process that does nothing else, so that its memory at the highest is the run's."""
    # an interrupt from the terminal is for the parent, which stops this
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return begin(__name__, run.plugins, run, **how)


def _read(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Read what a probe has said, which has ended."""
    said, _ = process.communicate()
    try:
        answer: dict[str, Any] = json.loads(said)
    except ValueError:
        return {"error": "its process died (killed, or out of memory)"}
    return answer


def _title(run: Run) -> str:
    return str(run).rpartition(", seed ")[0]


def answer() -> None:
    """Be the process of a probe: read a run from standard input, write its forecast to standard output as JSON."""
    with redirect_stdout(sys.stderr):  # whatever plug-ins print
        try:
            (run,) = told()
            found = probe(run)
            said: dict[str, Any] = {"seconds": found.seconds, "peak_bytes": found.peak_bytes}
        except (Exception, SystemExit) as error:  # a plug-in may raise anything
            ours = type(error).__module__.startswith("bench.")
            first = (str(error).strip().splitlines() or [""])[0]
            said = {"error": first if ours else blame.told(error, plugin_files())}
            said["data"] = isinstance(error, DataMissing | DataDamaged)
    os.write(sys.stdout.fileno(), json.dumps(said).encode())


def probe(run: Run) -> Forecast:
    """Do some rounds of a run and extrapolate, in this process, which should do nothing else before.

    A run that several processes will do is tried with one, and is taken to be shared evenly.

    Returns:
        The time of the whole run, and its memory at the highest.

    Raises:
        DataMissing: As for the run itself, which fails in the same way.
    """
    torch.set_num_threads(1)
    setting = run.trained_by()
    began = time.perf_counter()
    splits = source.load(run.dataset, run.data_root)
    if time.perf_counter() - began < _QUICK_SECONDS:  # once more: libraries are imported once a worker, not once a run
        began = time.perf_counter()
        splits = source.load(run.dataset, run.data_root)
    split = make_split(splits.labels, run.dataset.num_classes, setting, run.seed)
    source.require(run.dataset, run.data_root, [*split.clients, *run.reserved(splits.labels)])
    seldom = replace(setting, eval_every=setting.rounds)  # evaluations are timed apart from rounds
    job = Job(
        run.algorithm, run.dataset, splits, split, seldom, run.seed, run.engine, run.precision, run.device,
        run.read_weights(), run.reserve(splits), run.read_teacher(len(splits.train_y)),
    )  # fmt: skip
    going = rounds.Run(job)
    before = time.perf_counter() - began
    seconds = _timed(going.step)
    between = range(1, setting.rounds - 1)
    if between:
        seconds += _seconds_between(going, between)
    if evaluations := (setting.rounds - 1) // setting.eval_every:
        seconds += evaluations * _seconds_of_evaluation(going)
    if setting.rounds > 1:
        going.progress.round = setting.rounds - 1
        seconds += _timed(going.step)
    peak = memory.peak_memory(run.device)
    if peak is not None:
        peak += _states_to_come(going)
    return Forecast(seconds=before + seconds / run.workers, peak_bytes=peak, how="probed")


def _seconds_between(going: rounds.Run, between: range) -> float:
    """Time some of the rounds between first and last, and forecast all: clients differ in their number of steps."""
    alike: dict[tuple[Exchange, ...], list[int]] = {}
    for r in between:
        alike.setdefault(going.algorithm.exchanges(going.task_at(r)), []).append(r)
    return sum(_seconds_of_alike(going, those) for those in alike.values())


def _seconds_of_alike(going: rounds.Run, alike: Sequence[int]) -> float:
    """Time some rounds of one kind, and forecast all of them."""
    spent, of_a_step = 0.0, []
    for r in alike[:_MOST_ROUNDS]:
        going.progress.round = r
        seconds = _timed(going.step)
        spent += seconds
        of_a_step.append(seconds / _steps(going, r))
        if spent >= _ENOUGH_SECONDS:
            break
    return median(of_a_step) * sum(_steps(going, r) for r in alike)


def _steps(going: rounds.Run, r: int) -> float:
    """Count the batches of a round's cohort in one epoch."""
    population = going.population
    return float((population.sizes(population.cohort(r)) / going.setting.batch_size).ceil().sum())


def _seconds_of_evaluation(going: rounds.Run) -> float:
    task, times = going.task_at(going.progress.round - 1), list[float]()
    while sum(times) < _ENOUGH_SECONDS and len(times) < _MOST_EVALUATIONS:
        times.append(_timed(lambda: going.evaluate(task, going.progress.round, False)))
    return min(times)


def _states_to_come(going: rounds.Run) -> float:
    """Count the bytes that clients which took no part yet will keep in this process."""
    each = tree.nbytes(going.store.initial)
    if each * going.population.size > IN_MEMORY_BYTES:  # in a file
        return 0.0
    return float(each * (going.population.training - len(going.store.clients())))


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
