"""One run's folder, looked at by itself: whether its files say what a run of its identity must say."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import bench
from bench import metrics
from bench.dataset import DataDamaged, DataMissing
from bench.longtail import group_classes
from bench.results.expected import (
    Asked,
    CannotRebuild,
    Cells,
    Dealt,
    dealt,
    description,
    evaluations,
    rebuild,
    sent,
    tested_models,
)
from bench.results.record import COUNTS, DOCUMENT, ROUNDS, DamagedResult, Record, check
from bench.settings import BadConfig
from bench.split import PartitionFailed

if TYPE_CHECKING:
    import pandas

COSTS = (
    "bytes_down", "bytes_up", "samples", "train_flops",
    "device_seconds", "wall_seconds", "peak_memory_bytes", "client_state_bytes",
)  # fmt: skip
_WHOLE = ("bytes_down", "bytes_up", "client_state_bytes", "peak_memory_bytes")
_ALWAYS = ("samples", "device_seconds", "wall_seconds")
"""Costs that no run is without."""
COUNT_COLUMNS = ("round", "model", "client", "class", "correct", "total")
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
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is no problem and yet to be known; the same words for all runs that it holds for."""
    record: Record | None = None
    """None where run.json cannot be read as one."""
    asked: Asked | None = None
    dealt: Dealt | None = None
    """None where the data are not at hand."""
    tested: dict[str, Cells] = field(default_factory=dict)
    """By "generic", "personal", "unseen": the test images that its counts are of."""

    def add(self, file: str, key: str, what: str) -> None:
        """Note a problem of one of the folder's files; of the folder itself where the file is empty."""
        self.problems.append(Problem(f"{self.folder.name}/{file}".rstrip("/"), key, what))


def inspect(folder: Path, root: Path) -> Inspected:
    """Look at a run's folder.

    Args:
        folder: Named by the run's id.
        root: Of all datasets; where it has the run's, the split is made anew.
    """
    found = Inspected(folder=folder)
    try:
        _inspect(found, root)
    except Exception as error:  # what was made up may be anything, and the other folders are still of interest
        found.add("", "", f"cannot be made sense of ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    return found


def _inspect(found: Inspected, root: Path) -> None:
    _open(found)
    record = found.record
    if record is None:
        return
    _provenance(found, record)
    try:
        found.asked = rebuild(record)
    except CannotRebuild as error:
        found.add(DOCUMENT, error.key, str(error))
    if found.asked is not None:
        found.notes += [f"made by {old}, so that less can be compared" for old in found.asked.outdated.values()]
        _description(found, record, found.asked)
    if record.status == "failed":
        _failure(found, record)
        return
    if found.asked is not None:
        _split(found, record, found.asked, root)
        _cost(found, record, found.asked)
    counts, rounds = _frame(found, COUNTS), _frame(found, ROUNDS)
    if counts is not None and _counts_fit(found, record, counts):
        _tests(found, counts)
        _measured(found, record, counts, rounds)


# Its files --------------------------------------------------------------------------------------------------


def _open(found: Inspected) -> None:
    """Read run.json, and compare the other files with what it says of them."""
    folder = found.folder
    for path in sorted(folder.iterdir()):
        if path.name not in (DOCUMENT, ROUNDS, COUNTS):
            found.add(path.name, "", "does not belong into a run's folder; remove it")
    try:
        text = (folder / DOCUMENT).read_text(encoding="utf-8")
        document = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_repetition)
        found.record = record = check(folder, document)
    except FileNotFoundError:
        found.add("", "", f"has no {DOCUMENT}: the run is unfinished; finish it, or leave the folder out")
        return
    except (OSError, ValueError, RecursionError) as error:
        found.add(DOCUMENT, "", str(error).splitlines()[0])
        return
    if record.id != folder.name:
        found.add(DOCUMENT, "id", f"is {record.id}, and the folder is called {folder.name}")
    if record.status == "failed":
        return
    for name in sorted({*record.files, ROUNDS, COUNTS}):
        if name not in (ROUNDS, COUNTS):
            found.add(DOCUMENT, f"files.{name}", "is no file of a run")
            continue
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            found.add(name, "", f"cannot be read: {error.strerror}")
            continue
        if hashlib.sha256(content).hexdigest() != record.files[name]:
            found.add(name, "", f"is not the file that {DOCUMENT} was written with: it has another checksum")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number of JSON")


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object that has a key twice: readers would differ in which they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in names if names.count(key) > 1)!r} stands there twice")
    return content


