"""One folder per run: written once, read for ever. Many of them in few files are a pack: `bench.results.packed`.

    OUT/<id>/rounds.parquet        the curves: a row an evaluated round
    OUT/<id>/counts.parquet        a row per round but the last, model, client and class: correct, total, and whether
                                   it was drawn
    OUT/<id>/predictions.parquet   of the last round, a row per model, client, class and predicted class: how often
    OUT/<id>/models/               only if they were to be kept: see `bench.training.keeping`
    OUT/<id>/run.json              everything else; written last, so that a folder without it is unfinished

Every file appears whole or not at all, whenever the process is killed. `run.json` holds the SHA-256 of its
companions' contents and its own identity's hash, so that files of different runs cannot be taken for one result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import Literal

from bench.results import content, packed, standing, storage, tables
from bench.results.record import DOCUMENT, FORMAT, MODELS, check, stored
from bench.results.record import DamagedResult as DamagedResult
from bench.results.record import Record as Record
from bench.results.record import read as read
from bench.results.storage import OutputUnwritable as OutputUnwritable
from bench.results.storage import prepare as prepare
from bench.system import reading

Status = Literal["done", "failed", "partial", "absent"]


class AlreadyDone(FileExistsError):
    """A finished result would be overwritten, and nobody asked for that."""

    def __str__(self) -> str:
        return str(self.args[0])


def status(out: Path, run_id: str) -> Status:
    """Say how far a run has come: "done", "failed", "partial" (begun, or killed) or "absent".

    Raises:
        DamagedResult: It has been finished, and its files are not what was written.
    """
    folder = out / run_id
    if not folder.is_dir():
        return "absent"
    return read(folder).status if (folder / DOCUMENT).exists() else "partial"


def write(
    out: Path,
    run_id: str,
    document: Mapping[str, object],
    rounds: Sequence[Mapping[str, float | int | None]],
    counts: Mapping[str, Sequence[int | str]],
    predictions: Mapping[str, Sequence[int | str]],
    *,
    models: Path | None = None,
    replace: bool = False,
) -> Path:
    """Store a finished run.

    Args:
        out: The folder of all results.
        run_id: First 12 hexadecimal digits of the SHA-256 of `document["identity"]`.
        document: What run.json is to hold; "format", "id", "status" and "tables" are put in here.
        rounds: A row an evaluated round, with a "round"; not all need the same keys. None and NaN are absent.
        counts: Columns round, model, client (-1: generic), class, correct, total and drawn, all of one length: of all
            evaluations but the last.
        predictions: Columns round, model, client, class, predicted, count and drawn, all of one length: of the last
            evaluation, without what never happened.
        models: Folder of the files that `document["models"]` lists; it is moved into the run's. None: none were kept.
        replace: Whether a finished or damaged result may be overwritten.

    Returns:
        The run's folder.

    Raises:
        AlreadyDone: The run is finished, and `replace` is not set.
        DamagedResult: The run's folder is damaged, and `replace` is not set.
        OutputUnwritable: The disk is full, or the folder cannot be written.
        ValueError: The document lacks a key, has one of the wrong type, or is not that of `run_id`.
    """
    folder = out / run_id
    if not replace and status(out, run_id) == "done":
        raise AlreadyDone(f"{folder} holds a finished run; --force runs it again and replaces it")
    written = {
        tables.ROUNDS: tables.curves(rounds),
        tables.COUNTS: tables.tally(tables.COUNTS, counts),
        tables.PREDICTIONS: tables.tally(tables.PREDICTIONS, predictions),
    }
    companions = {tables.file(name): storage.parquet(table) for name, table in written.items()}
    digests = {name: content.digest(table) for name, table in written.items()}
    _put(folder, {**document, "id": run_id, "status": "done", "tables": digests}, companions, models)
    return folder


def fail(out: Path, run_id: str, document: Mapping[str, object], reason: str) -> Path:
    """Record that a run failed and why; a later run replaces that. A finished run is left as it is.

    Args:
        out: The folder of all results.
        run_id: As for `write`.
        document: As for `write`, with what was known when the run failed.
        reason: A sentence.

    Returns:
        The run's folder.

    Raises:
        OutputUnwritable: The disk is full, or the folder cannot be written.
        ValueError: As for `write`.
    """
    folder = out / run_id
    try:
        finished = status(out, run_id) == "done"
    except DamagedResult:
        finished = False
    if not finished:
        _put(folder, {**document, "id": run_id, "status": "failed", "reason": reason}, {})
    return folder


def read_all(out: Path) -> tuple[list[Record], list[str]]:
    """Read all finished and failed runs of a folder: of run folders and of packs in it, or of a pack, if it is one.
    Unfinished ones are passed over. The same result in two places is one.

    Returns:
        The runs sorted by id, and a sentence for each damaged one.
    """
    found: list[Record] = []
    damaged: list[str] = []
    for path in sorted(out.glob(f"*/{DOCUMENT}")):
        try:
            found.append(read(path.parent))
        except DamagedResult as error:
            damaged.append(str(error))
    damaged += [f"{pack} is a link, and no folder of its own; put the pack itself there" for pack in packed.links(out)]
    for pack in packed.packs(out):
        runs, told = packed.read(pack)
        found += runs
        damaged += told
    by_id: dict[str, list[Record]] = {}
    for record in found:
        by_id.setdefault(record.id, []).append(record)
    several = [runs for runs in by_id.values() if len(runs) > 1 and len(set(map(text_of, runs))) > 1]
    for runs in several:
        places = " and ".join(str(record.pack or record.folder) for record in by_id.pop(runs[0].id))
        damaged.append(f"run {runs[0].id} is another result in each of {places}; remove all but the right one")
    runs, told = stand(out, [by_id[id][0] for id in sorted(by_id)])
    return runs, damaged + told


def stand(out: Path, found: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """Give the runs of a folder their standing, and the name of the submission that each came with.

    A pack below the folder is a submission; runs of their own, and of the folder's own pack, are the folder's.

    Returns:
        The runs, and a sentence if the board's file is damaged: then all are self-reported.
    """
    told: list[str] = []
    entries: Mapping[str, standing.Standing] = {}
    try:
        entries = standing.read(out)
    except ValueError as error:
        told.append(f"{error}; until then every run is self-reported")
    placed = []
    for record in found:
        entry = entries.get(record.id)
        if entry is not None and hashlib.sha256(text_of(record)).hexdigest() != entry.document:
            entry = None
        cost = record.cost if entry is None else {**record.cost, **entry.cost}
        submission = None if record.pack is None or record.pack == out else record.pack.name
        placed.append(changed(record, standing=entry, submission=submission, cost=cost))
    return placed, told


def digest(out: Path, id: str) -> str | None:
    """Give the SHA-256 of the run.json of a folder's run, which holds those of its tables; None if it has none."""
    try:
        text = document(out, id)
    except (OSError, DamagedResult):
        return None
    return None if text is None else hashlib.sha256(text).hexdigest()


