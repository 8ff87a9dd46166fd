"""Results that were made up with care: found, or never shown as anybody's but whoever handed them in."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.attack.frame import TRIES, Try, copied
from tests.attack.published import forged, validated
from tests.attack.verdict import Fell, bench, calm, refused, require
from tests.test_validation import (
    _LEAVE_THE_TABLE,
    ADVERSARIES,
    SWEEP,
    TAMPERINGS,
    Forger,
    a_little_better,
    all_right,
    document,
    folder,
    write_table,
)

AREA = "consistent forgeries against validate"


def _enter(name: str, act: Callable[[], object], seconds: float = 90) -> None:
    TRIES.append(Try(area=AREA, name=name.replace("_", " "), act=act, seconds=seconds, needs=("published",)))


# Found without training -------------------------------------------------------------------------------------


def _tampered(name: str) -> None:
    out = copied("published")
    change, says = TAMPERINGS[name]
    change(out)
    if name not in _LEAVE_THE_TABLE:
        write_table(out)
    refused(validated(out), says)


for each in TAMPERINGS:
    _enter(each, partial(_tampered, each))


def _refused(change: Callable[[Forger], object], label: str = "fedavg_ft") -> None:
    out, run = forged(change, label)
    refused(validated(out), run)


def endless_epochs(forger: Forger) -> None:
    forger.set("epochs", 10**12)


def a_split_out_of_any_sense(forger: Forger) -> None:
    forger.set("alpha", 1e-300)


def a_tail_out_of_any_sense(forger: Forger) -> None:
    forger.set("imbalance", 1e300)
    forger.document["imbalance"] = 1e300


def a_label_with_praise(forger: Forger) -> None:
    forger.document["label"] += " [verified by the maintainers]"


def overrides_of_ones_own(forger: Forger) -> None:
    forger.document["overrides"]["first place"] = 1


def hardware_of_ones_own(forger: Forger) -> None:
    forger.document["hardware"]["cpu"] = "x" * 100_000


def _cost(key: str, value: float | None) -> Callable[[Forger], None]:
    def change(forger: Forger) -> None:
        forger.document["cost"][key] = value

    return change


for change in (
    endless_epochs,
    a_split_out_of_any_sense,
    a_tail_out_of_any_sense,
    a_label_with_praise,
    overrides_of_ones_own,
    hardware_of_ones_own,
):
    _enter(change.__name__, partial(_refused, change))
for key in ("train_samples", "train_flops", "bytes_up", "peak_memory_bytes", "wall_seconds", "device_seconds"):
    _enter(f"{key} of nearly nothing", partial(_refused, _cost(key, 1e-9 if "seconds" in key else 1.0)))
for key in ("train_samples", "train_flops", "bytes_up", "bytes_down"):
    _enter(f"{key} that is absent", partial(_refused, _cost(key, None)))


def _other_algorithms_files(other: str) -> None:
    """The files of one algorithm under the name of another, at its version here."""
    from bench.sweep import execution
    from bench.sweep.config import parse_algorithms

    (run, _) = replace(SWEEP, algorithms=tuple(parse_algorithms(other))).expand()
    said = json.loads(json.dumps(execution.document(run, None)))

    def change(forger: Forger) -> None:
        forger.document["identity"]["algorithm"] = said["identity"]["algorithm"]
        forger.document |= {key: said[key] for key in ("algorithm", "label", "call", "tier")}

    _refused(change, "ditto")


for each in ("fedrep", "fedprox", "fedper", "fedavg"):
    _enter(f"the files of ditto as {each}", partial(_other_algorithms_files, each))


# Found by a rerun, and never published as verified -----------------------------------------------------------


def _rerun(change: Callable[[Forger], None]) -> None:
    out, run = forged(change, "ditto")
    answer = validated(out)
    if calm(answer).status:
        return  # found at once
    refused(validated(out, "--rerun", run), "run again, it differs")


for forge in ADVERSARIES:
    _enter(f"{forge.__name__}, by a rerun", partial(_rerun, forge), 150)


def _board(out: Path) -> list[dict[str, Any]]:
    answer = calm(bench("table", "--out", out, "--format", "json"))
    boards = json.loads(answer.out)
    boards = boards["leaderboards"] if isinstance(boards, dict) else boards
    return [row for board in boards for row in board["rows"]]


def _shown(out: Path, label: str, metric: str) -> list[float]:
    """Means of a metric in all rows of a label."""
    found = []
    for row in _board(out):
        if row["words"] == label and metric in row["metrics"]:
            estimate = row["metrics"][metric]
            found.append(estimate["mean"] if isinstance(estimate, dict) else estimate)
    return found


def _believed(out: Path) -> set[str]:
    """Runs that have the sign of a rerun, by the board's file, whatever its format."""
    file = out / "verified.json"
    entries = json.loads(file.read_text())["runs"] if file.exists() else {}
    found = set()
    for run, entry in entries.items():
        same = hashlib.sha256((out / run / "run.json").read_bytes()).hexdigest() == entry["document"]
        if same and entry.get("kind", "verified") in ("verified", "reproduced"):
            found.add(run)
    return found


def _elsewhere(change: Callable[[Forger], None]) -> None:
    """Somebody says that it was another processor: no sign of a rerun stands beside invented numbers."""

    def forge(forger: Forger) -> None:
        forger.document["hardware"]["cpu"] = "Apple M9"
        forger.document["digest"] = "0" * 64
        change(forger)

    out, run = forged(forge, "ditto")
    said = document(out / run)["metrics"]["generic.few"]
    answer = validated(out, "--rerun", run, "--write")
    calm(answer)
    if run in _believed(out):
        write_table(out)
        require(said not in _shown(out, "ditto", "generic.few"), f"verified, and few is {100 * said:.1f} as invented")


