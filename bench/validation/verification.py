"""Which published runs somebody else has run again, with the same outcome: OUT/verified.json.

An entry holds the SHA-256 of the `run.json` that was verified, and so of all that the run left: a run that is changed
afterwards is self-reported again. Whoever can write the file can write anything into it; it is a maintainer's, and
submissions never bring one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.results import records, storage

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FILE = "verified.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Verification:
    """That a run was run again."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"strict": True, "allow_inf_nan": False}

    date: str
    """Day in ISO 8601."""
    commit: str | None
    """Of the code that ran it again."""
    versions: dict[str, str]
    """Of the libraries that ran it again."""
    hardware: dict[str, str | int | None]
    """That ran it again."""
    exact: bool
    """Whether digest, counts and metrics were the same to the bit; else the metrics lay within `tolerance`."""
    tolerance: float | None = None
    """What metrics were allowed to differ by, as fractions; None where they were the same."""
    document: str
    """SHA-256 of the run.json that was verified."""


def verified(out: Path) -> Mapping[str, Verification]:
    """Give the runs of a folder of results that were verified and are still as they were, by id.

    All others are self-reported.

    Raises:
        ValueError: There is a verified.json, and it is not one.
    """
    return {run: entry for run, entry in read(out).items() if digest(out, run) == entry.document}


def read(out: Path) -> dict[str, Verification]:
    """Read all entries, also those of runs that have gone or changed since; none if there is no file.

    Raises:
        ValueError: The file cannot be read, is of another format, or an entry lacks something.
    """
    path = out / FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"this version reads format {FORMAT}")
        return _adapter().validate_json(json.dumps(content.get("runs")))
    except (OSError, ValueError) as error:  # pydantic's is a ValueError, of many lines
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); put the last version back") from error


def note(out: Path, entries: Mapping[str, Verification]) -> Path:
    """Add entries to the file; earlier ones of the same runs are replaced.

    Raises:
        OutputUnwritable: It cannot be written.
        ValueError: As for `read`.
    """
    together = {run: asdict(entry) for run, entry in sorted({**read(out), **entries}.items())}
    text = json.dumps({"format": FORMAT, "runs": together}, indent=2, allow_nan=False) + "\n"
    storage.place(out, {FILE: text.encode()})
    return out / FILE


def digest(out: Path, run: str) -> str | None:
    """Give the SHA-256 of the run.json of a folder's run, which holds those of its tables; None if it has none."""
    try:
        content = records.document(out, run)
    except (OSError, records.DamagedResult):
        return None
    return None if content is None else hashlib.sha256(content).hexdigest()


@cache
def _adapter() -> TypeAdapter[dict[str, Any]]:
    from pydantic import TypeAdapter

    return TypeAdapter(dict[str, Verification])
