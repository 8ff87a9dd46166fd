"""The pages of runs, of which there may be thousands: drawn side by side, and put a few into a script each.

    run.html?026484b81708     shows the run of that id, out of
    runs/02.js                the runs whose ids begin so: id to gzip, in base64

A page that was opened as a file may load scripts and nothing else.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from bench.site.run_page import Drawn, Shown, draw
from bench.sweep.cluster import spread

_FEW = 100
"""Runs that are drawn before another process has begun."""
_AT_A_TIME = 50


def drawn(runs: Iterable[Shown]) -> dict[str, Drawn]:
    """Draw runs, many of them in several processes; by id, ascending.

    Raises:
        DamagedResult: A run's files are not what was written.
    """
    ordered = sorted(runs, key=lambda run: run.record.id)  # as they lie in packs
    parts = [ordered[first : first + _AT_A_TIME] for first in range(0, len(ordered), _AT_A_TIME)]
    found: dict[str, Drawn] = {}

    def done(_: object, those: Mapping[str, Drawn]) -> None:
        found.update(those)

    spread(_draw_some, parts, 1 if len(ordered) < _FEW else None, done)
    return {run.record.id: found[run.record.id] for run in ordered}


def _draw_some(runs: Sequence[Shown]) -> dict[str, Drawn]:
    return {run.record.id: draw(run) for run in runs}


def shelves(contents: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Put what pages show into scripts: their paths within the site, and their texts.

    Args:
        contents: HTML by the run's id, ascending.
    """
    for start, ids in groupby(contents, key=lambda id: id[:2]):
        together = {id: folded(contents[id]) for id in ids}
        yield f"runs/{start}.js", f"shelve({json.dumps(together, indent=0)});\n"


def folded(text: str) -> str:
    """Compress a text so that a script can hold it: the same text gives the same letters."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
