"""Who sets peers to work: which there are, which are installed, and a process that does a round when it is its turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import bench
from bench.speed.commands import end, last_line
from bench.speed.turns import Side, SideFailed, Turn

TOLERANCE = 0.05
"""Largest difference of accuracies of the same work; beyond it a peer's figures are not comparable."""


@dataclass(frozen=True)
class Peer:
    """Somebody who does the same work."""

    module: str
    """In this package."""
    package: str | None = None
    """Whose version tells whether it is there; None: torch is all that it needs."""
    install: str = ""
    """What installs it."""


PEERS: Mapping[str, Peer] = {
    "plain loop": Peer("loop"),
    "Flower": Peer("flower", "flwr", 'pip install "flwr[simulation]"'),
    "pfl": Peer("apple", "pfl", "pip install pfl"),
}
"""By name. The plain loop is one as PFLlib has it, and not PFLlib."""


def installed(python: str = sys.executable) -> dict[str, str | None]:
    """Give the version of each peer that an interpreter finds, by name; None where it is not installed."""
    packages = [peer.package for peer in PEERS.values() if peer.package is not None]
    code = (
        "import json, sys\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        "for name in sys.argv[1:]:\n    try: found[name] = version(name)\n    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    said = subprocess.run([python, "-c", code, *packages], capture_output=True, check=True, env=_environment(1)).stdout
    found: dict[str, str] = json.loads(said)
    ours = f"of bench {bench.__version__}"
    return {name: ours if peer.package is None else found.get(peer.package) for name, peer in PEERS.items()}


@contextmanager
def at_work(name: str, folder: Path, workers: int, python: str) -> Iterator[Side]:
    """Have a peer's process wait for its turns, in each of which it does a round; it ends with this.

    Args:
        name: Of the peer.
        folder: With `work.write`'s file.
        workers: Threads of its process; Flower's actors.
        python: Interpreter that has it.
    """
    with _process(name, folder, workers, python) as going:
        yield Side(name, going.round)


def whole_run(
    side: str, name: str, folder: Path, workers: int, rounds: int, python: str, accuracies: dict[str, float]
) -> Side:
    """Have a peer do a run with one command, from start to end.

    Args:
        side: Its name.
        name: Of the peer.
        folder: As above.
        workers: As above.
        rounds: Of the run.
        python: As above.
        accuracies: Given the accuracy of its last model, by the side's name.
    """

    def take() -> Turn:
        started = time.perf_counter()
        with _process(name, folder, workers, python) as going:
            going.allow(rounds)
            images = sum(going.answer("images") for _ in range(rounds))
            accuracies[side] = going.answer("accuracy")
            going.process.wait()
            return Turn(time.perf_counter() - started, images)

    return Side(side, take)


def side_by_side(side: str, name: str, folder: Path, rounds: int, runs: int, python: str) -> Side:
    """Have two copies of a peer, of a thread each, do some runs one after the other.

    Args:
        side: Its name.
        name: Of the peer.
        folder: As above.
        rounds: Of a run.
        runs: Of each copy.
        python: As above.
    """

    def copy(number: int) -> None:
        for _ in range(runs):
            whole_run(side, name, folder, 1, rounds, python, {}).take()

    def take() -> Turn:
        started = time.perf_counter()
        with ThreadPoolExecutor(2) as copies:
            list(copies.map(copy, range(2)))
        return Turn(time.perf_counter() - started, None)

    return Side(side, take)


class _Going:
    """A peer's process."""

    def __init__(self, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        self.process, self.said = process, said

    def allow(self, rounds: int) -> None:
        """Let it begin so many rounds, and no more."""
        self._tell(b"go\n" * rounds)
        assert self.process.stdin is not None
        self.process.stdin.close()

    def round(self) -> Turn:
        """Have it do a round."""
        started = time.perf_counter()
        self._tell(b"go\n")
        images = self.answer("images")
        return Turn(time.perf_counter() - started, images)

    def answer(self, key: str) -> float:
        """Wait for what it says next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise SideFailed(f"its process ended ({last_line(self.said)})")
        return float(json.loads(line)[key])

    def _tell(self, said: bytes) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # that it has ended is seen when it does not answer
            self.process.stdin.write(said)


@contextmanager
def _process(name: str, folder: Path, workers: int, python: str) -> Iterator[_Going]:
    """Begin a peer's process; it is ended with this."""
    command = [python, "-m", f"{__package__}.{PEERS[name].module}", str(folder), str(workers)]
    with tempfile.TemporaryFile() as said:
        pipe, environment = subprocess.PIPE, _environment(workers)
        process = subprocess.Popen(
            command, bufsize=0, stdin=pipe, stdout=pipe, stderr=said, env=environment, start_new_session=True
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            yield _Going(process, said)
        finally:
            with suppress(OSError):
                process.stdin.close()  # no more rounds: it ends by itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            if process.poll() is None:
                end(process)
            process.stdout.close()


def _environment(workers: int) -> dict[str, str]:
    """Give a peer's process this suite, and its threads."""
    root = str(Path(bench.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(workers)}
