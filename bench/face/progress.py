"""What a person sees on standard error while a sweep runs: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from bench.face.wording import accuracy, duration
from bench.protocol.spelling import label
from bench.protocol.words import spell_imbalance
from bench.sweep.schedule import Forecast, Outlook, cell
from bench.system.text import lines, plain
from bench.training.outcome import Report

if TYPE_CHECKING:
    from bench.sweep.run import Run

_LINE_SECONDS = 10.0
"""Least time between two lines about one run, and about the sweep, where there are no bars."""


_DRAWN_SECONDS = 0.3
"""Least time between two drawings of bars in a notebook."""


class Display:
    """A watcher that shows one bar for the sweep and one for each run that is going on.

    Args:
        quiet: Say nothing but failures and warnings where there is no terminal.
        stream: Standard error, if not told otherwise.
        forecasts: By a run's id, as far as they are known: when the sweep ends is said before the first run has.
        clock: Gives seconds; tests have their own.
    """

    def __init__(
        self,
        quiet: bool = False,
        stream: TextIO | None = None,
        forecasts: Mapping[str, Forecast] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal or self.console.is_jupyter
        self.quiet = quiet and not self.live
        self.forecasts = forecasts if forecasts is not None else {}
        self.clock = clock
        kind = _InNotebook if self.console.is_jupyter else Progress
        self.bars = kind(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
            _Left(clock),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
        )
        self.sweep: TaskID | None = None
        self.tasks: dict[str, TaskID] = {}
        self.latest: dict[str, Mapping[str, float | None]] = {}
        self.took: dict[str, float] = {}
        self.said: dict[str, float] = {}
        self.varying: list[int] = []
        """Which parts of a run's cell tell it from others: a bar has little room."""
        self.outlook = Outlook({})
        self.total = self.over = self.failed = 0

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
        self.total, self.over, self.failed = len(runs) + len(cached), len(cached), 0
        if cached:
            self._say(f"{len(cached)} of {self.total} runs are done already")
        cells = [_cell(run) for run in runs]
        self.varying = [i for i, values in enumerate(zip(*cells, strict=True)) if len(set(values)) > 1]
        known = {run.id: self.forecasts[run.id].seconds for run in runs if run.id in self.forecasts}
        self.outlook = Outlook({run.id: cell(run) for run in runs}, known)
        self.said[""] = self.clock()
        self.sweep = self.bars.add_task("sweep", total=self.total, completed=self.over, unit="runs", note="", end=None)

    def started(self, run: Run) -> None:
        """Show a bar for the run."""
        now = self.clock()
        self.outlook.started(run.id, now)
        self.said[run.id] = now
        name = plain(" ".join((run.label, *(_cell(run)[i] for i in self.varying))))
        if run.id in self.tasks:  # begun anew
            self.bars.remove_task(self.tasks.pop(run.id))
        self.tasks[run.id] = self.bars.add_task(name, total=run.trained_by().rounds, unit="rounds", note="", end=None)
        self._look_ahead(run)
        if not self.live:
            self._say(f"started: {run}")

    def progressed(self, run: Run, report: Report) -> None:
        """Move the run's bar."""
        if report.anew is not None:
            self.warn(f"the checkpoint of {run} {report.anew}; it begins anew")
        now = self.clock()
        self.outlook.progressed(run.id, report.round, report.rounds, report.seconds, now)
        if report.metrics is not None:
            self.latest[run.id] = report.metrics
        if report.round == report.rounds:
            self.took[run.id] = report.seconds
        accuracy = self._accuracy(run)
        self.bars.update(self.tasks[run.id], completed=report.round, note=accuracy)
        self._look_ahead(run)
        if not self.live and now - self.said[run.id] > _LINE_SECONDS * len(self.tasks):
            self.said[run.id] = now
            left = self.outlook.left_of(run.id, now)
            guess = f", {duration(left)} left" if report.round > 1 and left is not None else ""
            self._say(f"{run}: round {report.round} of {report.rounds}, {accuracy}{guess}")
            self._say_sweep()

    def retried(self, run: Run, reason: str) -> None:
        """Say why a run waits, which may have begun already."""
        self.outlook.waits(run.id)
        self._forget(run)
        self.warn(f"waits: {run}: {reason}")

    def found(self, run: Run, metrics: Mapping[str, float | None]) -> None:
        """Say what another process has done."""
        self.outlook.ended(run.id, None)
        self._say(f"done by another process: {run}: {accuracy(metrics)}")
        self._count(run)

    def ended(self, run: Run, reason: str | None) -> None:
        """Say how the run ended."""
        self.outlook.ended(run.id, self.took.get(run.id) if reason is None else None)
        self.failed += reason is not None
        if reason is not None:
            self.warn(f"failed: {run}: {reason}")
        elif run.id in self.latest:
            self._say(f"done: {run}: {self._accuracy(run)}")
        else:  # its last round was over before this process went on with it
            self._say(f"done: {run}")
        self._count(run)

    def _count(self, run: Run) -> None:
        """Count a run that is over."""
        self._forget(run)
        self.over += 1
        if self.sweep is not None:
            note = f"{self.failed} failed" if self.failed else ""
            self.bars.update(self.sweep, completed=self.over, note=note)
            self._look_ahead()
            self._say_sweep()

    def warn(self, sentence: str) -> None:
        """Say something that must be heard."""
        self.console.print(f"bench: {lines(sentence)}", markup=False)

    def _forget(self, run: Run) -> None:
        """Take a run's bar away."""
        if run.id in self.tasks:
            self.bars.remove_task(self.tasks.pop(run.id))

    def _look_ahead(self, run: Run | None = None) -> None:
        """Note in the bars when they will be full: another thread draws them, and only counts down."""
        if not self.live:
            return
        now = self.clock()
        ends = [(self.sweep, self.outlook.left(now))]
        if run is not None:
            ends.append((self.tasks[run.id], self.outlook.left_of(run.id, now)))
        for task, left in ends:
            if task is not None:
                self.bars.update(task, end=None if left is None else now + left)

    def _say_sweep(self) -> None:
        """Say now and then how far the sweep is, where there is no bar."""
        now = self.clock()
        if self.live or self.over == self.total or now - self.said[""] <= _LINE_SECONDS:
            return
        self.said[""] = now
        left = self.outlook.left(now)
        failed = f", {self.failed} of them failed" if self.failed else ""
        guess = "" if left is None else f"; about {duration(left)} left"
        self._say(f"sweep: {self.over} of {self.total} runs have ended{failed}{guess}")

    def _say(self, line: str) -> None:
        if not self.quiet:
            self.console.print(lines(line), markup=False)

    def _accuracy(self, run: Run) -> str:
        return accuracy(self.latest.get(run.id, {}))


