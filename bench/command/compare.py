"""`bench compare`: what stored results say about two or more algorithms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.command.stored import out_option, read_stored

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from bench.results.comparison import Comparison, Part, Spread
    from bench.results.statistics import Estimate, Pair, Ranking

_MOST = 6
"""Algorithms of which a person is shown all pairs; of more, those of the best-ranked one."""
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
    from bench.protocol.settings import BadConfig
    from bench.protocol.spelling import near, split_list
    from bench.results import comparison
    from bench.results.leaderboard import leaderboards

    if diagram is not None and diagram.suffix not in _ENDINGS:
        raise click.BadParameter(f"{diagram}: must end in {', '.join(_ENDINGS)}", param_hint="--diagram")
    boards = leaderboards(read_stored(out, datasets))
    known = comparison.metrics(boards)
    if not known:
        raise BadConfig(f"there are no finished runs in {out}{'' if datasets is None else f' on {datasets}'}")
    if metric not in known:
        plain = [key for key in known if not set(key) & set(":@")]  # there are dozens
        raise BadConfig(f"--metric {metric}: the results have none that can be compared; {near(metric, plain)}")
    labels = comparison.choose(boards, split_list(",".join(algorithms))) if algorithms else None
    if labels is not None and len(labels) < 2:
        raise BadConfig(f"{labels[0]}: two algorithms or more are wanted, or none for all")
    compared = comparison.compare(boards, metric, labels)
    if not compared.parts:
        raise BadConfig(f"no two of {', '.join(compared.labels) or 'them'} have {metric} under one protocol")
    if diagram is not None:
        ranking = comparison.ranking(boards, metric, labels)
        if ranking is None:
            raise BadConfig(f"--diagram {diagram}: nothing is ranked over all of these results; choose with --dataset")
        _save(diagram, ranking, metric)
    if as_json:
        click.echo(json.dumps(comparison.document(compared), indent=2, allow_nan=False))
    else:
        _print(compared)


# For a person -----------------------------------------------------------------------------------------------


def _print(compared: Comparison) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console.width = 120
    for part in (*compared.parts, *([compared.overall] if compared.overall else [])):
        console.print(Text(f"{compared.metric}: {part.title}", style="bold"))
        for piece in _piece(part):
            console.print(piece)
        console.print()
    for varying in compared.spread:
        console.print(Text(f"{compared.metric}: {varying.title}", style="bold"))
        console.print(_spread(varying))
    for sentence in compared.left_out:
        console.print(Text(sentence))
    console.print(Text(_LEGEND, style="dim"))


_LEGEND = (
    "Differences are percentage points of the first over the second: a mean with (the range) of two to four values, or "
    "with its [95 % interval] of five (Student t) or more (BCa bootstrap), not corrected; p of the signed-rank test, "
    "and after Holm's correction. An average rank of 1 is always the best; equals share theirs."
)


def _piece(part: Part) -> Iterable[RenderableType]:
    from rich.text import Text

    pairs = part.pairs
    ranking = part.ranking
    members = dict.fromkeys(label for pair in pairs for label in (pair.first, pair.second))
    if ranking is not None and len(members) > _MOST:
        best = ranking.labels[0]
        pairs = tuple(pair for pair in pairs if best in (pair.first, pair.second))
        yield Text(f"The pairs of {best}, which ranks first; --json has all {len(part.pairs)}.")
    yield _pairs(pairs, part.unit)
    if ranking is not None and len(members) > 2:
        yield _ranks(ranking)
    for sentence in part.says:
        yield Text(sentence)


def _table() -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, pad_edge=False)


def _pairs(pairs: Sequence[Pair], unit: str) -> Table:
    from rich.text import Text

    from bench.results.comparison import spell_p

    table = _table()
    for heading in ("first", "second"):
        table.add_column(heading, overflow="fold")
    for heading in ("difference", f"wins-ties-losses\nof {unit}s", "p", "corrected"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pair in pairs:
        counts = "all tied" if pair.tied else f"{pair.wins}-{pair.ties}-{pair.losses}"
        cells = [difference(pair.difference), counts, spell_p(pair.p), spell_p(pair.corrected)]
        style = "bold" if pair.separated else ""
        table.add_row(Text(pair.first, style=style), Text(pair.second, style=style), *cells, style=style)
    return table


def _ranks(ranking: Ranking) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("algorithm", overflow="fold")
    table.add_column("average rank", justify="right")
    for label, average in zip(ranking.labels, ranking.ranks, strict=True):
        table.add_row(Text(label), f"{average:.2f}")
    return table


def _spread(varying: Spread) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("algorithm", overflow="fold")
    for heading in ("initialisation\n± points", "partition\n± points"):
        table.add_column(heading, justify="right")
    for label, initialisation, partition in varying.rows:
        table.add_row(Text(label), f"{100 * initialisation:.2f}", f"{100 * partition:.2f}")
    return table


def difference(estimate: Estimate) -> str:
    """Write a mean difference in percentage points, with its interval: `+1.2 [+0.3, +2.0]`, or the range of few values:
    `+1.2 (+0.3, +2.0)`; a dash if there is none.
    """
    ends = [estimate.mean, estimate.low, estimate.high]
    mean, low, high = ("–" if end is None else f"{100 * end + 0.0:+.1f}" for end in ends)
    if estimate.low is None:
        return mean
    return f"{mean} ({low}, {high})" if estimate.kind == "range" else f"{mean} [{low}, {high}]"


# Diagrams ---------------------------------------------------------------------------------------------------


def _save(path: Path, ranking: Ranking, metric: str) -> None:
    try:
        draw(path, ranking, metric)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be written ({error})", param_hint="--diagram") from error
    click.echo(f"diagram: {path}", err=True)


def draw(path: Path, ranking: Ranking, metric: str) -> None:
    """Draw a critical-difference diagram; bars join algorithms that are not told apart.

    Args:
        path: Of the file; its ending says the format, and its folder is made. An SVG of the same ranking has the same
            bytes.
        ranking: Of two algorithms or more.
        metric: What the ranks are of.

    Raises:
        OSError: It cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from scikit_posthocs import critical_difference_diagram

    from bench.results.comparison import spell_p

    names = [label.replace("$", r"\$") for label in ranking.labels]  # a dollar would begin a formula
    figure = Figure(figsize=(9, 1.6 + 0.22 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    drawn = critical_difference_diagram(
        dict(zip(names, ranking.ranks, strict=True)),
        DataFrame(ranking.p_values, index=names, columns=names),
        ax=axes,
        text_h_margin=0.01 * len(names),
        label_fmt_left="{label} ({rank:.2f})",
        label_fmt_right="({rank:.2f}) {label}",
        color_palette=dict.fromkeys(names, "black"),
        elbow_props={"linewidth": 0.8},
        marker_props={"s": 12},
    )
    for (bar,) in drawn["crossbars"]:  # its points come from a set, in an order that differs by process
        bar.set_xdata(sorted(bar.get_xdata()))
    if ranking.separates:  # above the numbers of the axis, which the function's own bar would strike out
        start, stop = ranking.ranks[0], ranking.ranks[0] + ranking.critical_difference
        axes.plot([start, stop], [1.4, 1.4], color="black", linewidth=2)
        axes.text(stop, 1.4, f"  critical difference {ranking.critical_difference:.2f}", va="center")
    said = "" if ranking.separates else ", no two told apart"
    axes.set_title(
        f"{metric}: average rank over {ranking.blocks} {ranking.unit}s (Friedman p {spell_p(ranking.p)}){said}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "ranks", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
