"""The page of one run: its metrics and pictures, what it cost, how it was made, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.plugins.ledger import TIERS
from bench.results import older
from bench.results.columns import ABSENT
from bench.results.packing import packable
from bench.results.record import DOCUMENT, Record
from bench.results.spent import with_derived
from bench.results.standing import SIGNS
from bench.site import charts
from bench.site.counts import count
from bench.site.matrix import matrices
from bench.site.rendering import render, spell


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a site is made of."""

    records: Mapping[str, Record]
    """By id."""
    notes: str | None
    """What a person says about the results, in Markdown."""
    reproductions: Mapping[str, str]
    """And about how methods were reproduced, by the method's name."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as others link to it."""

    id: str
    seed: int
    page: str
    failed: bool


_PERSONAL = ("balanced", "drawn", "never", "many", "medium", "few", "weighted", "std", "worst_decile")
_MODELS = (
    ("generic", "generic", ("many", "medium", "few")),
    ("personal", "personal", _PERSONAL),
    ("personal.masked", "masked", _PERSONAL),
    ("generic.robust", "generic, attacked", ("many", "medium", "few")),
    ("personal.robust", "personal, attacked", _PERSONAL),
    ("unseen", "unseen", ("balanced",)),
    ("unseen.masked", "unseen, masked", ("balanced",)),
)
_PARTS = (
    ("balanced", "balanced"),
    ("", "mean"),
    ("drawn", "drawn"),
    ("never", "never"),
    ("many", "many"),
    ("medium", "medium"),
    ("few", "few"),
    ("weighted", "weighted"),
    ("std", "std of clients"),
    ("worst_decile", "worst decile"),
)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the page of a run is made of."""

    record: Record
    label: str
    """Of its row."""
    siblings: tuple[Run, ...]
    """The row's other runs; none where there are very many, as its comparison has them."""
    title: str
    """Of the comparison."""
    page: str
    """Of the comparison."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A run as it is shown."""

    content: str
    """HTML, with addresses as seen from the site's first folder."""
    curve: Mapping[int, Mapping[str, float | None]]
    """By round what `charts.GRADES` names, fractions 0-1; empty if the run failed."""
    generic: Mapping[int, float]
    """As `counts.Counted` has it; empty if the run failed."""
    balanced: Mapping[int, float]
    """As `counts.Counted` has it; empty if the run failed."""


def draw(run: Shown) -> Drawn:
    """Draw a run.

    Raises:
        DamagedResult: Its files are not what was written.
    """
    record = run.record
    content: dict[str, Any] = {
        "comparison": {"title": run.title, "page": run.page},
        "run": {
            "label": run.label,
            "seed": record.seed,
            "failed": record.status == "failed",
            "reason": record.reason,
            "standing": record.stands,
            "sign": SIGNS.get(record.stands, ""),
        },
        "looked_at": None if record.standing is None else str(record.standing),
        "siblings": run.siblings,
        "provenance": _provenance(record),
        "files": _files(record),
        "packed": is_packed(record),
        "setting": [(key, spell(value)) for key, value in record.setting.items()],
        "figures": [],
    }
    curve: dict[int, dict[str, float | None]] = {}
    generic: Mapping[int, float] = {}
    balanced: Mapping[int, float] = {}
    if record.status == "done":
        counted, rounds = count(record), record.rounds()
        curves = charts.curves(rounds)
        pictures = (curves, charts.classes(counted), charts.clients(counted))
        confused = matrices(record)
        content |= {
            "metrics_heading": ("model", *(name for _, name in _PARTS)),
            "metrics": _metrics(record),
            "metrics_note": "Mean: over classes for generic, over clients for personal and unseen, each weighing the "
            "same; balanced: over the classes of a client first; drawn, never: over the clients that were in the "
            f"cohort of any round, and never were; weighted: by test images. {ABSENT} stands for what there is not.",
            "figures": [[figure] for figure in pictures if figure is not None] + [list(confused)] * bool(confused),
            "evaluated_often": curves is not None,
            "lacks": older.remarks([record]),
            "cost": _cost(record),
        }
        curve, generic, balanced = charts.graded(rounds), counted.generic, counted.balanced
    return Drawn(content=render("run_content.html", "", **content), curve=curve, generic=generic, balanced=balanced)


