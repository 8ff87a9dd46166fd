"""One run in a process of its own, which may not take longer than it is given: what a stranger asks for may not end."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from bench.plugins.registry import load_plugin
from bench.sweep import limits
from bench.sweep.config import Run
from bench.sweep.execution import execute

_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from bench.sweep.apart import answer; answer()"
)


class NotToItsEnd(RuntimeError):
    """A run's process was stopped, or died; the message is half a sentence."""


def execute_apart(run: Run, out: Path, seconds: float) -> None:
    """Do one run as `bench.sweep.execution.execute` does.

    Args:
        run: What to do.
        out: The folder of all results.
        seconds: After which its process is killed.

    Raises:
        NotToItsEnd: It was killed, or has died, for instance for want of memory.
    """
    with tempfile.TemporaryFile() as request:
        for part in (sys.path, run.plugins, (run, out)):
            request.write(pickle.dumps(part))
        request.seek(0)
        child = [sys.executable, "-c", _CHILD]
        process = subprocess.Popen(child, stdin=request, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process:
        try:
            _, told = process.communicate(timeout=seconds)
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise NotToItsEnd(f"it was stopped after {seconds:.0f} s, which --time-limit is") from error
            raise
    if process.returncode:
        last = (told.decode(errors="replace").strip().splitlines() or [f"signal or status {process.returncode}"])[-1]
        raise NotToItsEnd(f"its process died ({last})")


def answer() -> None:
    """Be that process: read a run from standard input, and do it."""
    stream = sys.stdin.buffer
    with redirect_stdout(sys.stderr):  # whatever plug-ins print
        for file in pickle.load(stream):
            load_plugin(file)
        run, out = pickle.load(stream)
        if run.device == "cpu" and (memory := limits.of_the_machine()) is not None:
            limits.take_memory(memory)  # or others would go with it
        execute(run, out)
