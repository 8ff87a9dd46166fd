"""Which parts may stand on a method, in which order, and what their fields are called together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from bench.algorithm import Algorithm, is_usual
from bench.part import Aggregation, Channel, Compression, Correction, LearnedCorrection, Loss, Part
from bench.plugins.registry import label, name
from bench.protocol.composed import Composed
from bench.protocol.settings import BadConfig

KINDS = ("loss", "channel", "aggregation", "correction")
"""In the order in which parts are written."""


def compose(method: Algorithm, parts: Iterable[Part]) -> Algorithm:
    """Put parts on a method, in their canonical order; those at their neutral values are left out.

    Returns:
        The method itself where no part is left.

    Raises:
        BadConfig: Two losses, two aggregations, one part twice, or a part that makes no sense on the method.
    """
    acting = [part for part in parts if not is_neutral(part) or (isinstance(part, Loss) and method.own_loss)]
    ordered = tuple(sorted(acting, key=lambda part: KINDS.index(part.kind)))
    for part in ordered:
        if (reason := refusal(method, part)) is not None:
            what = f"{name(part)} is of the kind {part.kind}"
            raise BadConfig(f"{label(method)}+{label(part)}: {what}, which makes no sense here: {reason}")
    for one, other in itertools.combinations(ordered, 2):
        if type(one) is type(other):
            raise BadConfig(
                f"{label(method)}+{label(one)}+{label(other)}: {name(one)} stands there twice; leave one out"
            )
        if one.kind == other.kind and one.kind in ("loss", "aggregation"):
            both = f"{name(one)} and {name(other)} are both of the kind {one.kind}"
            raise BadConfig(f"{label(method)}+{label(one)}+{label(other)}: {both}, of which one is allowed")
        if isinstance(one, Aggregation) and one.noisy and isinstance(other, LearnedCorrection):
            hides = f"noise hides one update a round, and {name(other)} would have clients send more in the clear"
            raise BadConfig(f"{label(method)}+{label(one)}+{label(other)}: {hides}; leave one out")
    return Composed(method, ordered) if ordered else method


def is_neutral(part: Part) -> bool:
    """Tell whether a part has the values at which it changes nothing."""
    return bool(part.neutral) and all(getattr(part, key) == value for key, value in part.neutral.items())


def refusal(method: Algorithm, part: Part) -> str | None:
    """Say why a part makes no sense on a method; None: it does."""
    if "pooled" in method.needs and isinstance(part, Channel | Aggregation):
        return "the data are pooled, and nothing is sent"
    if isinstance(part, Correction) and "head" in part.reads and not is_usual(method.predict, Algorithm.predict):
        return "it corrects a linear head, and this method predicts in its own way"
    if isinstance(part, Compression) and part.remembers and "memory" in method.refuses:
        return method.refuses["memory"]
    return method.refuses.get(part.kind)


def prefixed(algorithm: Algorithm) -> list[tuple[str, Algorithm | Part]]:
    """Give the pieces, each with what stands before the names of its fields: nothing, or `focal.`."""
    return [("" if isinstance(piece, Algorithm) else f"{name(piece)}.", piece) for piece in algorithm.pieces]


def values_of(algorithm: Algorithm) -> dict[str, Any]:
    """Give all fields of all pieces by name, a part's as `focal.gamma`."""
    return {
        prefix + each.name: getattr(piece, each.name)
        for prefix, piece in prefixed(algorithm)
        for each in fields(piece)  # type: ignore[arg-type]
    }


def with_values(algorithm: Algorithm, values: Mapping[str, Any]) -> Algorithm:
    """Replace fields, by the names of `values_of`.

    Raises:
        ValueError: A piece refuses its values.
    """
    pieces: list[Any] = []
    for prefix, piece in prefixed(algorithm):
        names = {prefix + each.name: each.name for each in fields(piece)}  # type: ignore[arg-type]
        own = {names[key]: value for key, value in values.items() if key in names}
        pieces.append(replace(piece, **own))  # type: ignore[type-var]
    return compose(pieces[0], pieces[1:])
