"""Algorithms compared, for a person: tables of pairs and of ranks, and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bench.results.comparison import Comparison, Control, Part, Spread, spell_p
from bench.results.statistics import Estimate, Pair, Ranking

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_MOST = 6
"""Algorithms of which a person is shown all pairs; of more, those of the best-ranked one."""
_LEGEND = (
    "Differences are percentage points of the first over the second: a mean with (the range) of two to four values, or "
    "with its [95 % interval] of five (Student t) or more (BCa bootstrap), not corrected; p of the signed-rank test, "
    "and after Holm's correction. An average rank of 1 is always the best; equals share theirs."
)


def terminal(compared: Comparison) -> Iterator[RenderableType]:
    """Lay a comparison out for the terminal."""
    from rich.text import Text

    for part in (*compared.parts, *([compared.overall] if compared.overall else [])):
        yield Text(f"{compared.metric}: {part.title}", style="bold")
        yield from _piece(part)
        yield Text()
    for varying in compared.spread:
        yield Text(f"{compared.metric}: {varying.title}", style="bold")
        yield _spread(varying)
    if compared.controls:
        yield Text("Controls: what each row is there to tell of its method", style="bold")
        yield _controls(compared.controls)
    yield from map(Text, compared.left_out)
    yield Text(_LEGEND, style="dim")


def _piece(part: Part) -> Iterator[RenderableType]:
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


def _controls(controls: Sequence[Control]) -> Table:
    from rich.text import Text

    table = _table()
    for heading in ("method", "control", "asks"):
        table.add_column(heading, overflow="fold")
    for each in controls:
        row = f"{each.control} (no results)" if each.label is None else each.label
        table.add_row(Text(each.method), Text(row), Text(each.answers), style="dim" if each.label is None else "")
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
