"""Ray: how it is started and ended, what it needs of us, and pieces of work done side by side on it."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from bench.plugins import cells
from bench.plugins.registry import load_plugin
from bench.protocol.settings import BadConfig

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Payload = tuple[list[tuple[str, bytes]], bytes]
"""Names and contents of plug-in files, and what is pickled."""

RUN_MEMORY_BYTES = 2 * 2**30
"""What one run may need on a CPU: bounds the default number of runs at once."""
MODELS_BYTES = 2000 * 2**20
"""Shared memory for processes that hand each other models; where they write their results to files, less will do."""
_LITTLE_BYTES = 100 * 2**20
_POLL_SECONDS = 0.2


class WorkersDied(RuntimeError):
    """Processes that did a piece of work were killed, again and again."""


def has_ray() -> bool:
    """Tell whether ray is installed, without importing it."""
    return importlib.util.find_spec("ray") is not None


def need_ray(option: str, otherwise: str) -> None:
    """Make sure that ray is installed.

    Args:
        option: What asked for it, as it was typed.
        otherwise: What to do without it.

    Raises:
        BadConfig: It is not.
    """
    if not has_ray():
        raise BadConfig(f"{option}: ray is not installed; install it (pip install ray) or {otherwise}")


@contextmanager
def session(cpus: int, address: str = "local", shared_bytes: int = _LITTLE_BYTES) -> Iterator[Any]:
    """Give Ray's module, connected to a cluster; what was started or joined here is left at the end.

    Nothing that Ray prints is seen meanwhile: it says on standard output, which is for results, what happened to its
    workers, and whoever has them work says that anyway. Within a task of Ray nothing is started, joined or hidden.

    Args:
        cpus: Cores to start Ray with.
        address: "local" starts it on this machine; another one joins a running cluster, whatever `cpus` says.
        shared_bytes: Memory for what its processes hand each other.

    Raises:
        BadConfig: Nobody answers at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "address": address}
    if address == "local":
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": shared_bytes}
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            try:
                ended_by = signal.getsignal(signal.SIGTERM)
                ray.init(**options)
                if callable(ended_by) and threading.current_thread() is threading.main_thread():
                    # Ray has put its own there, which ends this process at once.
                    signal.signal(signal.SIGTERM, ended_by)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise BadConfig(f"--ray {address}: Ray does not start or answer there ({error})") from error
            yield ray
        finally:
            ray.shutdown()


def import_ray() -> Any:
    """Import ray without its notices."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # in a notebook without widgets
        import ray
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)

    return ray


def packed(plugins: Sequence[Path], value: Any) -> Payload:
    """Pickle something for a worker, with the plug-in files that it takes: on a cluster a worker may not have them."""
    return [(file.name, _source(file)) for file in plugins], cells.packed(value)


def _source(plugin: Path) -> bytes:
    """Read a plug-in file where this process has it from: in a worker that is not where the command found it."""
    module = sys.modules.get(f"bench_plugin_{plugin.stem}")
    return Path(plugin if module is None or module.__file__ is None else module.__file__).read_bytes()


@contextmanager
def unpacked(payload: Payload) -> Iterator[Any]:
    """Give what was packed, in a worker; the files of its plug-ins are there as long."""
    sources, value = payload
    with tempfile.TemporaryDirectory() as folder:
        for file_name, source in sources:  # before unpickling, which needs their classes
            file = Path(folder) / file_name
            file.write_bytes(source)
            load_plugin(file)
        yield cells.unpacked(value)


def cores(device: str) -> int:
    """Count the runs that this machine holds at once: cores, as far as memory goes; GPUs if they compute."""
    if device == "cuda":
        import torch

        return max(torch.cuda.device_count(), 1)
    if device == "mps":
        return 1
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return here
    return max(min(here, memory // RUN_MEMORY_BYTES), 1)


@cache
def gpu_bytes() -> float | None:
    """Give the memory of a GPU of this machine, the first; None if there is none."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


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
    with session(at_once) as ray:
        _spread_on(ray, work, items, at_once, done)


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
            finished, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
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
