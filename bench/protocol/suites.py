"""Suites: named, versioned grids of runs, each a TOML file of the options of `bench run` and what it is for.

    bench run --suite lt-small --algos mine,fedavg --plugin mine.py

A result belongs to a suite by its protocol: no flag says so, and whoever ran the same by hand is in it too.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "suites"
ABOUT = "suite"
"""Table of a suite's file that tells a person what it is."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a suite is for, and what it runs."""

    name: str
    version: int
    """Raised when its cells or its protocol are others: what was run before is no longer of it."""
    title: str
    shows: str
    """What it is meant to show."""
    hides: str
    """What it cannot show."""
    costs: str
    """In words; `bench run --suite NAME --dry-run` forecasts it."""
    needs: tuple[str, ...] = ()
    """Commands that have to be done once before."""
    options: Mapping[str, Any]
    """Of `bench run`."""


def names() -> list[str]:
    """Name all suites."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def file(name: str) -> Path:
    """Give the file of a suite."""
    return FOLDER / f"{name}.toml"


@cache
def suite(name: str) -> Suite:
    """Read a suite that is one of `names`."""
    options = tomllib.loads(file(name).read_text(encoding="utf-8"))
    about: dict[str, Any] = options.pop(ABOUT)
    words: dict[str, Any] = {
        key: " ".join(value.split()) if isinstance(value, str) else value for key, value in about.items()
    }
    return Suite(name=name, options=options, needs=tuple(words.pop("needs", ())), **words)