def holds_runs(out: Path) -> bool:
    """Tell whether a folder has runs, finished or failed, in folders or packs."""
    return any(out.glob(f"*/{DOCUMENT}")) or bool(packed.packs(out))


def text_of(record: Record) -> bytes:
    """Read a run's run.json to the letter.

    Raises:
        DamagedResult: It is not there any more.
    """
    if record.pack is not None:
        return packed.documents(record.pack)[record.id]
    try:
        return stored(record.folder)
    except (OSError, reading.TooLarge) as error:
        raise DamagedResult(f"{record.folder / DOCUMENT} cannot be read: {reading.why(error)}") from error


def file_of(record: Record, name: str) -> bytes:
    """Read a file of a run's folder, run.json or a table's; of a run in a pack, as the folder would have it.

    Raises:
        DamagedResult: The run is not what was written.
        OSError: The folder's file cannot be read, or is a link. TooLarge: It is larger than a table's can be.
    """
    if name == DOCUMENT:
        return text_of(record)
    if record.pack is None:
        return reading.contents(record.folder / name, tables.MOST_BYTES, links=False)
    (kept,) = (table for table, file in record.companions.items() if file == name)
    return storage.parquet(record.table(kept))


def document(out: Path, id: str) -> bytes | None:
    """Read the run.json of a run of a folder, to the letter; None if the folder and its packs have none.

    Raises:
        DamagedResult: A pack cannot be read.
        OSError, TooLarge: As of `stored`.
    """
    path = out / id / DOCUMENT
    if path.is_file():
        return stored(path.parent)
    return next((known[id] for known in map(packed.documents, packed.packs(out)) if id in known), None)


def unfinished(out: Path) -> list[Path]:
    """Give the folders of runs that were begun and have not ended, sorted."""
    return sorted(path for path in out.iterdir() if is_run(path) and path.is_dir() and not (path / DOCUMENT).exists())


def is_run(path: Path) -> bool:
    """Tell by its name whether a folder is a run's."""
    return re.fullmatch("[0-9a-f]{12}", path.name) is not None


def prose(out: Path) -> str | None:
    """Read what a person wrote about the results of a folder: its NOTES.md, if it has one.

    Raises:
        DamagedResult: It cannot be read, or is a link: what it shows may be somebody's who did not show it.
    """
    path = out / "NOTES.md"
    return _text(path) if os.path.lexists(path) else None


def reproductions(out: Path) -> dict[str, str]:
    """Read what a person wrote about how methods were reproduced: reproductions/NAME.md, by the method's name.

    Raises:
        DamagedResult: One cannot be read, or is a link.
    """
    folder = out / "reproductions"
    if folder.is_symlink():
        raise DamagedResult(f"{folder} is a link; put there what it stands for")
    return {path.stem: _text(path) for path in sorted(folder.glob("*.md"))}


def _text(path: Path) -> str:
    try:
        return reading.contents(path, reading.TEXT, links=False).decode()
    except (OSError, ValueError) as error:
        raise DamagedResult(f"{path} cannot be read: {reading.why(error)}; write the text itself there") from error


def publish(out: Path, text: str) -> Path:
    """Write the folder's README.md, whole or not at all.

    Raises:
        OutputUnwritable: The folder cannot be written.
    """
    storage.place(out, {"README.md": text.encode()})
    return out / "README.md"


def _put(
    folder: Path, document: Mapping[str, object], companions: Mapping[str, bytes], models: Path | None = None
) -> None:
    """Write a run's files, run.json last; what could not be read back is not written."""
    whole = storage.absent_is_none({**document, "format": FORMAT})
    text = json.dumps(whole, indent=2, allow_nan=False) + "\n"
    check(folder, json.loads(text))
    storage.place(folder, {**companions, DOCUMENT: text.encode()}, {MODELS: models})
