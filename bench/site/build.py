"""Building a site into a folder, and taking away what an earlier build left there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from bench.results import packing, records
from bench.results.leaderboard import leaderboards
from bench.results.records import file_of
from bench.results.storage import OutputUnwritable
from bench.site import assets, pages
from bench.site.run_page import DATA, Results, files, is_packed
from bench.system import durable

MARKER = "bench-site.json"
"""Lists the files of a site, and so tells a site from any other folder."""
FORMAT = 1


def build(
    found: Iterable[records.Record],
    to: Path,
    *,
    notes: str | None = None,
    reproductions: Mapping[str, str] | None = None,
    all_versions: bool = False,
) -> list[str]:
    """Write a site; the same records give the same bytes.

    Files that an earlier build left and that are no longer wanted go; files that no build wrote stay.

    Args:
        found: Finished and failed runs.
        to: Where to: a folder that is new, empty, or holds a site.
        notes: What a person says about the results, in Markdown.
        reproductions: And about how methods were reproduced, by the method's name.
        all_versions: Whether older versions of a plug-in have rows and pages too.

    Returns:
        The paths of all files within the site, sorted.

    Raises:
        OutputUnwritable: The folder holds something else, or cannot be written.
        DamagedResult: A run's files are not what was written.
    """
    known = {record.id: record for record in found}
    boards = leaderboards(known.values(), all_versions=all_versions)
    shown = {run: known[run] for board in boards for row in board.rows for run in row.ids}
    results = Results(records=shown, notes=notes, reproductions=reproductions or {})
    try:
        old = _earlier(to)
        contents: dict[str, bytes | Path | Callable[[], bytes]] = {**assets.static()}
        contents |= {path: text.encode() for path, text in pages.write(results, boards)}
        contents |= _data(results.records.values())
        _mark(to, {*old, *contents})  # before anything is written: a build that was killed can be repeated
        for path, content in contents.items():
            match content:
                case bytes():
                    _put(to / path, content)
                case Path():
                    _put(to / path, content.read_bytes())
                case _:  # of a run, of which there may be thousands
                    _put(to / path, content())
        for path in old - {*contents}:
            _remove(to, path)
        _mark(to, set(contents))
    except OutputUnwritable:
        raise
    except OSError as error:
        raise OutputUnwritable(f"the site cannot be written to {to}: {error.strerror}; name another --to") from error
    return sorted([*contents, MARKER])


def _data(found: Iterable[records.Record]) -> dict[str, bytes | Callable[[], bytes]]:
    """Give what runs left, by path: a pack, and the files of runs that no pack can hold."""
    ordered = sorted(found, key=lambda record: record.id)
    together = [record for record in ordered if is_packed(record)]
    alone = [record for record in ordered if not is_packed(record)]
    contents: dict[str, bytes | Callable[[], bytes]] = {
        path: partial(file_of, record, name) for record in alone for name, path in files(record)
    }
    if together:
        runs = [(records.text_of(record), record) for record in together]
        contents |= {f"{DATA}/{name}": content for name, content in packing.written(runs).items()}
    return contents


def _earlier(to: Path) -> set[str]:
    """List the files of the site that a folder holds; none if it is new or empty.

    Raises:
        OutputUnwritable: The folder holds something else.
    """
    marker = to / MARKER
    if not marker.is_file():
        if (to.is_dir() and not any(to.iterdir())) or not to.exists():
            return set()
        raise OutputUnwritable(
            f"{to} is no site of ours (it has no {MARKER}) and not empty; name another folder with --to"
        )
    try:
        content = json.loads(marker.read_bytes())
        known = content["files"]
        if content["format"] > FORMAT:
            raise OutputUnwritable(f"{marker} is of a later version of bench; update bench, or name another --to")
        if content["format"] != FORMAT or not all(isinstance(path, str) and _inside(path) for path in known):
            raise ValueError("its paths are not ours")
    except (ValueError, TypeError, KeyError) as error:
        raise OutputUnwritable(
            f"{marker} is not the list of a site's files; delete {to} or name another --to"
        ) from error
    return set(known)


def _inside(path: str) -> bool:
    """Whether a path stays within the folder that it is relative to."""
    parts = PurePosixPath(path)
    return not parts.is_absolute() and bool(parts.parts) and ".." not in parts.parts


def _mark(to: Path, paths: set[str]) -> None:
    to.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "files": sorted(paths)}, indent=1)
    durable.put(to / MARKER, f"{text}\n".encode())


def _put(file: Path, content: bytes) -> None:
    """Write a file unless it is there already: a folder that is synchronised elsewhere changes little."""
    if not file.is_file() or file.read_bytes() != content:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def _remove(to: Path, path: str) -> None:
    """Remove a file, and the folders that it leaves empty."""
    file = to / path
    file.unlink(missing_ok=True)
    for folder in file.relative_to(to).parents:
        if folder != Path() and (to / folder).is_dir() and not any((to / folder).iterdir()):
            (to / folder).rmdir()