def groups_invented(forger: Forger) -> None:
    """The rare classes right, the frequent ones wrong, as far as eight points of the mean allow."""
    counts = forger.counts
    generic = counts["model"] == "generic"
    for label in forger.document["groups"]["few"]:
        rows = generic & (counts["class"] == label)
        counts.loc[rows, "correct"] = counts.loc[rows, "total"]
    for label in forger.document["groups"]["many"][:2]:
        counts.loc[generic & (counts["class"] == label), "correct"] = 0
    forger.recompute()


def one_flop(forger: Forger) -> None:
    forger.document["cost"]["train_flops"] = 1.0


for forge in (a_little_better, all_right, groups_invented, one_flop):
    _enter(f"{forge.__name__}, made on another processor", partial(_elsewhere, forge), 150)


# A stranger and somebody else's row --------------------------------------------------------------------------


def _strangers(change: Callable[[Path], object]) -> None:
    """A stranger's submission leaves the row of others as it was."""
    out = copied("published")
    (out / "README.md").unlink()
    for path in list(out.glob("*/run.json")):
        if document(path.parent)["algorithm"] != "ditto":
            shutil.rmtree(path.parent)
    spare = Path(shutil.copytree(folder(out, "ditto", 1), "spare"))
    shutil.rmtree(folder(out, "ditto", 1))
    require(calm(bench("submit", out, "--to", "published")).status == 0, "cannot be submitted")
    before = _shown(Path("published"), "ditto", "personal.balanced")
    stranger = Path("stranger")
    stranger.mkdir()
    spare.rename(stranger / document(spare)["id"])
    change(stranger)
    for each in [*stranger.iterdir()]:
        shutil.move(each, Path("published"))
    after = _shown(Path("published"), "ditto", "personal.balanced")
    if calm(bench("validate", "published", "--data-root", "no data here")).status == 0 or after != before:
        require(before[0] in after, f"ditto was {before} and is {after}")
        rows = [row for row in _board(Path("published")) if row["words"] == "ditto" and row["runs"]]
        failures = [row for row in rows if row["failures"]]
        require(not failures, "a stranger's failure stands in the row")


def a_worse_seed(stranger: Path) -> None:
    forger = Forger(next(stranger.iterdir()))
    forger.counts["correct"] = 0
    forger.recompute().save()
    if calm(bench("submit", stranger, "--to", "packed")).status == 0:
        shutil.rmtree(stranger)
        Path("packed").rename(stranger)


def a_failure(stranger: Path) -> None:
    from bench.results import records

    here = next(stranger.iterdir())
    said = {key: value for key, value in document(here).items() if key not in ("metrics", "cost", "tables", "digest")}
    shutil.rmtree(here)
    records.fail(stranger, here.name, said, "it never works")


for hand_in in (a_worse_seed, a_failure):
    _enter(f"{hand_in.__name__} of a stranger", partial(_strangers, hand_in))


# A standing of its own ---------------------------------------------------------------------------------------


def _not_rerun(change: Callable[[Forger], object]) -> None:
    """What cannot be run again here is refused or said to be so, and never verified."""
    out, run = forged(change, "ditto")
    answer = validated(out, "--rerun", run, "--write")
    calm(answer)
    require(run not in _believed(out), "verified, without a rerun")
    if not validated(out).status:
        words = ("cannot be run again", "cannot be rerun", "no run's data and device are at hand", "not rerun")
        if not any(word in answer.text for word in words):
            raise Fell(f"nobody says that it cannot be rerun: {answer.text[-300:]}")


def on_a_gpu(forger: Forger) -> None:
    forger.document["identity"]["device"] = forger.document["device"] = "cuda"


def from_any_weights(forger: Forger) -> None:
    forger.set("weights", "0" * 64)


def of_an_older_version(forger: Forger) -> None:
    forger.document["identity"]["algorithm"] = {"name": "fedrep", "version": 1, "fields": {}}
    forger.document |= {"algorithm": "fedrep", "label": "fedrep", "call": "FedRep()"}


for forge in (on_a_gpu, from_any_weights, of_an_older_version):
    _enter(f"{forge.__name__}, where nobody can rerun it", partial(_not_rerun, forge))


def _ones_own_verification() -> None:
    """A verified.json that comes with a submission gives no sign."""
    out = copied("published")
    run = folder(out, "ditto").name
    entry = {"date": "2026-01-02", "commit": None, "versions": {"torch": "2"}, "hardware": {"cpu": "x"}}
    entry["document"] = hashlib.sha256((out / run / "run.json").read_bytes()).hexdigest()
    for form, more in ((1, {"exact": True}), (2, {"kind": "verified"})):
        (out / "verified.json").write_text(json.dumps({"format": form, "runs": {run: {**entry, **more}}}))
        write_table(out)
        refused(validated(out), "verified.json")


TRIES.append(
    Try(
        area=AREA,
        name="a verified.json of one's own",
        act=_ones_own_verification,
        needs=("published",),
        left="the file is the publishing job's, and CI refuses one that is handed in (see there); validate cannot tell",
    )
)


def _chosen_seeds() -> None:
    """Seeds picked from many do not rank: those of a row are 0, 1, 2 and so on."""
    out = copied("published")
    for label in ("ditto", "fedavg_ft", "fedrep"):
        shutil.rmtree(folder(out, label, 0))
    write_table(out)
    answer = validated(out)
    table = bench("table", "--out", out)
    if calm(answer).status == 0:
        said = " ".join(f"{answer.text}{table.text}".split())
        require("not ranked" in said, "a row of seed 1 alone is ranked, without a word")


_enter("seeds that were picked", _chosen_seeds)
