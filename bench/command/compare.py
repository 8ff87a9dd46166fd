"""`bench compare`: what stored results say about two or more algorithms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.command.stored import all_versions_option, chosen, out_option, read_stored, suite_option

if TYPE_CHECKING:
    from bench.face.comparing import Compared
    from bench.results.statistics import Ranking

_ENDINGS = (".svg", ".png", ".pdf")


@click.command("compare")
@click.argument("algorithms", metavar="[DIR] [ALGORITHMS]...", nargs=-1)
@out_option()
@all_versions_option
@click.option("--dataset", "datasets", help="Only these datasets, separated by commas.")
@suite_option
@click.option(
    "--metric",
    default="personal.balanced",
    show_default=True,
    help="generic, personal, generic.few, generic.f1, unseen ...; with @last10 the mean of the last ten evaluations.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option(
    "--diagram",
    type=click.Path(path_type=Path),
    metavar="FILE.svg|png",
    help="Draw average ranks and the critical difference to a file as well.",
)
def compare_command(
    algorithms: tuple[str, ...],
    out: Path | None,
    all_versions: bool,
    datasets: str | None,
    suite: str | None,
    metric: str,
    as_json: bool,
    diagram: Path | None,
) -> None:
    """Test whether ALGORITHMS differ, paired by split and seed; all that there are results of, if none is given.
    The first word is DIR if it is a folder of results.

    On each leaderboard: mean differences with 95 % intervals, Wilcoxon's signed-rank test with Holm's correction for
    all pairs, average ranks, Friedman's test and Nemenyi's critical difference; over several datasets the same with
    datasets in the place of seeds. Damaged folders are named on standard error and left out.

    \b
    bench compare fedavg fedloge
    bench compare fedavg "fedrep(head_epochs=2)" --metric generic
    bench compare results --suite lt-features
    bench compare --dataset cifar10 --diagram ranks.svg
    """
    from bench.face.comparing import compare
    from bench.protocol.settings import BadConfig
    from bench.protocol.words import split_list
    from bench.results import classes, comparison
    from bench.results.leaderboard import leaderboards

    if diagram is not None and diagram.suffix not in _ENDINGS:
        raise click.BadParameter(f"{diagram}: must end in {', '.join(_ENDINGS)}", param_hint="--diagram")
    folder, algorithms = _folder(algorithms)
    place = chosen(folder, out)
    found = read_stored(place, datasets, suite)
    measured = classes.with_derived(found) if classes.is_derived(metric) else found
    boards = leaderboards(measured, all_versions=all_versions)
    if not comparison.metrics(boards):
        on, of = "" if datasets is None else f" on {datasets}", "" if suite is None else f" of suite {suite}"
        raise BadConfig(f"there are no finished runs{of} in {place}{on}")
    compared = compare(boards, split_list(",".join(algorithms)), metric)
    if diagram is not None:
        if compared.ranking is None:
            raise BadConfig(f"--diagram {diagram}: nothing is ranked over all of these results; choose with --dataset")
        _save(diagram, compared.ranking, metric)
    if as_json:
        click.echo(json.dumps(comparison.document(compared.comparison), indent=2, allow_nan=False))
    else:
        _print(compared)


def _folder(words: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    """Take the folder off the words: the first, if it is one and is written as a path or holds runs."""
    if not words or not Path(words[0]).is_dir():
        return None, words
    from bench.results.records import holds_runs

    first = Path(words[0])
    written = first.name != words[0]  # a folder beside us may be called like an algorithm
    return (first, words[1:]) if written or holds_runs(first) else (None, words)


def _print(compared: Compared) -> None:
    from rich.console import Console

    from bench.results.compared import terminal

    console = Console()
    if not console.is_terminal:
        console.width = 120
    for part in terminal(compared.comparison):
        console.print(part)


def _save(path: Path, ranking: Ranking, metric: str) -> None:
    from bench.face.pictures import ranks

    try:
        ranks(ranking, metric).save(path)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be written ({error})", param_hint="--diagram") from error
    click.echo(f"diagram: {path}", err=True)
