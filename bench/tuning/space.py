"""What is tuned of an algorithm, and within which bounds."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from bench.algorithm import Algorithm
from bench.part import Part
from bench.plugins.registry import label
from bench.protocol.composition import prefixed
from bench.protocol.settings import BadConfig

LR = "lr"
"""The setting's learning rate, beside an algorithm's own fields."""
_FACTORS = {float: 10.0, int: 2.0}


def space(algorithm: Algorithm, lr: float, chosen: Collection[str] | None = None) -> dict[str, BaseDistribution]:
    """Say what is tuned of an algorithm, and within which bounds.

    The learning rate of the setting from a tenth to ten times; of the algorithm's own fields what it declares as
    `space`, else: a float above 0 from a tenth of its value to ten times, an int above 0 from half to twice, a bool
    and a `Literal` over all values. A field that was asked for with another value than its default stays as it is.
    A part's fields are the same, by `part.field`.

    Args:
        algorithm: As asked for.
        lr: Of the setting.
        chosen: Only these fields; None: all.

    Raises:
        BadConfig: The algorithm declares a space that is none.
    """
    found = {prefix + name: one for prefix, piece in prefixed(algorithm) for name, one in _own(piece).items()}
    found.setdefault(LR, _range(lr, 10.0))
    return {name: one for name, one in found.items() if chosen is None or name in chosen}


def _own(piece: Algorithm | Part) -> dict[str, BaseDistribution]:
    """Say what is tuned of a method's or a part's own fields."""
    found: dict[str, BaseDistribution] = {}
    hints = get_type_hints(type(piece))
    usual = {each.name: each.default for each in fields(piece)}  # type: ignore[arg-type]
    declared = piece.space
    for name in usual if declared is None else declared:
        if name not in usual:
            raise BadConfig(f"{label(piece)} declares a space of {name!r}, which is none of its fields")
        if getattr(piece, name) == usual[name]:
            one = _around(usual[name], hints[name]) if declared is None else _declared(piece, name, hints[name])
            found |= {} if one is None else {name: one}
    return found


def _around(value: Any, hint: Any) -> BaseDistribution | None:
    if get_origin(hint) is Literal:
        return CategoricalDistribution(get_args(hint))
    if hint is bool:
        return CategoricalDistribution((False, True))
    if hint in _FACTORS and value > 0:
        return _range(value, _FACTORS[hint])
    return None  # around 0, or of another type: there is no telling where to look


def _range(value: float, factor: float) -> BaseDistribution:
    if isinstance(value, int):
        return IntDistribution(max(round(value / factor), 1), round(value * factor), log=True)
    return FloatDistribution(rounded(value / factor), rounded(value * factor), log=True)


def _declared(piece: Algorithm | Part, name: str, hint: Any) -> BaseDistribution:
    assert piece.space is not None
    values = piece.space[name]
    try:
        if isinstance(values, list):
            return CategoricalDistribution(values)  # type: ignore[arg-type]
        low, high = values
        kind = IntDistribution if hint is int else FloatDistribution
        return kind(low, high, log=low > 0)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        said = f"{label(piece)}: its space of {name} is {values!r}"
        raise BadConfig(f"{said}; (lowest, highest) or a list of values is wanted ({error})") from error


def rounded(value: Any) -> Any:
    """Keep three digits: what is tuned is also written, read and typed."""
    return float(f"{value:.3g}") if isinstance(value, float) else value
