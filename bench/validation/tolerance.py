"""How far the numbers of one run may lie apart on two machines, measured for that run.

Machines round sums in other ways, and training makes much or nothing of it. So the board does a run several times, each
with a learning rate that differs in its sixth digit, which is rounding enough: what these runs differ by among
themselves is what another machine's may differ by. A number lies within its tolerance if

    |number - mean| <= image + _WIDTH * sqrt(1 + 1 / runs) * max(spread, share * noise)

where `image` is what one image can change it by, `spread` the standard deviation of the board's runs, `noise` that of
the draw of the test images (binomial), and `share` the root mean square of spread / noise over all numbers of a kind,
0.05 at least: few runs say little about one number, and much about hundreds of them. Pooled for the same reason, and
otherwise: Smyth 2004, "Linear models and empirical Bayes methods for assessing differential expression".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas

from bench.results.curves import curves
from bench.results.record import Record
from bench.training.metrics import FOLLOWED

Values = dict[str, float]
"""By name: "personal.balanced", "generic of class 3", "personal of client 7"."""

_WIDTH = 5.0
"""Standard deviations: hundreds of numbers are compared, and one that is honest is called forged in 10^6."""
_LEAST_SHARE = 0.05
_DRAWS = 200
_MOST_CELLS = 5_000_000
"""Rows times draws: of many clients fewer draws say as much."""
KINDS = ("metrics", "rounds", "classes", "clients")


@dataclass(frozen=True)
class Allowed:
    """Where a number may lie."""

    mean: float
    """Of the board's runs."""
    tolerance: float


def allowed(runs: Sequence[Record]) -> dict[str, dict[str, Allowed]]:
    """Say where each number of a run may lie, by its kind (`KINDS`) and name, by what the board's runs of it gave.

    Args:
        runs: Two or more, of the same algorithm, split and seed.
    """
    given, draws = [numbers(run) for run in runs], _draws(runs[0])
    found = {kind: _within([each[kind] for each in given], draws[kind]) for kind in KINDS}
    return {kind: each for kind, each in found.items() if each}


def outside(record: Record, bounds: Mapping[str, Mapping[str, Allowed]]) -> list[str]:
    """Name the numbers of a run that lie where they may not, in words, the farthest of each kind first."""
    said = []
    for kind, own in numbers(record).items():
        known = bounds.get(kind, {})
        for name in dict.fromkeys((*own, *known)):
            if (name in own) != (name in known):
                said.append((kind, float("inf"), f"{name} is {'there' if name in own else 'not there'}"))
            elif (apart := abs(own[name] - known[name].mean)) > known[name].tolerance + 1e-9:
                spans = f"{100 * known[name].mean:.1f} ± {100 * known[name].tolerance:.1f} % here"
                said.append((kind, apart, f"{name} is {100 * own[name]:.1f} %, and {spans}"))
    ordered = sorted(said, key=lambda each: (KINDS.index(each[0]), -each[1]))
    return [words for _, _, words in ordered]


def numbers(record: Record) -> dict[str, Values]:
    """Give what is compared of a run, by kind: every metric; every model's share of right answers after every round;
    and, of the last round, in every class and at every client.
    """
    found = {kind: _named(sums["correct"] / sums["total"]) for kind, sums in _shares(record)}
    return {"metrics": {key: value for key, value in record.metrics.items() if value is not None}, **found}


def _within(runs: Sequence[Values], draw: _Draw) -> dict[str, Allowed]:
    """Say where the numbers of a kind may lie."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    if not names:
        return {}
    given = np.array([[run[name] for name in names] for run in runs])
    noise, image = (np.array([each.get(name, 0.0) for name in names]) for each in (draw.noise, draw.image))
    spread, known = given.std(axis=0, ddof=1), noise > 0
    share = math.sqrt(np.mean((spread[known] / noise[known]) ** 2)) if known.any() else 0.0
    width = _WIDTH * math.sqrt(1 + 1 / len(runs))
    tolerance = image + width * np.maximum(spread, max(share, _LEAST_SHARE) * noise)
    return {name: Allowed(*pair) for name, *pair in zip(names, given.mean(axis=0), tolerance, strict=True)}


@dataclass(frozen=True)
class _Draw:
    """What the draw of the test images does to numbers, by name."""

    noise: Values
    """Standard deviation."""
    image: Values
    """What one image can change."""


def _shares(record: Record) -> Iterator[tuple[str, pandas.DataFrame]]:
    """Give right answers and test images by model and round, and of the last round by class and by client."""
    frame = record.counts()
    last = frame[frame["round"] == frame["round"].max()]
    for kind, column, rows in (("rounds", "round", frame), ("classes", "class", last), ("clients", "client", last)):
        sums = rows.groupby(["model", column])[["correct", "total"]].sum()
        place = {"round": "after round", "class": "of class", "client": "of client"}[column]
        sums.index = pandas.Index([f"{model} {place} {which}" for model, which in sums.index])
        yield kind, sums


def _named(values: pandas.Series[float]) -> Values:
    return {str(name): float(value) for name, value in values.items()}


def _draws(record: Record) -> dict[str, _Draw]:
    """Say what the draw of the test images does to each kind of numbers."""
    found = {}
    for kind, sums in _shares(record):
        share = (sums["correct"] + 1) / (sums["total"] + 2)  # all right, or none, is no certainty
        noise = (share * (1 - share) / sums["total"]) ** 0.5
        found[kind] = _Draw(_named(noise), _named(1 / sums["total"]))
    return {"metrics": _draw_of_metrics(record), **found}


def _draw_of_metrics(record: Record) -> _Draw:
    """Draw the right answers of the last round anew, all of them and then one of each model, and see what becomes of
    the metrics.
    """
    frame = record.counts()
    last = frame[frame["round"] == frame["round"].max()].reset_index(drop=True)
    draws = max(2, min(_DRAWS, _MOST_CELLS // len(last)))
    random = np.random.default_rng(0)
    right, total = last["correct"].to_numpy(), last["total"].to_numpy()
    anew = random.binomial(total, (right + 1) / (total + 2), (draws, len(last)))
    other = np.tile(right, (draws, 1))
    for rows in last.groupby("model").indices.values():
        one = random.choice(rows, draws)
        other[np.arange(draws), one] += np.where(right[one] < total[one], 1, -1)
    values = _metrics(record, last, np.concatenate([right[None], anew, other]))
    noise = {key: float(np.std(each[1 : draws + 1], ddof=1)) for key, each in values.items()}
    image = {key: float(np.abs(each[draws + 1 :] - each[0]).max()) for key, each in values.items()}
    noise, image = ({**each, **_followed(each)} for each in (noise, image))
    return _Draw(noise, image)


def _metrics(
    record: Record, last: pandas.DataFrame, right: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """Compute the metrics of each row of right answers, (D, cells): (D,) each."""
    several = last.iloc[np.tile(np.arange(len(last)), len(right))]
    frame = several.assign(round=np.repeat(np.arange(len(right)), len(last)), correct=right.reshape(-1))
    rows = curves(frame, len(record.class_counts), record.groups)
    keys = [key for key, value in rows[0].items() if key != "round" and value is not None]
    return {key: np.array([row[key] for row in rows], dtype=float) for key in keys}


def _followed(values: Values) -> Values:
    """Take the last evaluation's for those of the mean of ten, and of the best."""
    return {f"{key}{end}": values[key] for key in FOLLOWED if key in values for end in ("@last10", "@best")}
