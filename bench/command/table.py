"""`bench table`: the leaderboard of stored results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.command.stored import all_versions_option, read_stored, stored_in, suite_option
from bench.command.typed import Choice

if TYPE_CHECKING:
    from bench.results.leaderboard import Leaderboard


@click.command("table")
@click.option("--dataset", "datasets", help="Only these datasets, separated by commas.")
@suite_option
@stored_in()
@all_versions_option
@click.option(
    "--format",
    "form",
    type=Choice(["md", "csv", "long", "latex", "html", "json"]),
    help="Text in this format instead of a table for the terminal; long is CSV with a line for every metric.",
)
@click.option("--per-seed", is_flag=True, help="With --format csv: a line a run instead of the means.")
@click.option(
    "--metric",
    type=Choice(["last", "last10", "best"]),
    default="last",
    show_default=True,
    help="Last round, mean of the last ten evaluations, or the best on test data (optimistic).",
)
@click.option(
    "--metrics",
    "shown",
    metavar="NAME,NAME",
    help="These columns: any metric or cost, f1, generic.precision, personal.pooled_f1 ...",
)
@click.option("--write", is_flag=True, help="Write the README.md of the folder of results.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.md",
    help="Write the main columns between a page's two comments.",
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Draw balanced accuracy, seed by seed, as a picture for such a page.",
)
@click.option("--best", type=click.IntRange(min=1), help="With --into and --draw: so many rows of each table.")
def table_command(
    datasets: str | None,
    suite: str | None,
    out: Path,
    all_versions: bool,
    form: str | None,
    per_seed: bool,
    metric: str,
    shown: str | None,
    write: bool,
    into: Path | None,
    draw: Path | None,
    best: int | None,
) -> None:
    """Print the leaderboard of stored results: means over seeds and what these span, one table per protocol.

    Damaged folders are named on standard error and left out.

    \b
    bench table
    bench table --suite lt-small
    bench table --dataset cifar10 --format latex > table.tex
    bench table results --format csv --per-seed > runs.csv
    bench table --metrics generic,f1,personal.balanced,samples
    bench table --out results --write --into README.md
    bench table results --suite lt-features --best 10 --into README.md --draw best.svg
    """
    from bench.results import chosen, records, table
    from bench.results.leaderboard import RANKS_BY, suffix
    from bench.system.durable import put

    if per_seed and form != "csv":
        raise click.UsageError("--per-seed is for --format csv: a line a run instead of the means")
    if all_versions and (write or into is not None):
        raise click.UsageError("a published table has the newest versions alone; leave --all-versions out")
    if best is not None and into is None and draw is None:
        raise click.UsageError("--best is for --into and --draw; other tables have all rows")
    if shown is not None and write:
        raise click.BadParameter(
            "the README of a folder has all columns; leave one of them out", param_hint="--metrics"
        )
    found = read_stored(out, datasets, suite)
    if shown is None:
        boards = table.leaderboards(found, metric, all_versions=all_versions)
    else:
        boards = chosen.boards(found, metric, shown, all_versions=all_versions)
    if write:
        command = f"bench table --out {out} --write" + (f" --metric {metric}" if metric != "last" else "")
        path = records.publish(out, table.results_readme(boards, records.prose(out), command))
        click.echo(f"wrote {path}", err=True)
    if into is not None:
        try:
            put(into, table.front_page(into.read_text(encoding="utf-8"), boards, best).encode())
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"{into}: {error}", param_hint="--into") from error
        click.echo(f"wrote {into}", err=True)
    if draw is not None:
        from bench.site import picture

        try:
            put(draw, picture.drawn(boards, RANKS_BY[0] + suffix(metric), best).encode())
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"{draw}: {error}", param_hint="--draw") from error
        click.echo(f"wrote {draw}", err=True)
    if write or into is not None or draw is not None:
        return
    if form is not None:
        click.echo(table.render(boards, form, per_seed=per_seed), nl=False)
    else:
        print_boards(boards)


def print_boards(boards: Sequence[Leaderboard]) -> None:
    """Print leaderboards for a person."""
    from rich.console import Console

    from bench.results.table import terminal

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width, and 80 columns would cut
    for part in terminal(boards):
        console.print(part)
