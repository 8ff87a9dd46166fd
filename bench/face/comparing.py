"""Stored results compared: the statistics of `bench compare`, as an object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.face.shown import as_html, as_text
from bench.protocol.settings import BadConfig
from bench.results import chosen, comparison
from bench.results.compared import terminal
from bench.results.comparison import Comparison
from bench.results.entrants import choose
from bench.results.leaderboard import RANKS_BY, Leaderboard
from bench.results.statistics import Ranking

if TYPE_CHECKING:
    import pandas

    from bench.face.pictures import Picture

_WIDTH = 120


@dataclass(frozen=True)
class Compared:
    """Algorithms compared by one metric: tables at a prompt and in a notebook."""

    comparison: Comparison
    ranking: Ranking | None = field(repr=False)
    """Over all of it; None where nothing is common to all."""

    def frame(self) -> pandas.DataFrame:
        """Give the pairs, a row each.

        `part` is the leaderboard's title, or says how many datasets; `difference`, `low` and `high` are fractions 0-1,
        of the first less the second; `p` of the signed-rank test, `corrected` after Holm.
        """
        import pandas

        rows = [
            {
                "part": part.title,
                "metric": self.comparison.metric,
                "first": pair.first,
                "second": pair.second,
                "difference": pair.difference.mean,
                "low": pair.difference.low,
                "high": pair.difference.high,
                "interval": pair.difference.kind,
                "wins": pair.wins,
                "ties": pair.ties,
                "losses": pair.losses,
                "p": pair.p,
                "corrected": pair.corrected,
                "separated": pair.separated,
            }
            for part in (*self.comparison.parts, *([self.comparison.overall] if self.comparison.overall else []))
            for pair in part.pairs
        ]
        return pandas.DataFrame(rows)

    def plot(self) -> Picture:
        """Draw average ranks and the critical difference.

        Raises:
            BadConfig: Nothing is ranked over all of the leaderboards.
        """
        from bench.face.pictures import ranks

        if self.ranking is None:
            raise BadConfig("nothing is ranked over all of these results; choose some of one dataset")
        return ranks(self.ranking, self.comparison.metric)

    def __str__(self) -> str:
        return as_text(terminal(self.comparison), _WIDTH)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(terminal(self.comparison), _WIDTH)


def compare(boards: Sequence[Leaderboard], algorithms: Sequence[str] = (), metric: str = RANKS_BY[0]) -> Compared:
    """Test whether algorithms differ, paired by split and seed.

    Args:
        boards: Leaderboards.
        algorithms: Two or more labels, names or calls; none: all there are.
        metric: Key of a metric: "generic", "personal.few", with "@last10" the mean of the last ten evaluations.

    Raises:
        BadConfig: There is no such metric or algorithm, or no two that can be compared.
    """
    known = comparison.metrics(boards)
    if metric not in known:
        listed = chosen.known(metric, known)
        raise BadConfig(f"--metric {metric}: the results have none that can be compared; {listed}")
    labels = choose(boards, algorithms) if algorithms else None
    if labels is not None and len(labels) < 2:
        raise BadConfig(f"{labels[0]}: two algorithms or more are wanted, or none for all")
    compared = comparison.compare(boards, metric, labels)
    if not compared.parts:
        raise BadConfig(f"no two of {', '.join(compared.labels) or 'them'} have {metric} under one protocol")
    return Compared(compared, comparison.ranking(boards, metric, labels))
