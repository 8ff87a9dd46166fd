"""What stands behind a run's numbers: whoever handed it in, or the board, which ran it again: OUT/verified.json.

An entry holds the SHA-256 of the `run.json` that was looked at, and so of all that the run left: a run that is changed
afterwards is self-reported again. Whoever can write the file can write anything into it; it is the board's, and
submissions never bring one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bench.results import storage
from bench.system import reading

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FILE = "verified.json"
FORMAT = 2

Kind = Literal["verified", "reproduced", "recounted", "unrepeatable"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the board found out about a run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "allow_inf_nan": False, "extra": "forbid"}

    kind: Kind
    """"verified": run again, it gave the same bits. "reproduced": run again elsewhere, its numbers lie `within`.
    "recounted": its models, which were handed in, give its counts. "unrepeatable": the board cannot run it."""
    document: str
    """SHA-256 of the run.json."""
    date: str
    """Day in ISO 8601."""
    commit: str | None
    """Of the code that looked."""
    versions: dict[str, str]
    """Of the libraries that looked."""
    hardware: dict[str, str | int | None]
    """That looked."""
    because: str | None = None
    """Why the same bits could not be expected, or why it cannot be run, in words."""
    runs: int = 0
    """How often the board ran it."""
    within: dict[str, float] = field(default_factory=dict)
    """By metric, what it was allowed to differ by from the mean of the board's runs; empty where bits were compared."""
    cost: dict[str, float | None] = field(default_factory=dict)
    """What depends on the machine, as the board measured it; it stands in the place of what was handed in."""

    def __str__(self) -> str:
        """Say it in a clause."""
        by = f" with commit {self.commit[:10]}" if self.commit else ""
        when = f"on {self.date}{by}"
        if self.kind == "verified":
            return f"run again {when}, the same to the bit"
        if self.kind == "reproduced":
            widest = max(self.within.values(), default=0.0)
            least = min(self.within.values(), default=0.0)
            allowed = f"every metric within its tolerance, ± {100 * least:.1f} to {100 * widest:.1f} percentage points"
            return f"run again {self.runs} times {when}, {allowed} by how much these runs differ; {self.because}"
        if self.kind == "recounted":
            return f"its models were tested again {when}, with the same right answers; their training is not checked"
        return f"it cannot be run again here ({when}): {self.because}"


ORDER = ("verified", "reproduced", "recounted", "self-reported", "unrepeatable")
"""What a run stands as, the best first; "self-reported" is what verified.json says nothing of."""
WORDS = {
    "verified": "verified: run again by the board, the same to the bit",
    "reproduced": "reproduced: run again by the board on another machine, every number within what such runs differ by",
    "recounted": "recounted: the board tested the models that were handed in; how they were trained is not checked",
    "self-reported": "self-reported: nobody else has run it",
    "unrepeatable": "unrepeatable: the board has not what it takes to run it (data, weights, device, version)",
}
SIGNS = {"verified": "✓", "reproduced": "≈"}
"""Stand before the word of those that have one."""
BELIEVED = (
    "Left to believe of a row that the board has run again: that its method's code holds no test images and was not "
    "tuned on them, which readers of the code can see, and that nobody chose it for its seeds, which are 0 to n - 1; "
    "of a recounted row besides: how its models were trained; of all others: whatever does not contradict itself."
)
_RUN_AGAIN = "run again"
RANKED = (_RUN_AGAIN, *ORDER[2:])
"""What is ranked beside each other, the best first: what the board has run itself, then each for itself."""


def ranked_with(kind: str) -> str:
    """Say among which rows one of a standing is ranked: one of `RANKED`."""
    return _RUN_AGAIN if kind in ORDER[:2] else kind


def weakest(kinds: Iterable[str]) -> str:
    """Give what a row stands as: no better than each of its runs."""
    return max(kinds, key=ORDER.index)


def read(out: Path) -> dict[str, Standing]:
    """Read all entries, also those of runs that have gone or changed since; none if there is no file.

    Raises:
        ValueError: The file cannot be read, is of another format, or an entry lacks something.
    """
    path = out / FILE
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(reading.contents(path, reading.TEXT, links=False))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"this version reads format {FORMAT}")
        return _adapter().validate_json(json.dumps(content.get("runs")))
    except (OSError, ValueError, RecursionError) as error:  # pydantic's is a ValueError, of many lines
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); put the last version back") from error


def note(out: Path, entries: Mapping[str, Standing]) -> Path:
    """Add entries to the file; earlier ones of the same runs are replaced.

    Raises:
        OutputUnwritable: It cannot be written.
        ValueError: As for `read`.
    """
    together = {**read(out), **entries}
    whole = {run: asdict(entry) for run, entry in sorted(together.items())}
    text = json.dumps({"format": FORMAT, "runs": whole}, indent=2, allow_nan=False) + "\n"
    storage.place(out, {FILE: text.encode()})
    return out / FILE


@cache
def _adapter() -> TypeAdapter[dict[str, Any]]:
    from pydantic import TypeAdapter

    return TypeAdapter(dict[str, Standing])
