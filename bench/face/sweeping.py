"""A sweep from what is asked to its leaderboards, with progress, MLflow and a journal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from bench.face import asked as asking
from bench.face.asked import Asked
from bench.face.preparing import prepare_own
from bench.face.progress import Display
from bench.face.wording import duration
from bench.plugins.registry import label
from bench.protocol.presets import remarks
from bench.results import records
from bench.results.storage import prepare
from bench.results.table import leaderboards, render
from bench.sweep import driver, execution
from bench.sweep.cluster import RayDied, require_room
from bench.sweep.forecast import forecast
from bench.sweep.journal import Journal
from bench.sweep.schedule import Budget, Schedule
from bench.system.text import lines

if TYPE_CHECKING:
    from bench.results.leaderboard import Leaderboard
    from bench.sweep.config import Sweep
    from bench.sweep.driver import Result
    from bench.sweep.run import Run
    from bench.sweep.watch import Watcher
    from bench.tracking import Mirror


class Stopped(KeyboardInterrupt):
    """A person interrupted a sweep; that was said, and how it goes on."""


@dataclass(frozen=True)
class Swept:
    """A sweep that has come to its end."""

    results: Sequence[Result]
    boards: Sequence[Leaderboard]
    """Of the runs that are finished."""
    mirror: Mirror | None
    """What showed it in MLflow."""

    @property
    def failed(self) -> int:
        """Count the runs that failed."""
        return sum(result.status == "failed" for result in self.results)


def perform(asked: Asked, command: str, quiet: bool = False) -> Swept:
    """Do what is asked for and not done yet, and tell standard error how it goes.

    Args:
        asked: What.
        command: As it can be typed again.
        quiet: Whether little is said where there is no terminal.

    Raises:
        Stopped: Somebody interrupted it.
        RayDied: Ray's own processes did, again and again; the runs wait.
        BadConfig, DataMissing, ...: It cannot be done; nothing was begun.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other: what is done here is small, and runs take a core
    try:
        return _perform(asked, command, quiet)
    finally:
        torch.set_num_threads(threads)


def _perform(asked: Asked, command: str, quiet: bool) -> Swept:
    read, budget = asking.sweep(asked), asking.budget(asked)
    runs = asking.expand(read)
    require_room(asked.ray, asked.workers_per_run)
    keep = asked.keep_models
    rest = [run for run in runs if asked.force or not execution.finished(run, asked.out, keep)]
    prepare_own((run.dataset for run in rest), read.data_root)
    driver.check_data(rest)
    driver.verify_data(rest)
    prepare(asked.out)  # now that nothing is wrong with what was typed
    _say_protocol(read, runs)
    if keep and not asked.force and (again := sum(execution.finished(run, asked.out) for run in rest)):
        _say(f"run again, to the same numbers, as no models were kept: {again} of {len(runs)} runs")
    forecasts = forecast(rest, asked.out, probe=False)
    journal = Journal(asked.out, command, forecasts)
    # Standard output is for results, whatever Ray and MLflow think.
    with redirect_stdout(sys.stderr), Display(quiet=quiet, forecasts=forecasts) as display, journal:
        pool = asking.pool(asked, read.device, len(rest), display.warn)
        mirror = asking.mirror(asked, read, len(rest), command, display.warn)
        watchers: list[Watcher] = [journal, display, *([mirror] if mirror else [])]
        schedule = partial(Schedule, forecasts=forecasts, budget=budget)
        try:
            results = driver.run(
                runs, asked.out, pool=pool, watchers=watchers, force=asked.force, keep_models=keep, schedule=schedule
            )
        except KeyboardInterrupt as interrupt:
            done = sum(execution.finished(run, asked.out) for run in runs)
            kept = f"interrupted: {done} of {len(runs)} runs are done and kept"
            display.warn(f"{kept}. The same command goes on: {command}")
            if mirror is not None:
                mirror.finish("KILLED", {})
            raise Stopped from interrupt
        except RayDied as error:
            done = sum(execution.finished(run, asked.out) for run in runs)
            if mirror is not None:
                mirror.finish("KILLED", {})
            kept = f"{done} of {len(runs)} runs are done and kept, the others wait"
            raise RayDied(f"{error}; {kept}. The same command goes on: {command}") from error
        finished = [result.run.id for result in results if result.status in ("done", "cached")]
        swept = Swept(results, leaderboards([records.read(asked.out / run) for run in finished]), mirror)
        if mirror is not None:
            tables = {f"leaderboard.{form}": render(swept.boards, form) for form in ("md", "json")}
            mirror.finish("FAILED" if swept.failed else "FINISHED", tables)
    _say_end(swept, budget, command)
    return swept


def _say_protocol(read: Sweep, runs: Sequence[Run]) -> None:
    """Say which setting holds, and which of its fields were replaced."""
    for dataset in dict.fromkeys(run.dataset for run in runs):
        changed = {key: value for run in runs if run.dataset == dataset for key, value in run.overrides().items()}
        replaced = f", with other {', '.join(changed)}" if changed else ""
        _say(f"setting {read.setting} on {label(dataset)}{replaced}")
    for setting in dict.fromkeys(run.setting for run in runs if run.setting.match == "samples"):
        rounds = {label(run.algorithm): run.trained_by().rounds for run in runs if run.setting == setting}
        told = ", ".join(f"{each} {number}" for each, number in rounds.items())
        _say(
            f"samples are matched: {setting.rounds} rounds of plain local training are the budget, and clients process "
            f"about as many samples, tuning included, in these rounds: {told}"
        )
    for sentence in remarks(read.presets, {run.protocol for run in runs}):
        _say(sentence)


def _say_end(swept: Swept, budget: Budget | None, command: str) -> None:
    """Say which runs are not there, and what to do."""
    late = [result.run for result in swept.results if result.status == "waiting"]
    if budget is not None and late:
        _say(f"bench: {left_out(late, budget, command)}")
    if swept.failed:
        told = f"{swept.failed} of {len(swept.results)} runs failed; each says why in the run.json of its folder"
        _say(f"bench: {told}, and the same command tries again")


def left_out(runs: Sequence[Run], budget: Budget, command: str) -> str:
    """Say which runs a sweep did not begin because they would not have ended in time.

    Args:
        runs: At least one.
        budget: Of the sweep.
        command: As it can be typed again.
    """
    several = f"{len(runs)} runs were not begun, they" if len(runs) > 1 else "1 run was not begun, it"
    told = f"{several} would not have ended within --time-budget {duration(budget.seconds)}"
    return "\n".join((f"{told}; the same command goes on: {command}", *(f"  {run.id}  {run}" for run in runs)))


def _say(sentence: str) -> None:
    print(lines(sentence), file=sys.stderr)
