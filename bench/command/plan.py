"""`bench run --dry-run`: the runs of a sweep, what they will take, and what it will cost."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from bench.command.options import Options
from bench.face.wording import duration

if TYPE_CHECKING:
    from bench.sweep.forecast import Total
    from bench.sweep.run import Run
    from bench.sweep.schedule import Forecast


def print_plan(runs: Sequence[Run], options: Options, device: str) -> int:
    """Print what would run, and what it will take as far as that is known.

    An interruption stops the probes, and what is known by then is printed. What the runs themselves would be refused
    for is raised, except that data are missing: those may be on another machine.

    Args:
        runs: All that were asked for.
        options: Of `bench run`.
        device: "cpu" or "cuda", resolved.

    Returns:
        The exit status.
    """
    from bench.sweep import execution, forecast

    keep = options.keep_models
    todo = [run for run in runs if options.force or not execution.finished(run, options.out, keep)]
    _check(todo)
    jobs = _jobs(options, device, len(todo))
    try:
        forecasts = forecast.forecast(todo, options.out, probe=not options.no_probe, jobs=jobs, say=_say)
    except KeyboardInterrupt:
        _say("interrupted: what was not probed yet has no forecast")
        forecasts = forecast.forecast(todo, options.out, probe=False)
    late = _too_late(todo, forecasts, options, jobs)
    in_time = [run for run in todo if run.id not in late]
    total = forecast.total(in_time, forecasts, jobs)
    statuses = {run.id: "too late" if run.id in late else "to do" for run in todo}
    if options.json:
        rows = [_row(run, statuses.get(run.id, "cached"), forecasts.get(run.id)) for run in runs]
        click.echo(json.dumps({"runs": rows, "total": _total(total, device, len(in_time))}, indent=2))
        return 0
    wide = max((len(status) for status in statuses.values()), default=0)
    for run in runs:
        status = statuses.get(run.id, "cached").ljust(max(wide, len("cached")))
        known = forecasts.get(run.id)
        seconds = "–" if known is None else duration(known.seconds)
        click.echo(f"{run.id}  {status}  {seconds:>10}  {_memory(known):>8}  {run}")
    click.echo("\n" + _summary(len(runs), len(todo), len(late), total, forecasts, device))
    return 0


def _check(runs: Sequence[Run]) -> None:
    """Make the splits of the datasets that are there, from labels alone."""
    from bench.dataset import DataMissing
    from bench.sweep import driver

    for dataset in dict.fromkeys(run.dataset for run in runs):
        with suppress(DataMissing):
            driver.check_data([run for run in runs if run.dataset == dataset])


def describe(run: Run) -> dict[str, Any]:
    """Give the cell of a run as JSON has it."""
    from bench.protocol.spelling import label, name

    return {
        "id": run.id,
        "algorithm": name(run.algorithm),
        "call": run.label,
        "dataset": label(run.dataset),
        "imbalance": run.setting.imbalance,
        "alpha": run.setting.alpha,
        "seed": run.seed,
    }


def _jobs(options: Options, device: str, todo: int) -> int:
    """Say how many runs will go on at once."""
    from bench.sweep.cluster import cores, has_ray

    if options.ray == "off" or todo <= 1 or (options.ray is None and not has_ray()):
        return 1
    return min(options.jobs or max(cores(device) // options.workers_per_run, 1), todo)


def _too_late(todo: Sequence[Run], forecasts: Mapping[str, Forecast], options: Options, jobs: int) -> frozenset[str]:
    """Play the sweep through, and give the ids of runs that would not begin within the time budget."""
    from bench.sweep.schedule import Budget, Schedule, parse_duration

    if options.time_budget is None:
        return frozenset()
    now = 0.0
    budget = Budget(parse_duration(options.time_budget, "--time-budget"), clock=lambda: now)
    schedule = Schedule(todo, forecasts, budget)
    ends = [0.0] * jobs
    while not schedule.exhausted():
        now = ends[0]
        run = schedule.take()
        if run is not None:
            known = forecasts.get(run.id)
            heapq.heapreplace(ends, now + (0.0 if known is None else known.seconds))
    return frozenset(run.id for run in schedule.left_out)


def _row(run: Run, status: str, known: Forecast | None) -> dict[str, Any]:
    return {
        **describe(run),
        "status": status,
        "seconds": None if known is None else known.seconds,
        "peak_memory_bytes": None if known is None else known.peak_bytes,
        "forecast": None if known is None else known.how,
    }


def _total(total: Total, device: str, begun: int) -> dict[str, Any]:
    return {
        "runs": begun,
        "unknown": total.unknown,
        _unit(device).replace("-", "_"): total.hours,
        "jobs": total.jobs,
        "wall_seconds": total.wall_seconds,
    }


def _summary(runs: int, todo: int, late: int, total: Total, forecasts: Mapping[str, Forecast], device: str) -> str:
    told = f"{runs} runs: {runs - todo} cached, {todo - late} to do"
    told += f", {late} too late for --time-budget" if late else ""
    if todo - late > total.unknown:
        at_once = f"{total.jobs} at once, longest first" if total.jobs > 1 else "one after the other"
        hours = f"{total.hours:.2g}" if total.hours < 99.5 else f"{total.hours:.0f}"
        told += f"; {hours} {_unit(device)}, in about {duration(total.wall_seconds)} ({at_once})"
        peak = max((known.peak_bytes for known in forecasts.values() if known.peak_bytes is not None), default=None)
        if peak is not None:
            told += f", with at most {_bytes(peak)} a run"
    if total.unknown:
        told += f"; of {total.unknown} nothing is known, and they are not counted"
    return told


def _unit(device: str) -> str:
    return "core-hours" if device == "cpu" else "GPU-hours"


def _memory(known: Forecast | None) -> str:
    return "–" if known is None or known.peak_bytes is None else _bytes(known.peak_bytes)


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _say(sentence: str) -> None:
    click.echo(f"bench: {sentence}", err=True)
