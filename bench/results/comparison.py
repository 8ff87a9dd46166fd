"""From leaderboards to what can be said about two or more algorithms: pairs, ranks, and sentences.

On one leaderboard the blocks are its seeds, and the findings hold for that dataset and setting. Over several the blocks
are the datasets, each averaged over its settings (imbalance, partition, budget), and these over the seeds that all
compared algorithms were measured with. Neither the seeds of a setting nor the settings of a dataset, which share images
and initial weights, say anything about the next dataset, and they are not counted as if they did.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from statistics import variance
from typing import Any

from bench.plugins import declared
from bench.protocol.identity import canonical
from bench.protocol.refusal import BadConfig
from bench.results.entrants import entrants, pieces
from bench.results.layout import NOT_INDEPENDENT, resolution, title
from bench.results.leaderboard import Leaderboard, measured
from bench.results.standing import RANKED
from bench.results.statistics import LEVEL, Pair, Ranking, Scores, pairwise, rank

_NAMED = 6
"""Findings that a sentence names one by one."""

_ByLabel = dict[str, dict[Hashable, float]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Algorithms compared on one kind of block."""

    title: str
    """The leaderboard's, or how many datasets there are."""
    unit: str
    """What a block is: "seed" or "dataset"."""
    pairs: tuple[Pair, ...]
    """All pairs of the algorithms that have the metric, in the order of the labels."""
    ranking: Ranking | None
    """None if no block is common to all."""
    says: tuple[str, ...]
    """What may be concluded, in sentences."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How much of what varies between runs is the initialisation's, and how much the partition's."""

    title: str
    rows: tuple[tuple[str, float, float], ...]
    """Label, and two standard deviations, fractions: over seeds on one partition (initial weights, cohorts, order of
    the data), and over partitions, without what the seeds contribute to their means."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """A row that a method says it must be compared with."""

    method: str
    """Label of the method's row."""
    control: str
    """As the method names it."""
    answers: str
    """Which question it answers."""
    label: str | None
    """Of the control's row; None: there are no results of it."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Algorithms compared by one metric."""

    metric: str
    labels: tuple[str, ...]
    """Those compared, as asked for, else in the order of the leaderboards."""
    parts: tuple[Part, ...]
    """One for each leaderboard that has two of them; over its seeds."""
    overall: Part | None
    """Over datasets; None with fewer than two, or two algorithms common to them."""
    spread: tuple[Spread, ...]
    """Where the partition was drawn anew for the same seeds: what varies with which."""
    controls: tuple[Control, ...]
    """Of the methods among those compared, whether they are compared here or not."""
    left_out: tuple[str, ...]
    """Sentences: what was not compared, and why."""


def compare(boards: Sequence[Leaderboard], metric: str, labels: Sequence[str] | None = None) -> Comparison:
    """Compare algorithms wherever two of them were measured on the same splits.

    Args:
        boards: Leaderboards.
        metric: Key of a metric, one of `metrics(boards)`.
        labels: Two or more of `entrants(boards)`; None: all but screened ones.
    """
    tables = _tables(boards, metric, labels)
    known = tuple(labels or dict.fromkeys(label for _, scores in tables for label in scores))
    left_out = [
        f"{title(board)}: no {metric} of {_listed(lacking)}."
        for board, scores in tables
        if (lacking := [label for label in labels or () if label not in scores])
    ]
    parts = [_part(title(board), "seed", scores) for board, scores in tables if len(scores) > 1]
    overall = part_over_datasets(boards, metric, labels)
    together = len({board.protocol for board, scores in tables if len(scores) > 1}) > 1
    left_out += [
        f"{title(board)}: {few} screened row{'s' * (few > 1)}, unless named."
        for board in boards
        if not labels and (few := sum(row.screened for row in board.rows))
    ]
    left_out += [f"There is no test over all of these leaderboards. {NOT_INDEPENDENT}"] * (together and overall is None)
    return Comparison(
        metric=metric,
        labels=known,
        parts=tuple(parts),
        overall=overall,
        spread=spread(tables),
        controls=tuple(controls(boards, known)),
        left_out=tuple(left_out),
    )


