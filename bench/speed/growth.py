"""How time grows with clients, classes, cohort and model: `bench speed --growth`.

One of them is multiplied by four, three times, and everything else stays. The exponent is the slope of a line through
the logarithms: 1 is in proportion, 0 does not grow; below 1 a part of the time does not grow with it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.speed import sides
from bench.speed.federation import job
from bench.speed.turns import Side, Turn, spread, take_turns
from bench.speed.workloads import Workload
from bench.training.rounds import Run

_BASE = Workload(
    what="", model="mlp", shape=(1, 8, 8), largest=100, tested=64, clients=100, cohort=10, batch=10, rounds=1,
    partition="iid",
)  # fmt: skip
_WIDE = replace(_BASE, model="adapter", largest=200)

AXES: Mapping[str, Mapping[int, Workload]] = {
    "clients": {n: replace(_BASE, clients=n, largest=n) for n in (100, 400, 1600, 6400)},
    "classes": {n: replace(_BASE, classes=n, largest=6400 // n, tested=6400 // n) for n in (10, 40, 160, 640)},
    "cohort": {n: replace(_BASE, clients=256, cohort=n, largest=410) for n in (4, 16, 64, 256)},
    "weights": {256 * (n + 11) + 10: replace(_WIDE, shape=(n,)) for n in (40, 160, 640, 2560)},
}
"""By what grows, federations by its value: ten examples a client and ten clients a round of an MLP, 100 of them, one by
one; the clients of a cohort have 16; weights are those of `adapter`, by features."""
QUANTITIES = {
    "start": "from the file to the first round: reading, split, set-up",
    "round": "training of a cohort, one epoch, and aggregation",
    "evaluation": "the generic and all personal models",
}
"""What is timed, and in words."""


def measure(repeats: int = 5, axes: Mapping[str, Mapping[int, Workload]] = AXES) -> dict[str, Any]:
    """Measure all points of all axes, which take turns; a few minutes.

    Args:
        repeats: Turns of each.
        axes: As `AXES`.

    Returns:
        In JSON's types: "machine", "versions", "commit", "repeats", and "axes", by what grows: "values", and for each
        of `QUANTITIES` "seconds" (a list of "median", "least" and "most") and "exponent".
    """
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-speed-") as folder:
            found = {axis: _measure(points, Path(folder), axis, repeats) for axis, points in axes.items()}
    finally:
        torch.set_num_threads(threads)
    return {
        **sides.here(),
        "repeats": repeats,
        "axes": found,
    }


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Fit seconds = factor · value^exponent to at least two points, by least squares of logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def _measure(points: Mapping[int, Workload], folder: Path, axis: str, repeats: int) -> dict[str, Any]:
    taking: list[Side] = []
    for value, workload in points.items():
        place = folder / f"{axis}-{value}"
        place.mkdir()
        run = Run(job(workload, place))
        taking += [
            _start(f"start {value}", workload, place),
            sides.federated(f"round {value}", run),
            sides.evaluation(f"evaluation {value}", run),
        ]
    turns = take_turns(taking, repeats).turns
    found: dict[str, Any] = {"values": list(points)}
    for quantity in QUANTITIES:
        seconds = [spread([turn.seconds for turn in turns[f"{quantity} {value}"]]) for value in points]
        found[quantity] = {
            "seconds": seconds,
            "exponent": exponent(list(points), [each["median"] for each in seconds]),
        }
    return found


def _start(name: str, workload: Workload, folder: Path) -> Side:
    def take() -> Turn:
        torch.set_num_threads(1)
        started = time.perf_counter()
        Run(job(workload, folder))
        return Turn(time.perf_counter() - started, None)

    return Side(name, take)
