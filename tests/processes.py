"""The command in processes of its own, as a person starts it: Ray and MLflow leave threads and warnings behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
