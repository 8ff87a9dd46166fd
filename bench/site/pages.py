"""From records to pages: which there are, and what stands on each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import bench
from bench.identity import identify
from bench.results import table
from bench.results.comparison import compare, part_over_settings
from bench.results.layout import ABSENT, LEGEND, Column, best, columns, details, footnotes, remarks, title, warnings
from bench.results.leaderboard import Leaderboard, Row, leaderboards
from bench.results.record import DOCUMENT, Record
from bench.results.verification import Verification
from bench.site import charts
from bench.site.counts import count
from bench.spelling import spell_imbalance

if TYPE_CHECKING:
    from jinja2 import Environment

NAME = "bench"
TITLE = "Personalised and long-tailed federated learning"
LEAD = (
    "Every method got the same clients, the same data order, the same initial weights and the same budget; the "
    "official test set never entered training; the last round is what ranks."
)
TIERS = "S nothing beyond models, L label statistics, A its own data, V pre-trained models"

VIEWS = ("overview", "personal", "generic", "unseen", "cost", "everything")
"""Which columns the leaderboard can show."""
_COLUMNS: tuple[tuple[Column, str], ...] = (
    (Column("generic", "generic"), "overview generic"),
    (Column("many", "generic.many"), "generic"),
    (Column("medium", "generic.medium"), "generic"),
    (Column("few", "generic.few"), "generic"),
    (Column("personal", "personal"), "overview personal cost"),
    (Column("masked", "personal.masked"), "overview personal"),
    (Column("worst decile", "personal.worst_decile"), "overview personal"),
    (Column("unseen", "unseen"), "unseen"),
    (Column("unseen, masked", "unseen.masked"), "unseen"),
    (Column("MB", "bytes", 1e6), "overview cost"),
    (Column("TFLOP", "train_flops", 1e12), "cost"),
    (Column("k samples", "samples", 1e3), "cost"),
    (Column("seconds", "wall_seconds", 1.0), "overview cost"),
    (Column("peak MiB", "peak_memory_bytes", 2.0**20), "cost"),
    (Column("state MiB", "client_state_bytes", 2.0**20), "cost"),
)
"""Of the leaderboard of all comparisons, hence in the same units for all; and the views that show them."""

_FILTERS = ("dataset", "imbalance", "alpha", "setting", "tier", "standing")


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a site is made of."""

    records: Mapping[str, Record]
    """By id."""
    verified: Mapping[str, Verification]
    """Of the runs that were run again, by id; all others are self-reported."""
    notes: str | None
    """What a person says about the results, in Markdown."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of a table: as people read it, and as it is sorted by ("" if there is none)."""

    text: str
    order: str
    bold: bool
    """Whether tests set it apart from all others of its column."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as others link to it."""

    id: str
    seed: int
    page: str
    failed: bool


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of a leaderboard."""

    label: str
    marks: str
    """Of footnotes: " [1]", or nothing."""
    tier: str
    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]
    verified: bool
    standing: str
    board: Comparison
    filters: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A leaderboard and its page."""

    leaderboard: Leaderboard
    place: int
    title: str
    details: str
    page: str
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def warned(self) -> bool:
        """Whether its rows did not all see the same data."""
        return bool(self.warnings)


def write(results: Results) -> Iterator[tuple[str, str]]:
    """Give the path of every page within the site, and its text."""
    boards = leaderboards(results.records.values())
    comparisons = [_comparison(board, place) for place, board in enumerate(boards)]
    yield "index.html", _index(results, comparisons)
    yield "leaderboard.csv", table.render(boards, "csv")
    yield "leaderboard.json", table.render(boards, "json")
    for comparison in comparisons:
        yield comparison.page, _comparison_page(results, comparison)
        for row in comparison.leaderboard.rows:
            runs = _runs(results, row)
            for run in runs:
                yield run.page, _run_page(results, comparison, row, run, [other for other in runs if other != run])


def _comparison(board: Leaderboard, place: int) -> Comparison:
    named = re.sub(r"[^a-z0-9.]+", "-", title(board).lower()).strip("-.")[:80]
    what = (board.protocol, board.imbalance, board.alpha, board.engine, board.precision, board.device)
    own = warnings(board)
    return Comparison(
        leaderboard=board,
        place=place,
        title=title(board),
        details=details(board),
        page=f"comparisons/{named}-{identify({'comparison': what})[:6]}.html",
        warnings=tuple(own),
        remarks=tuple(line for line in remarks(board) if line not in own),
    )


def _ranks(boards: Sequence[Leaderboard]) -> list[list[charts.Figure]]:
    """Draw the ranks of algorithms over several settings; nothing if there are not."""
    parts = {key: part_over_settings(boards, key) for key in ("personal", "generic")}
    figures = [charts.ranks(part, key) for key, part in parts.items() if part is not None]
    drawn = [figure for figure in figures if figure is not None]
    return [drawn] if drawn else []


