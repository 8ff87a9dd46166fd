"""Company and surroundings: several drivers, signals, clocks, limits, odd folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.attack.frame import TRIES, Try, material
from tests.attack.kills import descendants, finished, words
from tests.attack.verdict import Answer, apart, bench, calm, equal, refused, require
from tests.processes import start, wait

AREA = "several drivers, signals, clock, limits, umask"
OFF = ("--ray", "off", "--tracking-uri", "off")
LONG = ("run", "--algos", "fedavg", "--rounds", 100_000, "--out", "out")
ASKED = words(Path("out"), "off", 4, 3)


def _enter(name: str, act: Callable[[], object], seconds: float = 120, alone: bool = False) -> None:
    TRIES.append(Try(area=AREA, name=name, act=act, seconds=seconds, memory=None, alone=alone, needs=("whole",)))


def _answer(process: subprocess.Popen[str], seconds: float = 100) -> Answer:
    out, err = process.communicate(timeout=seconds)
    return Answer(process.returncode, out, err)


def _as_ever() -> None:
    equal(finished(Path("out")), finished(material("whole") / "whole"))


# Several drivers --------------------------------------------------------------------------------------------


def _together(number: int, *more: str) -> None:
    """Several drivers on one folder: each ends well, and every run is as ever."""
    drivers = [start(*ASKED, *more, cwd=Path()) for _ in range(number)]
    for driver in drivers:
        answer = calm(_answer(driver))
        require(answer.status == 0, f"exit status {answer.status}: {answer.err[-300:]}")
    _as_ever()


_enter("two drivers on one folder", partial(_together, 2))
_enter("three drivers that force", partial(_together, 3, "--force"), 240)
_enter("five drivers on one folder", partial(_together, 5), 240)


def _stopped() -> None:
    """A driver that is stopped for a while, and goes on."""
    driver = start(*ASKED, cwd=Path())
    wait(lambda: any(Path("out").glob("*/progress.jsonl")))
    os.kill(driver.pid, signal.SIGSTOP)
    time.sleep(2)
    other = start(*ASKED, cwd=Path())
    time.sleep(4)
    os.kill(driver.pid, signal.SIGCONT)
    for each in (driver, other):
        require(calm(_answer(each)).status == 0, "it does not end well")
    _as_ever()


_enter("a driver that is stopped and goes on, beside another", _stopped)

# Signals ----------------------------------------------------------------------------------------------------


def _signalled(number: int, ray: str, when: str, seconds: float = 0) -> None:
    """A driver that is asked to end says how to go on, notes its end, and leaves no process behind."""
    process = start(*LONG, "--ray", ray, "--tracking-uri", "off", cwd=Path())
    if when == "at work":
        wait(lambda: any(Path("out").glob("*/progress.jsonl")), 60)
    time.sleep(seconds)
    below = {process.pid: "", **descendants(process.pid)}
    os.kill(process.pid, number)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        below |= descendants(process.pid)
        time.sleep(0.02)
    answer = _answer(process, 60)
    require(answer.status == 130, f"exit status {answer.status}: {answer.err[-300:]}")
    calm(answer)
    require("interrupted" in answer.err, f"nothing is said: {answer.err[-200:]}")
    for journal in Path("out/sweeps").glob("*.json"):
        require(json.loads(journal.read_text())["ended"] is not None, "the journal has no end")
    limit = time.monotonic() + 20
    left = list(below)
    while left and time.monotonic() < limit:
        left = [pid for pid in left if Path(f"/proc/{pid}").exists() and _runs(pid)]
        time.sleep(0.2)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    require(not left, f"left after 20 s: {[below[pid][:80] for pid in left]}")


def _runs(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}") / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


for name, number in (("SIGTERM", signal.SIGTERM), ("SIGINT", signal.SIGINT)):
    _enter(f"{name} at work, in one process", partial(_signalled, number, "off", "at work"))
    _enter(f"{name} at work, on Ray", partial(_signalled, number, "local", "at work"), 200)
for seconds in (4, 6, 8):
    _enter(
        f"SIGINT {seconds} s after the start, on Ray", partial(_signalled, signal.SIGINT, "local", "soon", seconds), 200
    )


def _hung_up() -> None:
    """A terminal that is closed."""
    process = start(*LONG, *OFF, cwd=Path())
    wait(lambda: any(Path("out").glob("*/progress.jsonl")), 60)
    os.kill(process.pid, signal.SIGHUP)
    answer = _answer(process, 60)
    require("Traceback" not in answer.text, answer.err[-300:])


_enter("SIGHUP at work", _hung_up)

# Clocks -----------------------------------------------------------------------------------------------------


def _clock(jump: float) -> None:
    """The clock is set while a run goes on: the run can be submitted all the same."""
    now, began = time.time, time.monotonic()
    import datetime

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Jumping:
            real = super().now(tz)
            later = real + datetime.timedelta(seconds=jump if time.monotonic() > began + 0.5 else 0)
            return cls.fromtimestamp(later.timestamp(), tz)

    time.time = lambda: now() + (jump if time.monotonic() > began + 0.5 else 0)
    for name, module in list(sys.modules.items()):
        if name.startswith("bench.") and vars(module).get("datetime") is datetime.datetime:
            vars(module)["datetime"] = Jumping
    answer = calm(bench("run", "--algos", "fedavg", "--rounds", 30, *OFF, "--json", "--out", "out"))
    require(answer.status == 0, f"exit status {answer.status}: {answer.err[-300:]}")
    time.time = now
    answer = calm(bench("submit", "out", "--to", "mine.zip", "--data-root", "no data here"))
    require(answer.status == 0, f"cannot be submitted: {answer.text[-300:]}")


for name, jump in (("an hour back", -3600.0), ("a year back", -3.15e7), ("a minute ahead", 60.0)):
    _enter(f"the clock is set {name}", partial(_clock, jump))

# Limits and places ------------------------------------------------------------------------------------------


def _memory(gigabytes: float) -> None:
    import resource

    most = int(gigabytes * 1e9)
    command = [sys.executable, "-m", "bench", "run", "--algos", "fedavg", "--rounds", "2", *OFF, "--out", "out"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
    )
    calm(Answer(done.returncode, done.stdout, done.stderr), memory=True)


for gigabytes in (0.6, 1.5, 2.5, 3.5):
    _enter(f"an address space of {gigabytes} GB", partial(_memory, gigabytes))


def _full(*asked: object) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "bench", *map(str, asked)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    refused(Answer(done.returncode, "", done.stderr))


_enter("list to /dev/full", partial(_full, "list", "algorithms"))
_enter("run --json to /dev/full", partial(_full, "run", "--algos", "fedavg", "--rounds", 1, "--json", *OFF))


def _mask() -> None:
    os.umask(0o077)
    calm(bench(*ASKED))
    modes = {oct(path.stat().st_mode & 0o077) for path in Path("out").rglob("*")}
    require(modes == {"0o0"}, f"open to others: {modes}")
    _as_ever()


_enter("a umask of 077", _mask)


def _gone() -> None:
    """The folder of results is removed under a driver."""
    import shutil

    process = start(*LONG[:4], 400, "--out", "out", *OFF, cwd=Path())
    wait(lambda: any(Path("out").glob("*/progress.jsonl")), 60)
    shutil.rmtree("out", ignore_errors=True)
    calm(_answer(process))


_enter("the folder of results is removed at work", _gone)


def _no_descriptors() -> None:
    import resource

    command = [sys.executable, "-m", "bench", *ASKED]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)),
    )
    answer = calm(Answer(done.returncode, done.stdout, done.stderr))
    if answer.status:
        calm(apart(*ASKED))
    _as_ever()


_enter("twenty-four open files at most", _no_descriptors)
