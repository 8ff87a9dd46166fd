"""A run's folder, read and checked: nothing that was cut off, mixed up or altered is taken for a result."""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from bench.protocol.identity import identify
from bench.results import content, older, tables
from bench.results.standing import Standing
from bench.system import reading

if TYPE_CHECKING:
    import numpy
    import numpy.typing
    import pandas
    import pyarrow
    from pydantic import TypeAdapter
    from torch.nn import Module

FORMAT = 3
"""Of run.json; raised when a reader of the old one would misread the new one. Earlier ones are read: `older`."""
DOCUMENT = "run.json"
MOST_BYTES = 1 << 20
"""Of a run.json: one of 21,841 classes with 500 files of models has 0.55 MB, one of the digits 9 kB."""
MODELS = "models"
"""Folder of the models that a run kept, and the key of run.json that lists its files."""
_MOST_MODELS = 64
"""That are tested of one run: the heads of an algorithm, each before and after local work, masked or not, have 10."""
_OF_A_FINISHED_RUN = ("fingerprint", "metrics", "cost", "groups", "class_counts", "tested")


class OtherFormat(ValueError):
    """A document of a later version: no damage, and no reason to delete it."""


class Lacking(ValueError):
    """A result does not hold what is asked of it, or there is no such thing. The message says what there is."""


