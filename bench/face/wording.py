"""Numbers of a sweep in words."""

from __future__ import annotations

from collections.abc import Mapping


def duration(seconds: float) -> str:
    """Write a time for people: two units at most, and none finer than what counts."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def accuracy(metrics: Mapping[str, float | None]) -> str:
    """Write the two numbers that say how well a run does, which are those that rank; say so if it was not tested."""
    if not metrics:
        return "not tested in this round"
    shares = {name: metrics.get(key) for name, key in (("generic", "generic"), ("balanced", "personal.balanced"))}
    return ", ".join(f"{name} {'–' if share is None else f'{100 * share:.1f} %'}" for name, share in shares.items())
