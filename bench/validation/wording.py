"""Free text of submitted results: as long as such text can honestly be, and of nothing but signs that are seen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from bench.system.text import plain

_MOST = 500
_MOST_OF = {
    "label": 300,
    "call": 2_000,
    "reason": 2_000,
    "traceback": 50_000,
    "hardware": 100,
    "versions": 100,
}
"""Characters of a text, by the key of run.json that it stands below; of others `_MOST`."""
_SEVERAL_LINES = ("reason", "traceback")
_MOST_OF_A_LINE = 2_000
"""Characters of a line of notes."""
_SHOWN = 80
"""Characters of a place that is named."""


def unfit(document: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Look at all texts of a run.json, its keys included.

    Returns:
        Where, and what is wrong.
    """
    for key, value in document.items():
        most, several = _MOST_OF.get(key, _MOST), key in _SEVERAL_LINES
        for place, text in _texts(value, key):
            seen = re.sub(r"[\t\n]", " ", text) if several else text
            if len(text) > most:
                yield _cut(place), f"has {len(text):,} characters, and may have {most:,}"
            elif not seen.isprintable():
                odd = next(character for character in seen if not character.isprintable())
                yield _cut(place), f"holds {plain(odd)}, and must be text that can be seen"


def overlong(notes: str) -> Iterator[tuple[str, str]]:
    """Look at the lines of a person's notes, as `unfit` does at a run.json."""
    for number, line in enumerate(notes.split("\n"), start=1):
        if len(line) > _MOST_OF_A_LINE:
            yield f"line {number}", f"has {len(line):,} characters, and may have {_MOST_OF_A_LINE:,}; break it"


def _texts(value: object, place: str) -> Iterator[tuple[str, str]]:
    """Give all texts below a key with their places; a key's text is its place."""
    yield place, place
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for inner in value:
            if not isinstance(inner, int | float):  # of which there may be thousands
                yield from _texts(inner, place)


def _cut(place: str) -> str:
    return place if len(place) <= _SHOWN else f"{place[: _SHOWN - 3]}..."
