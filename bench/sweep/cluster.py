"""Ray: how it is started and ended, what it needs of us, and pieces of work done side by side on it."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from bench.plugins import cells
from bench.plugins.registry import load_plugin
from bench.protocol.settings import BadConfig
from bench.sweep import code, limits, local_ray

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
_ANSWER_SECONDS = 5.0
DEATHS_OF_RAY = 3
"""How often Ray is started again for one piece of work."""
_SURELY_SECONDS, _PERHAPS_SECONDS = 10.0, 1.0
"""In which Ray's death shows, after an error that says so; and after another one of a worker's death."""


class WorkersDied(RuntimeError):
    """Processes that did a piece of work were killed, again and again."""


class RayDied(RuntimeError):
    """Ray itself is dead, on this machine and where we started it; that says nothing of the work it did."""


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
def session(
    cpus: int, address: str = "local", shared_bytes: int = _LITTLE_BYTES, ship: bool = False
) -> Iterator[Session]:
    """Give Ray, connected to a cluster; what was started or joined here is left at the end.

    Nothing that Ray prints is seen meanwhile: it says on standard output, which is for results, what happened to its
    workers, and whoever has them work says that anyway. Within a task of Ray nothing is started, joined or hidden.

    Args:
        cpus: Cores to start Ray with.
        address: "local" starts it on this machine, where it is private; another one joins a running cluster, whatever
            `cpus` says, with the user's own token.
        shared_bytes: Memory for what its processes hand each other.
        ship: Whether the machines of a cluster are sent this package; else they have it.

    Raises:
        BadConfig: Nobody answers at the address.
        RayDied: It does not start here.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield Session(ray)
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        if address != "local":
            try:
                with code.staged() if ship else nullcontext() as package:
                    shipped = {} if package is None else {"runtime_env": {"py_modules": [str(package)]}}
                    _init(ray, quiet | shipped | {"address": address})
                yield Session(ray)
            finally:
                ray.shutdown()
            return
        ours = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": shared_bytes}
        with local_ray.home() as home:
            try:
                _init(ray, quiet | ours | {"address": address, "_temp_dir": str(home.temporary)})
                home.listen()
                yield Session(ray, home)
            finally:
                if not home.is_alive():  # or Ray would wait for what is dead
                    home.clear()
                ray.shutdown()


@dataclass(frozen=True)
class Session:
    """Ray, connected to a cluster."""

    ray: Any
    """The module."""
    home: local_ray.Home | None = None
    """Of a Ray that was started here."""

    def require_alive(self, after: Exception | None = None) -> None:
        """Make sure that the Ray that was started here lives; of another one nothing is known.

        Args:
            after: Ray's error of a worker that died: of its own, or because Ray is dying, which shows a moment later.

        Raises:
            RayDied: It does not.
        """
        sure = type(after).__name__ in ("NodeDiedError", "LocalRayletDiedError")
        patience = 0.0 if after is None else _SURELY_SECONDS if sure else _PERHAPS_SECONDS
        if self.home is not None and not self.home.is_alive(patience):
            raise RayDied("Ray's own processes died (killed, or out of memory)")


def lasting(
    work: Callable[[Session], Answer],
    cpus: int,
    address: str = "local",
    shared_bytes: int = _LITTLE_BYTES,
    ship: bool = False,
    tell: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr),
) -> Answer:
    """Have work done on Ray, and go on with it on another one if that dies, three times at most.

    Args:
        work: Given the session; goes on where it was when it is called again. It calls `require_alive`.
        cpus, address, shared_bytes, ship: As of `session`.
        tell: Told in a sentence that Ray died.

    Raises:
        RayDied: It died once more, or does not start. Besides, whatever `work` raises.
    """
    deaths = 0
    while True:
        try:
            with session(cpus, address, shared_bytes, ship) as here:
                return work(here)
        except RayDied as error:
            deaths += 1
            if deaths > DEATHS_OF_RAY:
                raise
            tell(f"{error}; it is started again, and what was going on goes on from what was saved")


def require_room(address: str | None, workers: int) -> None:
    """Make sure that runs can go where they are asked to, as far as that is told at once.

    Args:
        address: "local", "off" or None for this machine; else of a cluster.
        workers: Processes of a run.

    Raises:
        BadConfig: This machine has fewer cores, or nobody listens at the address.
    """
    if address in (None, "local", "off"):
        if workers > (here := _processors()):
            raise BadConfig(f"--workers-per-run {workers}: this machine has {here} cores; use at most as many")
        return
    host, _, port = str(address).rpartition("//")[2].rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise BadConfig(
                f"--ray {address}: nobody answers there ({why}); 'ray start --head' says its address"
            ) from error


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _init(ray: Any, options: dict[str, Any]) -> None:
    """Start or join Ray, and leave this process's signals as they were."""
    ended_by = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as terminated:  # by what Ray does with SIGTERM
        raise KeyboardInterrupt from terminated
    except ValueError as error:
        raise BadConfig(_refused(options["address"], error)) from error
    except Exception as error:  # by this very class Ray says that a node does not come up
        if type(error) is not Exception and not isinstance(error, ConnectionError | RuntimeError):
            raise
        kind = RayDied if options["address"] == "local" else BadConfig
        raise kind(_refused(options["address"], error)) from error
    finally:
        if callable(ended_by) and threading.current_thread() is threading.main_thread():
            # Ray has put its own there, which ends this process at once.
            signal.signal(signal.SIGTERM, ended_by)


def _refused(address: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"--ray {address}: Ray does not start or answer there ({lines[0].rstrip('. ')})"


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
    """Give what was packed, in a worker; the files of its plug-ins are there as long.

    From then on SIGTERM ends the worker at once, as SIGKILL does: the exception that Ray makes of it, where a machine
    or a driver is taken away, would look like one of the plug-in's, and the run like one that failed.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
    here = _processors()
    memory = limits.of_the_machine()
    if memory is None:
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
        WorkersDied: The workers of one item died several times.
        RayDied: Ray did. Besides, whatever `work` raises; the others are stopped then, as they are at an interruption.
    """
    at_once = min(jobs or cores("cpu"), len(items))
    if at_once <= 1 or not has_ray():
        for item in items:
            done(item, work(item))
        return
    left = dict(enumerate(items))
    lasting(lambda here: _spread_on(here, work, left, at_once, done), at_once)


def _spread_on(
    here: Session,
    work: Callable[[Item], Answer],
    left: dict[int, Item],
    at_once: int,
    done: Callable[[Item, Answer], None],
) -> None:
    """Apply a function to the items that are left, and take those that are done out of them."""
    ray = here.ray
    task = ray.remote(num_cpus=1, max_retries=2)(_apply)
    waiting = iter(list(left))
    running = {task.remote(work, left[k]): k for k in islice(waiting, at_once)}
    try:
        while running:
            here.require_alive()
            finished, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            for reference in finished:
                k = running.pop(reference)
                running |= {task.remote(work, left[following]): following for following in islice(waiting, 1)}
                try:
                    answer: Answer = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    here.require_alive(error)
                    raise WorkersDied(
                        "workers died again and again (killed, or out of memory); the same command goes on, and "
                        "fewer --jobs need less memory"
                    ) from error
                done(left.pop(k), answer)
    except RayDied:
        raise
    except BaseException:
        for reference in running:
            ray.cancel(reference, force=True)
        raise


def _apply(work: Callable[[Item], Answer], item: Item) -> Answer:
    """Be what Ray takes for a function: it does not take callables of other kinds."""
    return work(item)
