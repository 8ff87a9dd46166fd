"""Which values a field takes: its type says so, and it is held to that when an instance is made, wherever it is made.

    mu: Strength = 0.01                                   a number from 0 to 1,000,000
    body_epochs: Epochs | None = None                     a whole number from 0 to 1,000, or None
    share: Annotated[float, Interval(ge=0, lt=0.5)] = 0.2     an interval of one's own, of `annotated_types`

What means the same is spelt in one way, hence one run: 1 where a float is wanted is 1.0, -0.0 is 0.0, a list is a
tuple, a number of numpy's is Python's. NaN and infinity are no value of any field, True is no number.
"""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache, partial, wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

# Ranges that many fields share: generous, and an end to what would not end ------------------------------------

Epochs: TypeAlias = Annotated[int, Interval(ge=0, le=1_000)]
"""Passes over data, none among them."""
Steps: TypeAlias = Annotated[int, Interval(ge=0, le=100_000)]
"""Batches, or steps of an optimiser."""
Count: TypeAlias = Annotated[int, Interval(ge=1, le=10_000)]
"""Of what there must be: units of a layer, examples of a batch."""
Share: TypeAlias = Annotated[float, Interval(ge=0, le=1)]
"""Of a whole, or a weight between two things."""
SomeShare: TypeAlias = Annotated[float, Interval(gt=0, le=1)]
"""Likewise, and not none."""
Momentum: TypeAlias = Annotated[float, Interval(ge=0, lt=1)]
"""Of an optimiser, or whatever else must not be the whole."""
Strength: TypeAlias = Annotated[float, Interval(ge=0, le=1_000_000)]
"""Of a pull, a noise, a learning rate: 0 turns it off."""
Positive: TypeAlias = Annotated[float, Interval(gt=0, le=1_000_000)]
"""What is divided by or multiplied with: a temperature, a width, a learning rate that must be one."""


class Ranged:
    """Base of what has fields that a person gives: each instance has checked values, spelt in one way.

    Raises:
        ValueError: A value is none of its field's.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        # A dataclass's own sees checked values, and need not call this class's; no type tells that it may be replaced.
        if "__post_init__" in vars(cls):
            cls.__post_init__ = _after_settling(vars(cls)["__post_init__"])  # type: ignore[assignment, method-assign]

    def __post_init__(self) -> None:
        settle(self)


def _after_settling(own: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(own)
    def settled(self: Any) -> None:
        settle(self)
        own(self)

    return settled


def settle(instance: object, refusal: type[ValueError] = ValueError) -> None:
    """Check the fields of a dataclass, and spell their values in the one way.

    Args:
        instance: Frozen or not. What is no value (`is_value`) is left as it is.
        refusal: What is raised where a value is none of its field's, with a sentence.
    """
    try:
        known = hints(type(instance))
    except NameError:  # a class of a notebook, in another process: what comes there was checked where it was made
        return
    for name, hint in known.items():
        given = getattr(instance, name)
        if is_value(hint):
            try:
                object.__setattr__(instance, name, checked(hint, given))
            except ValueError as error:
                raise refusal(f"{type(instance).__name__}({name}={shown(given)}): {name} {error}") from None


def hints(kind: type) -> dict[str, Any]:
    """Give the types of a dataclass's fields that can be given, by name, with their ranges."""
    known = _hints(kind)
    return {field.name: known[field.name] for field in fields(kind) if field.init}


_hints: Callable[[type], dict[str, Any]] = cache(partial(get_type_hints, include_extras=True))


def is_value(hint: Any) -> bool:
    """Tell whether a type is made of numbers, text, True and False, None, names to choose from, and tuples of them."""
    inner = [each for each in get_args(hint) if each is not Ellipsis]
    if get_origin(hint) is Annotated:
        return is_value(inner[0])
    if get_origin(hint) in (Union, UnionType, tuple):
        return all(map(is_value, inner))
    return get_origin(hint) is Literal or hint in _KINDS


def checked(hint: Any, value: object) -> Any:
    """Give a value as a field of this type has it.

    Raises:
        ValueError: It has another type, or lies outside the range; the message is what it must be.
    """
    try:
        return _positive(_adapter(hint).validate_python(_plain(value) if is_value(hint) else value))
    except ValidationError as error:
        if is_value(hint):
            raise ValueError(f"must be {words(hint)}") from None
        reasons = dict.fromkeys(detail["msg"].removeprefix("Input ") for detail in error.errors())
        raise ValueError(" or ".join(reasons)) from None
    except PydanticUserError:
        raise ValueError(f"must be {words(hint)}, which cannot be written here") from None


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _plain(value: object) -> object:
    """Spell numbers and sequences as Python's own."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _positive(value: Any) -> Any:
    """Spell 0 without a sign."""
    if isinstance(value, tuple):
        return tuple(map(_positive, value))
    return value + 0.0 if isinstance(value, float) else value


def shown(value: object) -> str:
    """Write what somebody gave, cut where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of over 4,300 digits
        return "…"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 4


def words(hint: Any) -> str:
    """Say which values a type has: `a whole number from 0 to 1,000, or None`."""
    inner = get_args(hint)
    if get_origin(hint) is Annotated:
        return _KINDS.get(inner[0], words(inner[0])) + _between(inner[1:])
    if get_origin(hint) in (Union, UnionType):
        optional = [words(each) for each in inner if each is not NoneType]
        return " or ".join(optional) + (", or None" if len(optional) < len(inner) else "")
    if get_origin(hint) is Literal:
        *most, last = map(repr, inner)
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(hint) is tuple:
        return f"a list, each {words(inner[0])}" if Ellipsis in inner else f"({', '.join(map(words, inner))})"
    return "a finite number" if hint is float else _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    NoneType: "None",
}


def _between(limits: Iterable[object]) -> str:
    """Say what a type's limits leave, after its name."""
    each = [one for limit in limits for one in (limit if isinstance(limit, GroupedMetadata) else (limit,))]
    low, high = "", ""
    for limit in each:
        match limit:
            case Ge(ge=bound):
                low = f"from {bound:,}"
            case Gt(gt=bound):
                low = f"above {bound:,}"
            case Le(le=bound):
                high = f"to {bound:,}" if low.startswith("from") else f"up to {bound:,}"
            case Lt(lt=bound):
                high = f"to below {bound:,}" if low.startswith("from") else f"below {bound:,}"
    return "".join(f" {part}" for part in (low, "and" if low.startswith("above") and high else "", high) if part)
