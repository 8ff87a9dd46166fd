"""A process of its own for one piece of work: what a stranger asks for may not end, or take all memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from bench.plugins.registry import load_plugin
from bench.sweep import limits
from bench.sweep.execution import execute
from bench.sweep.run import Run


class NotToItsEnd(RuntimeError):
    """A run's process was stopped, or died; the message is half a sentence."""


def begin(module: str, plugins: Sequence[Path], *asked: object, **how: Any) -> subprocess.Popen[bytes]:
    """Start a process of its own, which calls `answer` of a module; that reads what is asked with `told`.

    Args:
        module: By its name.
        plugins: Files that must be loaded before what is asked can be unpickled.
        asked: Whatever can be pickled.
        how: Of `subprocess.Popen`: where its output goes.
    """
    code = f"import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from {module} import answer; answer()"
    with tempfile.TemporaryFile() as request:
        for part in (sys.path, plugins, *asked):
            request.write(pickle.dumps(part))
        request.seek(0)
        return subprocess.Popen([sys.executable, "-c", code], stdin=request, **how)


def told() -> Iterator[Any]:
    """Give what such a process was asked, one after the other."""
    stream = sys.stdin.buffer
    for file in pickle.load(stream):
        load_plugin(file)
    with suppress(EOFError):
        while True:
            yield pickle.load(stream)


def execute_apart(run: Run, out: Path, seconds: float) -> None:
    """Do one run as `bench.sweep.execution.execute` does, in a process of its own.

    Args:
        run: What to do.
        out: The folder of all results.
        seconds: After which the process is killed.

    Raises:
        NotToItsEnd: It was killed, or has died, for instance for want of memory.
    """
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with begin(__name__, run.plugins, run, out, **how) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise NotToItsEnd(f"it was stopped after {seconds:.0f} s, which --time-limit is") from error
            raise
    if process.returncode:
        last = (said.decode(errors="replace").strip().splitlines() or [f"signal or status {process.returncode}"])[-1]
        raise NotToItsEnd(f"its process died ({last})")


def answer() -> None:
    """Be that process."""
    with redirect_stdout(sys.stderr):  # whatever plug-ins print
        run, out = told()
        if run.device == "cpu" and (memory := limits.of_the_machine()) is not None:
            limits.take_memory(memory)  # or others would go with it
        execute(run, out)
