"""Any two rows of a comparison, head to head: what the seeds, clients and classes that both have say of them.

    versus.html?COMPARISON&1f0a2b43&9c04d155    shows two rows, out of
    versus/COMPARISON/rows.js                   which rows there are, in the order of the leaderboard, and
    versus/COMPARISON/1f0a2b43.js               the pairs in which that row stands first, by the other's id: JSON, as
                                                gzip in base64, as pages of two rows are much alike

As with runs: a page that was opened as a file may load scripts and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.results.compared import difference
from bench.results.comparison import spell_p
from bench.results.layout import resolution
from bench.results.leaderboard import Leaderboard, Row, measured
from bench.results.record import Record
from bench.results.statistics import Pair, pairwise
from bench.site import paired
from bench.site.charts import Figure
from bench.site.counts import fewer, head_to_tail
from bench.site.rendering import render
from bench.site.rows import Comparison, id_of
from bench.site.run_page import Drawn
from bench.site.shelves import folded

PAGE = "versus.html"
"""Shows the two rows whose ids stand behind "?" and the comparison's name in its address."""
FOLDER = "versus"
MEASURES = {
    "balanced": "personal.balanced",
    "personal": "personal",
    "generic": "generic",
    "few": "generic.few",
    "tail": "personal.few",
}
"""What pairs are compared by: title to key."""
MOST = 60
"""Rows of a comparison that have such pages, the highest; pairs grow with the square of rows, and so would a site."""
HEADING = ("accuracy", "difference", "better, equal, worse", "p", "corrected")
_Block = tuple[int, str]
"""A seed, and the fingerprint of its split."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What the pairs of a comparison are made of."""

    rows: int
    scores: Mapping[str, Mapping[str, Mapping[Hashable, float]]]
    """By measure, label and block."""
    pairs: Mapping[str, Mapping[tuple[str, str], Pair]]
    """By measure and the labels, of which the first stands higher."""
    runs: Mapping[str, Mapping[_Block, str]]
    """By label and block."""
    drawn: Mapping[str, Drawn]
    records: Mapping[str, Record]


def compared(board: Leaderboard) -> Sequence[Row]:
    """Give the rows of which any two have a page; none where there is nothing to compare."""
    return board.rows[:MOST] if len(board.rows) > 1 else ()


def scripts(
    comparison: Comparison, records: Mapping[str, Record], drawn: Mapping[str, Drawn]
) -> Iterator[tuple[str, str]]:
    """Give the scripts of a comparison's pairs, path and text; none where there is one row only.

    Args:
        comparison: Whose rows.
        records: The runs, by id.
        drawn: The same runs, by id.
    """
    board, folder = comparison.leaderboard, f"{FOLDER}/{comparison.name}"
    rows = compared(board)
    if not rows:
        return
    known = _known(board, records, drawn)
    told = {"title": comparison.title, "page": comparison.page, "rows": [[id_of(row), row.label] for row in rows]}
    yield f"{folder}/rows.js", f"shelve({json.dumps(told)});\n"
    for place, first in enumerate(rows[:-1], start=1):
        contents = {id_of(second): _content(comparison, known, first, second) for second in rows[place:]}
        yield f"{folder}/{id_of(first)}.js", f"shelve({json.dumps(folded(json.dumps(contents)))});\n"


def _known(board: Leaderboard, records: Mapping[str, Record], drawn: Mapping[str, Drawn]) -> _Known:
    scores = {name: measured(board, key) for name, key in MEASURES.items()}
    return _Known(
        rows=len(board.rows),
        scores=scores,
        pairs={name: {(pair.first, pair.second): pair for pair in pairwise(those)} for name, those in scores.items()},
        runs={
            row.label: dict(zip(zip(row.seeds, row.splits, strict=True), row.runs, strict=True)) for row in board.rows
        },
        drawn=drawn,
        records=records,
    )


def _content(comparison: Comparison, known: _Known, first: Row, second: Row) -> str:
    labels = (first.label, second.label)
    common = [block for block in known.runs[first.label] if block in known.runs[second.label]]
    found = {name: pair for name, pairs in known.pairs.items() if (pair := pairs.get(labels)) is not None and pair.n}
    figures = [
        paired.by_seed(found, {name: _singles(known.scores[name], labels, common) for name in found})
        if found
        else None,
        _clients(known, labels, common),
        _classes(known, labels, common),
    ]
    return render(
        "versus_content.html",
        "",
        comparison=comparison,
        labels=labels,
        common=len(common),
        heading=HEADING,
        rows=[(name, *_line(pair)) for name, pair in found.items()],
        says=_says(known, labels, common),
        figures=[[figure] for figure in figures if figure is not None],
    )


def _line(pair: Pair) -> tuple[str, ...]:
    counts = f"{pair.wins}, {pair.ties}, {pair.losses}"
    return difference(pair.difference), counts, spell_p(pair.p), spell_p(pair.corrected)


def _says(known: _Known, labels: tuple[str, str], common: Sequence[_Block]) -> list[str]:
    """Say what the seeds can tell, and what cannot be paired."""
    if not common:
        return ["Nothing can be paired: there is no seed that both have finished on the same split."]
    says = [resolution(len(common), known.rows)]
    for label in labels:
        missing = [name for name, scores in known.scores.items() if label not in scores]
        says += [f"{label} has no {' and no '.join(missing)}, so that nothing is paired there."] if missing else []
    return says


def _singles(
    scores: Mapping[str, Mapping[Hashable, float]], labels: tuple[str, str], common: Sequence[_Block]
) -> dict[int, float]:
    """Give the difference of every common seed."""
    one, other = (scores[label] for label in labels)
    return {block[0]: one[block] - other[block] for block in common if block in one and block in other}


def _runs(known: _Known, labels: tuple[str, str], common: Sequence[_Block]) -> Iterator[tuple[Drawn, Drawn]]:
    for block in common:
        yield known.drawn[known.runs[labels[0]][block]], known.drawn[known.runs[labels[1]][block]]


def _clients(known: _Known, labels: tuple[str, str], common: Sequence[_Block]) -> Figure | None:
    """Pair the clients' own models, each with that of the same client of the same seed."""
    found = [
        [value - other.balanced[client] for client, value in one.balanced.items() if client in other.balanced]
        for one, other in _runs(known, labels, common)
    ]
    seeds = [differences for differences in found if differences]
    return paired.by_client([value for differences in seeds for value in differences], len(seeds)) if seeds else None


def _classes(known: _Known, labels: tuple[str, str], common: Sequence[_Block]) -> Figure | None:
    """Pair the generic models class by class, each class a mean over seeds."""
    runs = [
        (one.generic, other.generic) for one, other in _runs(known, labels, common) if one.generic and other.generic
    ]
    if not runs:
        return None
    of = [known.records[known.runs[labels[0]][block]] for block in common]
    parts = [
        replace(part, accuracy={"first": one, "second": other, "difference": one - other})
        for part in head_to_tail(of)
        if (pairs := [(a[label], b[label]) for a, b in runs if (label := int(part.label)) in a and label in b])
        for one, other in [tuple(math.fsum(values) / len(pairs) for values in zip(*pairs, strict=True))]
    ]
    return paired.by_class(fewer(parts), labels, len(runs), len(parts))