def part_over_datasets(boards: Sequence[Leaderboard], metric: str, labels: Sequence[str] | None = None) -> Part | None:
    """Compare algorithms over datasets; None with fewer than two datasets, or two algorithms common to them.

    The leaderboards are of rows that are believed alike: of the best standing of which there are enough.
    """
    parts = (_over(those, metric, labels) for those in _believed_alike(boards))
    return next((part for part in parts if part is not None), None)


def _over(boards: Sequence[Leaderboard], metric: str, labels: Sequence[str] | None) -> Part | None:
    tables = _tables(boards, metric, labels)
    scores, settings = _over_datasets(tables, labels)
    if not scores:
        return None
    datasets = len(next(iter(scores.values())))
    part = _part(f"{datasets} datasets", "dataset", scores)
    says = [f"Averaged over {settings} settings first. {NOT_INDEPENDENT}"] if settings > datasets else []
    absent = [label for label in dict.fromkeys(label for _, found in tables for label in found) if label not in scores]
    missed = len({board.protocol for board, found in tables if found}) - settings
    says += [f"{missed} more setting{'s lack' if missed > 1 else ' lacks'} some of these algorithms."] if missed else []
    says += [f"Not on each of the {datasets} datasets, hence left out: {_listed(absent)}."] if absent else []
    return replace(part, says=(*part.says, *says))


def ranking(boards: Sequence[Leaderboard], metric: str, labels: Sequence[str] | None = None) -> Ranking | None:
    """Rank algorithms: what a critical-difference diagram shows.

    Over datasets if there are two or more with common algorithms, else over the seeds of the only leaderboard.

    Args:
        boards: Leaderboards.
        metric: Key of a metric: "personal.balanced", "generic.few".
        labels: Two or more of `entrants(boards)`; None: those that most datasets have in common.

    Returns:
        Average ranks, Nemenyi's critical difference and the groups of algorithms that are not told apart; None if no
        block is common to two algorithms.
    """
    for those in _believed_alike(boards):
        scores, _ = _over_datasets(_tables(those, metric, labels), labels)
        if scores:
            return rank(scores, "dataset")
    tables = _tables(boards, metric, labels)
    alone = [scores for _, scores in tables if len(scores) > 1]
    return rank(alone[0]) if len(alone) == 1 else None


def metrics(boards: Iterable[Leaderboard]) -> list[str]:
    """Name what algorithms can be compared by: accuracies, of the last round or the last ten, sorted."""
    keys = {key for board in boards for row in board.rows for key, found in row.metrics.items() if found.n}
    return sorted(key for key in keys if not key.endswith("@best") and ".std" not in key)


def document(comparison: Comparison) -> dict[str, Any]:
    """Give a comparison as JSON's types."""
    parts = [*comparison.parts, *([comparison.overall] if comparison.overall else [])]
    found = [
        {**asdict(part), "pairs": [{**asdict(pair), "separated": pair.separated} for pair in part.pairs]}
        for part in parts
    ]
    overall = found.pop() if comparison.overall else None
    return {"format": 1, "level": LEVEL, **asdict(comparison), "parts": found, "overall": overall}


def controls(boards: Sequence[Leaderboard], labels: Iterable[str]) -> Iterator[Control]:
    """Find the controls of methods that stand alone, with other fields the same in both rows.

    Args:
        boards: Leaderboards, with rows that need not be compared.
        labels: Of the methods.
    """
    known: dict[str, dict[str, dict[str, object]]] = {}
    for label, rows in entrants(boards).items():
        with suppress(BadConfig):  # somebody else's label, which is no call
            known[label] = pieces(rows[0].words)
    for label in labels:
        own = known.get(label, {})
        method = next(iter(own), "") if len(own) == 1 else ""
        told = {call: (pieces(call), answers) for call, answers in declared.controls(method).items()}
        fields = own.get(method, {})
        if any(set(wanted) == {method} and fields | wanted[method] == fields for wanted, _ in told.values()):
            continue  # it is a control itself
        for call, (wanted, answers) in told.items():
            wanted = {name: own.get(name, {}) | given for name, given in wanted.items()}
            found = next((other for other, those in known.items() if those == wanted), None)
            yield Control(method=label, control=call, answers=answers, label=found)


