"""Columns by name: any metric, stored or derived, and any cost, in the order in which they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.plugins.names import near
from bench.protocol.refusal import BadConfig
from bench.results import budget, classes
from bench.results.columns import columns, to_be_asked
from bench.results.leaderboard import Leaderboard, leaderboards, suffix
from bench.results.record import Record

_SHORT = {measure: (f"generic.{measure}", f"personal.{measure}") for measure in classes.MEASURES}
"""What stands for several."""


def boards(records: Iterable[Record], metric: str, asked: str, *, all_versions: bool = False) -> list[Leaderboard]:
    """Make leaderboards that show chosen columns.

    Args:
        records: Finished and failed runs.
        metric: As for `leaderboards`: a metric without "@" is that of the last round, or as this says.
        asked: Names of metrics and costs, or titles of a table's columns, with commas between them; "f1" stands for
            "generic.f1,personal.f1", and "generic@5MB" is of the last evaluation by which so much was sent.
        all_versions: As for `leaderboards`.

    Raises:
        BadConfig: There is no such metric.
    """
    words = [word.strip() for word in asked.split(",") if word.strip()]
    keys = [key for word in words for key in _SHORT.get(word, (word,))]
    if not keys:
        raise BadConfig("--metrics: name at least one, such as generic,personal.balanced")
    records = classes.with_derived(records) if any(map(classes.is_derived, keys)) else list(records)
    records = budget.with_budgets(records, keys)
    plain = leaderboards(records, metric, all_versions=all_versions)
    if not plain:
        return plain
    shown = tuple(dict.fromkeys(_resolved(plain, key, metric) for key in keys))
    return [replace(board, shown=shown) for board in plain]


def _resolved(plain: Sequence[Leaderboard], word: str, metric: str) -> str:
    """Find the key of a metric or cost by its name or the title of its column."""
    rows = [row for board in plain for row in board.rows]
    metrics = {key for row in rows for key in row.metrics}
    costs = {key for row in rows for key in row.cost}
    titles = {column.title: column.key for board in plain for column in columns(board)}
    if (followed := word + suffix(metric)) in metrics:
        return followed
    if word in costs or ("@" in word and word in metrics):
        return word
    if word in titles:
        return titles[word]
    if (key := to_be_asked(word)) is not None:
        return key
    if word in metrics:
        raise BadConfig(f"--metrics {word}: it is known of the last round alone; leave --metric {metric} out")
    raise BadConfig(f"--metrics {word}: the results have none of this name; {known(word, (*metrics, *costs))}")


def known(word: str, there: Iterable[str]) -> str:
    """Say which metrics and costs there are, and which of them a wrong name is near."""
    names = sorted(key for key in there if not set(key) & set(":@"))  # variants and curves: there are dozens
    listed = f"there are {', '.join(names)}"
    if classes.is_derived(word) and not any(map(classes.is_derived, names)):
        return f"it follows of counts by predicted class, which no run here has; {listed}"
    guess = near(word, names)
    return listed if guess == listed else f"{listed}; {guess}"
