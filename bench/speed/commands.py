"""The sides of a workload that are whole commands: `bench run` from its start to the first round, or to its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from bench.speed.turns import Side, SideFailed, Turn
from bench.speed.workloads import ENDLESS, FILE, SEED, Workload

_SET = ("norm", "momentum", "augment", "eval_every")
"""Fields of a setting that have no option of their own."""
_LOOK_SECONDS = 0.005
_END_SECONDS = 20.0
"""For a process that was asked to end."""


def first_round(name: str, workload: Workload, folder: Path, workers: int) -> Side:
    """Start a run, and stop it after its first round: from the command to the first line of its progress."""

    def take() -> Turn:
        with tempfile.TemporaryDirectory(dir=folder) as out, tempfile.TemporaryFile() as said:
            started = time.perf_counter()
            with _begin(_command(workload, folder, Path(out), ENDLESS, workers), said) as process:
                try:
                    while not any(file.stat().st_size for file in Path(out).glob("*/progress.jsonl")):
                        if process.poll() is not None:
                            raise SideFailed(f"its process ended before the first round ({last_line(said)})")
                        time.sleep(_LOOK_SECONDS)
                    return Turn(time.perf_counter() - started, None)
                finally:
                    end(process)

    return Side(name, take)


def whole_run(
    name: str, workload: Workload, folder: Path, precision: str, workers: int, accuracies: dict[str, float]
) -> Side:
    """Do a run with one command, from start to end, with its last evaluation: of the one model of all, as of others,
    and of a single client's. Whoever tests every client's model after local training trains them all once more for it.

    Args:
        name: Of the side.
        workload: Which.
        folder: Of its examples.
        precision: "fp32" or "bf16".
        workers: Processes of the run.
        accuracies: Given the accuracy of the generic model, by the side's name.
    """

    def take() -> Turn:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            command = _command(workload, folder, Path(out), workload.rounds, workers)
            seconds = _done([*command, "--precision", precision, "--eval-clients", "1"])
            (file,) = Path(out).glob("*/run.json")
            document: dict[str, Any] = json.loads(file.read_bytes())
        accuracies[name] = document["metrics"]["generic"]
        return Turn(seconds, document["cost"]["train_samples"])

    return Side(name, take)


def sweep(name: str, workload: Workload, folder: Path, runs: int, jobs: int | None) -> Side:
    """Do a small sweep with one command.

    Args:
        name: Of the side.
        workload: Whose federation.
        folder: Of its examples.
        runs: How many, which differ in the seed.
        jobs: At once, by Ray; None: one after the other, without it.
    """

    def take() -> Turn:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            *command, ray, _ = _command(workload, folder, Path(out), workload.rounds, 1, seeds=runs)
            return Turn(_done([*command, *((ray, "off") if jobs is None else ("--jobs", str(jobs)))]), None)

    return Side(name, take)


def end(process: subprocess.Popen[bytes]) -> None:
    """Have a process that was begun here end, with all that it has begun: by an interrupt, else by a kill."""
    for how in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(_END_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(said: IO[bytes]) -> str:
    """Give the last line that a process has written to a file."""
    said.seek(0)
    return (said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1][-300:]


def _command(
    workload: Workload, folder: Path, out: Path, rounds: int, workers: int, seeds: int | None = None
) -> list[str]:
    """Spell a run of federated averaging; the last two words say that there is no Ray for runs."""
    dataset = "digits" if workload.shape is None else f"arrays(path={str(folder / FILE)!r})"
    fields: list[str] = []
    for key, value in workload.fields(rounds).items():
        fields += ["--set", f"{key}={value}"] if key in _SET else [f"--{key.replace('_', '-')}", str(value)]
    which = f"{SEED}," if seeds is None else str(seeds)
    return [
        sys.executable, "-m", "bench", "run", "--algos", "fedavg", "--dataset", dataset, "--seeds", which, *fields,
        "--workers-per-run", str(workers), "--tracking-uri", "off", "--out", str(out), "--ray", "off",
    ]  # fmt: skip


def _begin(command: Sequence[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
    )


def _done(command: Sequence[str]) -> float:
    """Do a command, and give its seconds."""
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        with _begin(command, said) as process:
            try:
                process.wait()
            except BaseException:
                end(process)
                raise
        if process.returncode:
            raise SideFailed(f"its process ended with status {process.returncode} ({last_line(said)})")
        return time.perf_counter() - started
