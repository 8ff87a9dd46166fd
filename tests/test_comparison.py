"""What seeds can say: on planted data, tests find what is there, and no more often than they say what is not."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.command.main import main
from bench.protocol.settings import BadConfig
from bench.results import comparison, records, table
from bench.results.comparison import compare, part_over_datasets, ranking
from bench.results.entrants import choose, entrants
from bench.results.layout import best, remarks, resolution
from bench.results.leaderboard import Leaderboard, leaderboards, measured
from bench.results.records import Record
from bench.results.statistics import (
    FEWEST_RESAMPLED,
    LEVEL,
    Estimate,
    Scores,
    corrected_floor,
    estimate,
    estimates,
    fewest,
    friedman,
    holm,
    leader,
    pairwise,
    rank,
    signed_rank,
)
from tests.test_results import document, record, store

Numbers = np.ndarray[Any, np.dtype[np.float64]]

# Simulation: intervals --------------------------------------------------------------------------------------

DISTRIBUTIONS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], Numbers], float]] = {
    "normal": (lambda random, shape: random.normal(0.7, 0.02, shape), 0.7),
    "uniform": (lambda random, shape: random.uniform(0.4, 0.6, shape), 0.5),
    "left-skewed accuracies": (lambda random, shape: random.beta(8, 1.5, shape), 8 / 9.5),
}


def coverage(values: Numbers, truth: float) -> float:
    """Say how many of the intervals of rows hold the truth."""
    found = estimates({str(index): row for index, row in enumerate(values.tolist())}).values()
    return sum(
        each.low is not None and each.high is not None and each.low <= truth <= each.high for each in found
    ) / len(found)


@pytest.mark.parametrize("n", [5, 6, 10])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_intervals_cover_the_truth_as_often_as_they_say(name: str, n: int) -> None:
    draw, truth = DISTRIBUTIONS[name]
    covered = coverage(draw(np.random.default_rng([n, len(name)]), (500, n)), truth)
    # The standard error of a share of 500 is 1 %. A plain bootstrap of six normal values would cover 87 %.
    assert 0.92 <= covered <= 0.98 if name == "normal" else 0.89 <= covered <= 0.99


def test_a_plain_bootstrap_of_few_seeds_would_cover_too_little() -> None:
    values = np.random.default_rng(5).normal(size=(800, 5))
    plain = stats.bootstrap((values,), np.mean, axis=-1, n_resamples=999, rng=np.random.default_rng(0), batch=100)
    low, high = plain.confidence_interval.low, plain.confidence_interval.high
    assert np.mean((low <= 0) & (high >= 0)) < 0.88  # hence Student's of five
    assert coverage(values, 0.0) > 0.93
    within = (values.min(1) <= 0) & (values.max(1) >= 0)  # what no resample of five leaves
    assert np.mean(within) == pytest.approx(1 - 2 / 2**5, abs=0.03)


def test_a_bootstrap_interval_is_the_librarys_at_the_widened_level() -> None:
    values = [0.71, 0.74, 0.69, 0.80, 0.78, 0.77, 0.73]
    widened = 1 - 2 * stats.norm.cdf(-math.sqrt(7 / 6) * stats.t.ppf(0.975, 6))
    ends = stats.bootstrap(
        (values,), np.mean, confidence_level=widened, method="BCa", n_resamples=9999, rng=np.random.default_rng(0)
    ).confidence_interval
    found = estimate(values)
    assert found.low == pytest.approx(ends.low) and found.high == pytest.approx(ends.high)
    assert found.kind == "bootstrap" and found.mean == math.fsum(values) / 7


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_an_interval_holds_the_mean_and_is_the_same_again(values: list[float]) -> None:
    found = estimate(values)
    assert found == estimate([None, *values, math.nan]) == estimates({"a": [0.1] * 6, "b": values})["b"]
    assert found.n == len(values) and (found.kind == "bootstrap") == (len(values) >= FEWEST_RESAMPLED)
    if len(values) > 1:
        assert found.low is not None and found.high is not None and found.mean is not None
        assert found.low <= found.mean + 1e-9 and found.mean <= found.high + 1e-9
        if found.kind != "student":
            assert min(values) - 1e-9 <= found.low and found.high <= max(values) + 1e-9


def test_seeds_that_agree_have_an_interval_of_no_width() -> None:
    assert estimate([0.25] * 7) == Estimate(0.25, 7, 0.25, 0.25, "bootstrap")
    nearly = estimate([0.1 + 0.2, 0.3, 0.3, 0.3, 0.3, 0.3])
    assert nearly.low is not None and nearly.high is not None and nearly.high - nearly.low < 1e-12


# Simulation: tests ------------------------------------------------------------------------------------------


def planted(
    random: np.random.Generator, effects: Sequence[float], blocks: int, step: float = 0.0, trials: int = 1
) -> Numbers:
    """Draw accuracies: every block has its own difficulty, and algorithms differ by their effects and noise.

    With a step they are rounded to it, which makes ties.

    Returns:
        (trials, blocks, algorithms).
    """
    values = random.normal(0.6, 0.1, (trials, blocks, 1)) + random.normal(effects, 0.02, (trials, blocks, len(effects)))
    return np.round(values / step) * step if step else values


def scores_of(values: Numbers) -> Scores:
    """Name the algorithms of one trial a0, a1 and so on."""
    return {f"a{k}": dict(enumerate(column)) for k, column in enumerate(values.T.tolist())}


def at_most(share: float, level: float, trials: int) -> bool:
    """Say whether a share of trials is no more than a level, up to three standard errors."""
    return share <= level + 3 * math.sqrt(level * (1 - level) / trials)


def rejected(p: Sequence[float | None], level: float) -> float:
    return sum(value is not None and value <= level for value in p) / len(p)


@pytest.mark.parametrize("step", [0.0, 0.02], ids=["no ties", "ties"])
@pytest.mark.parametrize("blocks", [5, 6, 9, 18])
def test_two_equal_algorithms_are_separated_no_more_often_than_the_level_says(blocks: int, step: float) -> None:
    values = planted(np.random.default_rng([blocks, int(step * 100)]), [0, 0], blocks, step, trials=1000)
    p = signed_rank(np.round(values[..., 0] - values[..., 1], 12).tolist())
    for level in (0.05, 0.2, 0.5):
        assert at_most(rejected(p, level), level, 1000)
    assert rejected(p, 0.5) > 0.35  # not by never rejecting
    assert (rejected(p, 0.05) > 0) == (blocks > 5)  # of five, 2 / 2^5 is the least p
    ahead = planted(np.random.default_rng(blocks), [0.08, 0], blocks, step, trials=200)
    assert blocks == 5 or rejected(signed_rank((ahead[..., 0] - ahead[..., 1]).tolist()), 0.05) > 0.8


@pytest.mark.parametrize(("effects", "step"), [((0, 0, 0, 0), 0.0), ((0, 0, 0, 0), 0.02), ((0.1, 0, 0, 0), 0.0)])
def test_the_chance_of_any_false_finding_among_all_pairs_is_the_level(effects: tuple[float, ...], step: float) -> None:
    trials, pairs = 500, list(itertools.combinations(range(4), 2))
    values = planted(np.random.default_rng(int(100 * (sum(effects) + step))), effects, 10, step, trials)
    rows = [np.round(values[..., first] - values[..., second], 12) for first, second in pairs]
    p = np.array(signed_rank(np.stack(rows, 1).reshape(-1, 10).tolist()), float).reshape(trials, len(pairs))
    equal = np.array([effects[first] == effects[second] for first, second in pairs])
    corrected = np.array([holm(row) for row in p.tolist()])
    assert at_most((corrected[:, equal] <= LEVEL).any(1).mean(), LEVEL, trials)
    if equal.all():
        assert (p <= LEVEL).any(1).mean() > 0.1  # six pairs: without a correction, much too often
    else:
        assert (corrected[:, ~equal] <= LEVEL).all(1).mean() > 0.95
    first = scores_of(values[0])
    assert [pair.corrected for pair in pairwise(first)] == pytest.approx(corrected[0])


@pytest.mark.parametrize(("algorithms", "blocks"), [(2, 5), (3, 4), (3, 12), (5, 6), (5, 2)])
def test_ranks_of_equal_algorithms_differ_no_more_often_than_the_level_says(algorithms: int, blocks: int) -> None:
    values = planted(np.random.default_rng([algorithms, blocks]), [0] * algorithms, blocks, trials=300)
    p = friedman(stats.rankdata(-values, axis=-1))
    for level in (0.05, 0.2):
        assert at_most((p <= level).mean(), level, 300)
    assert (p <= 0.5).mean() > 0.2
    assert at_most((friedman(stats.rankdata(-values.round(2), axis=-1)) <= LEVEL).mean(), LEVEL, 300)


@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_no_two_are_told_apart_by_ranks_unless_friedmans_test_says_that_any_are(k: int, n: int, seed: int) -> None:
    found = rank(scores_of(planted(np.random.default_rng(seed), [0.02 * each for each in range(k)], n, 0.01)[0]))
    assert found is not None and (found.p <= LEVEL or not found.separates)
    apart = {
        (a, b)
        for (a, first), (b, second) in itertools.product(zip(found.labels, found.ranks, strict=True), repeat=2)
        if found.p <= LEVEL and abs(first - second) > found.critical_difference
    }
    for row, a in enumerate(found.labels):
        for column, b in enumerate(found.labels):
            assert ((a, b) in apart) == (found.p_values[row][column] <= LEVEL)
            together = any(a in group and b in group for group in found.groups)
            assert a == b or together == ((a, b) not in apart)


def test_a_leader_is_named_where_one_is_planted_and_hardly_ever_where_none_is() -> None:
    random = np.random.default_rng(3)
    equal = [leader(scores_of(values)) for values in planted(random, [0] * 4, 10, trials=100)]
    assert at_most(sum(name is not None for name in equal) / 100, LEVEL, 100)
    found = [leader(scores_of(values)) for values in planted(random, [0, 0, 0.08, 0], 10, trials=40)]
    assert found.count("a2") >= 38 and set(found) <= {"a2", None}
    two = [leader(scores_of(values)) for values in planted(random, [0, 0.08, 0.08, 0], 10, trials=40)]
    assert two.count(None) >= 36  # two are better, and neither of them is the best


def test_a_leader_is_separated_from_each_other_algorithm_after_the_correction() -> None:
    named, only_before = 0, 0
    for values in planted(np.random.default_rng(7), [0, 0, 0.03, 0], 10, trials=50):
        scores = scores_of(values)
        own = [(pair, pair.first == "a2") for pair in pairwise(scores) if "a2" in (pair.first, pair.second)]
        ahead = [((pair.difference.mean or 0.0) > 0) == first for pair, first in own]
        expected = all(ahead) and all(pair.separated for pair, _ in own)
        assert (leader(scores) == "a2") == expected
        named += expected
        only_before += all(ahead) and not expected and all((pair.p or 0.0) <= LEVEL for pair, _ in own)
    assert named > 5 and only_before > 5


def test_a_planted_order_is_found_by_ranks() -> None:
    found = rank(scores_of(planted(np.random.default_rng(0), [0.3, 0.2, 0.1, 0.0], 14)[0]))
    assert found is not None and found.labels == ("a0", "a1", "a2", "a3") and found.ranks == (1.0, 2.0, 3.0, 4.0)
    assert found.p < 0.001 and found.separates and found.blocks == 14
    # Demšar's example has as many algorithms and data sets, and a critical difference of 1.25
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)
    assert found.groups == (("a0", "a1"), ("a1", "a2"), ("a2", "a3"))


# By hand ----------------------------------------------------------------------------------------------------


def blocks(*values: float) -> dict[Any, float]:
    return dict(enumerate(values))


def test_the_signed_rank_test_is_exact_for_few_seeds() -> None:
    ahead = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    for n, expected in ((1, 1.0), (5, 2 / 32), (6, 2 / 64)):
        (pair,) = pairwise({"a": blocks(*ahead[:n]), "b": blocks(*[0.0] * n)})
        assert pair.p == pair.corrected == expected == corrected_floor(n, 1)
        assert (pair.wins, pair.ties, pair.losses) == (n, 0, 0)
    # Ranks 1 to 6, the smallest negative: of 64 sums as many as (), (1) are that small, on two sides 4 / 64
    (pair,) = pairwise({"a": blocks(-0.01, *ahead[1:]), "b": blocks(*[0.0] * 6)})
    assert pair.p == 4 / 64 and not pair.separated


@given(st.lists(st.integers(-60, 60).filter(bool), min_size=1, max_size=20, unique_by=abs))
@settings(max_examples=40, deadline=None)
def test_without_ties_the_p_is_the_librarys_exact_one(steps: list[int]) -> None:
    (pair,) = pairwise({"a": blocks(*(0.5 + step / 200 for step in steps)), "b": blocks(*[0.5] * len(steps))})
    assert pair.p == pytest.approx(stats.wilcoxon(steps, method="exact").pvalue)


def test_ties_are_left_out_and_counted_as_ties() -> None:
    # Two ties and five wins of one size: as five wins, 2 / 2^5, where the normal approximation would say 0.025
    (pair,) = pairwise({"a": blocks(0.5, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8), "b": blocks(0.5, 0.6, *[0.7] * 5)})
    assert (pair.n, pair.wins, pair.ties, pair.losses) == (7, 5, 2, 0) and pair.p == 2 / 32
    (pair,) = pairwise({"a": blocks(*[0.3] * 8), "b": blocks(*[0.3] * 8)})
    assert pair.tied and pair.p == pair.corrected == 1.0 and not pair.separated
    assert pair.difference == Estimate(0.0, 8, 0.0, 0.0, "bootstrap")


def test_a_difference_that_is_only_rounding_is_a_tie() -> None:
    (pair,) = pairwise({"a": blocks(0.1 + 0.2, 0.5), "b": blocks(0.3, 0.4)})
    assert (pair.wins, pair.ties, pair.losses) == (1, 1, 0)
    found = rank({"a": blocks(0.1 + 0.2), "b": blocks(0.3)})
    assert found is not None and found.ranks == (1.5, 1.5)


def test_pairs_are_of_common_blocks_and_those_without_any_are_not_tested() -> None:
    scores: Scores = {"a": {0: 0.5, 1: 0.6}, "b": {1: 0.5, 2: 0.9}, "c": {0: 0.1, 1: 0.2}, "d": {7: 0.5}}
    found = {(pair.first, pair.second): pair for pair in pairwise(scores)}
    assert list(found) == list(itertools.combinations("abcd", 2))
    assert found["a", "b"].n == 1 and found["a", "b"].difference.mean == pytest.approx(0.1)
    assert found["a", "d"].n == 0 and found["a", "d"].p is found["a", "d"].corrected is None
    assert found["a", "c"].corrected == 1.0 and not found["a", "d"].tied
    assert rank(scores) is None and rank({"a": blocks(0.1)}) is rank({}) is None
    found_ranks = rank({key: scores[key] for key in "abc"})
    assert found_ranks is not None and found_ranks.blocks == 1


@pytest.mark.parametrize("n", [1, 2, 6, 78])
def test_holms_correction_is_the_librarys(n: int) -> None:
    from statsmodels.stats.multitest import multipletests

    p = (np.random.default_rng(n).random(n) ** 3).round(2).tolist()  # some are equal, and some small
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist())
    assert holm([None, *p, None]) == [None, *holm(p), None] and holm([None]) == [None]


def test_the_smallest_p_is_multiplied_by_all_pairs() -> None:
    pairs = pairwise(scores_of(planted(np.random.default_rng(1), [0, 0.02, 0.05], 9)[0]))
    first, *_ = sorted(pairs, key=lambda pair: pair.p or 0.0)
    assert first.p is not None and first.corrected == pytest.approx(3 * first.p)
    assert holm([pair.p for pair in pairs]) == [pair.corrected for pair in pairs]


def test_the_fewest_seeds_are_those_from_which_the_smallest_p_is_small_enough() -> None:
    assert [fewest(pairs) for pairs in (1, 3, 10, 36, 78)] == [6, 7, 9, 11, 12]
    clear: Scores = {f"a{k}": blocks(*(0.1 * k + 0.001 * block * k for block in range(8))) for k in range(5)}
    assert not any(pair.separated for pair in pairwise(clear))
    clear = {f"a{k}": blocks(*(0.1 * k + 0.001 * block * k for block in range(9))) for k in range(5)}
    assert all(pair.separated for pair in pairwise(clear)) and leader(clear) == "a4"


@pytest.mark.parametrize(
    ("orders", "square", "p"),
    [
        (["abc", "abc", "acb", "acb"], 6.0, 0.069),  # where the chi-square distribution says 0.0498
        (["abc", "abc", "abc", "acb"], 6.5, 0.042),
        (["abc", "abc", "abc", "abc"], 8.0, 0.0046),
        (["abc", "abc", "abc"], 6.0, 0.028),
    ],
)
def test_friedmans_p_is_that_of_the_textbooks_table(orders: list[str], square: float, p: float) -> None:
    found = rank({name: blocks(*(-order.index(name) for order in orders)) for name in "abc"})
    assert found is not None and found.statistic == pytest.approx(square)
    assert found.p == pytest.approx(p, abs=0.0005)
    assert found.groups == (("a", "b", "c"),) if p > LEVEL else found.labels[0] == "a"


def test_friedmans_statistic_allows_for_ties_as_the_librarys_does() -> None:
    random = np.random.default_rng(4)
    for _ in range(20):
        values = random.integers(0, 4, (7, 4)) / 10
        found = rank({str(k): blocks(*column) for k, column in enumerate(values.T)})
        assert found is not None
        assert found.statistic == pytest.approx(stats.friedmanchisquare(*values.T).statistic)
    same = rank({name: blocks(0.1, 0.2, 0.3) for name in "abc"})
    assert same is not None and same.ranks == (2.0, 2.0, 2.0) and (same.statistic, same.p) == (0.0, 1.0)
    assert same.groups == (("a", "b", "c"),) and not same.separates


def test_equals_share_their_rank() -> None:
    found = rank({"a": blocks(0.9, 0.9), "b": blocks(0.5, 0.9), "c": blocks(0.5, 0.1)})
    assert found is not None and found.labels == ("a", "b", "c") and found.ranks == (1.25, 2.0, 2.75)


# Boards -----------------------------------------------------------------------------------------------------


def runs(values: Mapping[str, Sequence[float | None]], metric: str = "personal", **named: Any) -> list[Record]:
    """Records of algorithms with a value a seed."""
    return [
        record(name, seed=seed, values={metric: value}, **named)
        for name, row in values.items()
        for seed, value in enumerate(row)
    ]


CLEAR = {
    "good": [0.80 + 0.001 * seed for seed in range(8)],
    "bad": [0.60 - 0.002 * seed for seed in range(8)],
}


def test_runs_are_paired_by_seed_and_split() -> None:
    found = [record("a", seed=seed, values={"personal": 0.5 + seed / 10}) for seed in (0, 1, 2)]
    found += [record("b", seed=seed, values={"personal": seed / 10}) for seed in (2, 1)]
    found += [record("b", seed=0, values={"personal": 0.9}, fingerprint="another split")]
    compared = compare(leaderboards(found), "personal")
    ((pair,),) = [part.pairs for part in compared.parts]
    assert (pair.n, pair.wins, pair.losses) == (2, 2, 0) and pair.difference.mean == pytest.approx(0.5)
    assert measured(leaderboards(found)[0], "personal")["b"] == {
        (0, "another split"): 0.9, (1, f"{1:016x}"): 0.1, (2, f"{2:016x}"): 0.2
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"engine": "stacked"}, {"setting": {"lr": 0.1}}])
def test_runs_of_other_protocols_or_machines_are_no_pairs(change: dict[str, Any]) -> None:
    boards = leaderboards([*runs({"a": [0.5, 0.6]}), *runs({"b": [0.1, 0.2]}, **change)])
    assert compare(boards, "personal").parts == () and ranking(boards, "personal") is None


def test_absent_models_are_not_compared() -> None:
    boards = leaderboards(runs({"a": [0.5, 0.6], "b": [None, None], "c": [0.4, 0.7]}))
    (part,) = compare(boards, "personal").parts
    assert [(pair.first, pair.second) for pair in part.pairs] == [("a", "c")]
    compared = compare(boards, "personal", ["a", "b", "c"])
    assert compared.left_out == ("digits, imbalance 10, alpha 0.5, setting quick: no personal of b.",)


def test_a_pair_that_is_separated_is_said_so_and_one_that_cannot_be_too() -> None:
    (part,) = compare(leaderboards(runs(CLEAR)), "personal").parts
    assert part.says[0].startswith("8 seeds can separate two algorithms by the signed-rank test")
    assert part.says[1:] == ("Separated by the corrected signed-rank test: good above bad by 21.1 points (p 0.008).",)
    (part,) = compare(leaderboards(runs({name: row[:5] for name, row in CLEAR.items()})), "personal").parts
    assert part.says == (
        "5 seeds cannot separate two algorithms by the signed-rank test, however far apart: its p is 0.062 or more. "
        "6 seeds could.",
        "The corrected signed-rank test separates no pair.",
    )
    assert "3 pairs. 7 seeds could." in resolution(2, 3)


def test_ties_are_said_to_be_ties() -> None:
    values = {"a": [0.5, 0.6, 0.7], "b": [0.5, 0.6, 0.7], "c": [0.5, 0.1, 0.2]}
    (part,) = compare(leaderboards(runs(values)), "personal").parts
    assert "Tied on every common seed: a and b." in part.says
    assert part.ranking is not None and part.ranking.ranks[0] == part.ranking.ranks[1] == pytest.approx(5 / 3)


BALANCED = "personal.balanced"


def several(count: int, order: Sequence[str] = ("a", "b", "c"), gap: float = 0.1, settings: int = 1) -> list[Record]:
    """Records of some datasets and settings of each, in each of which the algorithms are in this order."""
    found = []
    for which, setting, place, seed in itertools.product(range(count), range(settings), range(len(order)), range(2)):
        value = 0.9 - gap * place - 0.01 * which - 0.002 * setting + 0.001 * seed * place
        protocol = {"imbalance": 10.0 * (setting + 1), "model": f"m{which}"}
        values = {BALANCED: value}
        found.append(record(order[place], seed=seed, values=values, setting=protocol, dataset=f"d{which}"))
    return found


def test_datasets_are_blocks_and_neither_their_seeds_nor_their_settings_are() -> None:
    boards = leaderboards(several(8))
    compared = compare(boards, BALANCED)
    assert len(compared.parts) == 8 and compared.overall is not None and compared.overall.unit == "dataset"
    assert [pair.n for pair in compared.overall.pairs] == [8, 8, 8]
    assert all(pair.separated for pair in compared.overall.pairs) and compared.overall.ranking is not None
    assert compared.overall.ranking == ranking(boards, BALANCED) and compared.overall.ranking.unit == "dataset"
    assert compared.overall.ranking.ranks == (1.0, 2.0, 3.0)
    assert compared.overall.ranking.groups == (("a", "b"), ("b", "c"))
    assert all(pair.n == 2 for part in compared.parts for pair in part.pairs)
    assert not any("no independent evidence" in line for line in (*compared.overall.says, *compared.left_out))
    more = compare(leaderboards(several(2, settings=4)), BALANCED).overall
    assert more is not None and [pair.n for pair in more.pairs] == [2, 2, 2] and more.title == "2 datasets"
    assert more.says[-1].startswith("Averaged over 8 settings first. Settings of one dataset share images, seeds and")


def test_settings_of_one_dataset_are_not_tested_together_however_many() -> None:
    boards = leaderboards(several(1, settings=9))
    compared = compare(boards, BALANCED)
    assert len(compared.parts) == 9 and compared.overall is None and ranking(boards, BALANCED) is None
    assert part_over_datasets(boards, BALANCED, ["a", "b"]) is None
    (said,) = compared.left_out
    assert said.startswith("There is no test over all") and "no independent evidence" in said
    assert "Average ranks" not in table.render(boards, "md")
    assert "no independent evidence" in table.render(boards, "md")
    assert compare(boards[:1], BALANCED).left_out == ()


def test_settings_are_averaged_within_their_dataset_first() -> None:
    # on d0 a is far better in one setting and a little worse in two; on d1 b is better
    found = []
    for imbalance, ahead in ((10.0, 0.3), (20.0, -0.05), (30.0, -0.05)):
        for name, value in (("a", 0.5 + ahead), ("b", 0.5)):
            found.append(record(name, values={BALANCED: value}, setting={"imbalance": imbalance}, dataset="d0"))
    for name, value in (("a", 0.4), ("b", 0.5)):
        found.append(record(name, values={BALANCED: value}, setting={"model": "cnn"}, dataset="d1"))
    part = part_over_datasets(leaderboards(found), BALANCED)
    assert part is not None
    (pair,) = part.pairs
    assert (pair.n, pair.wins, pair.losses) == (2, 1, 1)
    assert pair.difference.mean == pytest.approx((0.2 / 3 - 0.1) / 2) and pair.difference.kind == "range"
    assert (pair.difference.low, round(pair.difference.high or 0.0, 9)) == (-0.1, round(0.2 / 3, 9))


def test_one_setting_on_two_machines_is_one_block() -> None:
    twins = [{name: [0.1 * (1 + k)] * 3 for k, name in enumerate("abc")}]
    cuda = runs(twins[0], BALANCED, device="cuda", dataset="d0", setting={"model": "m0", "imbalance": 10.0})
    part = part_over_datasets(leaderboards([*several(2), *cuda]), BALANCED)
    assert part is not None and part.ranking is not None and part.ranking.blocks == 2
    # The GPU has more common seeds, and stands for the first setting: there c is the best
    assert {pair.wins for pair in part.pairs} == {1} == {pair.losses for pair in part.pairs}


def test_algorithms_that_lack_a_dataset_are_left_out_and_named() -> None:
    found = [each for each in several(3) if not (each.algorithm == "b" and each.dataset == "d1")]
    part = part_over_datasets(leaderboards(found), BALANCED)
    assert part is not None and part.ranking is not None and part.ranking.labels == ("a", "b", "c")
    assert part.ranking.blocks == 2 and part.says[-1] == "1 more setting lacks some of these algorithms."
    found = [each for each in several(9) if not (each.algorithm == "b" and each.dataset != "d1")]
    part = part_over_datasets(leaderboards(found), BALANCED)  # nine datasets of two say more than one of three
    assert part is not None and part.ranking is not None and part.ranking.labels == ("a", "c")
    assert part.ranking.blocks == 9 and part.says[-1] == "Not on each of the 9 datasets, hence left out: b."
    found = [each for each in several(3) if not (each.algorithm == "b" and each.dataset == "d1")]
    chosen = part_over_datasets(leaderboards(found), BALANCED, ["a", "b", "c"])
    assert chosen is not None and chosen.ranking is not None and chosen.ranking.blocks == 2
    assert part_over_datasets(leaderboards(several(1)), BALANCED) is None
    # one of a dataset's settings lacks b: the others stand for it
    found = [each for each in several(2, settings=3) if not (each.algorithm == "b" and each.imbalance == 20.0)]
    part = part_over_datasets(leaderboards(found), BALANCED)
    assert part is not None and part.ranking is not None and part.ranking.labels == ("a", "b", "c")
    assert part.says[-2].startswith("Averaged over 4 settings") and part.says[-1].startswith("2 more settings lack")


def test_many_settings_of_a_dataset_decide_no_more_than_one_about_who_is_compared() -> None:
    found = [*several(2), *(each for each in several(1, settings=7) if each.algorithm != "c" and each.imbalance != 10)]
    part = part_over_datasets(leaderboards(found), BALANCED)
    assert part is not None and part.ranking is not None and part.ranking.labels == ("a", "b", "c")


def test_means_over_seeds_are_of_the_seeds_that_all_have() -> None:
    found = several(2)
    alone = {"imbalance": 10.0, "model": "m0"}
    found += [record("a", seed=5, values={BALANCED: 0.0}, setting=alone, dataset="d0")]  # nobody else has seed 5
    part = part_over_datasets(leaderboards(found), BALANCED)
    assert part is not None and part.ranking is not None and part.ranking.ranks == (1.0, 2.0, 3.0)


# Partitions drawn anew --------------------------------------------------------------------------------------


def test_initialisation_and_partition_are_told_apart_where_the_split_seed_is_given() -> None:
    random = np.random.default_rng(0)
    found = []
    for which in range(12):
        shift = random.normal(0, 0.04)
        for seed in range(8):
            values = {"steady": 0.5 + random.normal(0, 0.01), "moving": 0.5 + shift + random.normal(0, 0.01)}
            for name, value in values.items():
                found.append(record(name, seed=seed, values={BALANCED: value}, setting={"split_seed": which}))
    (spread,) = compare(leaderboards(found), BALANCED).spread
    assert spread.title == "digits, imbalance 10, alpha 0.5, setting quick, what varies over 12 partitions"
    rows = {label: numbers for label, *numbers in spread.rows}
    assert rows["steady"] == [pytest.approx(0.01, abs=0.002), pytest.approx(0.0, abs=0.004)]
    assert rows["moving"] == [pytest.approx(0.01, abs=0.002), pytest.approx(0.04, abs=0.015)]
    few = [
        record("a", seed=seed, values={BALANCED: value}, setting={"split_seed": which})
        for which, values in enumerate(((0.1, 0.3), (0.5, 0.7)))
        for seed, value in enumerate(values)
    ]
    (spread,) = comparison.spread(comparison._tables(leaderboards(few), BALANCED, None))
    # within: 0.02; means 0.2 and 0.6, variance 0.08, of which half of 0.02 is the seeds'
    assert spread.rows[0][1:] == pytest.approx((math.sqrt(0.02), math.sqrt(0.07)))
    assert compare(leaderboards(runs(CLEAR)), "personal").spread == ()
    fixed = [record(name, seed=seed, setting={"split_seed": 0}) for name in "ab" for seed in range(3)]
    fixed += [record(name, seed=seed) for name in "ab" for seed in range(3)]
    assert compare(leaderboards(fixed), BALANCED).spread == ()


def test_partitions_of_different_settings_or_machines_are_no_family() -> None:
    found = [
        record("a", seed=seed, values={BALANCED: 0.1 * seed}, setting={"split_seed": which, "lr": 0.1 + which})
        for which in range(2)
        for seed in range(2)
    ]
    found += [record("a", seed=seed, setting={"split_seed": 5, "lr": 0.1}, device="cuda") for seed in range(2)]
    assert comparison.spread(comparison._tables(leaderboards(found), BALANCED, None)) == ()


# Who is meant -----------------------------------------------------------------------------------------------


def family() -> list[Leaderboard]:
    found = [record("fedavg"), record("fed_rep"), record("fed_rep", {"head_epochs": 5}), record("fed_ft", {"n": 1})]
    return leaderboards([*found, record("old", version=1), record("old", version=2)], all_versions=True)


def test_algorithms_are_found_by_name_or_by_some_of_their_fields() -> None:
    boards = family()
    assert choose(boards, ["fedavg", "fed_rep", "fed-rep(head_epochs=5)", "fed_ft", "fedavg"]) == [
        "fedavg", "fed_rep", "fed_rep(head_epochs=5)", "fed_ft(n=1)"
    ]  # fmt: skip
    assert choose(boards, ["old version 2"]) == ["old version 2"]
    assert {label for label in entrants(boards) if label.startswith("old")} == {"old version 1", "old version 2"}


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("fedprox(mu=0)", "fedprox(mu=0.0)"),
        ("FedProx( MU = 0 )", "fedprox(mu=0.0)"),
        ("fedprox(mu=1e-1, on=False)", "fedprox(mu=0.1)"),
        ("fedprox(on=0)", None),
        ("fedprox(on=True)", None),
        ("fedprox+focal(gamma=2)+topk", "fedprox(mu=0.0)+focal+topk"),
        ("fedprox+topk+FOCAL( gamma=2.0 )", "fedprox(mu=0.0)+focal+topk"),
        ("fedprox+focal+topk(gamma=2)", None),
        ("fedprox(gamma=2)+topk+focal", None),
        ("fedprox+topk", None),
        ("FOCAL+focal", "focal+focal"),
    ],
)
def test_a_call_means_its_values_however_it_is_spelt(word: str, wanted: str | None) -> None:
    """Spaces, 0 and 0.0, defaults, the order of fields and of parts say nothing; a truth is no number."""
    rows = {
        "fedprox(mu=0.0)": ("fedprox", "FedProx(mu=0.0, on=False)"),
        "fedprox(mu=0.1)": ("fedprox", "FedProx(mu=0.1, on=False)"),
        "fedprox(mu=0.0)+focal+topk": ("fedprox+focal+topk", "FedProx(mu=0.0) + Focal(gamma=2.0) + TopK(share=0.1)"),
        "focal+focal": ("focal+focal", "Focal() + Focal(gamma=2.0)"),
    }
    found = [record(name, {"call": call}, call=call, label=label) for label, (name, call) in rows.items()]
    boards = leaderboards(found)
    if wanted is not None:
        assert choose(boards, [word]) == [wanted]
    else:
        with pytest.raises(BadConfig, match="there are no results of"):
            choose(boards, [word])


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("fedavgg", "there are no results of fedavgg; did you mean fedavg?"),
        ("fed_rep(head_epochs=6)", "there are no results of"),
        ("old", "old may be old version 1 or old version 2: write which"),
        ("fed rep", "is not a name or a call"),
        ("fed_rep(5)", "is not a name or a call"),
    ],
)
def test_an_algorithm_that_is_not_there_is_answered_with_those_that_are(word: str, reason: str) -> None:
    with pytest.raises(BadConfig, match=re.escape(reason)):
        choose(family(), [word])


def test_a_learning_rate_of_its_own_makes_another_algorithm(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def tuned(seed: int) -> dict[str, Any]:
        content = document("fedavg", seed=seed, values={BALANCED: 0.7})
        content["identity"]["algorithm"]["lr"] = 0.1
        return {**content, "label": "fedavg [tuned, lr 0.1]"}

    for seed in range(2):
        store(tmp_path, document("fedavg", seed=seed, values={BALANCED: 0.5}))
        store(tmp_path, tuned(seed))
    boards = leaderboards(records.read_all(tmp_path)[0])
    assert [row.lr for row in boards[0].rows] == [0.1, None]
    assert set(entrants(boards)) == {"fedavg", "fedavg [tuned, lr 0.1]"}
    ((pair,),) = [part.pairs for part in compare(boards, BALANCED).parts]
    assert {pair.first, pair.second} == set(entrants(boards)) and pair.difference.mean == pytest.approx(0.2)
    status, printed, _ = bench(capsys, "compare", "fedavg [tuned, lr 0.1]", "fedavg", "--out", tmp_path)
    assert status == 0 and "+20.0 (+20.0, +20.0)" in printed


def test_versions_on_different_boards_are_never_one_algorithm() -> None:
    found = [record("a", version=1), record("b"), record("a", version=2, setting={"imbalance": 50.0})]
    boards = leaderboards([*found, record("b", setting={"imbalance": 50.0})])
    assert set(entrants(boards)) == {"a version 1", "a version 2", "b"}
    assert part_over_datasets(boards, "personal") is None


# Tables -----------------------------------------------------------------------------------------------------


def cells(boards: Sequence[Leaderboard]) -> list[str]:
    return re.findall(r"\*\*[^*]+\*\*", table.render(boards, "md"))


def test_bold_is_only_what_a_test_supports() -> None:
    boards = leaderboards(runs(CLEAR))
    assert best(boards[0]) == {"personal": "good"}
    assert len(cells(boards)) == 1 and cells(boards)[0].startswith("**80.4 [")
    assert table.render(boards, "html").count("<strong>80.4 [") == 1
    assert table.render(boards, "latex").count(r"\textbf{80.4 [") == 1
    assert json.loads(table.render(boards, "json"))["leaderboards"][0]["best"] == {"personal": "good"}
    few = leaderboards(runs({name: row[:5] for name, row in CLEAR.items()}))
    assert cells(few) == [] and best(few[0]) == {}
    rivals = leaderboards(
        runs({**CLEAR, "as good": [value + 0.01 * (-1) ** k for k, value in enumerate(CLEAR["good"])]})
    )
    assert cells(rivals) == []  # both are better than the third, and neither is the best
    assert best(leaderboards(runs(CLEAR, "personal@best"), "best")[0]) == {}


def test_bold_needs_every_row_of_the_column_on_the_same_splits() -> None:
    other = [record("new", seed=seed, values={"personal": 0.1}, fingerprint=f"other {seed}") for seed in range(8)]
    assert best(leaderboards([*runs(CLEAR), *other])[0]) == {}
    screened = [*runs(CLEAR), *other[:4]]
    assert best(leaderboards(screened)[0]) == {"personal": "good"}
    absent = [*runs(CLEAR), *runs({"headless": [None] * 8})]
    assert best(leaderboards(absent)[0]) == {"personal": "good"}


def test_the_terminal_shows_in_bold_what_tests_support() -> None:
    import io

    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    for part in table.terminal(leaderboards(runs(CLEAR, BALANCED))):
        console.print(part)
    lines = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.findall(r"\x1b\[1m *([\d.–]+)", lines) == ["80.4", "80.1–80.5"]


def test_a_bootstrap_shows_both_ends_students_interval_its_half_and_a_range_says_so() -> None:
    values = {"a": [0.5, 0.5, 0.5, 0.5, 0.5, 0.9, 0.6]}
    found = estimate(values["a"])
    text = table.render(leaderboards(runs(values)), "md")
    assert found.low is not None and found.high is not None
    assert f"57.1 [{100 * found.low:.1f}, {100 * found.high:.1f}]" in text
    assert re.search(r"52\.0 ± \d", table.render(leaderboards(runs({"a": [0.5, 0.51, 0.52, 0.53, 0.54]})), "md"))
    assert "52.5 (50.0–55.0)" in table.render(leaderboards(runs({"a": [0.5, 0.55]})), "md")


def test_a_table_says_what_its_seeds_can_separate() -> None:
    (board,) = leaderboards(runs({"a": [0.5, 0.6], "b": [0.1, 0.2], "c": [0.1, 0.3]}))
    assert "2 seeds cannot separate any two of 3 algorithms" in " ".join(remarks(board))
    assert not any("separate" in line for line in remarks(leaderboards(runs({"a": [0.5, 0.6]}))[0]))


@pytest.mark.parametrize("form", ["md", "html", "latex"])
def test_several_datasets_are_summed_up_by_average_ranks(form: str) -> None:
    text = table.render(leaderboards(several(3, settings=2)), form)
    assert text.count("Average ranks over 3 datasets") == 1 and "2.00" in text
    assert "Average ranks" not in table.render(leaderboards(several(1)), form)
    summary = json.loads(table.render(leaderboards(several(3)), "json"))["averages"]
    assert summary["cells"] == [["a", "1.00", "2.00"], ["b", "2.00", "2.00"], ["c", "3.00", "2.00"]]
    assert summary["heading"] == ["algorithm", "balanced", "generic"]
    alone = leaderboards([*runs({"a": [0.5]}), *runs({"b": [0.5]}, setting={"lr": 0.1})])
    assert "Average ranks" not in table.render(alone, form)


# Command ----------------------------------------------------------------------------------------------------


def bench(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words], prog_name="bench")
    printed = capsys.readouterr()
    return int(str(ended.value.code)), printed.out, printed.err


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three algorithms, seven seeds, one setting."""
    place = tmp_path_factory.mktemp("results")
    for name, start in (("fedavg", 0.5), ("fedrep", 0.7), ("tag$x$", 0.3)):
        for seed in range(7):
            content = document(name, seed=seed, values={BALANCED: start + 0.01 * seed, "generic": 0.5})
            content |= {"label": name}
            store(place, content)
    return place