def _index(results: Results, comparisons: Sequence[Comparison]) -> str:
    boards = [comparison.leaderboard for comparison in comparisons]
    shown = tuple(column for column, _ in _COLUMNS)
    entries = [entry for comparison in comparisons for entry in _entries(results, comparison, shown, True)]
    used = {view for column, views in _COLUMNS for view in views.split() if _measured(column, comparisons)}
    days = sorted(day for comparison in comparisons for day in comparison.leaderboard.finished)
    verified = sum(entry.verified for entry in entries)
    parts = [
        _many(len(entries), "entry", "entries"),
        _many(len(results.records), "run"),
        _many(len(comparisons), "comparison"),
        f"{verified} verified, {len(entries) - verified} self-reported",
        *([f"latest run {days[-1]}"] if days else []),
    ]
    return _render(
        "index.html",
        "",
        lead=LEAD,
        tally=" · ".join(parts),
        entries=entries,
        boards=comparisons,
        columns=[
            {
                "title": column.title,
                "name": column.key,
                "cost": column.unit is not None,
                "views": (*views.split(), "everything"),
            }
            for column, views in _COLUMNS
        ],
        views=[{"name": view, "empty": view != "everything" and view not in used} for view in VIEWS],
        filters=_filters(entries),
        figures=_ranks(boards),
        legend=LEGEND,
        notes=_markdown(results.notes) if results.notes else None,
    )


def _measured(column: Column, comparisons: Sequence[Comparison]) -> bool:
    return any(column.estimate(row).n for comparison in comparisons for row in comparison.leaderboard.rows)


def _filters(entries: Sequence[Entry]) -> list[dict[str, object]]:
    """Give the values of each filter, numbers in their order."""

    def order(value: str) -> tuple[bool, float, str]:
        try:
            return False, float(value), value
        except ValueError:
            return True, 0.0, value

    return [
        {"name": name, "title": name, "options": sorted({entry.filters[name] for entry in entries}, key=order)}
        for name in _FILTERS
    ]


def _entries(results: Results, comparison: Comparison, shown: Sequence[Column], brief: bool = False) -> list[Entry]:
    board = comparison.leaderboard
    marks, _ = footnotes(board)
    first = best(board)
    entries = []
    for row in board.rows:
        runs = _runs(results, row)
        good = sum(run.id in results.verified for run in runs)
        standing = _standing(good, len(runs))
        entries.append(
            Entry(
                label=row.label,
                marks=marks[row.label],
                tier=row.tier,
                cells=tuple(_cell(column, row, first.get(column.title) == row.label, brief) for column in shown),
                runs=runs,
                verified=good == len(runs),
                standing=standing,
                board=comparison,
                filters={
                    "dataset": board.dataset,
                    "imbalance": spell_imbalance(board.imbalance),
                    "alpha": "none" if board.alpha is None else f"{board.alpha:g}",
                    "setting": " or ".join(board.names),
                    "tier": row.tier,
                    "standing": standing.split(",")[0],
                },
            )
        )
    return entries


def _standing(good: int, runs: int) -> str:
    if good == runs:
        return "verified"
    return f"self-reported, {good} of {runs} runs verified" if good else "self-reported"


def _cell(column: Column, row: Row, bold: bool, brief: bool) -> Cell:
    mean = column.estimate(row).mean
    return Cell(text=column.show(row, brief=brief), order="" if mean is None else repr(mean), bold=bold)


def _runs(results: Results, row: Row) -> tuple[Run, ...]:
    records = sorted((results.records[run] for run in row.ids), key=lambda record: record.seed)
    return tuple(
        Run(id=record.id, seed=record.seed, page=f"runs/{record.id}.html", failed=record.status == "failed")
        for record in records
    )


def _comparison_page(results: Results, comparison: Comparison) -> str:
    board = comparison.leaderboard
    shown = columns(board)
    ranked = {key: compare([board], key).parts for key in ("personal", "generic")}
    ranks = [charts.ranks(part, key) for key, parts in ranked.items() for part in parts]
    wide = [*charts.cost(board), charts.progress(board, results.records)]
    figures: list[list[charts.Figure | None]] = [[*charts.spread(board, results.records)], ranks]
    figures += [[figure] for figure in wide]
    protocol = [
        ("setting", " or ".join(board.names)),
        *((key, _value(value)) for key, value in board.setting.items()),
        ("engine, precision, device", f"{board.engine}, {board.precision}, {board.device}"),
        ("protocol", board.protocol),
        *((f"split of seed {seed}", ", ".join(prints)) for seed, prints in board.fingerprints.items()),
    ]
    return _render(
        "comparison.html",
        "../",
        board=comparison,
        columns=[{"title": column.title, "name": column.key, "cost": column.unit is not None} for column in shown],
        entries=_entries(results, comparison, shown),
        figures=[[figure for figure in group if figure is not None] for group in figures],
        protocol=protocol,
    )


