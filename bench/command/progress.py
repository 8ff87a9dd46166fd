"""What a person sees on standard error while a sweep runs: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bench.rounds import Report
from bench.spelling import label, spell_imbalance

if TYPE_CHECKING:
    from bench.config import Run

_LINE_SECONDS = 10.0
"""Least time between two lines about one run, where there are no bars."""


class Display:
    """A watcher that shows one bar for the sweep and one for each run that is going on.

    Args:
        quiet: Say nothing but failures and warnings where there is no terminal.
        stream: Standard error, if not told otherwise.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self.quiet = quiet and not self.live
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[accuracy]}", markup=False),
            console=self.console,
            transient=True,
        )
        self.sweep: TaskID | None = None
        self.tasks: dict[str, TaskID] = {}
        self.latest: dict[str, Mapping[str, float | None]] = {}
        self.said: dict[str, float] = {}
        self.varying: list[int] = []
        """Which parts of a run's cell tell it from others: a bar has little room."""

    def __enter__(self) -> Display:
        if self.live:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.bars.stop()

    def begin(self, runs: Sequence[Run], cached: Sequence[Run]) -> None:
        """Show how much there is to do."""
        total = len(runs) + len(cached)
        if cached:
            self._say(f"{len(cached)} of {total} runs are done already")
        cells = [_cell(run) for run in runs]
        self.varying = [i for i, values in enumerate(zip(*cells, strict=True)) if len(set(values)) > 1]
        self.sweep = self.bars.add_task("sweep", total=total, completed=len(cached), unit="runs", accuracy="")

    def started(self, run: Run) -> None:
        """Show a bar for the run."""
        rounds = run.setting.rounds
        name = " ".join((label(run.algorithm), *(_cell(run)[i] for i in self.varying)))
        self.tasks[run.id] = self.bars.add_task(name, total=rounds, unit="rounds", accuracy="")
        self.said[run.id] = time.monotonic()
        if not self.live:
            self._say(f"started: {run}")

    def progressed(self, run: Run, report: Report) -> None:
        """Move the run's bar."""
        if report.metrics is not None:
            self.latest[run.id] = report.metrics
        accuracy = self._accuracy(run)
        self.bars.update(self.tasks[run.id], completed=report.round, accuracy=accuracy)
        now = time.monotonic()
        if not self.live and now - self.said[run.id] > _LINE_SECONDS:
            self.said[run.id] = now
            left = _duration(report.seconds / report.round * (report.rounds - report.round))
            guess = f", {left} left" if report.round > 1 else ""  # the first round also warms up
            self._say(f"{run}: round {report.round} of {report.rounds}, {accuracy}{guess}")

    def ended(self, run: Run, reason: str | None) -> None:
        """Say how the run ended."""
        self.bars.remove_task(self.tasks.pop(run.id))
        if self.sweep is not None:
            self.bars.advance(self.sweep)
        if reason is None:
            self._say(f"done: {run}: {self._accuracy(run)}")
        else:
            self.warn(f"failed: {run}: {reason}")

    def warn(self, sentence: str) -> None:
        """Say something that must be heard."""
        self.console.print(f"bench: {sentence}", markup=False)

    def _say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(line, markup=False)

    def _accuracy(self, run: Run) -> str:
        metrics = self.latest.get(run.id, {})
        return ", ".join(f"{key} {_percent(metrics.get(key))}" for key in ("generic", "personal"))


def _cell(run: Run) -> tuple[str, ...]:
    setting = run.setting
    alpha = [] if setting.alpha is None else [f"alpha {setting.alpha:g}"]
    numbers = (f"imbalance {spell_imbalance(setting.imbalance)}", *alpha, f"seed {run.seed}")
    return (label(run.dataset), *numbers)


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes >= 2 else f"{60 * minutes + rest} s"
