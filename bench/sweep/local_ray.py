"""Ray on this machine, for one sweep: a folder and a token that nobody else reads, loopback, and no process is left.

Ray's own temporary folder may be entered by everybody, it listens on every interface, and its token lies in the home.
Of an interruption while it starts it knows nothing, and agents of a node that was killed outlive it.
"""

from __future__ import annotations

import importlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.protocol.settings import BadConfig
from bench.sweep import scratch

if TYPE_CHECKING:
    import psutil

PREFIX = "bench-ray-"
_LONGEST = 20
"""Bytes that the path of all folders may have: below it stand 85 of ours and Ray's, and a socket's may have 107."""
_OWN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_WATCHERS = ("start_monitor", "start_log_monitor", "start_api_server")
"""What Ray starts for clusters that grow, for what workers print, which nobody reads here, and for a dashboard."""
_HEART = ("raylet", "gcs_server")
"""Without these of its processes Ray is dead. The raylet dies of the death of either of its agents."""
_SECONDS = 3.0
"""To be gone in, for processes that were killed."""


class Home:
    """The folder of a Ray that is ours, and what lives there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "r"
        """What Ray opens to everybody, in a folder that nobody else enters."""
        self.heart: Sequence[tuple[int, float]] = ()
        """Numbers of the processes that must live, and when they began. They can be pickled, as Ray Tune does."""

    def listen(self) -> None:
        """Note which processes must live, once Ray has started."""
        import psutil

        ours = _of(self.folder, psutil.Process().children())
        self.heart = [(child.pid, child.create_time()) for child in ours if child.name() in _HEART]

    def is_alive(self, patience: float = 0.0) -> bool:
        """Tell whether Ray lives.

        Args:
            patience: Seconds in which its death may show, where something speaks for that.
        """
        until = time.monotonic() + patience
        while all(_lives(*each) for each in self.heart):
            if time.monotonic() >= until:
                return True
            time.sleep(0.05)
        return False

    def clear(self) -> None:
        """End what still runs there."""
        _end(self.folder)


@contextmanager
def home() -> Iterator[Home]:
    """Give a new folder for Ray with a token, which this process and those that it starts use meanwhile.

    In the end no process that belongs there is left, nor the folder; what drivers that were killed have left is removed
    first.

    Raises:
        BadConfig: No folder can be made.
    """
    where = _place()
    with ExitStack() as held:
        try:
            folder = held.enter_context(scratch.folder(where, PREFIX, _end))
        except OSError as error:
            raise BadConfig(
                f"--ray local: no folder can be made in {where} ({error.strerror}); have RAY_TMPDIR name another one, "
                f"of at most {_LONGEST} characters"
            ) from error
        token = folder / "token"
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(32))
        with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}):
            yield Home(folder)


def _place() -> Path:
    """Choose where folders are made: the names of Unix sockets are short."""
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return Path(wanted if len(os.fsencode(wanted)) <= _LONGEST else "/tmp")


@contextmanager
def _environment(ours: dict[str, str]) -> Iterator[None]:
    """Set variables of Ray, and in the end give back what the user had."""
    before = {name: os.environ.pop(name) for name in _OWN if name in os.environ}
    os.environ.update(ours)
    try:
        with _loopback(), _unwatched():
            _read_again()
            yield
    finally:
        for name in _OWN:
            os.environ.pop(name, None)
        os.environ.update(before)
        _read_again()


@contextmanager
def _loopback() -> Iterator[None]:
    """Have Ray know no address but 127.0.0.1, as it does by itself where clusters are not supported."""
    from ray._private import ray_constants

    before = getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _unwatched() -> Iterator[None]:
    """Have Ray start no process that only watches it: each takes as long as a worker, and for one of them Ray waits."""
    from ray._private.node import Node

    before = {name: vars(Node)[name] for name in _WATCHERS if name in vars(Node)}
    for name in before:
        setattr(Node, name, lambda node, **how: None)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(Node, name, start)


def _read_again() -> None:
    """Have Ray forget the mode and the token that it read earlier in this process; the mode first, or it may ask for a
    token that is not there.
    """
    core: Any = importlib.import_module("ray._raylet")
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()


def _of(folder: Path, processes: Any = None) -> Iterator[psutil.Process]:
    """Find processes that belong to a folder, this one aside: most write logs there, and some have it in their words.

    Agents and workers write over their words and environment, with a title.
    """
    import psutil

    inside = f"{folder}{os.sep}"
    for process in psutil.process_iter() if processes is None else processes:
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and (
                any(inside in word for word in process.cmdline())
                or any(file.path.startswith(inside) for file in process.open_files())
            ):
                yield process


def _lives(pid: int, born: float) -> bool:
    """Tell whether a process is there, and not only its number, or what nobody has asked of its end."""
    import psutil

    try:
        process = psutil.Process(pid)
        return bool(process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(folder: Path) -> None:
    """Kill the processes of a folder, and those that they start meanwhile."""
    import psutil

    until = time.monotonic() + _SECONDS
    while (left := list(_of(folder))) and time.monotonic() < until:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_SECONDS)