def _frame(found: Inspected, name: str) -> pandas.DataFrame | None:
    assert found.record is not None
    try:
        return found.record.rounds() if name == ROUNDS else found.record.counts()
    except DamagedResult:  # that was said
        return None
    except Exception as error:  # whatever a made-up file makes of pyarrow
        found.add(name, "", f"is no Parquet file that can be read ({type(error).__name__})")
        return None


# What it says of itself -------------------------------------------------------------------------------------


def _provenance(found: Inspected, record: Record) -> None:
    """Look at where, when and with what the run was done."""
    document = record.document
    if record.commit is not None and not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record.commit):
        found.add(DOCUMENT, "commit", f"is {record.commit!r}, and must be 40 hexadecimal digits")
    elif record.commit is not None and record.commit.endswith("-dirty"):
        found.notes.append("run with code that is in no commit")
    versions = document.get("versions")
    if not isinstance(versions, dict) or not all(re.match(r"\d", str(value)) for value in versions.values()):
        found.add(DOCUMENT, "versions", "is not an object of version numbers")
    else:
        lacking = [package for package in ("bench", "python", "torch") if package not in versions]
        if lacking:
            found.add(DOCUMENT, "versions", f"lacks {', '.join(lacking)}")
        if _number(versions.get("bench", "0")) > _number(bench.__version__):
            found.add(DOCUMENT, "versions.bench", f"is {versions['bench']}, and this is {bench.__version__}; update it")
    hardware = document.get("hardware")
    if (
        not isinstance(hardware, dict)
        or not isinstance(hardware.get("cpu"), str | None)
        or (hardware.get("gpu") is None) != (record.device == "cpu")
    ):
        found.add(DOCUMENT, "hardware", f"does not go with a run on {record.device}")
    _times(found, document)
    if record.status == "done":
        if not re.fullmatch(r"[0-9a-f]{64}", str(document.get("digest"))):
            found.add(DOCUMENT, "digest", f"is {document.get('digest')!r}, and must be 64 hexadecimal digits")
        if not re.fullmatch(r"[0-9a-f]{16}", str(record.fingerprint)):
            found.add(DOCUMENT, "fingerprint", f"is {record.fingerprint!r}, and must be 16 hexadecimal digits")
        if record.reason is not None:
            found.add(DOCUMENT, "reason", "says why the run failed, and the run is done")


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _times(found: Inspected, document: Mapping[str, object]) -> None:
    times = []
    for key in ("started", "finished"):
        try:
            time = datetime.fromisoformat(str(document.get(key)))
            times.append(time if time.tzinfo else time.replace(tzinfo=UTC))
        except ValueError:
            if key == "finished" or document.get(key) is not None:  # of a worker that died nobody knows the start
                found.add(DOCUMENT, key, f"is {document.get(key)!r}, and must be a time in ISO 8601")
    if len(times) == 2 and times[1] < times[0]:
        found.add(DOCUMENT, "finished", "is before the run started")
    if times and times[-1] > datetime.now(UTC) + timedelta(days=1):
        found.add(DOCUMENT, "finished", "lies in the future")


def _description(found: Inspected, record: Record, asked: Asked) -> None:
    """Compare what repeats the identity in other words."""
    try:
        told = description(asked)
    except BadConfig as error:
        found.add(DOCUMENT, "setting", f"cannot be: {error}")
        return
    for key, value in told.items():
        written = record.document.get(key)
        if not _equal(value, written):
            nested = isinstance(value, dict) and isinstance(written, dict)
            for place, wanted, there in _differences(value, written) if nested else [("", value, written)]:  # type: ignore[arg-type]
                where = f"{key}.{place}" if place else key
                found.add(DOCUMENT, where, f"is {_brief(there)}, and by the identity it is {_brief(wanted)}")


def _differences(one: Mapping[str, object], other: Mapping[str, object]) -> Iterator[tuple[str, object, object]]:
    for key in dict.fromkeys((*one, *other)):
        if key not in one or key not in other or not _equal(one[key], other[key]):
            yield key, one.get(key, _NOT_THERE), other.get(key, _NOT_THERE)


_NOT_THERE = type("", (), {"__repr__": lambda self: "not there"})()


