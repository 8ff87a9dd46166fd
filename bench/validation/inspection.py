"""One run's folder, looked at by itself: whether its files say what a run of its identity must say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from packaging.version import VERSION_PATTERN

import bench
from bench.dataset import DataDamaged, DataMissing
from bench.protocol.settings import BadConfig, Setting
from bench.results import packed
from bench.results.record import DOCUMENT, FORMAT, MODELS, DamagedResult, Record, check, parse, stored
from bench.results.tables import ROUNDS
from bench.splits.auxiliary import NEEDS
from bench.splits.longtail import group_classes
from bench.splits.open_set import open_classes
from bench.splits.split import PartitionFailed
from bench.system import reading
from bench.training.footprint import OF_THE_NETWORK
from bench.training.population import rests_on
from bench.training.rounds import CLIENT_ROUNDS, WORK
from bench.validation import beside, counted
from bench.validation.expected import countable, dealt, evaluations, ever_drawn, sent
from bench.validation.found import Inspected, brief, close
from bench.validation.plausible import implausible, network
from bench.validation.rebuilding import Asked, CannotRebuild, description, rebuild
from bench.validation.wording import unfit

COSTS = ("bytes_down", "bytes_up", *WORK, "device_seconds", "wall_seconds", "peak_memory_bytes", "client_state_bytes")
_LATER = (*OF_THE_NETWORK, CLIENT_ROUNDS)
"""Costs that came when results were stored already: a run has all of them, or none."""
_WHOLE = ("bytes_down", "bytes_up", "client_state_bytes", "peak_memory_bytes", *_LATER)
_VERSION = re.compile(VERSION_PATTERN, re.VERBOSE | re.IGNORECASE)
_PRESET = re.compile(r"[\w.-]{1,40}")
"""A preset's name, which stands in a row's label."""
_ALWAYS = ("train_samples", "device_seconds", "wall_seconds")
"""Costs that no run is without."""


def inspect(folder: Path, root: Path, pack: Path | None = None) -> Inspected:
    """Look at a run's folder.

    Args:
        folder: Named by the run's id.
        root: Of all datasets; where it has the run's, the split is made anew.
        pack: The pack that the run is in; the folder is then the run's id below it.

    Raises:
        MemoryError: It takes more than there is.
    """
    found = Inspected(folder=folder, pack=pack)
    try:
        _inspect(found, root)
    except MemoryError:  # which says more of this process than of the folder
        raise
    except Exception as error:  # what was made up may be anything, and the other folders are still of interest
        found.add("", "", f"cannot be made sense of ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
    found.tables.clear()
    return found


def _inspect(found: Inspected, root: Path) -> None:
    _open(found)
    record = found.record
    if record is None:
        return
    if record.format == 1:
        found.add(
            DOCUMENT, "format", "is 1, which this version reads and cannot validate: the version that wrote it can"
        )
        return
    _provenance(found, record)
    try:
        found.asked = rebuild(record, root)
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
    counted.look(found)


# Its files --------------------------------------------------------------------------------------------------


def _open(found: Inspected) -> None:
    """Read run.json, and compare the other files with what it says of them."""
    folder = found.folder
    try:
        text = stored(folder) if found.pack is None else packed.documents(found.pack)[folder.name]
        found.record = record = check(folder, parse(text), found.pack)
    except FileNotFoundError:
        found.add("", "", f"has no {DOCUMENT}: the run is unfinished; finish it, or leave the folder out")
        return
    except (OSError, ValueError, RecursionError) as error:
        found.add(DOCUMENT, "", reading.why(error))
        return
    for path in sorted(folder.iterdir()) if found.pack is None else ():
        going_on = record.status == "failed" and path.name.partition(".")[0] in ("claim", "checkpoint")
        if not going_on and path.name not in (DOCUMENT, *record.companions.values(), MODELS):
            found.add(path.name, "", "does not belong into a run's folder; remove it")
    if (folder / MODELS).exists() and not record.models:
        found.add(MODELS, "", f"is not listed in {DOCUMENT}; remove it")
    for name, what in beside.models(record) if record.models else ():
        found.add(name, "", what)
    found.whole = record.id == folder.name
    if not found.whole:
        found.add(DOCUMENT, "id", f"is {record.id}, and the folder is called {folder.name}")
    if record.status == "failed":
        return
    for key, told, known in (
        ("tables", record.tables, record.companions.keys() if record.format >= 3 else ()),
        ("files", record.files, record.companions.values() if record.format < 3 else ()),
    ):
        for name in sorted(set(told) - set(known)):
            found.add(DOCUMENT, f"{key}.{name}", f"is none of a run of format {record.format}")
    for name, file in record.companions.items():
        if name == ROUNDS and found.pack is not None:
            continue
        try:
            found.tables[name] = record.table(name)
        except DamagedResult as error:
            found.whole = False
            found.add(file, "", str(error).removeprefix(f"{folder / file} ").partition(";")[0])
    if record.format < FORMAT:
        found.notes.append(f"of format {record.format}, without {', '.join(record.lacks)}")


# What it says of itself -------------------------------------------------------------------------------------


def _provenance(found: Inspected, record: Record) -> None:
    """Look at where, when and with what the run was done."""
    document = record.document
    for key, what in unfit(document):
        found.add(DOCUMENT, key, what)
    if record.commit is not None and not re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record.commit):
        found.add(DOCUMENT, "commit", f"is {record.commit!r}, and must be 40 hexadecimal digits")
    elif record.commit is not None and record.commit.endswith("-dirty"):
        found.notes.append("run with code that is in no commit")
    versions = document.get("versions")
    if not isinstance(versions, dict) or not all(_VERSION.fullmatch(str(value)) for value in versions.values()):
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
    if not _PRESET.fullmatch(str(document.get("preset", "default"))):
        found.add(DOCUMENT, "preset", f"is {brief(document['preset'])}, and no preset can be called so")
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
    if asked.own_images:
        _own(found, record)
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
                found.add(DOCUMENT, where, f"is {brief(there)}, and by the identity it is {brief(wanted)}")


def _own(found: Inspected, record: Record) -> None:
    """Look at what a run says in its own words of somebody's own files: what they are called, and the overrides."""
    kind = str(record.identity["dataset"]["name"])  # type: ignore[index]
    if not re.fullmatch(rf"{re.escape(kind)}(\([\w='., /~:\\-]{{0,200}}\))?", record.dataset):
        found.add(DOCUMENT, "dataset", f"is {brief(record.dataset)}, and must be a call of {kind}")
    for key, value in record.overrides.items():
        if key not in record.setting or not _equal(value, record.setting[key]):
            found.add(DOCUMENT, f"overrides.{brief(key)}", f"is {brief(value)}, and the setting has not")


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


