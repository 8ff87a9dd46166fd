"""What commands on stored results share: the option that says where they are, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.names import meant

if TYPE_CHECKING:
    from bench.results.record import Record

out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of results.",
)


def require_folder(out: Path, hint: str = "--out") -> None:
    """Make sure that the folder of results is there."""
    if not out.is_dir():
        raise click.BadParameter(f"{out}: there is no such folder, 'bench run' makes one", param_hint=hint)


def read_stored(out: Path, datasets: str | None = None) -> list[Record]:
    """Read the results of a folder; damaged ones are named on standard error and left out.

    Args:
        out: Where.
        datasets: Names of those that are kept, separated by commas; None: all.

    Raises:
        BadParameter: There are results, and none on one of these.
    """
    from bench.results import records

    require_folder(out)
    found, damaged = records.read_all(out)
    for sentence in damaged:
        click.echo(f"bench: {sentence}", err=True)
    if datasets is None:
        return found
    known = sorted({_name(record) for record in found})
    wanted = [name.strip() for name in datasets.split(",") if name.strip()]
    for name in wanted:
        if known and meant(name, known) is None:
            said = f"there are no results on {name!r} in {out}; there are some on {', '.join(known)}"
            raise click.BadParameter(said, param_hint="--dataset")
    kept = {meant(name, known) for name in wanted}
    return [record for record in found if _name(record) in kept]


def _name(record: Record) -> str:
    return record.dataset.partition("(")[0]
