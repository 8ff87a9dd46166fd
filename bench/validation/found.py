"""What is found out about one run's folder, and how values are compared and named."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.results.record import Record
from bench.validation.expected import Cells, Dealt
from bench.validation.rebuilding import Asked

if TYPE_CHECKING:
    import pyarrow

_IDENTICAL = {"rel_tol": 1e-12, "abs_tol": 1e-12}
"""What is computed from the same counts may differ by the last bit between systems, and by no more."""


@dataclass(frozen=True, order=True)
class Problem:
    """Something that cannot be so."""

    file: str
    """Below the folder of results."""
    key: str
    """Within the file: "metrics.generic"; empty where it is the whole file."""
    what: str

    def __str__(self) -> str:
        """Say it in a sentence."""
        return f"{self.file}: {self.key} {self.what}" if self.key else f"{self.file}: {self.what}"


@dataclass(kw_only=True)
class Inspected:
    """A run's folder after inspection."""

    folder: Path
    pack: Path | None = None
    """The pack that the run is in; the folder is then the run's id below it."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is no problem and yet to be known; the same words for all runs that it holds for."""
    record: Record | None = None
    """None where run.json cannot be read as one."""
    whole: bool = False
    """Whether all its files are what was written."""
    asked: Asked | None = None
    dealt: Dealt | None = None
    """None where the data are not at hand."""
    tables: dict[str, pyarrow.Table] = field(default_factory=dict)
    """Those of its tables that are what was written, while it is inspected; without the curves of a run in a pack,
    which are computed of the others."""
    tested: dict[str, Cells] = field(default_factory=dict)
    """By "generic", "personal", "unseen": the test images that its counts are of."""

    def add(self, file: str, key: str, what: str) -> None:
        """Note a problem of one of the folder's files; of the folder itself where the file is empty."""
        self.problems.append(Problem(f"{self.folder.name}/{file}".rstrip("/"), key, what))

    @property
    def clients(self) -> int | None:
        """The number of clients, if anything says it."""
        assert self.record is not None and self.asked is not None
        if self.dealt is not None:
            return int(str(self.dealt.described["clients"]))
        return self.asked.setting.clients or self.record.clients


def close(one: object, other: object, **tolerance: float) -> bool:
    """Compare numbers up to rounding; what is no number must be the same."""
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return one is other
    return math.isclose(one, other, **(tolerance or _IDENTICAL))


def brief(value: object) -> str:
    """Spell a value, shortly."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
