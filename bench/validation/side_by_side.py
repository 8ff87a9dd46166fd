"""Runs looked at by other processes, which may come to an end: what a folder makes of one is that folder's problem.

A process looks at many runs, one after the other, so that what several of them need is made once. Whatever a file makes
of it - it takes too much memory or too long, or a library ends it - the next run is looked at by another.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench.plugins.registry import load_plugin
from bench.sweep import limits
from bench.sweep.cluster import cores
from bench.validation.found import Inspected
from bench.validation.inspection import inspect

Place = tuple[Path, Path | None]
"""A run's folder, and the pack that it is in, as for `inspect`."""

SECONDS, MEMORY = 300.0, 4 << 30
"""That looking at one run may take."""
_FEW = 200
"""Runs that one process looks at: each other one tries the methods anew."""
_AT_A_TIME = 50
_NO_MEMORY = 77
"""Exit status of a process that was given no more memory."""


def inspect_all(
    places: Sequence[Place],
    root: Path,
    plugins: Sequence[Path] = (),
    jobs: int | None = None,
    told: Callable[[int], None] = lambda runs: None,
) -> list[Inspected]:
    """Look at runs, each within `SECONDS` and `MEMORY`.

    Args:
        places: Of the runs; neighbours in a pack should be neighbours here, as their rows are read together.
        root: Of all datasets.
        plugins: Files of the plug-ins that were loaded.
        jobs: Processes; None: as many as the machine holds, or one for few runs.
        told: Told how many runs more have been looked at.

    Returns:
        In the order of the places; of a run whose process ended, that it did.
    """
    found: dict[str, Inspected] = {}
    parts = deque(deque(places[first : first + _AT_A_TIME]) for first in range(0, len(places), _AT_A_TIME))
    at_once = jobs or (1 if len(places) < _FEW else cores("cpu"))
    workers = [_Worker(root, plugins) for _ in range(min(at_once, len(parts)))]
    busy: dict[Any, _Worker] = {}

    def go_on(worker: _Worker) -> None:
        worker.places = worker.places or (parts.popleft() if parts else deque())
        if worker.places:
            busy[worker.ask()] = worker

    try:
        for worker in workers:
            go_on(worker)
        while busy:
            for connection in wait(list(busy)):
                worker = busy.pop(connection)
                one = worker.answer()
                found[one.folder.name] = one
                told(1)
                go_on(worker)
    finally:
        for worker in workers:
            worker.end()
    return [found[folder.name] for folder, _ in places]


class _Worker:
    """A process that looks at runs, and the next one where it has ended."""

    def __init__(self, root: Path, plugins: Sequence[Path]) -> None:
        self.places = deque[Place]()
        """Those that it is to look at."""
        self._begun_with = root, plugins
        self._process: BaseProcess | None = None

    def ask(self) -> Connection:
        """Have the first of its places looked at.

        Returns:
            What is to be read when there is an answer.
        """
        if self._process is None:
            context = get_context("fork" if _can_be_copied() else "spawn")
            self._connection, theirs = context.Pipe()
            arguments = (self._connection, theirs, *self._begun_with)
            self._process = context.Process(target=_look, args=arguments, daemon=True)  # type: ignore[attr-defined]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the copy has not and needs not
                self._process.start()
            theirs.close()
        with suppress(OSError):  # it has ended already, as `answer` sees
            self._connection.send(self.places[0])
        return self._connection

    def answer(self) -> Inspected:
        """Give what was found out about the first of its places."""
        folder, pack = self.places.popleft()
        try:
            one, goes_on = self._connection.recv(), self._connection.recv()
        except (EOFError, OSError):
            one, goes_on = Inspected(folder=folder, pack=pack), False
            one.add("", "", f"could not be inspected within {self._ended()}")
        if not goes_on:
            self.end()
        assert isinstance(one, Inspected)
        return one

    def _ended(self) -> str:
        """Say what a process has ended by."""
        assert self._process is not None
        self._process.join()
        status = self._process.exitcode or 0
        if status == -signal.SIGALRM:
            return f"{SECONDS:g} s"
        how = f" (signal {-status})" if status < 0 else "" if status == _NO_MEMORY else f" (exit status {status})"
        return f"{MEMORY >> 20:,} MiB of memory{how}"

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _can_be_copied(threads: Path = Path("/proc/self/task")) -> bool:
    """Tell whether a copy of this process, which has all that was imported and loaded, can compute as it does.

    It cannot if autograd has worked for a device here: it did so in threads, which a copy has not.
    """
    names = []
    for file in threads.glob("*/comm"):
        with suppress(OSError):  # it has ended
            names.append(file.read_text(encoding="utf-8", errors="replace"))
    return sys.platform == "linux" and not any(name.startswith("pt_autograd") for name in names)


def _look(ours: Connection, connection: Connection, root: Path, plugins: Sequence[Path]) -> None:
    """Look at runs, in a process of its own, until nobody asks any more."""
    import torch

    ours.close()  # the other end: if it stays open here, nobody sees that it is closed there
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.disable()
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what a library says before it ends the process
        os.dup2(silence, stream)
    torch.set_num_threads(1)
    for file in plugins:  # where this process is no copy
        load_plugin(file)
    limits.take_memory(MEMORY)
    before = limits.peak()
    with suppress(EOFError, OSError):
        while True:
            place = connection.recv()
            limits.take_seconds(SECONDS)
            found = _found(place, root)
            limits.take_seconds(0)
            goes_on = limits.peak() - before < MEMORY / 2  # else the next run has a fresh one
            connection.send_bytes(found)
            connection.send(goes_on)


def _found(place: Place, root: Path) -> bytes:
    folder, pack = place
    try:
        return pickle.dumps(inspect(folder, root, pack))
    except MemoryError:
        os._exit(_NO_MEMORY)
    except Exception as error:  # what was made up may be nested too deeply to be sent
        found = Inspected(folder=folder, pack=pack)
        found.add("", "", f"cannot be made sense of ({type(error).__name__})")
        return pickle.dumps(found)
