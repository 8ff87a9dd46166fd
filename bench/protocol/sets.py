"""Named sets of algorithms: `set:pfl` stands for all of its kind wherever algorithms are typed."""

from __future__ import annotations

from bench.plugins.registry import ALGORITHMS

PREFIX = "set:"
EVERYTHING = "all"
FAMILIES = {
    "references": "What others are measured against: training alone, on pooled data, and by label frequencies.",
    "generic": "One model for all clients.",
    "pfl": "Personalised: a model of its own for each client.",
    "fedlt": "Long-tailed: made for classes that have few images.",
}
"""What the `family` of an algorithm may be, and what that means."""
SETS = {**FAMILIES, EVERYTHING: "Every algorithm that is known, plug-ins too."}


def members(called: str) -> list[str]:
    """Give the names of a set's algorithms, which are imported for it.

    Args:
        called: A name in `SETS`.
    """
    return [name for name in ALGORITHMS if called == EVERYTHING or ALGORITHMS[name].family == called]