def _metrics(record: Record) -> list[tuple[str, ...]]:
    """Lay out the metrics of the last round, a line a model that there is, then further ones by their names."""
    lines = []
    listed = set()
    for key, name, parts in _MODELS:
        keys = [key if not part else f"{key}.{part}" for part, _ in _PARTS]
        listed |= set(keys)
        values = [
            record.metrics.get(known) if not part or part in parts else None
            for known, (part, _) in zip(keys, _PARTS, strict=True)
        ]
        if record.metrics.get(key) is not None:
            lines.append((name, *map(_percentage, values)))
    others = [key for key in record.metrics if key not in listed and "@" not in key and ":" in key]
    for key in others:
        if "." not in key.partition(":")[2]:
            values = [record.metrics.get(f"{key}.{part}" if part else key) for part, _ in _PARTS]
            lines.append((key, *map(_percentage, values)))
    return lines


def _percentage(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


def _cost(record: Record) -> list[tuple[str, str]]:
    units = (
        ("sent to clients", "bytes_down", 1e6, "MB"),
        ("sent to the server", "bytes_up", 1e6, "MB"),
        ("to a client in a round", "payload_bytes_down", 1e3, "kB"),
        ("from a client in a round", "payload_bytes_up", 1e3, "kB"),
        ("parameters of the network", "parameters", 1e3, "thousand"),
        ("bytes of the network", "model_bytes", 1e3, "kB"),
        ("its work for an image", "forward_flops", 1e6, "MFLOP"),
        *(
            (f"{what}, {unit}", f"{key}_{kind}", scale, spelt)
            for unit, kind, scale, spelt in (("samples", "samples", 1e3, "thousand"), ("work", "flops", 1e9, "GFLOP"))
            for what, key in (("training", "train"), ("adaptation", "adaptation"), ("server", "server"))
        ),
        ("wall time", "wall_seconds", 1.0, "s"),
        ("device time", "device_seconds", 1.0, "s"),
        ("peak memory", "peak_memory_bytes", 2.0**20, "MiB"),
        ("state at all clients", "client_state_bytes", 2.0**20, "MiB"),
    )
    spent = with_derived(record.cost)
    return [
        (name, ABSENT if (amount := spent.get(key)) is None else f"{amount / unit:,.4g} {spelt}")
        for name, key, unit, spelt in units
    ]


def _provenance(record: Record) -> list[tuple[str, str]]:
    document = record.document
    found = {
        "algorithm": record.call,
        "tier": f"{record.tier} ({TIERS.get(record.tier, 'unknown')})",
        "dataset": record.dataset,
        "seed": str(record.seed),
        "run": record.id,
        "commit": record.commit,
        "split": record.fingerprint,
        "final states": document.get("digest"),
        "protocol": record.protocol,
        "engine": f"{record.engine}, {record.precision}, {record.device}",
        "hardware": spell(document.get("hardware")),
        "versions": spell(document.get("versions")),
        "started": document.get("started"),
        "finished": record.finished,
    }
    return [(name, str(value)) for name, value in found.items() if value]


_SAYS = {
    DOCUMENT: "identity, setting, versions, hardware, metrics, cost",
    "rounds.parquet": "a row an evaluated round: the curves",
    "counts.parquet": "a row a round but the last, model, client and class: right answers and test images",
    "predictions.parquet": "of the last round, a row a model, client, class and predicted class: test images",
    "clients.parquet": "a row a round, model, client and class: right answers and test images",
}
DATA = "data"
"""Folder of the site that holds the runs: a pack, and beside it folders of runs that no pack can hold."""


def is_packed(record: Record) -> bool:
    """Tell whether a run lies in the site's pack."""
    return not packable([record])[1]


def files(record: Record) -> list[tuple[str, str]]:
    """Name the files of a run that no pack can hold, each with its path within the site."""
    return [(name, f"{DATA}/{record.id}/{name}") for name in (DOCUMENT, *record.companions.values())]


def _files(record: Record) -> list[dict[str, str | None]]:
    """Say of each file what is in it, what it is recognised by, and where it lies if it is there by itself."""
    digests = {file: record.tables.get(name, record.files.get(file)) for name, file in record.companions.items()}
    of, alone = "content, SHA-256" if record.tables else "SHA-256", not is_packed(record)
    return [
        {"name": name, "path": path if alone else None, "says": _SAYS[name], "digest": digests.get(name), "of": of}
        for name, path in files(record)
    ]
