"""The ledger: what a plug-in's file says, in its docstring, of what it keeps, sends, costs and departs from.

    Server keeps   body, head, etf (fixed)
    Down           body, head, prototypes (C, d)
    Up             body, head, means (C, d), counts (C)
    Passes         E + 1/3; before the test 5

What is kept and stands still is fixed, or moves later than in the first rounds; what is sent is later, too, if it is
not in these. What is sent and no part of the model has its shape, or how many models or parts of one it is:
`control (model)`, `body (3 × body)`; layers of a method's own may have none. Fields stand for their values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

TITLES = (
    *("Kind", "Learns", "Server keeps", "Client keeps", "Down", "Up", "Passes"),
    *("Newcomers", "Departs", "Elsewhere", "Reproduced"),
)
"""All that a ledger may say, in its order."""

TIERS: Mapping[str, str] = {
    "S": "nothing beyond models",
    "L": "label statistics",
    "A": "its own data",
    "V": "pre-trained models",
}
"""What the server learns or needs."""

LETTERS = (
    "C classes, d features (T of a teacher), N clients; body, head and model: their numbers, and weights those of the "
    "body's matrices and filters; // rounds down. Passes (E where nothing "
    "is said) go over a client's n examples in a round that it takes part in; E epochs, b a batch's share of them; one "
    "forward alone is a third."
)
"""What its formulas are written in."""

LATER = "later"
"""Says of what is sent, as of what is kept, that there is nothing of it in the first rounds."""
STANDS = ("fixed", LATER)
"""How what is kept stands still: for ever, or in the first rounds."""

USUAL = "E"
"""Passes of a method that says nothing of them."""


def sections(documentation: str) -> dict[str, str]:
    """Give what stands behind each title of a docstring, on one line."""
    found: dict[str, list[str]] = {}
    last: list[str] | None = None
    for line in documentation.splitlines():
        title = next((title for title in TITLES if re.match(rf"{title} +\S", line)), None)
        if title is not None:
            last = found.setdefault(title, [])
            line = line.removeprefix(title)
        elif not line.startswith(" "):
            last = None
        if last is not None:
            last.append(line.strip())
    return {title: " ".join(lines) for title, lines in found.items()}


_NESTED = r"[^()]*"
for _ in range(3):
    _NESTED = rf"[^()]*(?:\({_NESTED}\)[^()]*)*"
"""What a formula may hold: brackets within brackets within brackets."""


def entries(said: str) -> dict[str, str | None]:
    """Read what is kept or sent: by its key, the formula of its size, None where there is none."""
    if said == "nothing":
        return {}
    found = re.findall(rf"(\w+)(?: \(({_NESTED})\))?(?:,|$)", said)
    return {key: size or None for key, size in found}


def passes(said: str) -> dict[str, str]:
    """Read a formula of passes: by "between", and "first", "last" and "before the test" where they differ."""
    between, *others = said.split("; ")
    named = {when: other.removeprefix(when) for other in others for when in WHEN if other.startswith(f"{when} ")}
    return {"between": between, **named}


WHEN = ("first", "last", "before the test")
"""Whose passes are said besides those of a round in between: of the first and last round, and of tuning."""


def value(formula: str, names: Mapping[str, object]) -> object:
    """Evaluate a formula.

    Args:
        formula: Arithmetic, with × for times.
        names: What each of its letters and fields is.

    Raises:
        ValueError: It cannot be evaluated.
    """
    try:
        return eval(formula.replace("×", "*"), {"__builtins__": {}}, dict(names))
    except Exception as error:  # of arithmetic, of a name, or of whatever else a person wrote there
        raise ValueError(f"{formula}, no formula of {', '.join(names)}: {error}") from error
