"""What a handful of seeds can say: intervals of means, paired tests, ranks. Plain numbers in, plain numbers out.

The unit is a *block*: one seed of one protocol, which draws the split, the initial weights and every cohort anew, or
one dataset. A run's clients and test images are no further blocks: they share one training, so that a bootstrap over
them would count what varies inside a run again and again, and leave out what varies between runs. Nor are the settings
of a dataset, which share images, seeds and initial weights.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.float64]]

Scores = Mapping[str, Mapping[Hashable, float]]
"""An algorithm's label to its accuracy by block; higher is better."""

LEVEL = 0.05
"""Of every test; intervals cover 1 - LEVEL."""
FEWEST = 5
"""Values from which there is an interval: Student's of two is 12.7 times as wide as they are apart."""
FEWEST_RESAMPLED = 6
"""Values from which an interval is a bootstrap's: fewer cannot be resampled to 95 %, see `estimate`."""
_MOST_RESAMPLED = 100  # of more the two intervals are the same to a tenth of their width, and resampling takes seconds
_EXACT = 13
"""Differences up to which all signs are tried, 2^13 of them."""
_RESAMPLES = 9999
_DIGITS = 12  # of a difference: what is smaller is the rounding of a division, and a tie

# Intervals --------------------------------------------------------------------------------------------------


Kind = Literal["range", "student", "bootstrap"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or over other blocks."""

    mean: float | None
    """None: nothing was measured."""
    n: int
    """Values that were measured."""
    low: float | None = None
    """The lowest value, or the lower end of the interval; None with fewer than two values."""
    high: float | None = None
    """The highest value, or the upper end, which need not be as far from the mean."""
    kind: Kind | None = None
    """What `low` and `high` are: the "range" of two to four values, which is no interval; of five the 95 % interval of
    "student", of more that of the "bootstrap"."""


NOTHING = Estimate(None, 0)


def estimate(
    values: Iterable[float | None], confidence: float = 1 - LEVEL, scale: tuple[float, float] | None = None
) -> Estimate:
    """Average over seeds, from five on with an interval that covers the mean as often as it says.

    From six values on it is the bias-corrected and accelerated bootstrap interval of the mean (BCa, 9999 resamples from
    a fixed seed, so that the same values give the same interval), at the widened level
    1 - 2 Phi(-sqrt(n / (n - 1)) t), t Student's quantile with n - 1 degrees of freedom: a bootstrap takes the deviation
    with n below and the normal's tails, and would otherwise cover 87 % instead of 95 % with six normal values.

    Of five, and of more than a hundred, it is Student's interval, mean ± t s / sqrt(n), s the sample standard
    deviation: no resample leaves the range of the values, and that of five covers the middle of a symmetric
    distribution 1 - 2 / 2^5 = 94 % of the time at best; of a hundred the mean is as good as normal. Below five there is
    none, and the range of the values in its place.

    Args:
        values: One a seed; None and NaN are absent and do not count.
        confidence: Share of such intervals that cover the true mean; in (0, 1). Simulated, it is kept within about
            3 points where values are normal or uniform, and is 90 % with six values of an exponential distribution.
        scale: Least and greatest possible mean, where an interval is cut off; None: there are none.

    Source: Efron 1987, "Better bootstrap confidence intervals", JASA 82; the widening: Hesterberg 2015, "What teachers
    should know about the bootstrap", The American Statistician 69; Student 1908, "The probable error of a mean",
    Biometrika 6.
    """
    return estimates({"": values}, confidence, scale)[""]


def estimates(
    rows: Mapping[str, Iterable[float | None]],
    confidence: float = 1 - LEVEL,
    scale: tuple[float, float] | None = None,
) -> dict[str, Estimate]:
    """Do what `estimate` does for many rows at once, in the order given."""
    known = {key: [value for value in row if value is not None and not math.isnan(value)] for key, row in rows.items()}
    found = {key: _plainly(values, confidence) for key, values in known.items()}
    alike: dict[int, list[str]] = defaultdict(list)  # rows that can be resampled, by their length
    for key, values in known.items():
        if FEWEST_RESAMPLED <= len(values) <= _MOST_RESAMPLED and not math.isclose(min(values), max(values)):
            alike[len(values)].append(key)
    for keys in alike.values():
        found |= zip(keys, _bootstrap([known[key] for key in keys], confidence), strict=True)
    return found if scale is None else {key: _cut(each, *scale) for key, each in found.items()}


def _cut(estimate: Estimate, least: float, most: float) -> Estimate:
    if estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=max(least, estimate.low), high=min(most, estimate.high))


def _plainly(values: Sequence[float], confidence: float) -> Estimate:
    """Give the range, or Student's interval."""
    from scipy.special import stdtrit

    n = len(values)
    if n == 0:
        return NOTHING
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, 1)
    if n < FEWEST:
        return Estimate(mean, n, min(values), max(values), "range")
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    kind: Kind = "bootstrap" if FEWEST_RESAMPLED <= n <= _MOST_RESAMPLED else "student"
    return Estimate(mean, n, mean - half, mean + half, kind)


