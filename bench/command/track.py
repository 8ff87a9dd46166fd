"""`bench track`: stored results in MLflow, afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bench.command.stored import read_stored, require_folder, stored_in


@click.command("track")
@stored_in()
@click.option("--tracking-uri", metavar="URI", help="MLflow; by default SQLite beside the results.")
def track_command(out: Path, tracking_uri: str | None) -> None:
    """Show the finished and failed runs of a folder in MLflow, those that are not shown there yet.

    A sweep does that by itself while it runs. This is for results of a sweep that lost its server or had none, and for
    results from elsewhere; call it when no sweep is at work in the folder. What a sweep showed in part is completed.
    Damaged folders are named on standard error and left out.

    \b
    bench track
    bench track results --tracking-uri http://127.0.0.1:5000
    """
    from bench import tracking
    from bench.results import table
    from bench.sweep import journal

    require_folder(out)
    if tracking_uri == "":
        raise click.BadParameter("it is empty; the address of an MLflow server is wanted", param_hint="--tracking-uri")
    if any(sweep.fate == "working" for sweep in journal.read(out)):
        raise click.UsageError(f"a sweep is at work in {out} and shows its runs by itself; call this when it has ended")
    if not tracking.has_mlflow():
        raise click.UsageError("mlflow is not installed; pip install mlflow")
    found = read_stored(out)
    boards = table.leaderboards(found)
    tables = {f"leaderboard.{form}": table.render(boards, form) for form in ("md", "json")}
    uri, said = tracking_uri or tracking.default_uri(out), list[str]()
    with click.progressbar(length=len(found), label=f"{len(found)} runs of {out}", file=sys.stderr) as bar:
        done = tracking.import_records(uri, out, found, tables, lambda: bar.update(1), said.append)
    for sentence in said:
        click.echo(f"bench: {sentence}", err=True)
    click.echo(f"{done.added} added, {done.completed} completed, {done.present} there already")
    click.echo(f"curves:  {tracking.interface_command(uri)}")
