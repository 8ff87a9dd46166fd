"""`bench run`: from options to runs, finished folders and a leaderboard."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from bench.command.options import Options, run_options
from bench.command.plan import describe, print_plan
from bench.command.table import print_boards
from bench.system import collector

if TYPE_CHECKING:
    from bench.face.sweeping import Swept
    from bench.sweep.driver import Result


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
    alone = click.get_current_context().obj["alone"]
    # A seventh of the time of loading modules would be its, and half a second of the end.
    with collector.settling() if alone else collector.paused():
        from bench.face import asked
        from bench.face.sweeping import Stopped, perform

    if options.dry_run:
        read = asked.sweep(options)
        return print_plan(asked.expand(read), options, read.device)
    try:
        swept = perform(options, shlex.join(["bench", *sys.argv[1:]]), quiet=options.json)
    except Stopped:
        return 130
    if options.json:
        click.echo(json.dumps({"runs": [_as_json(result, options) for result in swept.results]}, indent=2))
    else:
        _print(swept, options)
    return 1 if swept.failed else 0


def _print(swept: Swept, options: Options) -> None:
    from bench.tracking import import_command, interface_command

    print_boards(swept.boards)
    click.echo(f"results: {options.out}  (bench table --out {shlex.quote(str(options.out))})")
    if (mirror := swept.mirror) is not None:
        lost = f"MLflow lacks some; they are imported by {import_command(mirror.uri, options.out)}"
        click.echo(f"curves:  {interface_command(mirror.uri) if mirror.healthy else lost}")


def _as_json(result: Result, options: Options) -> dict[str, Any]:
    from bench.results import records

    cell = {**describe(result.run), "status": result.status}
    if result.status not in ("done", "cached"):
        return {**cell, "metrics": {}, "digest": None, "reason": result.reason}
    record = records.read(options.out / result.run.id)
    return {**cell, "metrics": record.metrics, "digest": record.document["digest"]}
