"""Where work is done: runs and pieces of other work, one after the other in this process, or side by side on Ray.

Only this module imports ray.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from bench.claims import is_claimed
from bench.registry import load_plugin
from bench.rounds import Report
from bench.schedule import Schedule
from bench.settings import BadConfig
from bench.watch import Tail, Watcher, progress_file

if TYPE_CHECKING:
    from bench.config import Run

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Execute = Callable[["Run", Path, Callable[[Report], None] | None], "Failure | None"]
"""What is done with a run: (run, output directory, report) -> why it failed. It writes the run's folder."""

POLL_SECONDS = 0.2
ELSEWHERE_SECONDS = 2.0
"""Between two looks whether another process is still doing a run."""
DEATHS = 3
"""Workers that may die over one round of a run before it is given up."""
RUN_MEMORY_BYTES = 2 * 2**30
"""What one run may need on a CPU: bounds the default number of runs at once."""


@dataclass(frozen=True)
class Failure:
    """Why a run has not been finished."""

    reason: str
    """In a sentence."""
    again: Literal["never", "alone", "later"] = "never"
    """"alone": memory ran out, so that it may end with all of it; "later": another process is doing it."""


class WorkersDied(RuntimeError):
    """Processes that did a piece of work were killed, again and again."""


class Pool(Protocol):
    """A way to get runs done."""

    def __call__(self, schedule: Schedule, out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute the runs of a schedule and tell the watcher; one that fails does not keep the others."""


class InProcess:
    """Runs one after the other, here."""

    def __call__(self, schedule: Schedule, out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute all runs."""
        queue = _Queue(schedule, out, watcher)
        while not queue.is_over():
            run = queue.take(lambda run: True)
            if run is None:
                time.sleep(POLL_SECONDS)
                continue
            watcher.started(run)
            failure = _attempt(execute, run, out, lambda report, run=run: watcher.progressed(run, report))  # type: ignore[misc]
            if failure is not None and failure.again == "later":
                queue.wait_for_another(run)
            else:
                watcher.ended(run, None if failure is None else failure.reason)


class _Queue:
    """The runs that have not begun or begin again: what is next, and what another process is doing meanwhile."""

    def __init__(self, schedule: Schedule, out: Path, watcher: Watcher) -> None:
        self.schedule, self.out, self.watcher = schedule, out, watcher
        self.alone: set[str] = set()
        """Runs that begin only when nothing else is running."""
        self.elsewhere: list[Run] = []
        self._looked = time.monotonic()
        self._deaths: Counter[str] = Counter()
        self._rounds: dict[str, int] = {}

    def take(self, fits: Callable[[Run], bool]) -> Run | None:
        """Give the next run that fits and that nobody else is doing."""
        self._look_elsewhere()
        while (run := self.schedule.take(fits)) is not None:
            if not is_claimed(self.out / run.id):
                return run
            self.wait_for_another(run)
        return None

    def is_over(self) -> bool:
        """Tell whether no run will begin any more."""
        return self.schedule.exhausted() and not self.elsewhere

    def wait_for_another(self, run: Run) -> None:
        """Set a run aside while another process is doing it; what that leaves will be found then."""
        self.watcher.retried(run, "another process is doing it")
        self.elsewhere.append(run)

    def again(self, run: Run, failure: Failure) -> bool:
        """Have a run wait again whose worker had no memory left; not if it had all there is."""
        if failure.again == "later":
            self.wait_for_another(run)
            return True
        if failure.again == "never" or run.id in self.alone:
            return False
        self.alone.add(run.id)
        return self._delay(run, f"{failure.reason}; it will go on alone")

    def survives(self, run: Run, reason: str, completed: int) -> bool:
        """Have a run wait again whose worker died; not if too many have died since it last got on.

        Args:
            run: Which.
            reason: How the worker died.
            completed: Rounds that the run has completed.
        """
        if completed > self._rounds.get(run.id, 0):
            self._deaths[run.id] = 0
        self._rounds[run.id] = completed
        self._deaths[run.id] += 1
        return self._deaths[run.id] < DEATHS and self._delay(run, f"{reason}; another one will go on")

    def _delay(self, run: Run, why: str) -> bool:
        self.watcher.retried(run, why)
        self.schedule.put_back(run)
        return True

    def _look_elsewhere(self) -> None:
        now = time.monotonic()
        if not self.elsewhere or now - self._looked < ELSEWHERE_SECONDS:
            return
        self._looked = now
        for run in [run for run in self.elsewhere if not is_claimed(self.out / run.id)]:
            self.elsewhere.remove(run)
            self.schedule.put_back(run)


def _attempt(execute: Execute, run: Run, out: Path, report: Callable[[Report], None] | None) -> Failure | None:
    try:
        return execute(run, out, report)
    except OSError as error:  # its folder cannot be written, so nothing is recorded there
        return Failure(str(error))


def has_ray() -> bool:
    """Tell whether ray is installed, without importing it."""
    return importlib.util.find_spec("ray") is not None


class OnRay:
    """Runs side by side, each a Ray task of one core, or of a share of a GPU.

    Args:
        address: "local" starts Ray on this machine and stops it at the end; another address joins a running
            cluster, whose machines must have this package, the data, and the output directory, at the same paths.
        jobs: Runs at once; None for what the machine or cluster holds.
        device: "cpu" or "cuda".
        workers: Processes of each run; with more than one, a run starts the others itself.

    Raises:
        BadConfig: Ray is not installed, or nobody answers at the address.
    """

    def __init__(self, address: str = "local", jobs: int | None = None, device: str = "cpu", workers: int = 1) -> None:
        if not has_ray():
            raise BadConfig(f"--ray {address}: ray is not installed; install it (pip install ray) or use --ray off")
        self.address, self.jobs, self.device, self.workers = address, jobs, device, workers

    def __call__(self, schedule: Schedule, out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute all runs; an interruption stops the workers at once and keeps what they have saved."""
        ray = _quiet_ray()
        mine = not ray.is_initialized()
        # Ray prints what happened to workers on standard output, which is for results; the watcher is told anyway.
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            try:
                if mine:
                    self._start(ray, len(schedule))
                _Drive(ray, self.jobs, self.device, self.workers, schedule, out.resolve(), execute, watcher).go()
            finally:
                if mine:
                    ray.shutdown()

    def _start(self, ray: Any, runs: int) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address == "local":
            jobs = min(self.jobs or max(cores(self.device) // self.workers, 1), runs)
            options |= {"address": "local", "num_cpus": jobs * self.workers, "include_dashboard": False}
            # Results travel as files; models travel between the processes of one run.
            options |= {"object_store_memory": (100 if self.workers == 1 else 2000) * 2**20}
        else:
            options |= {"address": self.address}
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BadConfig(f"--ray {self.address}: Ray does not start or answer there ({error})") from error


class _Drive:
    """One sweep on Ray."""

    def __init__(
        self,
        ray: Any,
        jobs: int | None,
        device: str,
        workers: int,
        schedule: Schedule,
        out: Path,
        execute: Execute,
        watcher: Watcher,
    ) -> None:
        self.ray, self.device, self.schedule = ray, device, schedule
        self.out, self.execute, self.watcher = out, execute, watcher
        self.queue = _Queue(schedule, out, watcher)
        self.running: dict[Any, Run] = {}
        self.tails: dict[str, Tail] = {}
        self.completed: dict[str, int] = {}
        self.task = ray.remote(num_cpus=1, max_retries=0)(_work)
        self.resources: dict[str, float] = ray.cluster_resources()
        gpus = self.resources.get("GPU", 0.0) if device == "cuda" else 0.0
        cores = self.resources.get("CPU", 1.0)
        self.at_once = jobs or max(int((gpus or cores) // workers), 1)
        if workers > 1:  # each run waits for workers of its own: there must be room for those too
            self.at_once = max(min(self.at_once, int(cores // workers)), 1)
        self.share = min(1.0, gpus / (self.at_once * workers))
        self.largest = max((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)

    def go(self) -> None:
        """Execute all runs."""
        try:
            while True:
                while len(self.running) < self.at_once and (run := self.queue.take(self._fits)) is not None:
                    self._begin(run)
                if not self.running and self.queue.is_over():
                    return
                self._wait()
        except BaseException:
            for reference in self.running:
                self.ray.cancel(reference, force=True)
            raise

    def _begin(self, run: Run) -> None:
        alone = run.id in self.queue.alone
        options = {"num_gpus": 1.0 if alone and self.share else self._share(run)}
        if memory := min(self._peak(run), self.largest):
            options["memory"] = int(memory)
        payload = pickle.dumps((self.execute, run))
        reference = self.task.options(**options).remote(_sources(run), payload, str(self.out))
        self.running[reference] = run
        self.tails.setdefault(run.id, Tail(progress_file(self.out, run)))
        self.watcher.started(run)

    def _wait(self) -> None:
        """Wait a moment for news, and pass it on."""
        if not self.running:
            time.sleep(POLL_SECONDS)
            return
        finished, _ = self.ray.wait(list(self.running), timeout=POLL_SECONDS)
        for run in self.running.values():
            for report in self.tails[run.id].read():
                if report.round > self.completed.get(run.id, 0):  # and not done again after a worker's death
                    self.completed[run.id] = report.round
                    self.watcher.progressed(run, report)
        for reference in finished:
            self._end(self.running.pop(reference), reference)

    def _end(self, run: Run, reference: Any) -> None:
        """Take note of how a run's worker ended: the run goes on elsewhere if that may help."""
        errors = self.ray.exceptions
        try:
            failure: Failure | None = self.ray.get(reference)
        except errors.OutOfMemoryError:
            failure = Failure("the worker was stopped because memory ran out; fewer --jobs need less", "alone")
        except errors.RayTaskError as error:
            last = str(error).strip().splitlines()[-1]  # before it stands a trace
            failure = Failure(f"the worker failed: {last.partition('. ')[0]}")
        except errors.RayError as error:
            lost = isinstance(error, errors.NodeDiedError | errors.ObjectLostError)
            reason = "its machine was lost" if lost else "the worker died (killed, or out of memory)"
            if self.queue.survives(run, reason, self.completed.get(run.id, 0)):
                return
            failure = Failure(f"{reason}, {DEATHS} times in a row; the same command tries again")
        if failure is None or not self.queue.again(run, failure):
            self.watcher.ended(run, None if failure is None else failure.reason)

    def _fits(self, run: Run) -> bool:
        """Tell whether there is room for a run beside those that are running."""
        if not self.running:
            return True
        if run.id in self.queue.alone or any(other.id in self.queue.alone for other in self.running.values()):
            return False
        memory = self.resources.get("memory", 0.0)
        return self._peak(run) + sum(map(self._peak, self.running.values())) <= memory

    def _peak(self, run: Run) -> float:
        """Give the memory that a run will take in this machine's, as far as somebody has measured it."""
        forecast = self.schedule.forecasts.get(run.id)
        return 0.0 if forecast is None or self.device == "cuda" else forecast.peak_bytes or 0.0

    def _share(self, run: Run) -> float:
        """Give the share of a GPU that a run needs: by its measured memory, with a tenth to spare."""
        forecast = self.schedule.forecasts.get(run.id)
        if not self.share or forecast is None or not forecast.peak_bytes:
            return self.share
        import torch

        whole = torch.cuda.get_device_properties(0).total_memory
        return min(max(1.1 * forecast.peak_bytes / whole, 0.05), 1.0)


def spread(
    work: Callable[[Item], Answer], items: Sequence[Item], jobs: int | None, done: Callable[[Item, Answer], None]
) -> None:
    """Apply a function to items: in this process, or side by side as Ray tasks of one core on this machine.

    Args:
        work: Can be pickled; called again for an item whose worker died.
        items: Can be pickled.
        jobs: At once; None for what this machine holds. 1, or no Ray: in this process, in order.
        done: Told each item with its answer as they come, in this process.

    Raises:
        WorkersDied: The workers of one item died several times. Besides, whatever `work` raises; the others are stopped
        then, as they are at an interruption.
    """
    at_once = min(jobs or cores("cpu"), len(items))
    if at_once <= 1 or not has_ray():
        for item in items:
            done(item, work(item))
        return
    ray = _quiet_ray()
    mine = not ray.is_initialized()
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            if mine:
                OnRay(jobs=at_once)._start(ray, at_once)
            _spread_on(ray, work, items, at_once, done)
        finally:
            if mine:
                ray.shutdown()


def _spread_on(
    ray: Any,
    work: Callable[[Item], Answer],
    items: Sequence[Item],
    at_once: int,
    done: Callable[[Item, Answer], None],
) -> None:
    task = ray.remote(num_cpus=1, max_retries=2)(_apply)
    waiting = iter(items)
    running = {task.remote(work, item): item for item in islice(waiting, at_once)}
    try:
        while running:
            finished, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for reference in finished:
                item = running.pop(reference)
                running |= {task.remote(work, following): following for following in islice(waiting, 1)}
                try:
                    answer: Answer = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    raise WorkersDied(
                        "workers died again and again (killed, or out of memory); the same command goes on, and "
                        "fewer --jobs need less memory"
                    ) from error
                done(item, answer)
    except BaseException:
        for reference in running:
            ray.cancel(reference, force=True)
        raise


def _apply(work: Callable[[Item], Answer], item: Item) -> Answer:
    """Be what Ray takes for a function: it does not take callables of other kinds."""
    return work(item)


def _quiet_ray() -> Any:
    """Import ray without its notices."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    return ray


def cores(device: str) -> int:
    """Count the runs that this machine holds at once: cores, as far as memory goes; GPUs if they compute."""
    if device == "cuda":
        import torch

        return max(torch.cuda.device_count(), 1)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return here
    return max(min(here, memory // RUN_MEMORY_BYTES), 1)


def _sources(run: Run) -> list[tuple[str, bytes]]:
    """Read the plug-in files of a run: a worker of a cluster may not have them."""
    return [(path.name, path.read_bytes()) for path in run.plugins]


def _work(sources: list[tuple[str, bytes]], payload: bytes, out: str) -> Failure | None:
    """Execute one pickled run, in a worker; give why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        for file_name, source in sources:  # before unpickling, which needs their classes
            file = Path(folder) / file_name
            file.write_bytes(source)
            load_plugin(file)
        execute, run = pickle.loads(payload)
        return _attempt(execute, run, Path(out), None)
