"""Work of many pieces while it is done, for a person."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from bench.system.text import lines, plain

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

_LINE_SECONDS = 10.0
"""Least time between two lines where there is no bar."""


class Bar:
    """`bench.preparing.preparation.Progress` for a person: a bar on a terminal, lines elsewhere, on standard error.

    Args:
        pieces: What is counted: "images".
    """

    def __init__(self, pieces: str) -> None:
        from rich.console import Console

        self.pieces = pieces
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.bars: Bars | None = None
        self.what, self.total, self.done, self.began_with = "", 0, 0, 0
        self.began = self.said = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def say(self, sentence: str) -> None:
        """Print a line."""
        self.console.print(lines(sentence), markup=False)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Show how much there is to do."""
        self._stop()
        self.what, self.total, self.done, self.began_with = what, total, done, done
        self.began = self.said = time.monotonic()
        if done:
            self.say(f"{what}: {done:,} of {total:,} are done already")
        if self.console.is_terminal:
            self._start()

    def advance(self, pieces: int) -> None:
        """Move the bar, or print a line now and then."""
        self.done += pieces
        now = time.monotonic()
        speed = (self.done - self.began_with) / max(now - self.began, 1e-6)
        if self.bars is not None:
            self.bars.update(self.bars.task_ids[0], completed=self.done, speed=f"{speed:,.0f} {self.pieces}/s")
        elif now - self.said > _LINE_SECONDS:
            self.said = now
            seconds = (self.total - self.done) / max(speed, 1e-6)
            left = f"{seconds / 60:,.0f} min" if seconds > 120 else f"{seconds:.0f} s"
            self.say(f"{self.what}: {self.done:,} of {self.total:,}, {speed:,.0f} {self.pieces}/s, {left} left")

    def _start(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[speed]}  ETA"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.bars.add_task(plain(self.what), total=self.total, completed=self.done, speed="")
        self.bars.start()

    def _stop(self) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None
