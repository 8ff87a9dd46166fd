"""What commands on stored results share: the option that says where they are, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

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
    """
    from bench.results import records

    require_folder(out)
    found, damaged = records.read_all(out)
    for sentence in damaged:
        click.echo(f"bench: {sentence}", err=True)
    if datasets is None:
        return found
    wanted = {name.strip().replace("-", "_") for name in datasets.split(",") if name.strip()}
    return [record for record in found if record.dataset.partition("(")[0] in wanted]
