"""Sides that take turns, and what is said of them: medians, and ratios turn by turn.

A machine that slows down slows all sides of a turn alike, so that their ratio stays. Medians of sides that ran one
after the other would not have that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class SideFailed(RuntimeError):
    """A side cannot take its turn; the message is half a sentence that says why."""


class Turn(NamedTuple):
    """What one side did in its turn."""

    seconds: float
    images: float | None
    """Examples that were trained on, each as often as it was; None where time itself is what counts."""

    @property
    def value(self) -> float:
        """Images per second; or seconds."""
        return self.seconds if self.images is None else self.images / self.seconds

    @property
    def unit(self) -> str:
        """Of the value."""
        return "s" if self.images is None else "images/s"


@dataclass(frozen=True)
class Side:
    """Something that is measured beside others."""

    name: str
    take: Callable[[], Turn]
    """Does one turn; `SideFailed` where it cannot."""


@dataclass(frozen=True)
class Ratio:
    """What is divided by what, turn by turn."""

    of: str
    to: str
    by: str = "speed"
    """"speed": images per second, more is better; "time": seconds of a turn, less is better."""


@dataclass(frozen=True)
class Taken:
    """All turns of all sides."""

    turns: Mapping[str, Sequence[Turn]]
    """By side, as many for each that did not fail."""
    failed: Mapping[str, str]
    """Why a side has no turns."""


def take_turns(sides: Sequence[Side], repeats: int, warm: int = 1) -> Taken:
    """Let sides take turns: A B C A B C and so on.

    Args:
        sides: In the order of a turn; one that fails once is left out.
        repeats: Turns of each that count.
        warm: Turns of each before, which do not count.
    """
    turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
    failed: dict[str, str] = {}
    for round in range(repeats + warm):
        for side in sides:
            if side.name in failed:
                continue
            try:
                turn = side.take()
            except SideFailed as error:
                failed[side.name] = str(error)
                del turns[side.name]
                continue
            if round >= warm:
                turns[side.name].append(turn)
    return Taken(turns, failed)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Give the median of at least one number, and the least and the most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def described(taken: Taken, ratios: Sequence[Ratio]) -> dict[str, Any]:
    """Describe turns in JSON's types.

    Args:
        taken: What was done.
        ratios: Those of which a side is not there are left out.

    Returns:
        "sides": by name "unit" ("images/s" or "s"), "median", "least", "most", "seconds" (the median of a
        turn's) and "turns", or why it "failed";
        "ratios": a list of "of", "to", "by", "median", "least" and "most".
    """
    sides: dict[str, Any] = {
        name: {
            "unit": turns[0].unit,
            **spread([turn.value for turn in turns]),
            "seconds": spread([turn.seconds for turn in turns])["median"],
            "turns": len(turns),
        }
        for name, turns in taken.turns.items()
    }
    sides |= {name: {"failed": why} for name, why in taken.failed.items()}
    there = [ratio for ratio in ratios if ratio.of in taken.turns and ratio.to in taken.turns]
    return {"sides": sides, "ratios": [{**vars(ratio), **spread(_pairs(taken, ratio))} for ratio in there]}


def _pairs(taken: Taken, ratio: Ratio) -> list[float]:
    """Divide what the two sides of a ratio did in each turn."""
    pairs = zip(taken.turns[ratio.of], taken.turns[ratio.to], strict=True)
    if ratio.by == "time":
        return [one.seconds / other.seconds for one, other in pairs]
    return [one.value / other.value for one, other in pairs]