class DamagedResult(ValueError):
    """A result folder's files are not what was written. The message names the file and says what to do."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A finished or failed run; the fields after `document` are the checked keys of its run.json."""

    __pydantic_config__: ClassVar[dict[str, bool]] = {"strict": True, "allow_inf_nan": False}

    folder: Path
    document: dict[str, object] = field(repr=False)
    """The whole of run.json."""
    pack: Path | None = None
    """The folder of the pack that the run is in; None: it has a folder of its own."""
    format: int
    """Of run.json."""
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
    sent: dict[str, float] = field(default_factory=dict, repr=False)
    """Bytes that were sent, up and down, by each evaluated round. Empty where nothing is sent, if the run failed, or
    does not say."""
    open_set: dict[str, str] = field(default_factory=dict, repr=False)
    """How images came out in an open-set test, a line of `bench.training.open_set` for each client held out of training
    that had shots of two classes. Empty without one, and if the run failed."""
    groups: dict[str, list[int]] = field(default_factory=dict, repr=False)
    """The classes that are many, medium and few."""
    class_counts: list[int] = field(default_factory=list, repr=False)
    """Training images of each class."""
    clients: int | None = None
    """All clients; None if the run failed before there was a split."""
    tested: dict[str, int | list[int] | None] = field(default_factory=dict)
    """On what the personal metrics rest, as `bench.training.outcome.Outcome` has it. Empty if the run failed."""
    tables: dict[str, str] = field(default_factory=dict, repr=False)
    """Table to the SHA-256 of its content, as `bench.results.content` has it. Empty if the run failed, or is older."""
    files: dict[str, str] = field(default_factory=dict, repr=False)
    """Of formats before 3, SHA-256 of the Parquet files."""
    models: dict[str, str] = field(default_factory=dict, repr=False)
    """SHA-256 of the files of kept models, which `bench.results.kept` reads; empty if none were kept."""
    reason: str | None = None
    """Why the run failed, in a sentence."""
    commit: str | None = None
    finished: str | None = None
    """When, in ISO 8601."""
    standing: Standing | None = field(default=None, repr=False)
    """What the board found out about it, as `bench.results.records.stand` gives it; None: it is self-reported."""
    submission: str | None = None
    """The pack that it was handed in with; None: it lies in the folder itself."""

    @property
    def stands(self) -> str:
        """Say what it stands as: one of `bench.results.standing.ORDER`."""
        return "self-reported" if self.standing is None else self.standing.kind

    @property
    def has_models(self) -> bool:
        """Whether the run kept its models, and their files are there; what is in them is checked when they are read."""
        return bool(self.models) and all((self.models_folder / name).is_file() for name in self.models)

    @property
    def models_folder(self) -> Path:
        """Where the files of its models are, if it kept them."""
        return self.folder / MODELS if self.pack is None else self.pack / MODELS / self.id

    @property
    def lacks(self) -> tuple[str, ...]:
        """What a run of this format does not have: "counts by predicted class"."""
        return older.lacks(self.format)

    @property
    def companions(self) -> dict[str, str]:
        """Table to the name of its file beside run.json."""
        if self.format < 3:
            return {name: file for name, file in older.FILES.items() if file in self.files}
        return {name: tables.file(name) for name in tables.NAMES if name in self.tables}

    def table(self, name: str) -> pyarrow.Table:
        """Read a table: "rounds", "counts" or "predictions".

        Raises:
            DamagedResult: It is not what was written, or there is none because the run failed.
            Lacking: Runs of this format have no such table.
        """
        if self.pack is not None:
            from bench.results import packed

            return packed.table(self.pack, self.id, name)
        if self.status == "done" and name not in self.companions:
            raise Lacking(f"run {self.id} is of format {self.format}, which has no {name}; a run of today has them")
        path = self.folder / self.companions.get(name, tables.file(name))
        try:
            written = reading.contents(path, tables.MOST_BYTES, links=False)
        except (OSError, reading.TooLarge) as error:
            raise _damaged(path, f"cannot be read: {reading.why(error)}") from error
        if self.format < 3 and hashlib.sha256(written).hexdigest() != self.files.get(path.name):
            raise _damaged(path, f"is not the file that {DOCUMENT} was written with")
        try:
            table = tables.parse(written, self._most_rows(name))
            alike = self.format < 3 or content.digest(table) == self.tables.get(name)
        except reading.TooLarge as error:
            raise _damaged(path, f"cannot be read: {error}") from error
        except Exception as error:  # whatever a file that was cut off or made up makes of pyarrow
            raise _damaged(path, f"is no Parquet file that can be read ({type(error).__name__})") from error
        if not alike:
            raise _damaged(path, f"does not hold what {DOCUMENT} was written with")
        return table

    def _most_rows(self, name: str) -> int:
        """Count the rows that a table can have by what run.json says of the run, at most."""
        rounds, every = self.setting.get("rounds"), self.setting.get("eval_every", 1)
        matched = isinstance(told := self.identity.get("algorithm"), dict) and told.get("rounds")
        if type(rounds) is not int or type(every) is not int or every < 1 or self.clients is None:
            return tables.MOST_ROWS
        evaluations = -(-max(rounds, matched if type(matched) is int else 0) // every)
        if name == tables.ROUNDS:
            return evaluations
        cells = (self.clients + 1) * len(self.class_counts) * _MOST_MODELS
        return cells * (len(self.class_counts) if name == tables.PREDICTIONS else evaluations)

    def model(self, name: str, client: int | None = None) -> Module:
        """Read a kept model: "generic", "personal" of a client, or another of `kept.load(record).names()`.

        Args:
            name: Which.
            client: Whose; None for models of nobody's own.

        Returns:
            In evaluation mode; it takes normalised images (B, ...), and gives logits (B, C).

        Raises:
            NotKept: The run kept no models (`bench run --keep-models`), or not this one.
        """
        from bench.results import kept

        return kept.module(self, name, client)

    def rounds(self) -> pandas.DataFrame:
        """Read the curves: a row an evaluated round, NaN where a metric is absent.

        Raises:
            DamagedResult: As for `table`.
        """
        frame: pandas.DataFrame = self.table(tables.ROUNDS).to_pandas()
        return frame[[name for name in frame.columns if older.is_legible(self.format, name)]]

    def counts(self) -> pandas.DataFrame:
        """Read what each model got right in each evaluation: columns round, model, client (-1: generic), class,
        correct, total, and drawn (1 where the client was in the cohort of any round by then, 0, or -1 where that is no
        question), sorted by model, client, class and round.

        Raises:
            DamagedResult: As for `table`.
        """
        predictions = self.table(tables.PREDICTIONS) if self.format >= 3 else None
        frame: pandas.DataFrame = tables.together(self.table(tables.COUNTS), predictions).to_pandas()
        if self.format == 1:
            frame = frame[frame["model"].map(lambda model: older.is_legible(1, model))].assign(drawn=-1)
        return frame.reset_index(drop=True)

    def predictions(self) -> pandas.DataFrame:
        """Read what each model took the test images for in the last evaluation: columns round, model, client (-1:
        generic), class, predicted, count and drawn, a row for what happened at all.

        Raises:
            DamagedResult: As for `table`.
            Lacking: Runs of this format have none.
        """
        frame: pandas.DataFrame = self.table(tables.PREDICTIONS).to_pandas()
        return frame

    def confusion(self, model: str, client: int | None = None) -> numpy.typing.NDArray[numpy.int64]:
        """Count the test images of each class (rows) that a model took for each class (columns): (C, C) int64.

        Args:
            model: "generic", "personal", "personal.masked", "generic:NAME" ...
            client: Whose personal model; None: those of all clients together.

        Raises:
            DamagedResult: As for `table`.
            Lacking: Runs of this format do not say, or there is no such model or client.
        """
        import numpy

        frame = self.predictions()
        rows = frame[frame["model"] == model]
        if rows.empty:
            raise Lacking(f"run {self.id} has no model {model!r}; it has {', '.join(sorted(set(frame['model'])))}")
        if client is not None:
            rows = rows[rows["client"] == client]
            if rows.empty:
                raise Lacking(f"run {self.id} has no test images of client {client} for {model}")
        counted = numpy.zeros((len(self.class_counts),) * 2, dtype=numpy.int64)
        numpy.add.at(counted, (rows["class"].to_numpy(), rows["predicted"].to_numpy()), rows["count"].to_numpy())
        return counted

    def recompute(self) -> dict[str, float | None]:
        """Compute the metrics of the last counted round anew, from the stored counts.

        Raises:
            DamagedResult: As for `rounds`.
        """
        from bench.results.curves import curves

        frame = self.counts()
        (row,) = curves(frame[frame["round"] == frame["round"].max()], len(self.class_counts), self.groups)
        return {key: value for key, value in row.items() if key != "round"}


def read(folder: Path) -> Record:
    """Read a finished or failed run and check it.

    Raises:
        DamagedResult: A file is missing, cut off, of a later format, or of another run.
    """
    path = folder / DOCUMENT
    try:
        document = parse(stored(folder))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"cannot be read: {reading.why(error)}") from error
    try:
        record = check(folder, document)
    except OtherFormat as error:
        raise DamagedResult(f"{path} {error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if record.id != folder.name:
        raise _damaged(path, f"is that of run {record.id}, and its folder is called {folder.name}")
    for name in record.companions:
        record.table(name)
    return record


def stored(folder: Path) -> bytes:
    """Read the run.json of a run's folder, to the letter.

    Raises:
        OSError: The file cannot be read; it or the folder is a link, or it is no regular file.
        TooLarge: It has more than `MOST_BYTES`.
    """
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "its folder is a link, and no folder of its own", str(folder))
    return reading.contents(folder / DOCUMENT, MOST_BYTES, links=False)


