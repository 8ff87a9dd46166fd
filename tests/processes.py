"""The command in processes of its own, as a person starts it: Ray and MLflow leave threads and warnings behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

SLOW = '''
"""Slow: FedAvg that takes its time, and says in which process.

Server keeps   body, head
Client keeps   nothing
Down           body, head
Up             body, head
Departs        nowhere
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from bench import Algorithm, register


@register("slow")
@dataclass(frozen=True, kw_only=True)
class Slow(Algorithm):
    seconds: float = 0.1

    def local_update(self, task, shared, private, data):
        if "SLOW_PID" in os.environ:
            Path(os.environ["SLOW_PID"]).write_text(str(os.getpid()))
        time.sleep(self.seconds)
        return task.sgd(task.loss, shared, data.batches(task.epochs)), private
'''
"""A plug-in."""


def start(*words: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the command in a session of its own, so that it can be interrupted as from a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
        # a job in the background of a shell inherits a deaf ear for interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], status: int = 0, seconds: float = 240) -> tuple[Any, str]:
    """Wait for the command; give what it printed as JSON (None if nothing) and on standard error."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert out == "" or out.startswith("{"), out
    return (json.loads(out) if out else None), err


def wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


def digests(printed: Any) -> dict[str, str]:
    return {run["id"]: run["digest"] for run in printed["runs"]}


def alive(group: int) -> bool:
    """Tell whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def of_ray(driver: int) -> dict[str, list[int]]:
    """Find the processes of the Ray that a sweep's driver has started, by what they are: "raylet", "gcs_server",
    "DashboardAgent", "RuntimeEnvAgent", "worker" (at work or idle) and "other"; to be killed by those who test that.
    """
    import psutil

    found: dict[str, list[int]] = {}
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error):
                name = process.name()
                agent = name.removeprefix("ray::")
                what = next((each for each in _OF_RAY if each.startswith(agent[:13])), None)
                kind = what or ("worker" if name.startswith("ray::") else "other")
                found.setdefault(kind, []).append(process.pid)
    return found


_OF_RAY = ("raylet", "gcs_server", "DashboardAgent", "RuntimeEnvAgent")


def homes_of_ray() -> set[Path]:
    """List the folders of Rays that sweeps have started and not removed."""
    where = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return set(Path(where).glob("bench-ray-*"))


def in_homes(homes: Iterable[Path]) -> list[str]:
    """List the processes that live in such folders, also those whose driver is gone."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            words = [*process.cmdline(), *(file.path for file in process.open_files())]
            if any(f"{home}/" in word for home in homes for word in words):
                found.append(f"{process.pid} {process.name()}")
    return found
