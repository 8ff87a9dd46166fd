"""`bench site`: stored results as a folder of pages."""

from __future__ import annotations

from pathlib import Path

import click

from bench.command.stored import all_versions_option, read_stored, stored_in


@click.command("site")
@stored_in()
@click.option(
    "--to", type=click.Path(path_type=Path), default=Path("site"), show_default=True, help="Folder of the site."
)
@all_versions_option
def site_command(out: Path, to: Path, all_versions: bool) -> None:
    """Build a static site of stored results: a table to sort and filter, a page a comparison, any run, any two rows.

    The pages open in a browser without a server and without a network. Damaged folders are named on standard error and
    left out. What an earlier build left is replaced; a folder that holds anything else is refused.

    \b
    bench site
    bench site results --to site
    """
    from bench.results import records
    from bench.site.build import build

    notes, reproductions = records.prose(out), records.reproductions(out)
    written = build(read_stored(out), to, notes=notes, reproductions=reproductions, all_versions=all_versions)
    click.echo(f"wrote {len(written)} files: {to / 'index.html'}", err=True)