def parse(text: bytes) -> object:
    """Read the text of a run.json.

    Raises:
        ValueError: It is no JSON, or holds what readers would differ in: NaN, a key that stands there twice.
        RecursionError: It is nested too deeply.
    """
    return json.loads(text.decode(), parse_constant=_refuse, object_pairs_hook=_without_repetition)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number of JSON")


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} stands there twice")
    return content


def check(folder: Path, document: object, pack: Path | None = None) -> Record:
    """Turn the content of a run.json into a record, without looking at its tables.

    Args:
        folder: Where it lies.
        document: The content.
        pack: The pack that it is in, if it is.

    Raises:
        OtherFormat: It is a later version's.
        ValueError: No object, a key missing or of the wrong type, or an identity that is not the id's.
    """
    from pydantic import ValidationError

    if not isinstance(document, dict):
        raise ValueError("is not a JSON object")
    format = document.get("format")
    if type(format) is not int or format < 1:
        raise ValueError(f"has format {format!r}, and must have a whole number from 1 to {FORMAT}")
    if format > FORMAT:
        raise OtherFormat(
            f"has format {format}, and this version reads formats up to {FORMAT}: a later version of bench wrote it, "
            "so update bench"
        )
    try:
        # As JSON: "strict" lets an object be a dataclass there, and a string a path, yet no string a number.
        place = {
            "folder": str(folder),
            "pack": None if pack is None else str(pack),
            "standing": None,
            "submission": None,
        }
        whole = json.dumps({**older.legible(document), **place, "document": {}})
        record = replace(_adapter().validate_json(whole), document=document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(f"has a bad key {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from error
    if identify(record.identity) != record.id:
        raise ValueError(f"is called {record.id}, and its identity's hash is {identify(record.identity)}")
    if not isinstance(record.setting.get("name"), str):
        raise ValueError("has a setting without a name")
    if record.status == "done":
        lacking = [key for key in _OF_A_FINISHED_RUN if not document.get(key) and (format, key) != (1, "tested")]
        if format < 3:
            lacking += [file for file in older.FILES.values() if file not in record.files]
        else:
            lacking += [f"tables.{name}" for name in tables.NAMES if name not in record.tables]
        if lacking:
            raise ValueError(f"lacks {', '.join(lacking)}")
        if format > 1 and not _says_what_was_tested(record.tested):
            raise ValueError("does not say on how many clients and images its personal metrics rest (tested)")
    return record


def _says_what_was_tested(tested: dict[str, int | list[int] | None]) -> bool:
    """Tell whether `tested` is as `bench.training.population.rests_on` has it."""
    images = tested.get("images")
    counted = ("clients", "worst_decile", "one_class", "drawn", "never")
    span = isinstance(images, list) and len(images) == 2
    return (span or not tested.get("clients")) and all(isinstance(tested.get(key), int) for key in counted)


@cache
def _adapter() -> TypeAdapter[Record]:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def _damaged(path: Path, what: str) -> DamagedResult:
    return DamagedResult(f"{path} {what}; delete the folder {path.parent}, or run again with --force")
