"""`bench compare`: what stored results say about two or more algorithms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.command.stored import out_option, read_stored

if TYPE_CHECKING:
    from bench.results.statistics import Ranking

_ENDINGS = (".svg", ".png", ".pdf")


@click.command("compare")
@click.argument("algorithms", nargs=-1)
@out_option
@click.option("--dataset", "datasets", help="Only these datasets, separated by commas.")
@click.option(
    "--metric",
    default="personal.balanced",
    show_default=True,
    help="generic, personal, generic.few, unseen ...; with @last10 the mean of the last ten evaluations.",
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
    out: Path,
    datasets: str | None,
    metric: str,
    as_json: bool,
    diagram: Path | None,
) -> None:
    """Test whether ALGORITHMS differ, paired by split and seed; all that there are results of, if none is given.

    On each leaderboard: mean differences with 95 % intervals, Wilcoxon's signed-rank test with Holm's correction for
    all pairs, average ranks, Friedman's test and Nemenyi's critical difference; over several datasets the same with
    datasets in the place of seeds. Damaged folders are named on standard error and left out.

    \b
    bench compare fedavg fedloge
    bench compare fedavg "fedrep(head_epochs=2)" --out results --metric generic
    bench compare --dataset cifar10 --diagram ranks.svg
    """
    from bench.face.comparing import compare
    from bench.protocol.settings import BadConfig
    from bench.protocol.spelling import split_list
    from bench.results import comparison
    from bench.results.leaderboard import leaderboards

    if diagram is not None and diagram.suffix not in _ENDINGS:
        raise click.BadParameter(f"{diagram}: must end in {', '.join(_ENDINGS)}", param_hint="--diagram")
    boards = leaderboards(read_stored(out, datasets))
    if not comparison.metrics(boards):
        raise BadConfig(f"there are no finished runs in {out}{'' if datasets is None else f' on {datasets}'}")
    compared = compare(boards, split_list(",".join(algorithms)), metric)
    if diagram is not None:
        if compared.ranking is None:
            raise BadConfig(f"--diagram {diagram}: nothing is ranked over all of these results; choose with --dataset")
        _save(diagram, compared.ranking, metric)
    if as_json:
        click.echo(json.dumps(comparison.document(compared.comparison), indent=2, allow_nan=False))
    else:
        click.echo(str(compared))


def _save(path: Path, ranking: Ranking, metric: str) -> None:
    from bench.face.pictures import ranks

    try:
        ranks(ranking, metric).save(path)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be written ({error})", param_hint="--diagram") from error
    click.echo(f"diagram: {path}", err=True)