def _failure(found: Inspected, record: Record) -> None:
    if not (record.reason or "").strip():
        found.add(DOCUMENT, "reason", "does not say why the run failed")
    for key in ("metrics", "cost", "files", "tables", "digest"):
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
    withheld = open_classes(asked.trained_by, len(counts), record.seed)
    groups = group_classes(torch.tensor(counts), asked.setting.groups, withheld)
    for group, classes in groups.items():
        if record.groups.get(group) != classes.tolist():
            found.add(DOCUMENT, f"groups.{group}", f"is {brief(record.groups.get(group))}, and by class_counts it is "
                                                   f"{brief(classes.tolist())}")  # fmt: skip
    for group in set(record.groups) - set(groups):
        found.add(DOCUMENT, f"groups.{group}", "is no group of classes")
    if asked.setting.clients is not None and record.clients != asked.setting.clients:
        found.add(DOCUMENT, "clients", f"is {record.clients}, and the setting has {asked.setting.clients}")
    if "dataset" in asked.outdated:
        return
    if asked.dataset is None:
        found.notes.append("the split cannot be made anew, as the images are somebody's own and not here")
        return
    if not countable(asked.trained_by, found.clients or 0):
        found.notes.append("the split is not made anew, nor are cohorts, as there are too many clients and rounds")
        return
    try:
        found.dealt = dealt(asked, root)
    except DataMissing:
        found.notes.append(f"the split cannot be made anew, as {record.dataset} is not at hand")
        return
    except DataDamaged as error:
        found.notes.append(f"the split cannot be made anew: {error}")
        return
    except (PartitionFailed, BadConfig) as error:
        found.add(DOCUMENT, "setting", f"cannot be: {error}")
        return
    drawn = ever_drawn(asked, int(str(found.dealt.described["clients"])))
    tested = rests_on(found.dealt.images, found.dealt.classes, drawn)
    for key, value in {**found.dealt.described, "tested": tested}.items():
        written = record.document.get(key)
        alike = _alike(value, written) if key == "heterogeneity" else _equal(value, written)
        if not alike:
            found.add(DOCUMENT, key, f"is {brief(written)}, and the data give {brief(value)}")


