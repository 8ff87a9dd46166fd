"""Finished runs packed for others: what a result is, and nothing of the machine it was made on."""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from bench.results import packing, storage
from bench.results.packed import PLUGINS, RUNS
from bench.results.record import DOCUMENT, MODELS, DamagedResult, check, read, stored
from bench.results.records import text_of
from bench.results.tables import MOST_BYTES
from bench.system import durable, reading

_IN_QUOTES = re.compile(r"(?<=['\"])(?:/|~|[A-Za-z]:[\\/])[^'\"]*(?=['\"])")
_PATH = re.compile(r"(?<![\w.:/])(?:~?/[\w.@+-]+/[\w.@+/-]+|[A-Za-z]:\\[\w.\\-]+)")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The oldest time that a zip file can hold: the same runs give the same bytes."""
_RECIPE = ("identity", "setting", "algorithm", "call", "label")
"""Keys of run.json that hold words of plug-ins and settings, one of which may be some machine's name."""


class NotSubmittable(ValueError):
    """Runs cannot be packed as they are. The message says why and what to do."""


def finished(out: Path) -> tuple[list[Path], list[str]]:
    """Choose what can be submitted.

    Returns:
        The folders of finished runs, and in a sentence each what else there is, which stays.
    """
    chosen, others = [], []
    for folder in sorted(path for path in out.iterdir() if path.is_dir() and re.fullmatch("[0-9a-f]{12}", path.name)):
        if not (folder / DOCUMENT).exists():
            others.append(f"{folder.name} is unfinished.")
            continue
        try:
            record = read(folder)
        except DamagedResult as error:
            raise NotSubmittable(str(error)) from error
        if record.status == "done":
            chosen.append(folder)
        else:
            others.append(f"{folder.name} failed ({record.reason}).")
    return chosen, others


def gather(folders: Sequence[Path], models: bool = False) -> dict[str, dict[str, bytes]]:
    """Read the files of finished runs as they are submitted.

    Where run.json spells a dataset of somebody's own files with the path to them, only the path's last part stays: the
    identity tells the files by their contents. Kept models stay behind, and are not listed, unless they are wanted.

    Args:
        folders: Of the runs.
        models: Whether kept models are handed in too, for the board to test.

    Returns:
        By run the contents of its files, run.json last; by its id and "/models" those of its models.

    Raises:
        NotSubmittable: A run.json tells something else of the machine: a path, or its name.
    """
    runs = {}
    for folder in folders:
        content = stored(folder)
        document = json.loads(content)
        shortened = _IN_QUOTES.sub(_last_part, str(document["dataset"]))
        if shortened != document["dataset"] or (MODELS in document and not models):
            document = {**document, "dataset": shortened}
            if not models:
                document.pop(MODELS, None)
            content = (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
        for key, what in told(document):
            raise NotSubmittable(f"{folder / DOCUMENT}: {key} tells {what} of this machine; take it out and try again")
        record = check(folder, document)
        files = {name: reading.contents(folder / name, MOST_BYTES, links=False) for name in record.companions.values()}
        runs[folder.name] = {**files, DOCUMENT: content}
        if record.models:
            place = record.models_folder
            runs[f"{folder.name}/{MODELS}"] = {
                name: reading.contents(place / name, links=False) for name in record.models
            }
    return runs


def as_pack(place: Path, runs: Sequence[str], plugins: Sequence[Path] = ()) -> dict[str, dict[str, bytes]]:
    """Put runs into one pack, with the files of the plug-ins that made them; those of earlier formats stay folders.

    Args:
        place: Where the folders of the runs are, as `gather` and `write` make them.
        runs: Their ids.
        plugins: Files, which go along so that others can run the runs again.

    Returns:
        By folder the contents of its files, as `write` takes them.

    Raises:
        NotSubmittable: Two plug-ins have one name.
    """
    if len({file.name for file in plugins}) < len(plugins):
        raise NotSubmittable("two plug-ins have one file name; rename one of them and run it again")
    chosen, _ = packing.packable([read(place / run) for run in sorted(runs)])
    older = {*runs} - {record.id for record in chosen}
    folders = {run: {file.name: file.read_bytes() for file in sorted((place / run).glob("*.*"))} for run in older}
    kept = {
        record.id: {name: (record.models_folder / name).read_bytes() for name in record.models} for record in chosen
    }
    if chosen:
        files = {file.name: file.read_bytes() for file in sorted(plugins)}
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        contents = packing.written([(text_of(record), record) for record in chosen], sums)
        name = f"pack-{hashlib.sha256(contents[RUNS]).hexdigest()[:8]}"
        folders |= {name: contents, **({f"{name}/{PLUGINS}": files} if files else {})}
        folders |= {f"{name}/{MODELS}/{run}": models for run, models in kept.items() if models}
    return folders


def _last_part(path: re.Match[str]) -> str:
    kind = PureWindowsPath if "\\" in path[0] or ":" in path[0] else PurePosixPath
    return kind(path[0]).name


def told(document: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Find what a run.json tells of the machine besides its processor: keys, and in words what they tell."""
    host = socket.gethostname().split(".")[0]
    named = re.compile(rf"\b{re.escape(host)}\b", re.IGNORECASE) if len(host) > 2 and host != "localhost" else None
    for key, text in _texts(document, ""):
        if (path := _PATH.search(text)) is not None:
            yield key, f"a path ({path[0]})"
        elif named is not None and key.split(".")[0] not in _RECIPE and named.search(text):
            yield key, f"the name ({host})"


def _texts(value: object, place: str) -> Iterator[tuple[str, str]]:
    """List all texts of a document, keys included, by place."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, content in value.items():
            where = f"{place}.{key}" if place else str(key)
            yield where, str(key)
            yield from _texts(content, where)
    elif isinstance(value, list | tuple):
        for number, content in enumerate(value):
            yield from _texts(content, f"{place}.{number}")


def write(runs: Mapping[str, Mapping[str, bytes]], to: Path) -> None:
    """Write what `gather` gave, as a zip file if `to` ends so, or as folders in it. The same runs give the same bytes.

    Raises:
        NotSubmittable: Something else stands there.
        OutputUnwritable: It cannot be written.
    """
    if to.suffix == ".zip":
        content = packed(runs)
        if to.exists() and (not to.is_file() or to.read_bytes() != content):
            raise NotSubmittable(f"{to} is there, with other content; remove it, or name another file with --to")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            durable.put(to, content)
        except OSError as error:
            raise storage.OutputUnwritable(
                f"{to} cannot be written: {error.strerror}; name another with --to"
            ) from error
        return
    for run, files in runs.items():
        for name, content in files.items():
            there = to / run / name
            if there.exists() and there.read_bytes() != content:
                raise NotSubmittable(f"{there} is there, with other content; name another folder with --to")
    for run, files in runs.items():
        storage.place(to / run, files)


def packed(runs: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """Pack runs into the content of a zip file; not compressed, as Parquet is, and compressors differ."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for run, files in sorted(runs.items()):
            for name, content in sorted(files.items()):
                entry = zipfile.ZipInfo(f"{run}/{name}", _LONG_AGO)
                entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix, wherever it is packed
                archive.writestr(entry, content)
    return sink.getvalue()
