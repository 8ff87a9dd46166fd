"""A published run, run again by the board: whether its numbers come out once more.

The same bits come out on a machine of the same kind with the same library, and often on others too. Where they do not,
and need not, sums being rounded in other ways, the board runs it some times more with hardly another learning rate, and
compares every number with what these runs give (`tolerance`); and exactly what no rounding touches: the split, the test
images, the bytes sent, the samples visited, and the FLOP.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.dataset import DataDamaged, DataMissing
from bench.files import source
from bench.protocol import provenance
from bench.protocol.settings import BadConfig
from bench.results import records
from bench.results.record import Record
from bench.results.standing import Standing
from bench.sweep import execution
from bench.sweep.apart import execute_apart
from bench.sweep.config import resolve_device
from bench.sweep.run import Run
from bench.validation.found import Inspected
from bench.validation.tolerance import allowed, outside

_NUDGES = (1, -1)
"""In units of 2^-20 of a learning rate, which is eight roundings of 32 bits: further runs where bits cannot be
compared."""
_OF_THE_MACHINE_ITS_COSTS = ("device_seconds", "wall_seconds", "peak_memory_bytes")
_EXACT_COSTS = (
    "bytes_down", "bytes_up", "train_samples", "adaptation_samples", "server_samples", "client_state_bytes"
)  # fmt: skip
"""Costs that depend on neither machine nor hour."""
_LATER = ("parameters", "model_bytes", "client_rounds")
"""Such as earlier runs do not tell."""
_FLOPS = ("train_flops", "adaptation_flops", "server_flops", "forward_flops")
_OTHER_LIBRARY = 0.01
"""Share by which another version of torch may count FLOP otherwise."""
_OF_THE_MACHINE = ("machine", "cpu", "gpu", "instructions")
"""Keys of the hardware, as far as a run recorded them, by which bits may differ."""
_MOST = 5
"""Numbers that a sentence names."""


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """What came out."""

    record: Record
    differs: tuple[str, ...]
    """What is not as it was published, in words; nothing, and the run is verified or reproduced."""
    because: str | None
    """Why the same bits could not be expected, where they did not come out; None where they did, or should have."""
    within: dict[str, float] = field(default_factory=dict)
    """By metric, what it may differ by from the mean of the board's runs; empty where bits were compared."""
    cost: dict[str, float | None] = field(default_factory=dict)
    """What depends on the machine, as it was measured now."""
    runs: int
    """How often it was run."""
    seconds: float
    """They took."""

    @property
    def agrees(self) -> bool:
        """Whether the published numbers came out."""
        return not self.differs

    @property
    def exact(self) -> bool:
        """Whether they came out to the bit."""
        return self.agrees and self.because is None

    def __str__(self) -> str:
        """Say it in a sentence."""
        run = f"{self.record.id} ({self.record.label or self.record.call} on {self.record.dataset}, "
        run += f"seed {self.record.seed})"
        if self.differs:
            named = "; ".join(self.differs[:_MOST])
            more = f"; and {len(self.differs) - _MOST} more" if len(self.differs) > _MOST else ""
            return f"{run}: run again, it differs: {named}{more}."
        if self.record.status == "failed":
            return f"{run}: run again, it fails in the same way."
        if self.because is None:
            return f"{run}: run again, it gives the same states, counts and metrics to the bit."
        widest = max(self.within.values(), default=0.0)
        within = (
            f"every number lies within what {self.runs} runs here differ by, metrics within {100 * widest:.1f} points"
        )
        return f"{run}: run again, {within} or less; not the same bits, as {self.because}."


def candidates(inspected: Sequence[Inspected], root: Path, plugins: tuple[Path, ...] = ()) -> dict[str, Run]:
    """Choose the runs, finished or failed, that this machine can run again, by id."""
    return {
        one.record.id: one.asked.run(root, plugins)
        for one in inspected
        if one.record is not None and one.asked is not None and obstacle(one, root) is None
    }


def obstacle(one: Inspected, root: Path) -> str | None:
    """Say why this machine cannot run a run again; None if it can."""
    asked = one.asked
    if asked is None:
        return "this code cannot tell what was run"
    if asked.dataset is None:
        return "its images are somebody's own files, and not here"
    if asked.own_weights:
        return "it starts from somebody's own file of weights"
    if asked.teacher is not None:
        return "it learns from somebody's own file of a teacher's features"
    if asked.outdated:
        return f"it was made by {' and '.join(asked.outdated.values())}"
    try:
        resolve_device(asked.record.device)
    except BadConfig:
        return f"there is no {asked.record.device}"
    try:
        labels = source.labels(asked.dataset, root)
        if asked.setting.auxiliary is not None:
            asked.run(root).reserved(labels)
    except (BadConfig, DataMissing, DataDamaged):
        return "its images are not at hand"
    return None


def draw(runs: Sequence[str], n: int, seed: int) -> list[str]:
    """Draw n of some runs, or all if there are fewer; the same ones for the same runs and seed."""
    return random.Random(seed).sample(sorted(runs), min(n, len(runs)))