def _alike(one: object, other: object) -> bool:
    """Compare objects of numbers up to rounding: sums are taken in another order on another machine."""
    if not isinstance(one, dict) or not isinstance(other, dict) or one.keys() != other.keys():
        return False
    return all(close(one[key], other[key], rel_tol=1e-9) for key in one)


def _cost(found: Inspected, record: Record, asked: Asked) -> None:
    cost = record.cost
    for key, value in cost.items():
        if value is not None and value < 0:
            found.add(DOCUMENT, f"cost.{key}", f"is {value}, and no cost is below 0")
        elif value is not None and key in _WHOLE and value != int(value):
            found.add(DOCUMENT, f"cost.{key}", f"is {value}, and bytes and counts are whole")
    for key in (*COSTS, *(_LATER if any(key in cost for key in _LATER) else ())):
        if key not in cost:
            found.add(DOCUMENT, f"cost.{key}", "is not there")
        elif key in _ALWAYS and not cost[key]:
            found.add(DOCUMENT, f"cost.{key}", f"is {cost[key]}, and no run is without")
    for key in WORK:
        if key in cost and cost[key] is None:
            found.add(DOCUMENT, f"cost.{key}", "is absent, and what was not done counts 0")
    for key in set(cost) - {*COSTS, *_LATER}:
        found.add(DOCUMENT, f"cost.{key}", "is no cost")
    if cost.get("server_samples") and not asked.algorithm.needs & NEEDS:
        found.add(DOCUMENT, "cost.server_samples", "is of algorithms that need images at the server, and of no other")
    clients = found.clients
    if set(COSTS) <= set(cost):
        for key, what in implausible(asked, cost, clients, None if found.dealt is None else found.dealt.visited):
            found.add(DOCUMENT, f"cost.{key}", what)
    measured = None if asked.outdated else network(asked)
    if measured is not None and set(_LATER) <= set(cost):
        for key, number in measured.costs.items():
            _compare(found, cost, key, number)
    known = None if clients is None or asked.outdated else sent(asked, clients)
    if known is None:
        return
    pooled = known.pooled
    if known.bytes_down is not None or pooled:
        _compare(found, cost, "bytes_down", known.bytes_down)
    if known.client_state_bytes is not None:
        _compare(found, cost, "client_state_bytes", known.client_state_bytes)
    if (known.client_rounds is not None or pooled) and CLIENT_ROUNDS in cost:
        _compare(found, cost, CLIENT_ROUNDS, known.client_rounds)
    up = cost.get("bytes_up")
    if (up is None) != pooled:
        found.add(
            DOCUMENT, "cost.bytes_up", f"is {_count(up)}, and " + ("nothing is sent" if pooled else "clients send")
        )
    if record.sent:
        _sent(found, record, asked.trained_by)


def _sent(found: Inspected, record: Record, setting: Setting) -> None:
    """What was sent by each evaluation grows, up to what was sent in all."""
    sent = dict(sorted((int(round), amount) for round, amount in record.sent.items()))
    if [*sent] != evaluations(setting):
        found.add(DOCUMENT, "sent", f"is of the rounds {brief([*sent])}, and models are tested after others")
    amounts = [0.0, *sent.values()]
    if amounts != sorted(amounts):
        found.add(DOCUMENT, "sent", "falls from one round to a later one, and what was sent stays sent")
    both = sum(record.cost.get(key) or 0.0 for key in ("bytes_down", "bytes_up"))
    if amounts[-1] != both:
        found.add(DOCUMENT, "sent", f"ends with {_count(amounts[-1])}, and the bytes up and down are {_count(both)}")


def _compare(found: Inspected, cost: Mapping[str, float | None], key: str, number: float | None) -> None:
    if cost.get(key) != number:
        told = f"is {_count(cost.get(key))}, and by setting and model it is {_count(number)}"
        found.add(DOCUMENT, f"cost.{key}", told)


def _count(number: float | None) -> str:
    return "absent" if number is None else f"{number:.10g}"
