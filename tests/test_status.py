"""What people see of a sweep: bars and lines in its own shell, `bench status` in another, also when its driver died."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.command.main import main
from bench.face.progress import Display
from bench.face.wording import duration
from bench.results.claims import claim
from bench.sweep import execution, journal
from bench.sweep.journal import Journal
from bench.sweep.run import Run
from bench.sweep.schedule import Forecast
from bench.sweep.watch import append, progress_file
from bench.training.outcome import Report
from tests.processes import finish, start, wait
from tests.test_forecast import OFF, SLEEPER, runs_of

Bench = Callable[..., str]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Call the command in this process, in an empty folder; give what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words], prog_name="bench")
        assert ended.value.code == 0
        return capsys.readouterr().out

    return call


def another_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def change(journal: Journal, **fields: Any) -> None:
    """Alter what a journal has written."""
    document = json.loads(journal.file.read_text())
    journal.file.write_text(json.dumps({**document, **fields}))


# The journal


def test_a_journal_says_how_every_run_stands_and_is_read_back(tmp_path: Path) -> None:
    runs = runs_of("fedavg", seeds=6)
    forecasts = {runs[3].id: Forecast(seconds=7.0, peak_bytes=None, how="probed")}
    with Journal(tmp_path, "bench run --seeds 6", forecasts) as notes:
        notes.begin(runs[1:], runs[:1])
        for run in runs[1:5]:
            notes.started(run)
        notes.progressed(runs[1], Report(30, 30, 4.5, None))
        notes.ended(runs[1], None)
        notes.ended(runs[2], "it broke")
        notes.retried(runs[3], "its worker died")
        (sweep,) = journal.read(tmp_path)
        assert sweep.fate == "working" and sweep.pid == os.getpid() and sweep.command == "bench run --seeds 6"
        entries = [sweep.runs[run.id] for run in runs]
        assert [entry.state for entry in entries] == ["cached", "done", "failed", "waiting", "running", "waiting"]
        assert [entry.starts for entry in entries] == [0, 1, 1, 1, 1, 0]
        assert [entry.reason for entry in entries] == [None, None, "it broke", "its worker died", None, None]
        assert (entries[1].seconds, entries[3].forecast, entries[4].forecast) == (4.5, 7.0, None)
        assert entries[0].title == "fedavg on digits, imbalance 10, alpha 0.5, seed 0" and entries[0].rounds == 30
    (sweep,) = journal.read(tmp_path)
    assert sweep.fate == "ended" and sweep.ended is not None and sweep.ended >= sweep.began


def test_a_new_sweep_removes_what_ended_and_what_died_if_it_does_all_that_was_left(tmp_path: Path) -> None:
    runs = runs_of("fedavg", seeds=3)
    old = {name: Journal(tmp_path, name) for name in ("ended", "died", "died and more", "elsewhere")}
    for name, notes in old.items():
        notes.file = notes.file.with_name(f"{name}.json")
        notes.begin(runs if name == "died and more" else runs[:2], [])
        if name == "died and more":
            notes.started(runs[2])
        if name.startswith("died"):
            change(notes, pid=another_process(), born="1")
    change(old["elsewhere"], host="another")
    with old["ended"]:
        pass
    Journal(tmp_path, "new").begin(runs[:2], [])
    assert sorted(sweep.command for sweep in journal.read(tmp_path)) == ["died and more", "elsewhere", "new"]


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (run,) = runs_of("fedavg")
    (tmp_path / "sweeps").write_text("a file where a folder should be")
    with Journal(tmp_path, "") as notes:
        notes.begin([run], [])
        notes.started(run)
        notes.progressed(run, Report(1, 30, 1.0, None))
        notes.ended(run, None)


def test_what_is_no_journal_of_this_version_is_passed_over(tmp_path: Path) -> None:
    notes = Journal(tmp_path, "ours")
    notes.begin(runs_of("fedavg"), [])
    for name, content in {"a": "", "b": "[]", "c": '{"format": 1}', "d": '{"format": 2, "runs": {}}'}.items():
        notes.file.with_name(f"{name}.json").write_text(content)
    assert [sweep.command for sweep in journal.read(tmp_path)] == ["ours"]


def test_a_process_is_known_from_a_later_one_of_its_number_and_from_a_corpse() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    born = journal.birth(process.pid)
    assert journal.alive(process.pid, born) and journal.alive(process.pid, None)
    if born is not None:
        assert not journal.alive(process.pid, str(int(born) - 1))
        process.kill()
        wait(lambda: not journal.alive(process.pid, born), seconds=20)  # though nobody has asked how it ended
    process.kill()
    process.communicate()
    assert not journal.alive(process.pid, born) and not journal.alive(process.pid, None)
    assert journal.alive(1, None)  # somebody else's


# Status, of folders made here


def test_status_of_a_folder_without_a_driver_says_what_is_stored(bench: Bench, tmp_path: Path) -> None:
    good, bad = runs_of("local", rounds=1), runs_of("local", rounds=1, lr=1e6, weight_decay=1e6)
    assert execution.execute(good[0], tmp_path) is None and execution.execute(bad[0], tmp_path) is not None
    lines = bench("status", "--out", tmp_path).splitlines()
    assert lines[:2] == ["driver   none", "2 runs: 1 done, 1 failed, 0 running, 0 waiting"]
    assert lines[2].startswith(f"  failed   {bad[0].id}  local on digits, imbalance 10, alpha 0.5, seed 0: diverged")
    document = json.loads(bench("status", "--out", tmp_path, "--json"))
    assert document["drivers"] == [] and document["left_seconds"] is None
    assert document["counts"] == {"running": 0, "waiting": 0, "failed": 1, "done": 1}
    (tmp_path / "0123456789ab").mkdir()
    (tmp_path / "0123456789ab" / "run.json").write_bytes(b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert json.loads(bench("status", "--out", tmp_path, "--json")) == document
    shutil.rmtree(tmp_path / "0123456789ab")
    bench("pack", tmp_path, "--to", tmp_path / "pack", "--remove")
    assert not (tmp_path / good[0].id).exists()
    assert json.loads(bench("status", "--out", tmp_path, "--json")) == document


def test_status_of_no_folder_is_a_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["status", "--out", str(tmp_path / "none")], prog_name="bench")
    assert ended.value.code == 2 and "there is no such folder, 'bench run' makes one" in capsys.readouterr().err


def made(tmp_path: Path) -> tuple[list[Run], Journal]:
    """A sweep of eight runs: 0 cached, 1 done, 2 failed, 3 running, 4 begun again, 5, 6 and 7 waiting."""
    runs = runs_of("fedavg", seeds=8, rounds=10)
    forecasts = {run.id: Forecast(seconds=40.0, peak_bytes=None, how="probed") for run in runs[4:]}
    notes = Journal(tmp_path, "bench run --seeds 8", forecasts)
    notes.begin(runs[1:], runs[:1])
    notes.started(runs[1])
    notes.progressed(runs[1], Report(10, 10, 20.0, None))
    notes.ended(runs[1], None)
    notes.started(runs[2])
    notes.ended(runs[2], "it broke")
    notes.started(runs[4])
    notes.retried(runs[4], "the worker died")
    for run in runs[3:5]:
        notes.started(run)
        progress_file(tmp_path, run).parent.mkdir()
    append(progress_file(tmp_path, runs[3]), Report(4, 10, 10.0, {"generic": 0.5, "personal.balanced": 0.75}))
    append(progress_file(tmp_path, runs[3]), Report(5, 10, 12.0, None))
    return runs, notes


def test_status_says_who_drives_what_runs_failed_and_waits_and_how_long_it_takes(bench: Bench, tmp_path: Path) -> None:
    runs, _ = made(tmp_path)
    lines = bench("status", "--out", tmp_path).splitlines()
    cell = "fedavg on digits, imbalance 10, alpha 0.5, seed"
    assert re.fullmatch(rf"driver   process {os.getpid()} on \S+, since \S+ \S+ \(\d\.\d s\): at work", lines[0])
    # 12 s more for one of the running, 20 s for all others: the three on two places
    assert re.fullmatch(r"8 runs: 2 done, 1 failed, 2 running, 3 waiting; about (49|50|51|52) s left", lines[1])
    pattern = rf"  running  {runs[3].id}  {cell} 3: round 5 of 10, generic 50.0 %, balanced 75.0 %, (\d\d) s left"
    match = re.fullmatch(pattern, lines[2])
    assert match and int(match[1]) in (10, 11, 12)
    assert re.fullmatch(rf"  running  {runs[4].id}  {cell} 4: begins, (19|20) s left, start 2", lines[3])
    assert lines[4] == f"  failed   {runs[2].id}  {cell} 2: it broke"
    assert lines[5:] == [f"  waiting  {run.id}  {cell} {run.seed}" for run in runs[5:]]


def test_of_the_runs_that_wait_those_come_first_that_had_to(bench: Bench, tmp_path: Path) -> None:
    runs, notes = made(tmp_path)
    notes.retried(runs[7], "no memory was left")
    waiting = [line for line in bench("status", "--out", tmp_path).splitlines() if line.startswith("  waiting")]
    assert len(waiting) == 3 and waiting[0].endswith("seed 7: no memory was left")


def test_the_json_of_status_has_everything(bench: Bench, tmp_path: Path) -> None:
    runs, _ = made(tmp_path)
    document = json.loads(bench("status", "--out", tmp_path, "--json"))
    (driver,) = document["drivers"]
    assert driver["pid"] == os.getpid() and driver["state"] == "working" and driver["command"] == "bench run --seeds 8"
    by_id = {run["id"]: run for run in document["runs"]}
    statuses = [by_id[run.id]["status"] for run in runs]
    assert statuses == ["done", "done", "failed", "running", "running", "waiting", "waiting", "waiting"]
    going = by_id[runs[3].id]
    assert (going["round"], going["rounds"]) == (5, 10)
    assert going["metrics"] == {"generic": 0.5, "personal.balanced": 0.75}
    assert 9 < going["left_seconds"] <= 12 and by_id[runs[4].id]["starts"] == 2


def test_the_runs_of_a_driver_that_died_wait_and_go_on_from_their_checkpoints(bench: Bench, tmp_path: Path) -> None:
    runs, notes = made(tmp_path)
    (tmp_path / runs[3].id / "checkpoint.pt").write_bytes(b"")
    change(notes, pid=another_process(), born="1")
    lines = bench("status", "--out", tmp_path).splitlines()
    assert ": died, last heard of " in lines[0] and lines[0].endswith("the same command goes on: bench run --seeds 8")
    assert lines[1] == "8 runs: 2 done, 1 failed, 0 running, 5 waiting"
    assert lines[3].endswith("seed 3: its driver ended; it goes on from a checkpoint")
    assert lines[4].endswith("seed 4: its driver ended; it begins anew")
    assert bench("status", "--out", tmp_path, "--watch").splitlines()[1:] == lines[1:]  # nobody is at work: it ends
    printed = json.loads(bench("status", "--out", tmp_path, "--json"))
    assert printed["drivers"][0]["state"] == "died" and printed["left_seconds"] is None
    with claim(tmp_path / runs[3].id):  # by a worker that does not know yet that its driver is dead
        assert "1 running, 4 waiting" in bench("status", "--out", tmp_path)


def test_of_a_driver_on_another_machine_the_last_sign_of_life_is_said(bench: Bench, tmp_path: Path) -> None:
    runs, notes = made(tmp_path)
    change(notes, host="another")
    an_hour_ago = time.time() - 3600
    for file in (notes.file, *tmp_path.glob("*/progress.jsonl")):
        os.utime(file, (an_hour_ago, an_hour_ago))
    lines = bench("status", "--out", tmp_path).splitlines()
    assert "on another, since" in lines[0] and lines[0].endswith(": on another machine, last heard of 1 h 0 min ago")
    ten_minutes_ago = time.time() - 600
    os.utime(progress_file(tmp_path, runs[3]), (ten_minutes_ago, ten_minutes_ago))
    assert bench("status", "--out", tmp_path).splitlines()[0].endswith("last heard of 10 min ago"), "of its worker"
    notes._alive = 0.0  # some seconds later
    notes.progressed(runs[3], Report(6, 10, 1.0, None))
    assert bench("status", "--out", tmp_path).splitlines()[0].endswith(" s ago")


def test_what_another_driver_has_finished_is_done(bench: Bench, tmp_path: Path) -> None:
    run, other = runs_of("local", seeds=2, rounds=1)
    first, second = Journal(tmp_path, "first"), Journal(tmp_path, "second")
    second.file = second.file.with_name("second.json")
    first.begin([run, other], [])
    change(first, pid=another_process(), born="1")
    assert execution.execute(run, tmp_path) is None
    second.begin([], [run])
    document = json.loads(bench("status", "--out", tmp_path, "--json"))
    assert document["counts"] == {"running": 0, "waiting": 1, "failed": 0, "done": 1}
    assert [driver["state"] for driver in document["drivers"]] == ["died", "working"]


def test_who_did_a_run_knows_more_of_it_than_who_found_it_done(bench: Bench, tmp_path: Path) -> None:
    (run,) = runs_of("local", rounds=1)
    first, second = Journal(tmp_path, "first"), Journal(tmp_path, "second")
    second.file = second.file.with_name("second.json")
    first.begin([run], [])
    first.started(run)
    first.ended(run, None)
    second.begin([], [run])
    (known,) = json.loads(bench("status", "--out", tmp_path, "--json"))["runs"]
    assert (known["status"], known["starts"]) == ("done", 1)


# Status, of sweeps in other processes


KEPT = ("checkpoint.pt", "run.json")


def ask(folder: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "status", "--json"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


def test_status_sees_a_sweep_from_another_shell_and_that_its_driver_was_killed(tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    algorithms = ("--plugin", "sleeper.py", "--algos", "local,sleeper(round=0.5)")
    words = ("run", *algorithms, "--rounds", "400", "--json", *OFF)
    driver = start(*words, cwd=tmp_path)
    wait(lambda: len({file.parent for name in KEPT for file in tmp_path.glob(f"runs/*/{name}")}) == 2)
    seen = ask(tmp_path)
    assert seen["counts"] == {"running": 1, "waiting": 0, "failed": 0, "done": 1} and seen["left_seconds"] > 0
    (told,) = seen["drivers"]
    assert told["pid"] == driver.pid and told["state"] == "working" and told["command"].startswith("bench run --plugin")
    (running,) = [run for run in seen["runs"] if run["status"] == "running"]
    assert running["title"].startswith("sleeper(round=0.5) on digits") and running["round"] >= 1
    driver.send_signal(signal.SIGKILL)  # and nobody asks how it ended: its number stays taken
    left = {"running": 0, "waiting": 1, "failed": 0, "done": 1}
    wait(lambda: json.loads(bench("status", "--json"))["counts"] == left, seconds=30)
    seen = json.loads(bench("status", "--json"))
    assert seen["drivers"][0]["state"] == "died" and seen["left_seconds"] is None
    (waiting,) = [run for run in seen["runs"] if run["status"] == "waiting"]
    assert waiting["reason"] == "its driver ended; it goes on from a checkpoint"
    driver.communicate()
    watching = start("status", "--watch", cwd=tmp_path)
    said, _ = watching.communicate(timeout=120)
    assert ": died, " in said and watching.returncode == 0
    printed, _ = finish(start(*words, cwd=tmp_path, HURRY="1"))
    assert [run["status"] for run in printed["runs"]] == ["cached", "done"]
    lines = bench("status").splitlines()
    assert len(lines) == 2 and ": ended at " in lines[0] and lines[1].startswith("2 runs: 2 done, 0 failed")


# Bars and lines


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_run_that_waits_again_is_not_counted_as_going_on() -> None:
    runs, clock = runs_of("fedavg", seeds=2, rounds=10), Clock()
    forecasts = {run.id: Forecast(seconds=20.0, peak_bytes=None, how="probed") for run in runs}
    with Display(stream=io.StringIO(), forecasts=forecasts, clock=clock) as display:
        display.begin(runs, [])
        display.started(runs[0])
        clock.now += 15
        assert display.outlook.left(clock.now) == 5 + 20
        display.retried(runs[0], "the worker died")
        assert display.outlook.left(clock.now) == 20 + 20


def test_lines_say_how_far_runs_and_sweep_are_but_not_all_the_time() -> None:
    runs = runs_of("fedavg", seeds=3, rounds=10)
    said, clock = io.StringIO(), Clock()
    forecasts = {run.id: Forecast(seconds=20.0, peak_bytes=None, how="probed") for run in runs}
    with Display(stream=said, forecasts=forecasts, clock=clock) as display:
        display.begin(runs, [])
        display.started(runs[0])
        for completed in range(1, 11):
            clock.now += 3
            measured = {"generic": 0.5, "personal.balanced": None}
            display.progressed(runs[0], Report(completed, 10, 3.0 * completed, measured))
        display.ended(runs[0], None)
        display.started(runs[1])
        display.retried(runs[1], "the worker died")
        clock.now += 11
        display.started(runs[1])
        display.ended(runs[1], "it broke")
        display.ended(runs[2], None)
    cell = "fedavg on digits, imbalance 10, alpha 0.5, seed"
    assert said.getvalue().splitlines() == [
        f"started: {cell} 0",
        f"{cell} 0: round 4 of 10, generic 50.0 %, balanced –, 18 s left",
        "sweep: 0 of 3 runs have ended; about 58 s left",
        f"{cell} 0: round 8 of 10, generic 50.0 %, balanced –, 6.0 s left",
        "sweep: 0 of 3 runs have ended; about 46 s left",
        f"done: {cell} 0: generic 50.0 %, balanced –",
        f"started: {cell} 1",
        f"bench: waits: {cell} 1: the worker died",
        f"started: {cell} 1",
        f"bench: failed: {cell} 1: it broke",
        "sweep: 2 of 3 runs have ended, 1 of them failed; about 30 s left",
        f"done: {cell} 2",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (59.6, "60 s"), (119, "119 s"), (150, "2 min"), (3599, "1 h 0 min"),
     (5460, "1 h 31 min"), (47.9 * 3600, "47 h 54 min"), (50 * 3600, "2 d 2 h")],
)  # fmt: skip
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def on_terminal(folder: Path, *words: str, rows: int = 24) -> tuple[int, str]:
    """Run the command on a terminal of its own; give its exit status and all that it wrote there."""
    driver, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *words],
        cwd=folder,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": str(rows)},
        start_new_session=True,
    )
    os.close(terminal)
    written = b""
    limit = time.monotonic() + 240
    while time.monotonic() < limit:
        if select.select([driver], [], [], 0.1)[0]:
            try:
                written += os.read(driver, 65536)
            except OSError:  # the last process has closed it
                break
        elif process.poll() is not None:
            break
    os.close(driver)
    return process.wait(timeout=60), written.decode()


CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_a_terminal_shows_bars_and_failures_stay_above_them(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    algorithms = ("--plugin", "sleeper.py", "--algos", "sleeper(raises=True),sleeper(round=0.5)")
    code, written = on_terminal(tmp_path, "run", *algorithms, "--rounds", "8", *OFF)
    assert code == 1
    lines = [line.strip() for line in CONTROL.sub("", written).replace("\r", "\n").splitlines()]
    bars = [line for line in lines if line.startswith("sleeper(round=0.5) ") and "rounds" in line]
    assert any(re.search(r"[2-7]/8 rounds \d.* s left generic \d+\.\d %, balanced \d+\.\d %", bar) for bar in bars)
    failures = [line for line in lines if line.startswith("bench: failed: sleeper(raises=True) on digits")]
    assert len(failures) == 1 and "OverflowError: too much" in failures[0]
    sweeps = [line for line in lines if line.startswith("sweep ")]
    assert "0/2 runs" in sweeps[0] and any(re.search(r"1/2 runs .* s left 1 failed", line) for line in sweeps)
    assert lines.index(failures[0]) < max(i for i, line in enumerate(lines) if line.startswith("sweep "))
    assert any(line.startswith("done: sleeper(round=0.5)") for line in lines)
    assert not lines[-1].startswith("sweep ")  # the bars are gone, the leaderboard stays


def test_watching_on_a_terminal_redraws_in_place_and_ends_with_the_sweep(tmp_path: Path) -> None:
    runs, notes = made(tmp_path / "runs")
    keeper = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    change(notes, pid=keeper.pid, born=journal.birth(keeper.pid))
    timer = threading.Timer(8.0, keeper.communicate)
    timer.start()
    code, written = on_terminal(tmp_path, "status", "--watch", rows=5)
    timer.join()
    assert code == 0 and ": at work" in written and ": died, " in written
    assert "\x1b[1A" in written  # the cursor goes up: what was there is written over
    assert "waiting  " + runs[7].id not in CONTROL.sub("", written)  # cut to the terminal's height
