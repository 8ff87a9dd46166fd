"""Runs side by side on Ray: as many as fit, and again those whose workers died."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.results.claims import Claimed
from bench.sweep.away import Home, work
from bench.sweep.cluster import (
    MODELS_BYTES,
    Payload,
    RayDied,
    Session,
    cores,
    gpu_bytes,
    lasting,
    need_ray,
    packed,
    unpacked,
)
from bench.sweep.pool import DEATHS, GOES_ON, POLL_SECONDS, Execute, Failure, Queue, attempt
from bench.sweep.schedule import Schedule
from bench.sweep.watch import Tail, Watcher, progress_file

if TYPE_CHECKING:
    from bench.sweep.run import Run

_SPARE = 1.1
"""Of the measured memory of a run's tensors: what a GPU sets aside for them is more than they are."""
_CONTEXT_BYTES = 600 * 2**20
"""What a process takes of a GPU besides its tensors."""
_ROUNDING = 1e-9


class OnRay:
    """Runs side by side, each a Ray task of one core, or of a share of a GPU.

    Args:
        address: "local" starts Ray on this machine and stops it at the end; another address joins a running
            cluster. Data that its machines lack are sent there.
        jobs: Runs at once; None for what the machine or cluster holds. A GPU holds as many as their measured memory
            allows, and one of which nothing is known.
        device: "cpu" or "cuda".
        workers: Processes of each run; with more than one, a run starts the others itself.
        shared_out: Whether the machines of a cluster write results themselves, to the folder that is at the same path
            on all; else their files come home by Ray (`bench.sweep.away`).
        ship: Whether they are sent this package; else they have it.
        tell: Told in a sentence what has travelled between machines.

    Raises:
        BadConfig: Ray is not installed, or nobody answers at the address.
    """

    def __init__(
        self,
        address: str = "local",
        jobs: int | None = None,
        device: str = "cpu",
        workers: int = 1,
        shared_out: bool = False,
        ship: bool = True,
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        need_ray(f"--ray {address}", "use --ray off")
        self.address, self.jobs, self.device, self.workers = address, jobs, device, workers
        self.away = address != "local" and not shared_out
        self.ship, self.tell = address != "local" and ship, tell

    def __call__(self, schedule: Schedule, out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute all runs; an interruption stops the workers at once and keeps what they have saved.

        Raises:
            RayDied: Ray did, again and again; the runs that were going on wait.
        """
        shared = {} if self.workers == 1 else {"shared_bytes": MODELS_BYTES}
        drive = _Drive(self.jobs, self.device, self.workers, schedule, out.resolve(), execute, watcher, self.away)
        # that Ray died is told of each run that waits for it
        lasting(drive.go, self.cpus(len(schedule)), self.address, **shared, ship=self.ship, tell=lambda sentence: None)
        if drive.home is not None:
            sent = (f"{nbytes / 1e6:,.1f} MB of {what}" for what, nbytes in drive.home.travelled.items())
            self.tell(f"between machines travelled {' and '.join(sent)}")

    def cpus(self, runs: int) -> int:
        """Count the cores that Ray is started with for so many runs, if it is started here."""
        shared = self.workers == 1 and self.device == "cuda"  # runs share GPUs, as far as their memory goes
        held = cores("cpu" if shared else self.device)
        return self.workers * min(self.jobs or max(held // self.workers, 1), runs)


class _Drive:
    """One sweep on Ray, or on several, one after the other, if they die."""

    def __init__(
        self,
        jobs: int | None,
        device: str,
        workers: int,
        schedule: Schedule,
        out: Path,
        execute: Execute,
        watcher: Watcher,
        away: bool = False,
    ) -> None:
        self.jobs, self.device, self.workers, self.schedule = jobs, device, workers, schedule
        self.out, self.execute, self.watcher, self.away = out, execute, watcher, away
        self.home: Home | None = None
        self.queue = Queue(schedule, out, watcher)
        self.running: dict[Any, Run] = {}
        self.tails: dict[str, Tail] = {}
        self.completed: dict[str, int] = {}

    def go(self, here: Session) -> None:
        """Execute all runs that are left.

        Raises:
            RayDied: Ray did; the runs that were going on wait.
        """
        self._enter(here)
        try:
            while True:
                here.require_alive()
                while len(self.running) < self.at_once and (run := self.queue.take(self._fits)) is not None:
                    self._begin(run)
                if not self.running and self.queue.is_over():
                    return
                self._wait()
        except RayDied as error:
            for run in self.running.values():
                self.queue.wait(run, f"{error}; {GOES_ON}")
            self.running.clear()
            raise
        except BaseException:
            for reference in self.running:
                self.ray.cancel(reference, force=True)
            raise
        finally:
            if self.home is not None:
                for run in self.running.values():
                    self.home.loses(run)

    def _enter(self, here: Session) -> None:
        """See what a cluster has."""
        self.here, self.ray = here, here.ray
        self.home = Home(here.ray, self.out) if self.away else None
        self.task = self.ray.remote(num_cpus=1, max_retries=0)(_work if self.home is None else work)
        self.resources: dict[str, float] = self.ray.cluster_resources()
        gpus = self.resources.get("GPU", 0.0) if self.device == "cuda" else 0.0
        cores = self.resources.get("CPU", 1.0)
        self.room = [1.0] * int(gpus) if self.workers == 1 else []
        """What is left of each GPU, as runs are thought to lie there; Ray places them."""
        self.places: dict[str, tuple[int, float]] = {}
        """Of the runs that are going on: on which GPU, and how much of it."""
        self.at_once = self.jobs or max(int((cores if self.room else gpus or cores) // self.workers), 1)
        if self.workers > 1:  # each run waits for workers of its own: there must be room for those too
            self.at_once = max(min(self.at_once, int(cores // self.workers)), 1)
        each_alone = self.room and self.jobs is None
        together = 1 if each_alone else math.ceil(self.at_once * self.workers / gpus) if gpus else 0
        self.share = 1 / together if together else 0.0
        """Of a GPU, for each process of a run of which nobody knows how much memory it takes."""
        nodes = [node["Resources"].get("memory", 0.0) for node in self.ray.nodes() if node["Alive"]]
        self.largest = max(nodes, default=0.0)

    def _begin(self, run: Run) -> None:
        """Have a run done, unless another process is doing it, or has done it, since it was looked up."""
        taken = (str(self.out),) if self.home is None else self._sent(self.home, run)
        if taken is None:
            return
        alone = run.id in self.queue.alone
        share = 1.0 if alone and self.share else self._share(run)
        options = {"num_gpus": share}
        if self.room:  # where it fits best
            card = min(range(len(self.room)), key=lambda card: (self.room[card] + _ROUNDING < share, self.room[card]))
            self.room[card] -= share
            self.places[run.id] = card, share
        if memory := min(self._peak(run), self.largest):
            options["memory"] = int(memory)
        payload = packed(run.plugins, (self.execute, run))
        reference = self.task.options(**options).remote(payload, *taken)
        self.running[reference] = run
        self.tails.setdefault(run.id, Tail(progress_file(self.out, run)))
        self.watcher.started(run)

    def _sent(self, home: Home, run: Run) -> tuple[Any, ...] | None:
        """Give what a run takes along from here; None: it does not begin."""
        try:
            taken = home.sends(run)
        except Claimed:
            self.queue.wait_for_another(run)
            return None
        except OSError as error:
            self.watcher.started(run)
            self.watcher.ended(run, str(error))
            return None
        if not self.queue.has_been_done(run):
            return *taken, home.postbox
        home.loses(run)
        self.queue.find(run)
        return None

    def _wait(self) -> None:
        """Wait a moment for news, and pass it on."""
        if not self.running:
            time.sleep(POLL_SECONDS)
            return
        finished, _ = self.ray.wait(list(self.running), timeout=POLL_SECONDS)
        if self.home is not None:
            self.home.collect()
        for run in self.running.values():
            for report in self.tails[run.id].read():
                completed = self.completed.get(run.id, 0)
                if report.round > completed or report.anew is not None:  # else done again after a worker's death
                    self.completed[run.id] = max(report.round, completed)
                    self.watcher.progressed(run, report)
        for reference in finished:
            self._end(self.running.pop(reference), reference)

    def _end(self, run: Run, reference: Any) -> None:
        """Take note of how a run's worker ended: the run goes on elsewhere if that may help."""
        if (place := self.places.pop(run.id, None)) is not None:
            self.room[place[0]] += place[1]
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(reference)
            failure: Failure | None = answer if self.home is None else self.home.receives(run, answer)
        except errors.OutOfMemoryError:
            failure = Failure("the worker was stopped because memory ran out; fewer --jobs need less", "alone")
        except errors.RayTaskError as error:
            last = str(error).strip().splitlines()[-1]  # before it stands a trace
            failure = Failure(f"the worker failed: {last.partition('. ')[0]}")
        except errors.RayError as error:
            self._blame(run, reference, error)
            lost = isinstance(error, errors.NodeDiedError | errors.ObjectLostError)
            reason = "its machine was lost" if lost else "the worker died (killed, or out of memory)"
            if self.queue.survives(run, reason, self.completed.get(run.id, 0)):
                return
            failure = Failure(f"{reason}, {DEATHS} times in a row; the same command tries again")
        finally:
            if self.home is not None:
                self.home.loses(run)
        if failure is not None:
            self._blame(run, reference)
        if failure is None or not self.queue.again(run, failure):
            self.watcher.ended(run, None if failure is None else failure.reason)

    def _blame(self, run: Run, reference: Any, error: Exception | None = None) -> None:
        """Make sure that a run failed by itself.

        Raises:
            RayDied: Ray did, and what it made of the run says nothing: it is still going on.
        """
        try:
            self.here.require_alive(error)
        except RayDied:
            self.running[reference] = run
            raise

    def _fits(self, run: Run) -> bool:
        """Tell whether there is room for a run beside those that are running."""
        if not self.running:
            return True
        if run.id in self.queue.alone or any(other.id in self.queue.alone for other in self.running.values()):
            return False
        if self.room:
            return self._share(run) <= max(self.room) + _ROUNDING
        memory = self.resources.get("memory", 0.0)
        return self._peak(run) + sum(map(self._peak, self.running.values())) <= memory

    def _peak(self, run: Run) -> float:
        """Give the memory that a run will take in this machine's, as far as somebody has measured it."""
        forecast = self.schedule.forecasts.get(run.id)
        return 0.0 if forecast is None or self.device == "cuda" else forecast.peak_bytes or 0.0

    def _share(self, run: Run) -> float:
        """Give the share of a GPU that a process of a run needs: by its measured memory, as far as that is known."""
        forecast = self.schedule.forecasts.get(run.id)
        if not self.room or forecast is None or not forecast.peak_bytes:
            return self.share
        whole = gpu_bytes()
        return self.share if whole is None else min((_SPARE * forecast.peak_bytes + _CONTEXT_BYTES) / whole, 1.0)


def _work(payload: Payload, out: str) -> Failure | None:
    """Execute one run, in a worker; give why it failed."""
    with unpacked(payload) as (execute, run):
        return attempt(execute, run, Path(out), None)
