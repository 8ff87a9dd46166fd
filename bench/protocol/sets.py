"""What stands for algorithms where these are typed: `set:pfl` for all of a kind, an alias for a method with a part."""

from __future__ import annotations

import re

from bench.plugins.declared import aliases
from bench.plugins.names import meant, near
from bench.plugins.registry import ALGORITHMS
from bench.protocol.refusal import BadConfig

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


def unfold(item: str) -> list[str]:
    """Spell what a set stands for, `ditto+focal` and so on for `set:pfl+focal`, or what an alias does,
    `fedavg+calibrated(tau=0.5)` for `fedlc(tau=0.5)`; of anything else, itself.

    Raises:
        BadConfig: No set has that name.
    """
    if not item.startswith(PREFIX):
        return [_in_full(item)]
    typed, plus, parts = item.removeprefix(PREFIX).partition("+")
    called = meant(typed.strip(), SETS)
    if called is None:
        raise BadConfig(f"{item}: no set is called {typed.strip()!r}; {near(typed.strip(), SETS)}")
    return [f"{each}{plus}{parts}" for each in members(called)]


def _in_full(item: str) -> str:
    method = re.match(r"[\w-]+", item)
    if method is None or method[0] in ALGORITHMS:
        return item
    known = aliases()
    alias = meant(method[0], known)
    return item if alias is None else known[alias] + item[method.end() :]