class _InNotebook(Progress):
    """Bars below a notebook's cell, drawn anew now and then; rich's own need a library of widgets."""

    def start(self) -> None:
        """Show them."""
        from IPython.display import display  # a notebook has it

        self.shown = time.monotonic()
        self.place = display(self, display_id=True)

    def update(self, task_id: TaskID, **changed: Any) -> None:
        """Change a bar."""
        super().update(task_id, **changed)
        if time.monotonic() - self.shown > _DRAWN_SECONDS:
            self.shown = time.monotonic()
            self.place.update(self)

    def stop(self) -> None:
        """Take them away."""
        self.place.update(Text())


class _Left(ProgressColumn):
    """Counts down to the time that a bar's `end` says."""

    max_refresh = 0.5

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.clock = clock

    def render(self, task: Task) -> Text:
        """Write the time left."""
        end = task.fields["end"]
        return Text("" if end is None else f"{duration(max(end - self.clock(), 0.0))} left", style="cyan")


def _cell(run: Run) -> tuple[str, ...]:
    setting = run.setting
    alpha = [] if setting.alpha is None else [f"alpha {setting.alpha:g}"]
    numbers = (f"imbalance {spell_imbalance(setting.imbalance)}", *alpha, f"seed {run.seed}")
    return (label(run.dataset), *numbers)