_MODELS = (
    ("generic", "generic", ("many", "medium", "few")),
    ("personal", "personal", ("many", "medium", "few", "weighted", "std", "worst_decile")),
    ("personal.masked", "masked", ("many", "medium", "few", "weighted", "std", "worst_decile")),
    ("unseen", "unseen", ()),
    ("unseen.masked", "unseen, masked", ()),
)
_PARTS = (
    ("", "mean"),
    ("many", "many"),
    ("medium", "medium"),
    ("few", "few"),
    ("weighted", "weighted"),
    ("std", "std of clients"),
    ("worst_decile", "worst decile"),
)


def _run_page(results: Results, comparison: Comparison, row: Row, run: Run, siblings: Sequence[Run]) -> str:
    record = results.records[run.id]
    verification = results.verified.get(run.id)
    content: dict[str, Any] = {
        "board": comparison,
        "run": {
            "label": row.label,
            "seed": run.seed,
            "failed": run.failed,
            "reason": record.reason,
            "verified": verification is not None,
            "standing": "verified" if verification else "self-reported",
        },
        "verification": _verification(verification) if verification else None,
        "siblings": siblings,
        "provenance": _provenance(record),
        "files": _files(record),
        "setting": [(key, _value(value)) for key, value in record.setting.items()],
        "figures": [],
    }
    if not run.failed:
        counted = count(record)
        curves = charts.curves(record)
        pictures = (curves, charts.classes(counted), charts.clients(counted))
        content |= {
            "metrics_heading": ("model", *(name for _, name in _PARTS)),
            "metrics": _metrics(record),
            "metrics_note": "Mean: over classes for generic, over clients for personal and unseen, each weighing the "
            f"same; weighted: by test images. {ABSENT} stands for what there is not.",
            "figures": [[figure] for figure in pictures if figure is not None],
            "evaluated_often": curves is not None,
            "cost": _cost(record),
        }
    return _render("run.html", "../", **content)


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
        ("samples", "samples", 1e3, "thousand"),
        ("training", "train_flops", 1e9, "GFLOP"),
        ("wall time", "wall_seconds", 1.0, "s"),
        ("device time", "device_seconds", 1.0, "s"),
        ("peak memory", "peak_memory_bytes", 2.0**20, "MiB"),
        ("state at all clients", "client_state_bytes", 2.0**20, "MiB"),
    )
    return [
        (name, ABSENT if (amount := record.cost.get(key)) is None else f"{amount / unit:,.4g} {spelt}")
        for name, key, unit, spelt in units
    ]


def _verification(verification: Verification) -> str:
    outcome = "the same to the bit"
    if not verification.exact:
        outcome = f"the same metrics to within {100 * (verification.tolerance or 0.0):g} percentage points"
    commit = f" with commit {verification.commit[:10]}" if verification.commit else ""
    return f"run again on {verification.date}{commit}, {outcome}"


def _provenance(record: Record) -> list[tuple[str, str]]:
    document = record.document
    found = {
        "algorithm": record.call,
        "tier": f"{record.tier} ({TIERS})",
        "dataset": record.dataset,
        "seed": str(record.seed),
        "run": record.id,
        "commit": record.commit,
        "split": record.fingerprint,
        "final states": document.get("digest"),
        "protocol": record.protocol,
        "engine": f"{record.engine}, {record.precision}, {record.device}",
        "hardware": _value(document.get("hardware")),
        "versions": _value(document.get("versions")),
        "started": document.get("started"),
        "finished": record.finished,
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return ABSENT if value is None else f"{value:g}" if isinstance(value, float) else str(value)


_SAYS = {
    DOCUMENT: "identity, setting, versions, hardware, metrics, cost",
    "rounds.parquet": "a row an evaluated round: the curves",
    "clients.parquet": "a row a model, client and class: right answers and test images",
}


def files(record: Record) -> list[tuple[str, str]]:
    """Name the files of a run that the site carries, each with its path within the site."""
    return [(name, f"data/{record.id}/{name}") for name in (DOCUMENT, *(n for n in _SAYS if n in record.files))]


def _files(record: Record) -> list[dict[str, str | None]]:
    return [
        {"name": name, "path": path, "says": _SAYS[name], "digest": record.files.get(name)}
        for name, path in files(record)
    ]


def _many(number: int, one: str, several: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _markdown(text: str) -> str:
    """Turn a person's notes into HTML without tags of their own, pictures, or headings above our own."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = parser.parse(text)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
    return Markup(parser.renderer.render(tokens, parser.options, {}))


def _render(template: str, root: str, **content: object) -> str:
    page = _environment().get_template(template)
    return page.render(root=root, name=NAME, site=TITLE, version=bench.__version__, tiers=TIERS, **content)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bench.site"),
        autoescape=True,  # a label or a reason may hold anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "sort_keys": False}
    return environment
