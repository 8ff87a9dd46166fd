"""Where work is done: runs and pieces of other work, one after the other in this process, or side by side on Ray.

Only this module imports ray.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bench.registry import load_plugin
from bench.rounds import Report
from bench.settings import BadConfig
from bench.watch import Tail, Watcher, progress_file

if TYPE_CHECKING:
    from bench.config import Run

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Execute = Callable[["Run", Path, Callable[[Report], None] | None], str | None]
"""What is done with a run: (run, output directory, report) -> why it failed. It writes the run's folder."""

POLL_SECONDS = 0.2
RUN_MEMORY_BYTES = 2 * 2**30
"""What one run may need on a CPU: bounds the default number of runs at once."""


class WorkersDied(RuntimeError):
    """Processes that did a piece of work were killed, again and again."""


class Pool(Protocol):
    """A way to get runs done."""

    def __call__(self, runs: Sequence[Run], out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute all runs and tell the watcher; one that fails does not keep the others."""


class InProcess:
    """Runs one after the other, here."""

    def __call__(self, runs: Sequence[Run], out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute all runs."""
        for run in runs:
            watcher.started(run)
            try:
                reason = execute(run, out, lambda report, run=run: watcher.progressed(run, report))  # type: ignore[misc]
            except OSError as error:  # its folder cannot be written, so nothing is recorded there
                reason = str(error)
            watcher.ended(run, reason)


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

    Raises:
        BadConfig: Ray is not installed, or nobody answers at the address.
    """

    def __init__(self, address: str = "local", jobs: int | None = None, device: str = "cpu") -> None:
        if not has_ray():
            raise BadConfig(f"--ray {address}: ray is not installed; install it (pip install ray) or use --ray off")
        self.address, self.jobs, self.device = address, jobs, device

    def __call__(self, runs: Sequence[Run], out: Path, execute: Execute, watcher: Watcher) -> None:
        """Execute all runs; an interruption stops the workers at once and keeps what they have saved."""
        ray = _quiet_ray()
        mine = not ray.is_initialized()
        # Ray prints what happened to workers on standard output, which is for results; the watcher is told anyway.
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            try:
                if mine:
                    self._start(ray, len(runs))
                self._drive(ray, runs, out.resolve(), execute, watcher)
            finally:
                if mine:
                    ray.shutdown()

    def _start(self, ray: Any, runs: int) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address == "local":
            jobs = min(self.jobs or _cores(self.device), runs)
            options |= {"address": "local", "num_cpus": jobs, "include_dashboard": False}
            options |= {"object_store_memory": 100 * 2**20}  # results travel as files
        else:
            options |= {"address": self.address}
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BadConfig(f"--ray {self.address}: Ray does not start or answer there ({error})") from error

    def _drive(self, ray: Any, runs: Sequence[Run], out: Path, execute: Execute, watcher: Watcher) -> None:
        gpus = ray.cluster_resources().get("GPU", 0.0) if self.device == "cuda" else 0.0
        at_once = self.jobs or int(gpus or ray.cluster_resources().get("CPU", 1.0))
        share = min(1.0, gpus / at_once)
        task = ray.remote(num_cpus=1, num_gpus=share, max_retries=0)(_work)
        waiting = list(runs)
        running: dict[Any, Run] = {}
        tails = {run.id: Tail(progress_file(out, run)) for run in runs}
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    run = waiting.pop(0)
                    running[task.remote(_sources(run), pickle.dumps((execute, run)), str(out))] = run
                    watcher.started(run)
                finished, _ = ray.wait(list(running), timeout=POLL_SECONDS)
                for run in running.values():
                    for report in tails[run.id].read():
                        watcher.progressed(run, report)
                for reference in finished:
                    watcher.ended(running.pop(reference), _reason(ray, reference))
        except BaseException:
            for reference in running:
                ray.cancel(reference, force=True)
            raise


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
    at_once = min(jobs or _cores("cpu"), len(items))
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


def _cores(device: str) -> int:
    """Count the runs that this machine holds at once: cores, as far as memory goes; GPUs if they compute."""
    if device == "cuda":
        import torch

        return max(torch.cuda.device_count(), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return cores
    return max(min(cores, memory // RUN_MEMORY_BYTES), 1)


def _sources(run: Run) -> list[tuple[str, bytes]]:
    """Read the plug-in files of a run: a worker of a cluster may not have them."""
    return [(path.name, path.read_bytes()) for path in run.plugins]


def _work(sources: list[tuple[str, bytes]], payload: bytes, out: str) -> str | None:
    """Execute one pickled run, in a worker; give why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        for file_name, source in sources:  # before unpickling, which needs their classes
            file = Path(folder) / file_name
            file.write_bytes(source)
            load_plugin(file)
        execute, run = pickle.loads(payload)
        reason: str | None = execute(run, Path(out), None)
        return reason


def _reason(ray: Any, reference: Any) -> str | None:
    """Give a finished task's answer, or say in a sentence why it gave none."""
    try:
        reason: str | None = ray.get(reference)
    except ray.exceptions.OutOfMemoryError:
        return "the worker was stopped because memory ran out; fewer --jobs need less"
    except ray.exceptions.WorkerCrashedError:
        return "the worker died (killed, or out of memory); the same command tries again"
    except ray.exceptions.RayError as error:
        last = str(error).strip().splitlines()[-1]  # before it may stand a trace
        return f"the worker failed: {last.partition('. ')[0]}"
    return reason
