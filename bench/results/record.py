"""A run's folder, read and checked: nothing that was cut off, mixed up or altered is taken for a result."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from bench.protocol.identity import identify

if TYPE_CHECKING:
    import pandas
    from pydantic import TypeAdapter

FORMAT = 2
"""Of run.json; raised when a reader of the old one would misread the new one."""
DOCUMENT, ROUNDS, COUNTS = "run.json", "rounds.parquet", "clients.parquet"
MODELS = "models"
"""Folder of the models that a run kept, and the key of run.json that lists its files."""
_OF_A_FINISHED_RUN = ("fingerprint", "metrics", "cost", "groups", "class_counts", "tested")


class OtherFormat(ValueError):
    """A document of an earlier or a later version: no damage, and no reason to delete it."""


class DamagedResult(ValueError):
    """A result folder's files are not what was written. The message names the file and says what to do."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished or failed run; the fields after `document` are the checked keys of its run.json."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"strict": True, "allow_inf_nan": False}

    folder: Path
    document: dict[str, object] = field(repr=False)
    """The whole of run.json."""
    id: str
    protocol: str
    """Hash of what must be equal within a table: the dataset and the setting."""
    status: Literal["done", "failed"]
    identity: dict[str, object] = field(repr=False)
    """Everything that can change the numbers."""
    algorithm: str
    """Name in the registry."""
    call: str
    """The algorithm with all its fields, as Python writes it."""
    label: str | None = None
    """The same without fields at their defaults, as on the command line."""
    tier: str
    dataset: str
    imbalance: float | None
    alpha: float | None
    seed: int
    setting: dict[str, object] = field(repr=False)
    """The protocol's fields, and its name."""
    overrides: dict[str, object] = field(default_factory=dict, repr=False)
    """Fields of the setting that were given by hand."""
    engine: str
    precision: str
    device: str
    fingerprint: str | None = None
    """Hash of the split; None if the run failed before there was one."""
    metrics: dict[str, float | None] = field(default_factory=dict, repr=False)
    """Fractions 0-1; None where the algorithm has no such model. Empty if the run failed."""
    cost: dict[str, float | None] = field(default_factory=dict, repr=False)
    """Bytes, samples, FLOPs, seconds. Empty if the run failed."""
    groups: dict[str, list[int]] = field(default_factory=dict, repr=False)
    """The classes that are many, medium and few."""
    class_counts: list[int] = field(default_factory=list, repr=False)
    """Training images of each class."""
    clients: int | None = None
    """All clients; None if the run failed before there was a split."""
    tested: dict[str, int | list[int] | None] = field(default_factory=dict)
    """On what the personal metrics rest, as `bench.training.rounds.Outcome` has it. Empty if the run failed."""
    files: dict[str, str] = field(default_factory=dict, repr=False)
    """SHA-256 of the Parquet files."""
    models: dict[str, str] = field(default_factory=dict, repr=False)
    """SHA-256 of the files of kept models, which `bench.results.kept` reads; empty if none were kept."""
    reason: str | None = None
    """Why the run failed, in a sentence."""
    commit: str | None = None
    finished: str | None = None
    """When, in ISO 8601."""

    @property
    def has_models(self) -> bool:
        """Whether the run kept its models, and their files are there; what is in them is checked when they are read."""
        return bool(self.models) and all((self.folder / MODELS / name).is_file() for name in self.models)

    def rounds(self) -> pandas.DataFrame:
        """Read the curves: a row an evaluated round, NaN where a metric is absent.

        Raises:
            DamagedResult: The file is not what was written, or there is none because the run failed.
        """
        return self._frame(ROUNDS)

    def counts(self) -> pandas.DataFrame:
        """Read what each model got right: columns round, model, client (-1: generic), class, correct, total, and drawn
        (1 where the client was in the cohort of any round by then, 0, or -1 where that is no question).

        Raises:
            DamagedResult: As for `rounds`.
        """
        return self._frame(COUNTS)

    def recompute(self) -> dict[str, float | None]:
        """Compute the metrics of the last counted round anew, from the stored counts.

        Raises:
            DamagedResult: As for `rounds`.
        """
        import torch

        from bench.training import metrics

        frame = self.counts()
        frame = frame[frame["round"] == frame["round"].max()]
        rows = [{str(key): cell for key, cell in row.items()} for row in frame.to_dict("records")]
        groups = {name: torch.tensor(classes, dtype=torch.int64) for name, classes in self.groups.items()}
        counts, drawn = metrics.from_rows(rows, len(self.class_counts))
        return metrics.summarise(counts, groups, drawn)

    def _frame(self, name: str) -> pandas.DataFrame:
        import pandas

        return pandas.read_parquet(io.BytesIO(_companion(self, name)))


def read(folder: Path) -> Record:
    """Read a finished or failed run and check it.

    Raises:
        DamagedResult: A file is missing, cut off, of another format, or of another run.
    """
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    try:
        record = check(folder, document)
    except OtherFormat as error:
        raise DamagedResult(f"{path} {error}") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if record.id != folder.name:
        raise _damaged(path, f"is that of run {record.id}, and its folder is called {folder.name}")
    for name in record.files:
        _companion(record, name)
    return record


def check(folder: Path, document: object) -> Record:
    """Turn the content of a run.json into a record, without looking at the files beside it.

    Raises:
        OtherFormat: It is another version's.
        ValueError: No object, a key missing or of the wrong type, or an identity that is not the id's.
    """
    from pydantic import ValidationError

    if not isinstance(document, dict):
        raise ValueError("is not a JSON object")
    if document.get("format") != FORMAT:
        raise OtherFormat(_told(document.get("format")))
    try:
        # As JSON: "strict" lets an object be a dataclass there, and a string a path, yet no string a number.
        whole = json.dumps({**document, "folder": str(folder), "document": document})
        record = _adapter().validate_json(whole)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"has a bad key {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from error
    if identify(record.identity) != record.id:
        raise ValueError(f"is called {record.id}, and its identity's hash is {identify(record.identity)}")
    if not isinstance(record.setting.get("name"), str):
        raise ValueError("has a setting without a name")
    if record.status == "done":
        lacking = [key for key in _OF_A_FINISHED_RUN if not document.get(key)]
        lacking += [name for name in (ROUNDS, COUNTS) if name not in record.files]
        if lacking:
            raise ValueError(f"lacks {', '.join(lacking)}")
    return record


def _told(format: object) -> str:
    """Say what to do about another format."""
    known = f"has format {format!r}, and this version reads format {FORMAT}"
    if type(format) is not int or format < 1:
        return f"{known}; delete the folder, or run again with --force"
    if format > FORMAT:
        return f"{known}: a later version of bench wrote it, so update bench"
    return f"{known}: an earlier version of bench wrote it and still reads it; what it says is counted otherwise now"


@cache
def _adapter() -> TypeAdapter[Record]:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def _companion(record: Record, name: str) -> bytes:
    """Read a Parquet file of a record, if it is the one that was written."""
    path = record.folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != record.files.get(name):
        raise _damaged(path, f"is not the file that {DOCUMENT} was written with")
    return content


def _damaged(path: Path, what: str) -> DamagedResult:
    return DamagedResult(f"{path} {what}; delete the folder {path.parent}, or run again with --force")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number of JSON")
