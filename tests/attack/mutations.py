"""Hostile changes to a file: of its bytes, or of the values of a document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    10**400,
    -(10**30),
    0.5,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[31m",
    "\ud800",
    "a" * 100_000,
    "=1+1",
    "../..",
    "<script>",
    [],
    [[]],
    [None] * 1000,
    {},
    {"x": {"x": {}}},
    [[[[[[[[[[]]]]]]]]]],
    {"": None},
    "2026-01-01T00:00:00+00:00",
    "nan",
    "1e999",
)
"""In the place of any value."""

Change = tuple[str, float, int]
"""What is done, where in the file, as a share of it, and a number that says how."""
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "repeat", "swap", "zero", "insert"]),
        st.floats(0, 1),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=4,
)
LEAVES = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, len(HOSTILE) - 1),
        st.sampled_from(["put", "put", "put", "remove", "rename", "nest"]),
    ),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, changes: list[Change]) -> bytes:
    """Change bytes."""
    for what, share, number in changes:
        place = min(int(share * len(content)), max(len(content) - 1, 0))
        size = number % 600 + 1
        piece = content[place : place + size]
        if what == "flip" and content:
            piece = bytes([content[place] ^ (1 << number % 8)])
            content = content[:place] + piece + content[place + 1 :]
        elif what == "set" and content:
            content = content[:place] + bytes([number % 256]) + content[place + 1 :]
        elif what == "cut":
            content = content[:place]
        elif what == "drop":
            content = content[:place] + content[place + size :]
        elif what == "repeat":
            content = content[:place] + piece * (number % 5 + 1) + content[place:]
        elif what == "swap":
            content = content[:place] + content[place + size : place + 2 * size] + piece + content[place + 2 * size :]
        elif what == "zero":
            content = content[:place] + bytes(len(piece)) + content[place + size :]
        elif what == "insert":
            content = content[:place] + bytes([number % 256]) * size + content[place:]
    return content


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List all values of a JSON document that are in something, by their keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*place, key)
        yield from places(inner, (*place, key))


def rewritten(document: Any, changes: list[tuple[float, int, str]]) -> Any:
    """Change values of a JSON document."""
    document = json.loads(json.dumps(document))
    for share, number, what in changes:
        everything = list(places(document))
        if not everything:
            return document
        *way, key = everything[min(int(share * len(everything)), len(everything) - 1)]
        inside = document
        for each in way:
            inside = inside[each]
        value = deepcopy(HOSTILE[number])
        if what == "put":
            inside[key] = value
        elif what == "remove":
            del inside[key]
        elif what == "rename" and isinstance(inside, dict):
            inside[str(value)[:50]] = inside.pop(key)
        else:
            inside[key] = [inside[key]]
    return document


def spelt(document: Any) -> bytes:
    """Write JSON as Python does, with NaN and infinity, and numbers of any length."""
    text: str = json.dumps(document)
    return text.encode("utf-8", "surrogatepass")
