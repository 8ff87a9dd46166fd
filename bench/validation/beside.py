"""What stands beside runs in a folder of published results: each file is known and can be read, or is a problem."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from bench.protocol import presets
from bench.protocol.settings import BadConfig
from bench.results import packed, standing
from bench.results.record import MODELS, Record
from bench.system import reading
from bench.validation.found import Problem

TABLE, PROSE = "README.md", "NOTES.md"
_TEXTS = (TABLE, PROSE, standing.FILE, ".gitignore")
"""Not .gitattributes: it can hide what a pull request changes."""
_ID = re.compile("[0-9a-f]{12}")
_PICTURE = b"\x89PNG"
_SVG = "{http://www.w3.org/2000/svg}"
_ELEMENTS = frozenset(("svg", "metadata", "style", "g", "path", "line", "text"))
_ATTRIBUTES = frozenset((
    "version", "class", "width", "height", "viewBox", "fill", "stroke", "stroke-miterlimit", "stroke-width",
    "stroke-dasharray", "stroke-dashoffset", "stroke-linecap", "opacity", "d", "transform", "x2", "y2", "text-anchor",
    "font-family", "font-size", "font-weight", "role", "display", "pointer-events", "aria-roledescription",
    "aria-hidden", "aria-label",
))  # fmt: skip
"""Of a drawing."""
_HOME = "a folder of published results, which holds packs and folders of runs"


def strange(out: Path) -> Iterator[Problem]:
    """Name what is no part of published results, or cannot be read as one; runs and the tables of packs are others'."""
    folders: Mapping[str, Callable[[Path], Iterator[tuple[Path, str]]]] = {
        presets.FOLDER: lambda folder: _files(folder, _preset, "presets"),
        "tuning": _studies,
        "reproductions": lambda folder: _files(folder, _report, "reproductions"),
        "pictures": lambda folder: _files(folder, _drawing, "pictures"),
        "studies": lambda folder: _files(folder, _report, "studies"),
        "speed": lambda folder: _files(folder, _measurement, "speed"),
        packed.PLUGINS: _plugins,
    }
    own = (*packed.FILES, packed.PLUGINS) if packed.is_pack(out) else ()
    for path in sorted(out.iterdir()):
        told: Iterator[tuple[Path, str]] = iter(())
        if path.is_symlink():
            told = iter([(path, "is a link, and no part of these results; put there what it stands for")])
        elif path.name in _TEXTS:
            told = _text(path)
        elif path.is_dir() and path.name in folders and (path.name != packed.PLUGINS or own):
            told = folders[path.name](path)
        elif path.is_dir() and packed.is_pack(path):
            told = _plugins(path / packed.PLUGINS)
        elif not (path.is_dir() and _ID.fullmatch(path.name)) and path.name not in own:
            told = iter([(path, f"does not belong into {_HOME}; remove it")])
        for where, what in told:
            yield Problem(str(where.relative_to(out)), "", what)


def models(record: Record) -> Iterator[tuple[str, str]]:
    """Name what is wrong with the folder of a run's kept models: files, below the run's folder, and what."""
    folder = record.models_folder
    if folder.is_symlink():
        yield MODELS, "is a link, and no folder of its own"
        return
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name not in record.models:
            yield f"{MODELS}/{path.name}", "is not listed in run.json; remove it"
        elif path.is_symlink() or not path.is_file():
            yield f"{MODELS}/{path.name}", "is a link or a folder, and no file of its own"


def _text(path: Path) -> Iterator[tuple[Path, str]]:
    try:
        reading.contents(path, reading.TEXT, links=False).decode()
    except (OSError, ValueError) as error:
        yield path, f"cannot be read: {reading.why(error)}"


def _files(folder: Path, wrong: Callable[[Path], str | None], what: str) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.iterdir()):
        told = "is a link or a folder" if path.is_symlink() or path.is_dir() else wrong(path)
        if told is not None:
            yield path, f"does not belong into {what}, as it {told}; remove it"


def _preset(path: Path) -> str | None:
    if path.suffix != ".toml":
        return "is no preset, which is called NAME.toml"
    try:
        presets.read(path)
    except BadConfig as error:
        return f"is none ({reading.why(error).removeprefix(str(path)).lstrip(': ')})"
    return None


def _report(path: Path) -> str | None:
    if path.suffix not in (".md", ".py"):
        return "is neither a text (.md) nor what wrote it (.py)"
    return next((what for _, what in _text(path)), None)


def _drawing(path: Path) -> str | None:
    """Look at what `bench table --draw` wrote: lines and letters, and nothing that runs, leads on or is fetched."""
    if path.suffix != ".svg":
        return "is no drawing, which is called NAME.svg"
    try:
        text = reading.contents(path, reading.TEXT, links=False).decode()
        if "<!" in text or "<?" in text:  # entities, and what names another file
            return "has more than elements"
        for element in ElementTree.fromstring(text).iter():
            tag = element.tag.removeprefix(_SVG)
            attributes = [name for name in element.attrib if name not in _ATTRIBUTES]
            if tag not in _ELEMENTS or attributes:
                return f"has {tag if tag not in _ELEMENTS else attributes[0]!r}, which none of ours has"
            style = element.text or "" if tag == "style" else ""
            if re.search(r"url\(|@import", " ".join((style, *element.attrib.values())), re.IGNORECASE):
                return "fetches something"
    except (OSError, ValueError, ElementTree.ParseError) as error:
        return f"cannot be read: {reading.why(error)}"
    return None


def _measurement(path: Path) -> str | None:
    """Look at what `bench speed` printed or wrote, and what is said of it."""
    try:
        content = reading.contents(path, reading.TEXT, links=False)
        if path.suffix == ".md":
            content.decode()
        elif path.suffix == ".json":
            json.loads(content)
        elif path.suffix != ".png" or not content.startswith(_PICTURE):
            return "is neither a text (.md) nor a document (.json) nor a picture (.png)"
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {reading.why(error)}"
    return None


def _studies(folder: Path) -> Iterator[tuple[Path, str]]:
    """Look at what `bench tune` leaves: a folder a study, of two files."""
    from bench.tuning import book

    for study in sorted(folder.iterdir()):
        if study.is_symlink() or not study.is_dir() or not _ID.fullmatch(study.name):
            yield study, "does not belong into tuning, which holds folders of studies; remove it"
            continue
        for path in sorted(study.iterdir()):
            try:
                if path.name == book.TRIALS:
                    book.trials_of(path)
                elif path.name != book.STUDY:
                    raise ValueError("a study has no such file")
                elif not isinstance(json.loads(reading.contents(path, reading.TEXT, links=False)), dict):
                    raise ValueError("it is no JSON object")
            except (OSError, ValueError, RecursionError) as error:
                yield path, f"cannot be read as a study's: {reading.why(error)}"


def _plugins(folder: Path) -> Iterator[tuple[Path, str]]:
    """Look at the files that come with a pack."""
    if folder.is_symlink():
        yield folder, "is a link, and no folder of its own"
    elif folder.is_dir():
        yield from _files(folder, _plugin, "plug-ins")


def _plugin(path: Path) -> str | None:
    return "is no file of Python" if path.suffix != ".py" else next((what for _, what in _text(path)), None)
