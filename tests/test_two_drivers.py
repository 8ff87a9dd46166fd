"""Of two drivers on one folder each says what it did itself and what the other has done, with its numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.face.progress import Display
from bench.face.wording import accuracy
from bench.results import records
from bench.sweep import driver, execution, pool
from bench.sweep.journal import Journal
from bench.sweep.pool import Failure, InProcess
from bench.sweep.run import Run
from bench.sweep.watch import Watcher
from bench.tracking.mirror import _Sweep
from bench.training.outcome import Report
from tests.test_forecast import runs_of


class Told:
    """A watcher that notes what it is told, and lets another driver do a run when the first begins."""

    def __init__(self, out: Path, other: Run | None = None) -> None:
        self.out, self.other = out, other
        self.news: list[tuple[str, str]] = []
        self.metrics: Mapping[str, float | None] = {}

    def begin(self, runs: Sequence[Run], cached: Sequence[Run]) -> None:
        self.news += [("cached", run.id) for run in cached]

    def started(self, run: Run) -> None:
        self.news.append(("started", run.id))
        if self.other is not None:
            assert execution.execute(self.other, self.out) is None
            self.other = None

    def progressed(self, run: Run, report: Report) -> None:
        pass

    def retried(self, run: Run, reason: str) -> None:
        self.news.append((reason, run.id))

    def found(self, run: Run, metrics: Mapping[str, float | None]) -> None:
        self.news.append(("found", run.id))
        self.metrics = metrics

    def ended(self, run: Run, reason: str | None) -> None:
        self.news.append(("ended", run.id))


@pytest.fixture
def runs() -> tuple[Run, Run]:
    """Two short runs."""
    first, second = runs_of("fedavg,local", rounds=2)
    return first, second


def swept(out: Path, runs: Sequence[Run], *watchers: Watcher, force: bool = False) -> list[str]:
    results = driver.run(runs, out, pool=InProcess(), watchers=watchers, force=force)
    return [result.status for result in results]


def test_what_another_driver_has_done_meanwhile_is_neither_begun_nor_done_but_found(
    tmp_path: Path, runs: tuple[Run, Run]
) -> None:
    first, second = runs
    told, stream = Told(tmp_path, second), io.StringIO()
    notes, display = Journal(tmp_path, "bench run"), Display(stream=stream)
    assert swept(tmp_path, runs, told, notes, display) == ["done", "cached"]
    assert told.news == [("started", first.id), ("ended", first.id), ("found", second.id)]
    measured = records.read(tmp_path / second.id).metrics
    assert dict(told.metrics) == dict(measured) and measured["personal"] is not None
    said = stream.getvalue()
    assert f"done by another process: {second}: {accuracy(measured)}\n" in said and "%" in accuracy(measured)
    assert f"started: {second}" not in said and f"done: {second}" not in said and f"done: {first}: generic" in said
    assert display.over == 2 and display.outlook.left(0.0) == 0.0
    assert [notes.sweep.runs[run.id].state for run in runs] == ["done", "cached"]


def test_a_worker_that_finds_a_result_says_so(
    tmp_path: Path, runs: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look and the start of a worker there are seconds on Ray."""
    monkeypatch.setattr(pool.Queue, "_is_done", lambda self, run: False)
    _, second = runs
    told = Told(tmp_path, second)
    assert swept(tmp_path, runs, told) == ["done", "cached"]
    assert told.news[2:] == [("started", second.id), ("found", second.id)]
    assert execution.execute(second, tmp_path) == Failure("another process has done it", "found")


def test_what_is_forced_is_done_again_and_what_is_cached_is_not_found(tmp_path: Path, runs: tuple[Run, Run]) -> None:
    assert swept(tmp_path, runs) == ["done", "done"]
    again = Told(tmp_path)
    assert swept(tmp_path, runs, again) == ["cached", "cached"]
    assert [what for what, _ in again.news] == ["cached", "cached"]
    forced = Told(tmp_path)
    assert swept(tmp_path, runs, forced, force=True) == ["done", "done"]
    assert [what for what, _ in forced.news] == ["started", "ended"] * 2


def test_mlflow_looks_again_before_it_copies_what_was_found(tmp_path: Path, runs: tuple[Run, Run]) -> None:
    sweep = _Sweep(tmp_path, {})
    sweep.copied = {"an earlier look"}
    sweep.find(runs[0])
    assert list(sweep.cached) == [runs[0]] and sweep.copied is None and sweep.has_backlog


def test_a_round_without_a_test_says_so(runs: tuple[Run, Run]) -> None:
    """Dashes would be a method without a model."""
    now = 0.0
    stream = io.StringIO()
    display = Display(stream=stream, clock=lambda: now)
    display.begin(runs, [])
    display.started(runs[0])
    now = 1000.0
    display.progressed(runs[0], Report(1, 2, 1.0, None))
    assert f"{runs[0]}: round 1 of 2, not tested in this round" in stream.getvalue() and "–" not in stream.getvalue()
    now = 3000.0
    only: dict[str, Any] = {"generic": None, "personal.balanced": 0.5}
    display.progressed(runs[0], Report(2, 2, 1.0, only))
    assert "round 2 of 2, generic –, balanced 50.0 %" in stream.getvalue()
    display.ended(runs[1], None)
    assert stream.getvalue().splitlines()[-1] == f"done: {runs[1]}", "nothing is made up of a run that nobody watched"
