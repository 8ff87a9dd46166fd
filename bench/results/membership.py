"""Which suites a result belongs to, as far as its protocol says: no flag does. Imports no torch."""

from __future__ import annotations

from bench.protocol import suites
from bench.protocol.suites import Suite
from bench.protocol.words import split_at, split_list
from bench.results.record import Record

_FIELDS = (
    "partition", "clients", "participation", "rounds", "epochs", "batch_size", "lr", "model", "eval_clients", "match",
)  # fmt: skip
"""Options that are fields of the setting of the same name."""
_CELL = ("imbalance", "alpha")


def suites_of(record: Record) -> list[str]:
    """Name the suites that a run is of: its cell and seed are theirs, and so is every field of its setting."""
    return [name for name in suites.names() if _has(suites.suite(name), record)]


def _has(suite: Suite, record: Record) -> bool:
    options = suite.options
    wanted = {field: options[field] for field in _FIELDS if field in options} | dict(options.get("set", {}))
    given = {field: value for field, value in record.overrides.items() if field not in _CELL}
    return (
        record.setting.get("name") == options.get("setting", "quick")
        and all(record.setting.get(field) == value for field, value in wanted.items())
        and given.keys() <= wanted.keys()
        and record.seed in _seeds(str(options.get("seeds", "1")))
        and record.dataset in split_list(options["dataset"])
        and any(_in_grid(cells, record) for cells in options.get("grid", [""]))
        and _in_grid("; ".join(f"{axis}={options[axis]}" for axis in _CELL if axis in options), record)
    )


def _in_grid(cells: str, record: Record) -> bool:
    """Whether a run is in cells such as `imbalance=10,50; alpha=0.5`; what they say nothing of, they have all of."""
    said = dict(piece.split("=", 1) for piece in split_at(";", cells) if piece)
    if "dataset" in said and record.dataset not in split_list(said["dataset"]):
        return False
    found = {"imbalance": record.imbalance, "alpha": record.alpha}
    return all(
        found[axis] in [None if each == "natural" else float(each) for each in split_list(said[axis])]
        for axis in _CELL
        if axis in said
    )


def _seeds(text: str) -> set[int]:
    """Read a count, or seeds with a comma."""
    return {int(seed) for seed in split_list(text)} if "," in text else {*range(int(text))}