def rerun(record: Record, run: Run, seconds: float | None = None) -> Rerun:
    """Run a published run again, in folders that are gone afterwards, and compare.

    Args:
        record: As it was published.
        run: The same run, with this machine's data.
        seconds: What a run may take, in a process of its own; None: it takes what it takes, in this one.

    Raises:
        NotToItsEnd: It took longer, or its process died.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        runs = [_again(run, Path(place), seconds)]
        because: str | None = None
        within: dict[str, float] = {}
        differs = _bits(record, runs[0])
        if differs and record.status == runs[0].status == "done":
            because = _other_surroundings(record, runs[0])
        if because is not None:
            differs = _untouched(record, runs[0])
        if because is not None and not differs:
            runs += [_again(_nudged(run, nudge), Path(place), seconds) for nudge in _NUDGES]
            differs, within = _numbers(record, runs)
        cost = {key: runs[0].cost.get(key) for key in _OF_THE_MACHINE_ITS_COSTS} if runs[0].status == "done" else {}
    taken = time.perf_counter() - started
    return Rerun(
        record=record, differs=tuple(differs), because=because, within=within, cost=cost, runs=len(runs), seconds=taken
    )


def entry(outcome: Rerun) -> Standing:
    """Describe a rerun that agreed, for the board's file."""
    assert outcome.agrees
    return Standing(
        kind="verified" if outcome.exact else "reproduced",
        because=outcome.because,
        runs=outcome.runs,
        within=outcome.within,
        cost=outcome.cost,
        **_looked(outcome.record, outcome.record.device),
    )


def unrepeatable(record: Record, because: str) -> Standing:
    """Describe a run that cannot be run again here, for the board's file."""
    return Standing(kind="unrepeatable", because=because, **_looked(record))


def recounted(record: Record) -> Standing:
    """Describe a run whose models give its counts, for the board's file."""
    return Standing(kind="recounted", **_looked(record))


def _looked(record: Record, device: str = "cpu") -> dict[str, Any]:
    """Say who looked at which run.json, and when."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(device),
        "document": hashlib.sha256(records.text_of(record)).hexdigest(),
    }


def _again(run: Run, place: Path, seconds: float | None) -> Record:
    if seconds is None:
        execution.execute(run, place)
    else:
        execute_apart(run, place, seconds)
    return records.read(place / run.id)


def _nudged(run: Run, nudge: int) -> Run:
    """Give the same run with hardly another learning rate."""
    factor = 1 + nudge * 2**-20
    own = None if run.lr is None else run.lr * factor
    return replace(run, setting=replace(run.setting, lr=run.setting.lr * factor), lr=own)


def _other_surroundings(record: Record, again: Record) -> str | None:
    """Say in what this machine differs so that other bits are to be expected."""
    there, here = record.document, again.document
    pairs = [("torch", _of(there, "versions", "torch"), _of(here, "versions", "torch"))]
    known = [key for key in _OF_THE_MACHINE if _has(there, "hardware", key)]
    pairs += [(key, _of(there, "hardware", key), _of(here, "hardware", key)) for key in known]
    others = [f"{key} was {one} there and is {other} here" for key, one, other in pairs if one != other]
    return " and ".join(others) or None


def _of(document: dict[str, object], part: str, key: str) -> object:
    content = document.get(part)
    return content.get(key) if isinstance(content, dict) else None


def _has(document: dict[str, object], part: str, key: str) -> bool:
    content = document.get(part)
    return isinstance(content, dict) and key in content


def _ended(record: Record, again: Record) -> list[str]:
    """Compare how two runs ended."""
    if again.status != record.status:
        return [f"it fails: {again.reason}" if again.status == "failed" else "it does not fail"]
    return [f"it fails otherwise: {again.reason}"] if again.reason != record.reason else []


def _untouched(record: Record, again: Record) -> list[str]:
    """Compare what no rounding touches."""
    found = []
    if record.fingerprint != again.fingerprint:
        found.append(f"fingerprint {again.fingerprint}, not {record.fingerprint}")
    same_library = _of(record.document, "versions", "torch") == _of(again.document, "versions", "torch")
    told = [key for key in (*_LATER, *_FLOPS) if key in record.cost]
    for key in (*_EXACT_COSTS, *told):
        one, other = record.cost.get(key), again.cost.get(key)
        alike = one == other or (
            key in _FLOPS and not same_library and one is not None and other is not None
            and abs(one - other) <= _OTHER_LIBRARY * other
        )  # fmt: skip
        if not alike:
            found.append(f"cost.{key} {other}, not {one}")
    if record.sent and record.sent != again.sent:  # of runs that were stored before it was
        found.append("the bytes by each evaluation are others")
    if record.open_set.keys() != again.open_set.keys():
        found.append("the open-set test is of other clients")
    images = ["round", "model", "client", "class", "total"]
    if not record.counts()[images].equals(again.counts()[images]):
        found.append("the tests are on other images")
    return found


def _bits(record: Record, again: Record) -> list[str]:
    found = _ended(record, again)
    if found or record.status == "failed":
        return found
    found = _untouched(record, again)
    if record.document.get("digest") != again.document.get("digest"):
        found.append("the final states have another digest")
    for key in dict.fromkeys((*record.metrics, *again.metrics)):
        if record.metrics.get(key) != again.metrics.get(key):
            found.append(f"{key} {again.metrics.get(key)}, not {record.metrics.get(key)}")
            break  # with one they mostly all differ
    if not record.counts().equals(again.counts()):
        found.append("the stored counts are others")
    if not record.lacks and not record.predictions().equals(again.predictions()):
        found.append("classes were taken for others")
    one, other = (each.rounds().sort_index(axis=1) for each in (record, again))
    if not one.equals(other):
        found.append("the curves are others")
    return found


def _numbers(record: Record, runs: Sequence[Record]) -> tuple[list[str], dict[str, float]]:
    """Compare every number with what the board's runs give."""
    if failed := [f"it fails: {again.reason}" for again in runs if again.status == "failed"]:
        return failed, {}
    bounds = allowed(runs)
    return outside(record, bounds), {name: bound.tolerance for name, bound in bounds["metrics"].items()}
