"""`bench clean`: what nobody will look at again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.command.stored import read_stored, stored_in
from bench.system.text import plain

if TYPE_CHECKING:
    from bench.results.record import Record


@click.command("clean")
@stored_in()
@click.option("--stale", is_flag=True, help="Runs of which there is a newer version of the plug-in.")
@click.option("--failed", is_flag=True, help="Runs that failed.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean_command(out: Path, stale: bool, failed: bool, dry_run: bool, yes: bool) -> None:
    """Remove the folders of runs that are of an older version, or that failed; nothing without a flag.

    What will go is named first. Runs that a process is doing, unfinished and damaged ones stay.

    \b
    bench clean --stale
    bench clean results --failed --dry-run
    """
    from bench.results.discarding import discard, size
    from bench.results.versions import stale as older

    stored = read_stored(out)
    old = older(stored)
    found = [record for record in stored if record.pack is None]
    if in_packs := len(stored) - len(found):
        lie = "run lies" if in_packs == 1 else "runs lie"
        click.echo(f"{in_packs} {lie} in packs, which stay as they are; bench pack --unpack takes one apart")
    kinds = {
        "stale": [record for record in found if record.id in old],
        "failed": [record for record in found if record.status == "failed"],
    }
    asked = {kind: kinds[kind] for kind, wanted in (("stale", stale), ("failed", failed)) if wanted}
    if not asked:
        for kind, several in kinds.items():
            click.echo(f"--{kind}: {_count(several)} of {len(found)}, {_megabytes(sum(map(size, several)))}")
        click.echo("nothing is removed without one of these")
        return
    for kind, several in asked.items():
        for record in several:
            click.echo(f"{kind}  {record.id}  {_describe(record)}")
    going = list({record.id: record for several in asked.values() for record in several}.values())
    click.echo(f"{_count(going)} of {len(found)} in {out}, {_megabytes(sum(map(size, going)))}")
    if dry_run or not going:
        return
    if not yes:
        if not answers():
            raise click.UsageError("nobody is there to answer whether to remove them; use --yes")
        click.confirm("remove them?", default=False, abort=True, err=True)
    kept = discard(going)
    for run in kept:
        click.echo(f"bench: {run} stays: a process is doing it, or has done it meanwhile", err=True)
    click.echo(f"removed {len(going) - len(kept)}")
    if (out / "README.md").is_file():
        click.echo(f"the table beside them is written anew by: bench table --out {out} --write")


def answers() -> bool:
    """Tell whether somebody is there who can be asked."""
    return sys.stdin.isatty()


def _count(records: Sequence[Record]) -> str:
    return f"{len(records)} run{'s' * (len(records) != 1)}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _describe(record: Record) -> str:
    from bench.results.footnotes import moment
    from bench.results.versions import version

    when = f", {moment(record.finished)}" if record.finished else ""
    why = f": {' '.join(record.reason.split())}" if record.status == "failed" and record.reason else ""
    what = f"{record.label or record.call} version {version(record)} on {record.dataset}, seed {record.seed}"
    return plain(f"{what}{when}{why}")
