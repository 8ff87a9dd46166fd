"""Runs are looked at by processes that may come to an end, and that end is the problem of one folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.sweep import limits
from bench.validation import side_by_side
from bench.validation.found import Inspected
from bench.validation.side_by_side import inspect_all

ENDS: dict[str, tuple[Callable[[], object], str]] = {
    "late": (lambda: time.sleep(60), "could not be inspected within 1.5 s"),
    "large": (lambda: np.ones(2**28), "could not be inspected within 256 MiB of memory"),
    "aborted": (os.abort, "could not be inspected within 256 MiB of memory (signal 6)"),
    "gone": (lambda: os._exit(5), "could not be inspected within 256 MiB of memory (exit status 5)"),
}


def deep() -> list[object]:
    found: list[object] = []
    for _ in range(100_000):
        found = [found]
    return found


def looked_at(folder: Path, root: Path, pack: Path | None) -> Inspected:
    """Stands for `inspect`: notes the process, and does what the folder's name says."""
    found = Inspected(folder=folder, pack=pack, notes=[str(os.getpid())])
    if folder.name in ENDS:
        ENDS[folder.name][0]()
    if folder.name == "half":
        np.ones(20 * 2**20)
    if folder.name == "deep":
        found.tested["generic"] = deep()  # type: ignore[assignment]
    return found


@pytest.fixture(autouse=True)
def instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "inspect", looked_at)
    monkeypatch.setattr(side_by_side, "SECONDS", 1.5)
    monkeypatch.setattr(side_by_side, "MEMORY", 256 << 20)


def look(names: list[str], jobs: int | None = None) -> list[Inspected]:
    return inspect_all([(Path(name), None) for name in names], Path(), jobs=jobs)


def processes(found: list[Inspected]) -> list[str]:
    return [note for one in found for note in one.notes]


@pytest.mark.parametrize("jobs", [None, 3])
def test_whatever_ends_a_process_is_a_problem_of_one_folder(jobs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_AT_A_TIME", 3)
    names = ["a", *(name for end in ENDS for name in (end, f"after {end}"))]
    found = look(names, jobs)
    assert [one.folder.name for one in found] == names
    for one in found:
        told = [ENDS[one.folder.name][1]] if one.folder.name in ENDS else []
        assert [problem.what for problem in one.problems] == told
        assert all(problem.file == one.folder.name for problem in one.problems)


def test_hundreds_of_runs_are_looked_at_by_few_processes() -> None:
    names = [f"{k}" for k in range(400)]
    pids = processes(look(names, 2))
    assert len(pids) == 400 and len(set(pids)) <= 2 and str(os.getpid()) not in pids
    first, second = processes(look(names[:150]))[:2]
    assert first == second


def test_a_process_that_holds_much_gives_way_to_a_fresh_one() -> None:
    before, half, after, last = processes(look(["before", "half", "after", "last"]))
    assert before == half and after == last and half != after


def test_what_cannot_be_sent_is_a_problem() -> None:
    one, other = look(["deep", "other"])
    assert [problem.what for problem in one.problems] == ["cannot be made sense of (RecursionError)"]
    assert other.notes


def test_an_interruption_ends_all_processes() -> None:
    found: list[int] = []

    def told(runs: int) -> None:
        if not found:
            found.append(runs)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_all([(Path(name), None) for name in ("a", "late")], Path(), told=told)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # there is none that was not waited for


def test_a_process_that_waits_has_time() -> None:
    names = ["a", "b"]
    found = inspect_all([(Path(name), None) for name in names], Path(), told=lambda runs: time.sleep(2))
    assert [one.problems for one in found] == [[], []]


def test_runs_that_are_none_need_no_process() -> None:
    assert look([]) == []


def test_memory_is_counted_from_what_there_is() -> None:
    child = os.fork()
    if child == 0:
        limits.take_memory(128 << 20)
        np.ones(2**23)
        try:
            np.ones(2**25)
        except MemoryError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_in_which_autograd_works_for_a_device_is_not_copied(tmp_path: Path) -> None:
    """It does so in threads, as for a GPU, which are not in a copy, and there autograd refuses to work."""
    for thread, name in (("1", "python"), ("2", "pt_main_thread")):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "comm").write_text(f"{name}\n")
    assert side_by_side._can_be_copied(tmp_path) == (sys.platform == "linux")
    (tmp_path / "2" / "comm").write_text("pt_autograd_0\n")
    assert not side_by_side._can_be_copied(tmp_path)