# Who is who -------------------------------------------------------------------------------------------------


def _tables(
    boards: Sequence[Leaderboard], metric: str, labels: Sequence[str] | None
) -> list[tuple[Leaderboard, _ByLabel]]:
    """Give what the wanted algorithms were measured at on each leaderboard, in the order of the labels; where none is
    named, of all that are not screened: whoever has few seeds would leave few to all that are ranked together.
    """
    names = {id(row): label for label, rows in entrants(boards).items() for row in rows}
    tables = []
    for board in boards:
        known = measured(board, metric)
        found = {
            names[id(row)]: known[row.label]
            for row in board.rows
            if row.label in known and (labels or not row.screened)
        }
        tables.append((board, {label: found[label] for label in labels or found if label in found}))
    return tables


def _believed_alike(boards: Sequence[Leaderboard]) -> Iterator[list[Leaderboard]]:
    """Give the leaderboards of each standing, the best first."""
    for standing in RANKED:
        if those := [board for board in boards if board.standing == standing]:
            yield those


# Datasets as blocks -----------------------------------------------------------------------------------------


def _over_datasets(tables: Sequence[tuple[Leaderboard, Scores]], labels: Sequence[str] | None) -> tuple[_ByLabel, int]:
    """Average over common seeds, then over the settings of a dataset that all algorithms have: a block a dataset.

    Where one protocol was run on several engines or devices, the leaderboard with the most common seeds stands for it:
    its twins are no further evidence.

    Returns:
        Scores on the datasets that all have, empty with fewer than two algorithms or datasets; and on how many settings
        they rest.
    """
    wanted = list(labels or _common(tables))
    settings: dict[str, tuple[int, str, dict[str, float]]] = {}
    for board, scores in tables:
        if not wanted or any(label not in scores for label in wanted):
            continue
        seeds = sorted(set.intersection(*(set(scores[label]) for label in wanted)), key=repr)
        if seeds and len(seeds) > settings.get(board.protocol, (0,))[0]:
            means = {label: _mean([scores[label][seed] for seed in seeds]) for label in wanted}
            settings[board.protocol] = len(seeds), board.dataset, means
    blocks: dict[str, list[dict[str, float]]] = {}
    for _, dataset, means in settings.values():
        blocks.setdefault(dataset, []).append(means)
    if len(wanted) < 2 or len(blocks) < 2:
        return {}, 0
    return {
        label: {dataset: _mean([means[label] for means in found]) for dataset, found in blocks.items()}
        for label in wanted
    }, len(settings)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _common(tables: Sequence[tuple[Leaderboard, Scores]]) -> list[str]:
    """Choose the algorithms to compare over datasets: of those that the best-filled datasets have in common, the most.

    Datasets are taken in by the number of their algorithms, as long as (datasets - 1) x (algorithms - 1) grows. Whether
    an algorithm was run decides, and never what it reached.
    """
    held: dict[str, Sequence[str]] = {}  # by the leaderboard with the most
    for board, scores in tables:
        held[board.dataset] = max(held.get(board.dataset, ()), list(scores), key=len)
    shared, chosen, most = list(dict.fromkeys(label for _, scores in tables for label in scores)), [], 0
    for further, present in enumerate(sorted(held.values(), key=len, reverse=True)):
        shared = [label for label in shared if label in present]
        if further * (len(shared) - 1) > most:
            chosen, most = shared, further * (len(shared) - 1)
    return chosen


# Partitions drawn anew --------------------------------------------------------------------------------------


