"""A published run, run again: whether its numbers come out once more.

On a machine of the same kind with the same library a run gives the same bits, and these are compared. On another one
sums are rounded in another way: accuracies are compared up to a tolerance, and exactly what no rounding touches, the
split, the test images, the bytes sent and the samples visited.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.dataset import DataDamaged, DataMissing
from bench.files import source
from bench.protocol import provenance
from bench.protocol.settings import BadConfig
from bench.results import records
from bench.results.record import Record
from bench.sweep import execution
from bench.sweep.config import Run, resolve_device
from bench.training.metrics import FOLLOWED
from bench.training.rounds import Report
from bench.validation.found import Inspected
from bench.validation.rebuilding import Asked
from bench.validation.verification import Verification

HEADLINES = FOLLOWED
TOLERANCE = 0.08
"""What accuracies may differ by where bits cannot be compared, as fractions. Training makes much of little rounding:
with other vector instructions of one processor, ten short runs on FEMNIST (20 rounds) ended up to 0.055 apart.
"""
_EXACT_COSTS = (
    "bytes_down", "bytes_up", "train_samples", "adaptation_samples", "server_samples", "client_state_bytes"
)  # fmt: skip
"""Costs that depend on neither machine nor hour."""
_OF_THE_MACHINE = ("machine", "cpu", "gpu", "instructions")
"""Keys of the hardware, as far as a run recorded them, by which bits may differ."""


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """What came out."""

    record: Record
    differs: tuple[str, ...]
    """What is not as it was published, in words; nothing, and the run is verified."""
    because: str | None
    """Why the same bits could not be expected; None where they could."""
    seconds: float
    """It took."""

    @property
    def agrees(self) -> bool:
        """Whether the published numbers came out."""
        return not self.differs

    def __str__(self) -> str:
        """Say it in a sentence."""
        record = self.record
        run = f"{record.id} ({record.label or record.call} on {record.dataset}, seed {record.seed})"
        if self.differs:
            return f"{run}: run again, it differs: {'; '.join(self.differs)}."
        if self.because is None:
            return f"{run}: run again, it gives the same states, counts and metrics to the bit."
        within = f"its accuracies lie within {100 * TOLERANCE:g} points of the published ones"
        return f"{run}: run again, {within}; the same bits cannot be expected, as {self.because}."


def candidates(inspected: Sequence[Inspected], root: Path, plugins: tuple[Path, ...] = ()) -> dict[str, Run]:
    """Choose the finished runs that this machine can run again, by id: their data are at hand, and their device."""
    runs = {}
    for one in inspected:
        asked, record = one.asked, one.record
        if asked is None or record is None or record.status != "done" or one.dealt is None or not _can(asked, root):
            continue
        runs[record.id] = asked.run(root, plugins)
    return runs


def _can(asked: Asked, root: Path) -> bool:
    if asked.dataset is None or asked.outdated or asked.own_weights:
        return False
    try:
        resolve_device(asked.record.device)
        if asked.setting.auxiliary is not None:
            asked.run(root).reserved(source.labels(asked.dataset, root))
    except (BadConfig, DataMissing, DataDamaged):
        return False
    return True


def draw(runs: Sequence[str], n: int, seed: int) -> list[str]:
    """Draw n of some runs, or all if there are fewer; the same ones for the same runs and seed."""
    return random.Random(seed).sample(sorted(runs), min(n, len(runs)))


def rerun(record: Record, run: Run, report: Callable[[Report], None] | None = None) -> Rerun:
    """Run a published run again, in a folder that is gone afterwards, and compare.

    Args:
        record: As it was published.
        run: The same run, with this machine's data.
        report: Called after each round.
    """
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as place:
        execution.execute(run, Path(place), report)
        again = records.read(Path(place) / run.id)
        because = _other_surroundings(record, again)
        differs = _failed(again) or (_bits(record, again) if because is None else _numbers(record, again))
    seconds = (datetime.now(UTC) - started).total_seconds()
    return Rerun(record=record, differs=tuple(differs), because=because, seconds=seconds)


def entry(outcome: Rerun) -> Verification:
    """Describe a rerun that agreed, for verified.json."""
    document = hashlib.sha256(records.text_of(outcome.record)).hexdigest()
    assert outcome.agrees
    return Verification(
        date=datetime.now(UTC).date().isoformat(),
        commit=provenance.commit(),
        versions=provenance.versions(),
        hardware=provenance.hardware(outcome.record.device),
        exact=outcome.because is None,
        tolerance=None if outcome.because is None else TOLERANCE,
        document=document,
    )


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


def _failed(again: Record) -> list[str]:
    return [] if again.status == "done" else [f"it fails: {again.reason}"]


def _untouched(record: Record, again: Record, costs: Sequence[str] = _EXACT_COSTS) -> list[str]:
    """Compare what no rounding touches."""
    found = (
        []
        if record.fingerprint == again.fingerprint
        else [f"fingerprint {again.fingerprint}, not {record.fingerprint}"]
    )
    for key in costs:
        if record.cost.get(key) != again.cost.get(key):
            found.append(f"cost.{key} {again.cost.get(key)}, not {record.cost.get(key)}")
    return found


def _bits(record: Record, again: Record) -> list[str]:
    # Another library may count operations otherwise.
    found = _untouched(record, again, (*_EXACT_COSTS, "train_flops", "adaptation_flops", "server_flops"))
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


def _numbers(record: Record, again: Record) -> list[str]:
    found = _untouched(record, again)
    images = ["round", "model", "client", "class", "total"]
    if not record.counts()[images].equals(again.counts()[images]):
        found.append("the tests are on other images")
    for key in HEADLINES:
        one, other = record.metrics.get(key), again.metrics.get(key)
        if (one is None) != (other is None) or (one is not None and other is not None and abs(one - other) > TOLERANCE):
            found.append(f"{key} {other}, not {one}, which is more than {100 * TOLERANCE:g} points apart")
    return found
