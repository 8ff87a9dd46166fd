"""What stands for algorithms where these are typed: `set:pfl` for all of a kind, an alias for a method with a part."""

from __future__ import annotations

import re

from bench.plugins.declared import aliases
from bench.plugins.names import meant, near
from bench.plugins.registry import ALGORITHMS
from bench.protocol.refusal import BadConfig
from bench.protocol.words import split_at, split_list

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
    `fedavg+calibrated(tau=0.5)` for `fedlc(tau=0.5)`, and for one that says which of several rows is meant
    `fedavg+graph_cut(weight=1)` for `score(kind='gc', weight=1)`; of anything else, itself.

    Raises:
        BadConfig: No set has that name, or no row of an alias is the one that is said.
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
    known = [alias for alias in aliases() if meant(method[0], [alias.partition("(")[0]])]
    rows = {"".join(_parameters(alias)): aliases()[alias] for alias in known}
    call, *further = split_at("+", item)
    given = _parameters(call)
    chosen = next((choice for choice in rows if choice in given), None)
    if chosen is not None:
        left = ", ".join(text for plain, text in given.items() if plain != chosen)
        return "+".join([rows[chosen] + (f"({left})" if left else ""), *further])
    fields = {_field(choice) for choice in rows if choice}
    if any(_field(each) in fields for each in given):
        raise BadConfig(f"{item}: there is no such row; there are {', '.join(known)}")
    return rows[""] + item[method.end() :] if "" in rows else item


def _parameters(call: str) -> dict[str, str]:
    """Give the parameters of a call, such as `kind='gc'`: whatever case, blanks and quotes, and as they were typed."""
    texts = split_list(call.partition("(")[2].rstrip().removesuffix(")"))
    return {text.replace('"', "'").replace(" ", "").casefold(): text for text in texts}


def _field(parameter: str) -> str:
    return parameter.partition("=")[0]