def spread(tables: Sequence[tuple[Leaderboard, _ByLabel]]) -> tuple[Spread, ...]:
    """Tell initialisation and partition apart, where leaderboards differ in `split_seed` only.

    Source: the analysis of variance with one random effect; Searle, Casella and McCulloch 1992, "Variance components".
    """
    families: dict[str, list[tuple[Leaderboard, _ByLabel]]] = {}
    for board, scores in tables:
        if board.setting.get("split_seed") is not None:
            rest = {key: value for key, value in board.setting.items() if key != "split_seed"}
            cell = [board.dataset, board.engine, board.precision, board.device, board.standing, rest]
            families.setdefault(canonical({"cell": cell}), []).append((board, scores))
    found = []
    for members in families.values():
        rows = []
        for label in dict.fromkeys(label for _, scores in members for label in scores):
            partitions = [list(scores[label].values()) for _, scores in members if len(scores.get(label, ())) > 1]
            if len(partitions) > 1:
                within = _mean([variance(values) for values in partitions])
                share = _mean([within / len(values) for values in partitions])
                between = max(0.0, variance(map(_mean, partitions)) - share)
                rows.append((label, math.sqrt(within), math.sqrt(between)))
        if rows:
            name = f"{title(members[0][0], without=['split_seed'])}, what varies over {len(members)} partitions"
            found.append(Spread(title=name, rows=tuple(rows)))
    return tuple(found)


# Sentences --------------------------------------------------------------------------------------------------


def _part(name: str, unit: str, scores: Scores) -> Part:
    pairs, ranks = pairwise(scores), rank(scores, unit)
    return Part(title=name, unit=unit, pairs=pairs, ranking=ranks, says=_says(unit, len(scores), pairs, ranks))


def _says(unit: str, algorithms: int, pairs: Sequence[Pair], ranks: Ranking | None) -> tuple[str, ...]:
    says = [resolution(max(pair.n for pair in pairs), algorithms, unit)]
    alone = [pair for pair in pairs if pair.n == 0]
    if alone:
        says.append(f"No common {unit}, hence not compared: {_some([f'{p.first} and {p.second}' for p in alone])}.")
    tied = [f"{pair.first} and {pair.second}" for pair in pairs if pair.tied]
    if tied:
        says.append(f"Tied on every common {unit}: {_some(tied)}.")
    separated = [_better(pair) for pair in sorted(pairs, key=lambda pair: pair.corrected or 0.0) if pair.separated]
    says.append(
        f"Separated by the corrected signed-rank test: {_some(separated)}."
        if separated
        else "The corrected signed-rank test separates no pair."
    )
    if ranks is None:
        says.append(f"No {unit} is common to all, hence no ranks.")
    elif algorithms > 2:
        says += _of_ranks(ranks)
    return tuple(says)


def _better(pair: Pair) -> str:
    mean = pair.difference.mean or 0.0
    first, second = (pair.first, pair.second) if mean >= 0 else (pair.second, pair.first)
    return f"{first} above {second} by {100 * abs(mean):.1f} points (p {spell_p(pair.corrected)})"


def _of_ranks(ranks: Ranking) -> list[str]:
    differ = "the ranks differ by more than chance" if ranks.p <= LEVEL else "the ranks may differ by chance"
    tested = f"Over {ranks.blocks} {ranks.unit}{'s' * (ranks.blocks != 1)} {differ} (Friedman, p {spell_p(ranks.p)})"
    if not ranks.separates:
        largest = len(ranks.labels) - 1
        why = (
            f": that takes {ranks.critical_difference:.2f} between average ranks (Nemenyi), and {largest} is the most"
            if ranks.critical_difference > largest
            else ""
        )
        return [f"{tested}; no two algorithms are told apart by them{why}."]
    groups = "; ".join(_listed(group) for group in ranks.groups) or "none"
    return [
        f"{tested}. Average ranks more than {ranks.critical_difference:.2f} apart differ (Nemenyi); not told apart: "
        f"{groups}."
    ]


def spell_p(p: float | None) -> str:
    """Write a p for people; a dash if there is none."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _some(items: Sequence[str]) -> str:
    more = f", and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return "; ".join(items[:_NAMED]) + more


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items)