def _equal(one: object, other: object) -> bool:
    """Compare as JSON does: True is not 1, and 1 is 1.0."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _failure(found: Inspected, record: Record) -> None:
    if not (record.reason or "").strip():
        found.add(DOCUMENT, "reason", "does not say why the run failed")
    for key in ("metrics", "cost", "files", "digest"):
        if record.document.get(key):
            found.add(DOCUMENT, key, "is there, and the run failed")


# Its split and its cost -------------------------------------------------------------------------------------


def _split(found: Inspected, record: Record, asked: Asked, root: Path) -> None:
    counts = record.class_counts
    if not all(0 <= count < 2**31 for count in counts) or (
        asked.dataset is not None and len(counts) != asked.dataset.num_classes
    ):
        found.add(DOCUMENT, "class_counts", "are not a number of images for each class of the dataset")
        return
    groups = group_classes(torch.tensor(counts), asked.setting.groups)
    for group, classes in groups.items():
        if record.groups.get(group) != classes.tolist():
            found.add(DOCUMENT, f"groups.{group}", f"is {_brief(record.groups.get(group))}, and by class_counts it is "
                                                   f"{_brief(classes.tolist())}")  # fmt: skip
    for group in set(record.groups) - set(groups):
        found.add(DOCUMENT, f"groups.{group}", "is no group of classes")
    if asked.setting.clients is not None and record.clients not in (None, asked.setting.clients):
        found.add(DOCUMENT, "clients", f"is {record.clients}, and the setting has {asked.setting.clients}")
    if "dataset" in asked.outdated:
        return
    if asked.dataset is None:
        found.notes.append("the split cannot be made anew, as the images are somebody's own")
        return
    try:
        found.dealt = dealt(asked, root)
    except DataMissing:
        found.notes.append(f"the split cannot be made anew, as {record.dataset} is not at hand")
        return
    except (DataDamaged, PartitionFailed, BadConfig) as error:
        found.notes.append(f"the split cannot be made anew: {error}")
        return
    for key, value in found.dealt.described.items():
        written = record.document.get(key)
        if key == "clients" and written is None:  # results of early versions do not say
            continue
        alike = _alike(value, written) if key == "heterogeneity" else _equal(value, written)
        if not alike:
            found.add(DOCUMENT, key, f"is {_brief(written)}, and the data give {_brief(value)}")


def _alike(one: object, other: object) -> bool:
    """Compare objects of numbers up to rounding: sums are taken in another order on another machine."""
    if not isinstance(one, dict) or not isinstance(other, dict) or one.keys() != other.keys():
        return False
    return all(_close(one[key], other[key], rel_tol=1e-9) for key in one)


def _close(one: object, other: object, **tolerance: float) -> bool:
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return one is other
    return math.isclose(one, other, **(tolerance or _IDENTICAL))


def _cost(found: Inspected, record: Record, asked: Asked) -> None:
    cost = record.cost
    for key, value in cost.items():
        if value is not None and value < 0:
            found.add(DOCUMENT, f"cost.{key}", f"is {value}, and no cost is below 0")
        elif value is not None and key in _WHOLE and value != int(value):
            found.add(DOCUMENT, f"cost.{key}", f"is {value}, and bytes are whole")
    for key in COSTS:
        if key not in cost:
            found.add(DOCUMENT, f"cost.{key}", "is not there")
        elif key in _ALWAYS and not cost[key]:
            found.add(DOCUMENT, f"cost.{key}", f"is {cost[key]}, and no run is without")
    clients = _clients(found)
    known = None if clients is None or asked.outdated else sent(asked, clients)
    if known is None:
        return
    derived = {"bytes_down": known.bytes_down, "client_state_bytes": known.client_state_bytes}
    pooled = known.bytes_down is None
    for key, number in derived.items():
        if (number is not None or (pooled and key == "bytes_down")) and cost.get(key) != number:
            found.add(
                DOCUMENT, f"cost.{key}", f"is {_count(cost.get(key))}, and by setting and model it is {_count(number)}"
            )
    up = cost.get("bytes_up")
    if (up is None) != pooled:
        found.add(
            DOCUMENT, "cost.bytes_up", f"is {_count(up)}, and " + ("nothing is sent" if pooled else "clients send")
        )


def _count(number: float | None) -> str:
    return "absent" if number is None else f"{number:.10g}"


def _clients(found: Inspected) -> int | None:
    """Give the number of clients, if anything says it."""
    assert found.record is not None and found.asked is not None
    if found.dealt is not None:
        return int(str(found.dealt.described["clients"]))
    return found.asked.setting.clients or found.record.clients


# Its counts -------------------------------------------------------------------------------------------------


def _kind(model: str) -> str:
    """Give whose test images a model is tested on: "generic", "personal" or "unseen"."""
    return model.split(":")[0].split(".")[0]


def _counts_fit(found: Inspected, record: Record, frame: pandas.DataFrame) -> bool:
    """Look at each row; tell whether metrics can be computed of them."""
    if tuple(frame.columns) != COUNT_COLUMNS:
        found.add(COUNTS, "", f"has the columns {', '.join(frame.columns)}, and must have {', '.join(COUNT_COLUMNS)}")
        return False
    for column in COUNT_COLUMNS:
        texts = column == "model"
        kinds = {type(cell) for cell in frame[column]} if texts else {frame[column].dtype.kind}
        if not kinds <= ({str} if texts else {"i", "u"}):
            found.add(COUNTS, column, f"holds other things than {'texts' if texts else 'whole numbers'}")
            return False
    kind = frame["model"].map({model: _kind(model) for model in frame["model"].unique()})
    client, classes = frame["client"], len(record.class_counts)
    low, high = 0, np.inf
    clients = None if found.asked is None else _clients(found)
    if clients is not None and found.asked is not None:
        low, high = clients - found.asked.setting.unseen, clients
    at_home = (
        ((kind == "generic") & (client == -1))
        | ((kind == "personal") & (client >= 0) & (client < (low or np.inf)))
        | ((kind == "unseen") & (client >= low) & (client < high))
    )
    wrong = {
        "model": (~kind.isin(("generic", "personal", "unseen")), "is of no kind that is tested"),
        "client": (~at_home, "is no client of the model"),
        "class": ((frame["class"] < 0) | (frame["class"] >= classes), f"is none of the {classes} classes"),
        "total": (frame["total"] < 1, "is below 1: what has no test images has no row"),
        "correct": ((frame["correct"] < 0) | (frame["correct"] > frame["total"]), "is not between 0 and total"),
        "": (frame.duplicated(["round", "model", "client", "class"]), "stands there twice"),
    }
    fits = True
    for key, (rows, what) in wrong.items():
        if rows.any():
            first = frame[rows].iloc[0]
            place = ", ".join(f"{column} {first[column]}" for column in ("round", "model", "client", "class"))
            found.add(COUNTS, key, f"{what} in {int(rows.sum())} row(s), the first: {place}")
            fits = fits and key in ("correct", "total", "client")
    return fits


def _tests(found: Inspected, frame: pandas.DataFrame) -> None:
    """See that all models were tested, when they should be, on the same images."""
    asked, dealt = found.asked, found.dealt
    if asked is not None:
        rounds, wanted = sorted(frame["round"].unique().tolist()), evaluations(asked.setting)
        if rounds != wanted:
            found.add(
                COUNTS, "round", f"has {_brief(rounds)}, and by the setting models are tested after {_brief(wanted)}"
            )
        each, final = tested_models(asked)
        for round, models in frame.groupby("round")["model"].unique().items():
            names = final if round == asked.setting.rounds else each
            if not asked.outdated and set(models) != names:
                apart = ", ".join(sorted(set(models) ^ names))
                found.add(
                    COUNTS, "model", f"has not the models of {asked.record.algorithm} after round {round}: {apart}"
                )
    references = dict(dealt.tested) if dealt is not None else {}
    for (round, model), rows in frame.groupby(["round", "model"], sort=False):
        cells = rows[["client", "class", "total"]].to_numpy(dtype=np.int64).T
        cells = cells[:, np.lexsort((cells[1], cells[0]))]
        kind = _kind(str(model))
        reference = references.setdefault(kind, cells)
        found.tested.setdefault(kind, cells)
        if not np.array_equal(cells, reference):
            whose = "by the data" if dealt is not None else "of the other models"
            place = f"round {round}, model {model}"
            found.add(
                COUNTS, "total", f"has other test images than those {whose}: {place}, {apart_at(cells, reference)}"
            )
    plain, masked = (frame[frame["model"] == model] for model in ("personal", "personal.masked"))
    both = plain.merge(masked, on=["round", "client", "class"], suffixes=("", "_masked"))
    odd = both[(both["correct_masked"] < both["correct"]) & (both["correct_masked"] > 0)]
    if len(odd):
        first = ", ".join(f"{column} {odd.iloc[0][column]}" for column in ("round", "client", "class"))
        found.add(COUNTS, "correct", "of personal.masked is below that of personal, and leaving classes out takes no "
                  f"right answer away, in {len(odd)} row(s), the first: {first}")  # fmt: skip


def apart_at(cells: Cells, reference: Cells) -> str:
    """Say where two sets of test images differ first."""
    here, there = ({(k, c): n for k, c, n in table.T.tolist()} for table in (cells, reference))
    client, which = min(cell for cell in {*here, *there} if here.get(cell) != there.get(cell))
    numbers = here.get((client, which), 0), there.get((client, which), 0)
    return f"client {client}, class {which}: {numbers[0]} and not {numbers[1]}"


# Its metrics ------------------------------------------------------------------------------------------------


def _measured(found: Inspected, record: Record, counts: pandas.DataFrame, curves: pandas.DataFrame | None) -> None:
    """Compute every metric anew from the counts: of each round, of the last, of the last ten and of the best."""
    classes = len(record.class_counts)
    if any(not 0 <= label < classes for those in record.groups.values() for label in those):
        return  # that they are not the groups of the classes was said
    groups = {name: torch.tensor(those, dtype=torch.int64) for name, those in record.groups.items()}
    rows: list[dict[str, float | int | None]] = []
    for round, frame in counts.groupby("round"):
        rows.append({"round": int(str(round)), **metrics.summarise(tables(frame, classes), groups)})
    if curves is not None:
        _curves(found, rows, curves)
    final = {key: value for key, value in rows[-1].items() if key != "round"}
    for key in ("generic", "personal", "personal.masked"):
        final |= {f"{key}@last10": metrics.last_mean(rows, key), f"{key}@best": metrics.best(rows, key)}
    for key in dict.fromkeys((*final, *record.metrics)):
        if key not in final:
            found.add(DOCUMENT, f"metrics.{key}", "is no metric of the stored counts")
        elif key not in record.metrics:
            found.add(DOCUMENT, f"metrics.{key}", "is not there")
        elif not _close(record.metrics[key], final[key]):
            found.add(DOCUMENT, f"metrics.{key}", f"is {record.metrics[key]}, and the stored counts give {final[key]}")
    for key, value in record.metrics.items():
        if value is not None and not 0 <= value <= 1:
            found.add(DOCUMENT, f"metrics.{key}", f"is {value}, and must lie between 0 and 1")


def tables(frame: pandas.DataFrame, classes: int) -> metrics.Counts:
    """Turn the rows of one evaluation into a pair of (K, C) for each model; clients ascend."""
    counts: metrics.Counts = {}
    for model, rows in frame.groupby("model", sort=False):
        clients, k = np.unique(rows["client"].to_numpy(), return_inverse=True)
        pair = np.zeros((2, len(clients), classes), dtype=np.int64)
        pair[:, k, rows["class"].to_numpy()] = rows[["correct", "total"]].to_numpy().T
        counts[str(model)] = (torch.from_numpy(pair[0]), torch.from_numpy(pair[1]))
    return counts


def _curves(found: Inspected, rows: Sequence[Mapping[str, float | int | None]], frame: pandas.DataFrame) -> None:
    """Compare the curves with what the counts give, row by row."""
    columns = dict.fromkeys(key for row in rows for key in row)
    if (
        list(frame.columns[:1]) != ["round"]
        or set(frame.columns) != set(columns)
        or len(set(frame.columns)) < frame.shape[1]
    ):
        apart = ", ".join(sorted(set(columns) ^ set(frame.columns))) or "their order"
        found.add(ROUNDS, "", f"has not the columns round and the metrics of the stored counts: {apart}")
        return
    if any(frame[column].dtype.kind not in "iuf" for column in frame.columns if frame[column].notna().any()):
        found.add(ROUNDS, "", "holds other things than numbers")
        return
    if frame["round"].tolist() != [row["round"] for row in rows]:
        stored = _brief(frame["round"].tolist())
        found.add(
            ROUNDS,
            "round",
            f"is {stored}, and the stored counts are of rounds {_brief([row['round'] for row in rows])}",
        )
        return
    for column in list(columns)[1:]:
        for row, written in zip(rows, frame[column].tolist(), strict=True):
            there = None if written is None or math.isnan(written) else float(written)
            if not _close(there, row.get(column)):
                place = f"is {there} after round {row['round']}"
                found.add(ROUNDS, column, f"{place}, and the stored counts give {row.get(column)}")
                break