def test_compare_prints_pairs_ranks_and_what_can_be_said(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = bench(capsys, "compare", "fedrep", "fedavg", "--out", out)
    assert status == 0 and "+20.0 [+20.0, +20.0]" in printed and "7-0-0" in printed and "0.016" in printed
    assert "fedrep above fedavg by 20.0 points" in " ".join(printed.split())
    status, printed, _ = bench(capsys, "compare", "--out", out)
    assert status == 0 and "average rank" in printed and "tag$x$" in printed
    status, printed, _ = bench(capsys, "compare", "--out", out, "--metric", "generic")
    assert status == 0 and printed.count("all tied") == 3 and "Tied on every common seed" in printed


def test_compare_prints_what_varies_with_the_partition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, which, seed in itertools.product("ab", range(2), range(2)):
        values = {BALANCED: 0.5 + 0.1 * which + 0.01 * seed}
        store(tmp_path, document(name, seed=seed, values=values, setting={"split_seed": which}))
    status, printed, _ = bench(capsys, "compare", "--out", tmp_path)
    assert status == 0 and "what varies over 2 partitions" in printed
    assert re.search(r"\ba +0\.71 +7\.05\b", printed)
    found = json.loads(bench(capsys, "compare", "--out", tmp_path, "--json")[1])
    assert [row[0] for row in found["spread"][0]["rows"]] == ["a", "b"]


def test_compare_gives_everything_as_json(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = bench(capsys, "compare", "fedrep,fedavg", "--out", out, "--json")
    found = json.loads(printed)
    assert status == 0 and found["labels"] == ["fedrep", "fedavg"] and found["overall"] is None
    (pair,) = found["parts"][0]["pairs"]
    assert pair["separated"] is True and pair["p"] == pair["corrected"] == 2 / 2**7
    assert found["parts"][0]["ranking"]["ranks"] == [1.0, 2.0] and found["level"] == 0.05
    assert bench(capsys, "compare", "fedrep,fedavg", "--out", out, "--json")[1] == printed


def test_compare_draws_a_diagram(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("new/ranks.svg", "ranks.png"):
        status, _, said = bench(capsys, "compare", "--out", out, "--diagram", tmp_path / name)
        assert status == 0 and f"diagram: {tmp_path / name}" in said
    text = (tmp_path / "new" / "ranks.svg").read_text()
    assert "fedrep (1.00)" in text and "tag$x$" in text and "critical difference 1.25" in text
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_a_diagram_of_the_same_results_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from bench.face.pictures import ranks
from bench.results.statistics import rank
ranking = rank({name: dict.fromkeys(range(4), 0.1 * k) for k, name in enumerate("edcba")})
ranks(ranking, "personal").save(Path(sys.argv[1]))
"""
    drawn = []
    for seed in "12":  # of the order in which sets are gone through
        path = tmp_path / f"{seed}.svg"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment, timeout=180)
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("fedavg",), "two algorithms or more are wanted"),
        (("fedavg", "nobody"), "there are no results of nobody"),
        (("fedavg", "fedrep", "--metric", "persona"), "did you mean personal"),
        (("fedavg", "fedrep", "--metric", "personal@best"), "none that can be compared"),
        (("fedavg", "fedrep", "--metric", "personal.std"), "none that can be compared"),
        (("fedavg", "fedrep", "--metric", "unseen"), "none that can be compared"),
        (("--dataset", "cifar10"), "there are no results on 'cifar10'"),
        (("--diagram", "ranks.doc"), "must end in .svg, .png, .pdf"),
        (("--diagram", "/proc/nothing/ranks.svg"), "cannot be written"),
        (("--out", "nowhere"), "there is no such folder"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_a_sentence(
    out: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    status, printed, said = bench(capsys, "compare", "--out", out, *words)
    assert status == 2 and printed == "" and reason in said and len(said.splitlines()) == 1


def test_damaged_folders_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [store(tmp_path, document(name, seed=seed)) for name in ("a", "b") for seed in range(2)]
    (folders[0] / "run.json").write_text("{")
    status, printed, said = bench(capsys, "compare", "a", "b", "--out", tmp_path)
    assert status == 0 and str(folders[0]) in said and "all tied" in printed


def test_differences_over_protocols_that_share_nothing_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path, document("a"))
    store(tmp_path, document("b", setting={"lr": 0.1}))
    status, _, said = bench(capsys, "compare", "--out", tmp_path)
    assert status == 2 and "no two of a, b have personal.balanced under one protocol" in said
    for name in ("a", "c"):
        store(tmp_path, document(name, seed=3, setting={"lr": 0.2}))
    store(tmp_path, document("c", setting={"lr": 0.1}))
    status, _, said = bench(capsys, "compare", "--out", tmp_path, "--diagram", tmp_path / "x.svg")
    assert status == 2 and "choose with --dataset" in said


def test_the_published_metrics_are_those_that_can_be_compared() -> None:
    found = comparison.metrics(family())
    assert {"generic", "generic.few", "personal", "personal.worst_decile"} <= set(found)
    assert not [key for key in found if "std" in key or "@best" in key]
