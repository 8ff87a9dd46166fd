"""`bench run`: from options to runs, finished folders and a leaderboard."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command.options import Options, run_options
from bench.command.plan import describe, left_out, print_plan
from bench.command.table import print_boards

if TYPE_CHECKING:
    from bench.command.progress import Display
    from bench.results.leaderboard import Leaderboard
    from bench.sweep.config import Run, Sweep
    from bench.sweep.driver import Result
    from bench.sweep.pool import Pool
    from bench.sweep.schedule import Budget
    from bench.sweep.watch import Watcher
    from bench.tracking import Mirror

_OF_THE_SETTING = (
    "partition", "clients", "participation", "rounds", "epochs", "batch_size", "lr", "model", "eval_clients",
    "auxiliary", "match",
)  # fmt: skip
"""Options that replace a field of the setting of the same name."""


@run_options
@click.command("run")
def run_command(**values: Any) -> None:
    """Compare algorithms on one split, and print the leaderboard.

    Every algorithm is run in every cell of datasets × imbalance × alpha × seeds. What is finished is not run
    again; a sweep that was interrupted goes on with the same command.

    \b
    bench run
    bench run --algos "fedavg,fedrep(head_epochs=5)" --rounds 20 --seeds 3
    bench run --dataset cifar10 --imbalance 50,100 --alpha 0.5 --seeds 0,4,7 --jobs 2
    bench run --setting creff --dataset cifar10 --device cuda --set norm=group
    bench run --from sweep.toml --dry-run
    """
    sys.exit(_run(Options(**values)))


def _run(options: Options) -> int:
    import torch

    from bench.command.progress import Display
    from bench.results.storage import prepare
    from bench.sweep import driver, execution
    from bench.sweep.forecast import forecast
    from bench.sweep.journal import Journal
    from bench.sweep.schedule import Schedule

    torch.set_num_threads(1)  # more would wait for each other: what is done here is small, and runs take a core
    asked, budget = _sweep(options), _budget(options)
    runs = asked.expand()
    if options.dry_run:
        return print_plan(runs, options, asked.device)
    prepare(options.out)
    rest = [run for run in runs if options.force or not execution.finished(run, options.out)]
    driver.check_data(rest)
    _say_overrides(asked, runs)
    forecasts = forecast(rest, options.out, probe=False)
    journal = Journal(options.out, _command(), forecasts)
    # Standard output is for results, whatever Ray and MLflow think.
    with redirect_stdout(sys.stderr), Display(quiet=options.json, forecasts=forecasts) as display, journal:
        pool = _pool(options, asked.device, len(rest), display)
        mirror = _mirror(options, asked, len(rest), display)
        watchers: list[Watcher] = [journal, display, *([mirror] if mirror else [])]
        schedule = partial(Schedule, forecasts=forecasts, budget=budget)
        try:
            results = driver.run(
                runs, options.out, pool=pool, watchers=watchers, force=options.force, schedule=schedule
            )
        except KeyboardInterrupt:
            return _interrupted(runs, options, mirror, display)
        boards = _boards(results, options.out)
        if mirror is not None:
            _finish(mirror, results, boards)
    if options.json:
        click.echo(json.dumps({"runs": [_as_json(result, options.out) for result in results]}, indent=2))
    else:
        _print_boards(boards, options, mirror)
    if budget is not None and (late := [result.run for result in results if result.status == "waiting"]):
        click.echo(f"bench: {left_out(late, budget, _command())}", err=True)
    failed = sum(result.status == "failed" for result in results)
    if failed:
        told = f"{failed} of {len(results)} runs failed; each says why in the run.json of its folder"
        click.echo(f"bench: {told}, and the same command tries again", err=True)
    return 1 if failed else 0


# From options to what runs ----------------------------------------------------------------------------------


def _sweep(options: Options) -> Sweep:
    from bench.files import data_root
    from bench.protocol.presets import parse_presets
    from bench.protocol.settings import BadConfig
    from bench.protocol.spelling import parse_assignments, parse_numbers, split_list
    from bench.registry import load_plugin
    from bench.sweep import config

    for file in options.plugin:
        load_plugin(file)
    overrides = parse_assignments(options.set)
    for field in (*_OF_THE_SETTING, "imbalance", "alpha"):
        if field in overrides:
            raise BadConfig(f"--set {field}: use --{field.replace('_', '-')}")
    given = {field: getattr(options, field) for field in _OF_THE_SETTING}
    overrides |= {field: value for field, value in given.items() if value is not None}
    factors = split_list(options.imbalance) if options.imbalance is not None else []
    if options.imbalance is not None and not factors:
        raise BadConfig("--imbalance is empty; a number such as 50 is wanted")
    return config.Sweep(
        algorithms=tuple(config.parse_algorithms(options.algos)),
        datasets=tuple(config.parse_datasets(options.dataset)),
        setting=options.setting,
        overrides=overrides,
        imbalance=tuple(config.parse_imbalance(factor) for factor in factors),
        alpha=() if options.alpha is None else tuple(parse_numbers(options.alpha, "--alpha")),
        seeds=tuple(config.parse_seeds(options.seeds)),
        engine=options.engine,
        precision=options.precision,
        device=config.resolve_device(options.device),
        weights=None if options.weights is None else options.weights.resolve(),
        data_root=data_root(options.data_root).resolve(),
        plugins=tuple(file.resolve() for file in options.plugin),
        presets=parse_presets(options.preset, options.out),
        workers=options.workers_per_run,
    )


def _budget(options: Options) -> Budget | None:
    from bench.sweep.schedule import Budget, parse_duration

    given = options.time_budget
    return None if given is None else Budget(parse_duration(given, "--time-budget"))


def _pool(options: Options, device: str, todo: int, display: Display) -> Pool:
    from bench.sweep.cluster import has_ray
    from bench.sweep.on_ray import OnRay
    from bench.sweep.pool import InProcess

    if options.ray == "off" or (options.ray is None and todo <= 1):
        return InProcess()
    if options.ray is None and not has_ray():
        display.warn("ray is not installed, so the runs follow each other here; pip install ray for several at once")
        return InProcess()
    return OnRay(options.ray or "local", options.jobs, device, options.workers_per_run)


def _mirror(options: Options, asked: Sweep, todo: int, display: Display) -> Mirror | None:
    from bench import tracking

    given = options.tracking_uri
    if given == "off" or (given is None and todo == 0):
        return None
    if not tracking.has_mlflow():
        display.warn("mlflow is not installed, so nothing is tracked; pip install mlflow, or use --tracking-uri off")
        return None
    about = {"command": _command(), "setting": asked.setting, "seeds": ",".join(map(str, asked.seeds))}
    about |= {"algorithms": options.algos, "dataset": options.dataset}
    return tracking.Mirror(given or tracking.default_uri(options.out), options.out, about, display.warn)


def _command() -> str:
    """Give the command line as it can be typed again."""
    return shlex.join(["bench", *sys.argv[1:]])


# What is said -----------------------------------------------------------------------------------------------


def _say_overrides(asked: Sweep, runs: Sequence[Run]) -> None:
    """Say which setting holds, and which of its fields were replaced."""
    from bench.protocol.presets import remarks
    from bench.registry import label

    for dataset in dict.fromkeys(run.dataset for run in runs):
        changed = {key: value for run in runs if run.dataset == dataset for key, value in run.overrides().items()}
        replaced = f", with other {', '.join(changed)}" if changed else ""
        click.echo(f"setting {asked.setting} on {label(dataset)}{replaced}", err=True)
    for setting in dict.fromkeys(run.setting for run in runs if run.setting.match == "samples"):
        rounds = {label(run.algorithm): run.trained_by().rounds for run in runs if run.setting == setting}
        told = ", ".join(f"{each} {number}" for each, number in rounds.items())
        click.echo(
            f"samples are matched: {setting.rounds} rounds of plain local training are the budget, and clients process "
            f"about as many samples, tuning included, in these rounds: {told}",
            err=True,
        )
    for sentence in remarks(asked.presets, {run.protocol for run in runs}):
        click.echo(sentence, err=True)


def _interrupted(runs: Sequence[Run], options: Options, mirror: Mirror | None, display: Display) -> int:
    from bench.sweep import execution

    done = sum(execution.finished(run, options.out) for run in runs)
    display.warn(f"interrupted: {done} of {len(runs)} runs are done and kept. The same command goes on: {_command()}")
    if mirror is not None:
        mirror.finish("KILLED", {})
    return 130


def _finish(mirror: Mirror, results: Sequence[Result], boards: Sequence[Leaderboard]) -> None:
    from bench.results.table import render

    failed = any(result.status == "failed" for result in results)
    tables = {f"leaderboard.{format}": render(boards, format) for format in ("md", "json")}
    mirror.finish("FAILED" if failed else "FINISHED", tables)


def _boards(results: Sequence[Result], out: Path) -> list[Leaderboard]:
    from bench.results import records
    from bench.results.table import leaderboards

    finished = [records.read(out / result.run.id) for result in results if result.status in ("done", "cached")]
    return leaderboards(finished)


def _print_boards(boards: Sequence[Leaderboard], options: Options, mirror: Mirror | None) -> None:
    from bench.tracking import import_command, interface_command

    print_boards(boards)
    click.echo(f"results: {options.out}  (bench table --out {shlex.quote(str(options.out))})")
    if mirror is not None:
        lost = f"MLflow lacks some; they are imported by {import_command(mirror.uri, options.out)}"
        click.echo(f"curves:  {interface_command(mirror.uri) if mirror.healthy else lost}")


def _as_json(result: Result, out: Path) -> dict[str, Any]:
    from bench.results import records

    cell = {**describe(result.run), "status": result.status}
    if result.status not in ("done", "cached"):
        return {**cell, "metrics": {}, "digest": None, "reason": result.reason}
    record = records.read(out / result.run.id)
    return {**cell, "metrics": record.metrics, "digest": record.document["digest"]}