def _bootstrap(rows: Sequence[Sequence[float]], confidence: float) -> list[Estimate]:
    """Give the intervals of rows of one length, none of them constant."""
    import numpy as np
    from scipy import stats
    from scipy.special import ndtr, stdtrit

    n = len(rows[0])
    widened = 1 - 2 * ndtr(-math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + confidence) / 2))
    ends = stats.bootstrap(
        (np.array(rows),),
        np.mean,
        axis=-1,
        n_resamples=_RESAMPLES,
        batch=max(1, 10**7 // (len(rows) * n)),
        confidence_level=float(widened),
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = []
    for row, low, high in zip(rows, np.asarray(ends.low).tolist(), np.asarray(ends.high).tolist(), strict=True):
        found.append(Estimate(math.fsum(row) / n, n, low, high, "bootstrap"))
    return found


# Pairs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two algorithms on the blocks that both were measured on."""

    first: str
    second: str
    n: int
    """Common blocks."""
    wins: int
    """Blocks on which the first is better."""
    ties: int
    """Blocks on which both are equal, to the last image."""
    losses: int
    difference: Estimate
    """Of the first less the second, a fraction; its interval is not corrected for the number of pairs."""
    p: float | None
    """Two-sided, of the signed-rank test; None without a common block."""
    corrected: float | None
    """After Holm, over all pairs of the comparison."""

    @property
    def separated(self) -> bool:
        """Whether the corrected test says that the two differ."""
        return self.corrected is not None and self.corrected <= LEVEL

    @property
    def tied(self) -> bool:
        """Whether the two were equal on every block."""
        return 0 < self.n == self.ties


def pairwise(scores: Scores) -> tuple[Pair, ...]:
    """Compare all pairs of algorithms, each on its common blocks.

    The signed-rank test of Wilcoxon: ties are left out, equal differences share a rank, and up to 13 differences the
    p is exact, by trying all signs. Holm's correction keeps the chance of any false finding among all pairs at the
    level.

    Args:
        scores: At least one algorithm; blocks need not be the same.

    Returns:
        Pairs in the order of the labels: the first with the second, the first with the third, and so on.

    Source: Wilcoxon 1945, "Individual comparisons by ranking methods", Biometrics Bulletin 1; Holm 1979, "A simple
    sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    """
    names = list(itertools.combinations(scores, 2))
    differences = [_differences(scores[first], scores[second]) for first, second in names]
    p = signed_rank(differences)
    corrected = holm(p)
    means = estimates({str(index): values for index, values in enumerate(differences)}, scale=(-1.0, 1.0))
    return tuple(
        Pair(
            first=first,
            second=second,
            n=len(values),
            wins=sum(value > 0 for value in values),
            ties=sum(value == 0 for value in values),
            losses=sum(value < 0 for value in values),
            difference=means[str(index)],
            p=p[index],
            corrected=corrected[index],
        )
        for index, ((first, second), values) in enumerate(zip(names, differences, strict=True))
    )


def leader(scores: Scores) -> str | None:
    """Name the algorithm that the corrected tests of `pairwise` find better than each other one; None if none is."""
    ways = len(scores) * (len(scores) - 1) // 2
    means = {label: math.fsum(found.values()) / len(found) for label, found in scores.items() if found}
    if ways == 0 or len(means) < len(scores) or corrected_floor(len(_union(scores)), ways) > LEVEL:
        return None  # no test could say so: it need not be asked
    best = max(means, key=lambda label: means[label])
    others = [label for label in scores if label != best]
    ahead = [_differences(scores[best], scores[other]) for other in others]
    p = signed_rank(ahead)
    if any(each is None or each > LEVEL or math.fsum(values) < 0 for each, values in zip(p, ahead, strict=True)):
        return None  # before any correction, and without testing all the other pairs
    rest = [_differences(scores[first], scores[second]) for first, second in itertools.combinations(others, 2)]
    corrected = holm([*p, *signed_rank(rest)])[: len(others)]
    return best if all(each is not None and each <= LEVEL for each in corrected) else None


def corrected_floor(n: int, pairs: int) -> float:
    """Give the smallest p that the test of one of so many pairs can have after Holm's correction, on n blocks."""
    return min(1.0, pairs * 2.0 ** (1 - n))


def fewest(pairs: int) -> int:
    """Give the blocks from which one of so many pairs could be separated."""
    return next(n for n in itertools.count(1) if corrected_floor(n, pairs) <= LEVEL)


def _union(scores: Scores) -> set[Hashable]:
    return {block for found in scores.values() for block in found}


def _differences(first: Mapping[Hashable, float], second: Mapping[Hashable, float]) -> list[float]:
    return [round(value - second[block], _DIGITS) for block, value in first.items() if block in second]


def signed_rank(rows: Sequence[Sequence[float]]) -> list[float | None]:
    """Give the two-sided p of Wilcoxon's signed-rank test of each row of differences; None for an empty row.

    Zeros are left out, and equal sizes share a rank.
    """
    p: list[float | None] = [1.0 if row else None for row in rows]
    alike: dict[int, list[int]] = defaultdict(list)  # rows by the number of differences that are no ties
    for index, row in enumerate(rows):
        alike[sum(value != 0 for value in row)].append(index)
    for n, members in alike.items():
        if n > 1:  # one difference is as likely as its opposite: p is 1
            tested = _without_zeros([[value for value in rows[index] if value] for index in members])
            for index, value in zip(members, tested, strict=True):
                p[index] = value
    return p


def _without_zeros(rows: Sequence[Sequence[float]]) -> list[float]:
    import numpy as np
    from scipy import stats

    table = np.array(rows)  # (rows, n)
    if table.shape[1] > _EXACT:  # exact up to 50 where no two differences are equal in size, else the normal's
        return [float(stats.wilcoxon(row, correction=True).pvalue) for row in table]
    ranks = np.sign(table) * stats.rankdata(np.abs(table), axis=-1)
    found = stats.permutation_test(
        (ranks,), _sum, permutation_type="samples", n_resamples=2**_EXACT, batch=256, axis=-1, vectorized=True
    )
    return [float(value) for value in found.pvalue]


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Correct the p of a family of tests after Holm; None is no test, and stays.

    A test compares this with statsmodels' multipletests, which collects all garbage at each call: too slow for a table.
    """
    corrected = list(p)
    ordered = sorted((value, index) for index, value in enumerate(p) if value is not None)
    least = 0.0
    for place, (value, index) in enumerate(ordered):
        least = corrected[index] = max(least, min(1.0, (len(ordered) - place) * value))
    return corrected


def _sum(values: Numbers, axis: int) -> Numbers:
    total: Numbers = values.sum(axis=axis)
    return total


# Ranks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Algorithms by their average rank over the blocks on which all of them were measured."""

    unit: str
    """What a block is: "seed", or "dataset" (averaged over its settings and their seeds)."""
    labels: tuple[str, ...]
    """Best first; equal average ranks in alphabetical order."""
    ranks: tuple[float, ...]
    """Average ranks, as `labels`: 1 is always the best; algorithms that are equal on a block share the mean rank."""
    blocks: int
    statistic: float
    """Friedman's chi-square, corrected for ties; 0 if all are equal."""
    p: float
    """Of the Friedman test, by permuting within blocks: that all ranks are alike."""
    critical_difference: float
    """Nemenyi's: average ranks that are further apart differ, if the Friedman test says that any do."""
    p_values: tuple[tuple[float, ...], ...]
    """By pair, rows and columns as `labels`: the larger of Nemenyi's and Friedman's p; 1 on the diagonal."""
    groups: tuple[tuple[str, ...], ...]
    """The largest sets of two or more algorithms of which no two are told apart, best first: the bars of a
    critical-difference diagram.
    """

    @property
    def separates(self) -> bool:
        """Whether any two are told apart."""
        return any(p <= LEVEL for row in self.p_values for p in row)


def rank(scores: Scores, unit: str = "seed") -> Ranking | None:
    """Rank algorithms on the blocks that all of them were measured on: Friedman, and Nemenyi after it.

    Friedman's p is a share of permutations within blocks (all of them if there are fewer than 10,000, else 9999 from a
    fixed seed), as the chi-square distribution promises too much with few blocks. Nemenyi's test counts only where
    Friedman's finds a difference, so that a false finding among all pairs is no more likely than the level.

    Args:
        scores: Two algorithms or more.
        unit: What a block is.

    Returns:
        None if no block is common to all, or there are fewer than two algorithms.

    Source: Friedman 1937, "The use of ranks to avoid the assumption of normality", JASA 32; Nemenyi 1963,
    "Distribution-free multiple comparisons", thesis, Princeton; Demšar 2006, "Statistical comparisons of classifiers
    over multiple data sets", JMLR 7.
    """
    import numpy as np
    from scikit_posthocs import posthoc_nemenyi_friedman
    from scipy import stats

    common = sorted(set.intersection(*map(set, scores.values())), key=repr) if scores else []
    if not common or len(scores) < 2:
        return None
    table = np.array([[round(scores[label][block], _DIGITS) for label in scores] for block in common])  # (N, k)
    ranks = stats.rankdata(-table, axis=1)
    averages = dict(zip(scores, ranks.mean(axis=0).tolist(), strict=True))
    labels = sorted(scores, key=lambda label: (averages[label], label))
    blocks, k = table.shape
    p = float(friedman(ranks))
    nemenyi = posthoc_nemenyi_friedman(-table).to_numpy()
    places = [list(scores).index(label) for label in labels]
    p_values = tuple(
        tuple(1.0 if row == column else max(p, float(nemenyi[row, column])) for column in places) for row in places
    )
    return Ranking(
        unit=unit,
        labels=tuple(labels),
        ranks=tuple(averages[label] for label in labels),
        blocks=blocks,
        statistic=_chi_square(ranks),
        p=p,
        critical_difference=_quantile(k) * math.sqrt(k * (k + 1) / (6 * blocks)),
        p_values=p_values,
        groups=_groups(labels, lambda row, column: p_values[row][column] > LEVEL),
    )


@cache
def _quantile(k: int) -> float:
    """Give the quantile of the range of k normal numbers, over the root of 2: 2.34 for three, as in Demšar's table."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(1 - LEVEL, k, math.inf)) / math.sqrt(2)


def friedman(ranks: Numbers) -> Numbers:
    """Give the p of Friedman's test by permuting within blocks, of (..., N, k) ranks: (...).

    Of the sum of squares of the rank sums, which orders permutations as the statistic does, with ties or without.
    """
    import numpy as np
    from scipy import stats

    if ranks.shape[-2] == 1:  # every order of a single block is as likely
        return np.ones(ranks.shape[:-2])
    found = stats.permutation_test(
        tuple(np.moveaxis(ranks, -1, 0)),
        _squares,
        permutation_type="samples",
        alternative="greater",
        n_resamples=_RESAMPLES,
        batch=1000 if ranks.ndim == 2 else 100,
        axis=-1,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    p: Numbers = np.asarray(found.pvalue)
    return p


def _squares(*columns: Numbers, axis: int) -> Numbers:
    return sum((_sum(column, axis) ** 2 for column in columns[1:]), _sum(columns[0], axis) ** 2)


def _chi_square(ranks: Numbers) -> float:
    """Give Friedman's statistic of (N, k) ranks; the quotient of variances that allows for ties and for two columns."""
    blocks, k = ranks.shape
    spread = float(((ranks - (k + 1) / 2) ** 2).sum())  # N k (k + 1) (k - 1) / 12 without ties
    if spread == 0:
        return 0.0
    between = float(((ranks.sum(axis=0) - blocks * (k + 1) / 2) ** 2).sum())
    return float((k - 1) * between / spread)


def _groups(labels: Sequence[str], alike: Callable[[int, int], bool]) -> tuple[tuple[str, ...], ...]:
    """Find the longest stretches of labels whose ends are alike; stretches, as likeness is nearness of ranks."""
    found: list[tuple[int, int]] = []
    for start in range(len(labels)):
        stop = max(column for column in range(start, len(labels)) if column == start or alike(start, column))
        if stop > start and all(stop > other for _, other in found):
            found.append((start, stop))
    return tuple(tuple(labels[start : stop + 1]) for start, stop in found)
