"""Whether published results hold together: each run by itself, runs beside each other, and the table made of them.

What a run's files say is computed anew as far as it can be without training. What cannot - that the counts are those of
the algorithm, how long it took - is self-reported until somebody runs it again (`bench.validation.rerun`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.algorithm import Server, is_usual
from bench.protocol.identity import canonical
from bench.results import packed, records, standing
from bench.results.leaderboard import leaderboards
from bench.results.record import DOCUMENT, MODELS, Record, stored
from bench.results.table import results_readme
from bench.sweep import journal
from bench.system import reading
from bench.validation.beside import PROSE, TABLE, strange
from bench.validation.counted import apart_at
from bench.validation.found import Inspected, Problem
from bench.validation.side_by_side import Place, inspect_all
from bench.validation.wording import overlong

if TYPE_CHECKING:
    from bench.preparing.preparation import Progress

_ID = re.compile("[0-9a-f]{12}")
_COMMAND = re.compile(r"`(bench table --out [^`]+? --write(?: --metric (last10|best))?)`")
"""What the table says it was written by."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a validation."""

    inspected: tuple[Inspected, ...]
    """Sorted by folder."""
    problems: tuple[Problem, ...]
    """All of them, by file."""
    notes: tuple[str, ...]
    """What is no problem and yet to be known."""

    @property
    def runs(self) -> list[Record]:
        """The runs that could be read."""
        return [one.record for one in self.inspected if one.record is not None]

    @property
    def splits(self) -> int:
        """How many runs' splits were made anew and compared."""
        return sum(one.dealt is not None for one in self.inspected)


def validate(
    out: Path,
    root: Path,
    folders: Sequence[Path] | None = None,
    plugins: Sequence[Path] = (),
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at a folder of results and list everything that cannot be so.

    Args:
        out: The folder.
        root: Of all datasets; where it has a run's, the split is made anew and compared.
        folders: Of runs; None: all of `out`, and what stands beside them too.
        plugins: Files of plug-ins that were loaded.
        jobs: Processes that look at runs; None: as many as the machine holds, or this one for few runs.
        progress: Told how many runs have been looked at.

    Returns:
        Problems and notes; no problem, and the results hold together.
    """
    everything = folders is None
    here: dict[str, list[Place]] = {folder.name: [(folder, None)] for folder in folders or ()}
    if everything:
        here = _places(out)
    places = [here[run][-1] for run in sorted(here)]
    if progress is not None:
        progress.begin(f"runs of {out}", len(places))
    told = (lambda runs: None) if progress is None else progress.advance
    inspected = inspect_all(places, root, plugins, jobs, told)
    problems = [problem for one in inspected for problem in one.problems]
    said: dict[str, list[str]] = defaultdict(list)
    for one in inspected:
        for note in one.notes:
            said[note].append(one.folder.name)
    notes = [f"{note}: {_names(runs)}." for note, runs in sorted(said.items())]
    done = [one for one in inspected if one.record is not None and one.record.status == "done"]
    problems += [*_splits_agree(done), *_work_agrees(done), *_copies(done)]
    notes += _oddities(done)
    if everything and (out / journal.FOLDER).is_dir():  # of `bench run`: somebody's own folder
        problems += [*_twice(here), *_packs(out), *_verifications(out)]
        notes.append("a folder of one's own: its table and other files do not matter, 'bench submit' takes its runs.")
    elif everything:
        twice = [*_twice(here)]
        whole = [one.record for one in inspected if one.whole and one.record is not None]
        rows = [record for record in whole if record.id not in {problem.file for problem in twice}]
        problems += [*twice, *_packs(out), *strange(out), *_notes(out), *_table(out, rows), *_verifications(out)]
    return Report(inspected=tuple(inspected), problems=tuple(sorted(set(problems))), notes=tuple(notes))


# Runs beside each other -------------------------------------------------------------------------------------


def _splits_agree(done: Sequence[Inspected]) -> Iterator[Problem]:
    """Compare the splits of the runs of one protocol, where the data are not at hand to compare with."""
    unknown = [one for one in done if one.dealt is None]
    for group, of, keys in (
        (_protocol_and_seed, "protocol and seed", ("fingerprint", "clients", "groups")),
        (_protocol, "protocol", ("class_counts",)),
    ):
        for members in _grouped(unknown, group):
            for key in keys:
                given = {one.folder.name: one.record.document.get(key) for one in members if one.record}
                odd = _odd({name: canonical({key: value}) for name, value in given.items() if value is not None})
                yield from (
                    Problem(f"{name}/{DOCUMENT}", key, f"differs from that of other runs of its {of}") for name in odd
                )
    for members in _grouped(unknown, _protocol_and_seed):
        for kind in ("generic", "personal", "unseen"):
            cells = {one.folder.name: one.tested[kind] for one in members if kind in one.tested}
            files = {one.folder.name: one.record.companions["counts"] for one in members if one.record}
            spelled = {name: str(table.tolist()) for name, table in cells.items()}
            odd = _odd(spelled)
            usual = next((table for name, table in cells.items() if name not in odd), None)
            for name in odd:
                where = "" if usual is None else f": {apart_at(cells[name], usual)}"
                what = f"has other test images ({kind}) than other runs of its protocol and seed"
                yield Problem(f"{name}/{files[name]}", "total", what + where)


def _work_agrees(done: Sequence[Inspected]) -> Iterator[Problem]:
    """Compare what was sent and computed by runs that differ by their seed only: as many clients take part in each.

    Bytes of a method that counts them itself may hang on what its clients hold, such as on which classes.
    """
    for members in _grouped(done, _all_but_seed):
        odd = []
        asked = members[0].asked
        counts = asked is not None and not is_usual(asked.algorithm.pieces[0].payload_bytes, Server.payload_bytes)
        for key in () if counts else ("bytes_down", "bytes_up"):
            sent = {one.folder.name: _digits(_cost(one, key)) for one in members}
            odd += [(name, key) for name in _odd({name: value for name, value in sent.items() if value is not None})]
        rates = {one.folder.name: rate for one in members if (rate := _a_sample(one)) is not None}
        usual = median(rates.values()) if rates else 0.0
        odd += [(name, "train_flops") for name, rate in rates.items() if abs(rate - usual) > _APART * usual]
        for name, key in odd:
            yield Problem(f"{name}/{DOCUMENT}", f"cost.{key}", "does not go with that of the run's other seeds")


def _cost(one: Inspected, key: str) -> float | None:
    return one.record.cost.get(key) if one.record else None


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.9g}"


def _a_sample(one: Inspected) -> float | None:
    assert one.record is not None
    flops, samples = one.record.cost.get("train_flops"), one.record.cost.get("train_samples")
    return flops / samples if flops is not None and samples else None


_APART = 0.05
"""Share of the usual operations a sample by which a seed may differ: what a visit costs once, and the rounds in which a
method does otherwise, fall on clients of other sizes."""


def _copies(done: Sequence[Inspected]) -> Iterator[Problem]:
    """Find two folders that hold one run: states of two seeds are never equal, nor are two times to the nanosecond."""
    for members in _grouped(done, lambda one: str(one.record and one.record.document.get("digest"))):
        seeds = {one.record.seed for one in members if one.record}
        if len(seeds) > 1:
            for one in members:
                others = ", ".join(other.folder.name for other in members if other is not one)
                yield Problem(f"{one.folder.name}/{DOCUMENT}", "digest", f"is that of {others}, which has another seed")
    for members in _grouped(done, _duration):
        for one in members:
            others = ", ".join(other.folder.name for other in members if other is not one)
            what = f"and device_seconds are those of {others} to the last digit: one of them is a copy"
            yield Problem(f"{one.folder.name}/{DOCUMENT}", "cost.wall_seconds", what)


def _answers(one: Inspected) -> str | None:
    """Give what is the same of runs that gave the same answers."""
    assert one.record is not None
    kept = one.record.tables or one.record.files
    return "|".join(digest for name, digest in sorted(kept.items()) if name not in ("rounds", "rounds.parquet"))


def _oddities(done: Sequence[Inspected]) -> Iterator[str]:
    """Name what can be, and is what a forged run looks like."""
    for members in _grouped(done, _answers):
        if len({one.record.document.get("digest") for one in members if one.record}) > 1:
            names = ", ".join(one.folder.name for one in members)
            what = "have the same right answers and other final states"
            yield f"{names} {what}: a copy, or a difference that moves no answer."
    for members in _grouped([one for one in done if one.dealt is not None], _all_but_seed):
        passes = {one.folder.name: _digits(_passes(one)) for one in members}
        for name in _odd({name: value for name, value in passes.items() if value is not None}):
            what = "cost.train_samples does not go with that of the other seeds"
            yield f"{name}: {what}; 'bench validate --rerun {name}' tells whether it is so."


def _passes(one: Inspected) -> float | None:
    """Give how often a run processed an image of those that its cohorts hold."""
    assert one.record is not None and one.dealt is not None
    samples = one.record.cost.get("train_samples")
    return samples / one.dealt.visited if samples is not None and one.dealt.visited else None


def _names(runs: Sequence[str]) -> str:
    """Name runs, or some of many."""
    return ", ".join(runs[:6]) + (f" and {len(runs) - 6} more" if len(runs) > 6 else "")


def _grouped(members: Iterable[Inspected], key: Callable[[Inspected], object]) -> list[list[Inspected]]:
    """Group runs by a key; groups of one are left out."""
    groups: dict[object, list[Inspected]] = defaultdict(list)
    for one in members:
        groups[key(one)].append(one)
    return [group for group in groups.values() if len(group) > 1]


def _protocol(one: Inspected) -> object:
    assert one.record is not None
    return canonical({key: one.record.identity.get(key) for key in ("dataset", "setting", "model", "weights")})


def _protocol_and_seed(one: Inspected) -> object:
    assert one.record is not None
    return _protocol(one), one.record.seed


def _all_but_seed(one: Inspected) -> object:
    assert one.record is not None
    return canonical({key: value for key, value in one.record.identity.items() if key != "seed"})


def _duration(one: Inspected) -> object:
    assert one.record is not None
    return one.record.cost.get("wall_seconds"), one.record.cost.get("device_seconds")


def _odd(values: Mapping[str, str]) -> list[str]:
    """Give the names whose value is not the usual one; all names where none is usual."""
    counted = Counter(values.values()).most_common()
    if len(counted) < 2:
        return []
    usual = None if counted[0][1] == counted[1][1] else counted[0][0]
    return [name for name, value in values.items() if value != usual]


# What stands beside the runs --------------------------------------------------------------------------------


def _places(out: Path) -> dict[str, list[Place]]:
    """Say where the runs of a folder are, some in several places."""
    found: dict[str, list[Place]] = defaultdict(list)
    for pack in packed.packs(out):
        for run in _readable(pack):
            found[run].append((pack / run, pack))
    for folder in _run_folders(out):
        found[folder.name].append((folder, None))
    return found


def _twice(here: Mapping[str, Sequence[Place]]) -> Iterator[Problem]:
    """Look for runs that stand in two places with different contents."""
    for run, places in here.items():
        if len(places) > 1 and len({_text(place) for place in places}) > 1:
            named = " and ".join(str(pack or folder) for folder, pack in places)
            yield Problem(run, "", f"another result in each of {named}; remove all but the right one")


def _text(place: Place) -> bytes | None:
    folder, pack = place
    try:
        return packed.documents(pack)[folder.name] if pack is not None else stored(folder)
    except (OSError, reading.TooLarge):
        return None


def _run_folders(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.is_dir() and _ID.fullmatch(path.name)]


def _readable(pack: Path) -> list[str]:
    """Give the runs of a pack, none if it cannot be read; that is said elsewhere."""
    try:
        return [*packed.documents(pack)]
    except records.DamagedResult:
        return []


def _packs(out: Path) -> Iterator[Problem]:
    """Look at packs as a whole."""
    for pack in packed.packs(out):
        name = "" if pack == out else f"{pack.name}/"
        try:
            for table in packed.TABLES:
                if not packed.opened(pack).companion(table):
                    what = f"is not the file that {packed.RUNS} was written with: it has another checksum"
                    yield Problem(f"{name}{table}.parquet", "", what)
        except records.DamagedResult as error:
            yield Problem(f"{name}{packed.RUNS}", "", str(error))
        for path in sorted(pack.iterdir()) if pack != out else ():
            if path.name not in (*packed.FILES, packed.PLUGINS, MODELS):
                yield Problem(f"{name}{path.name}", "", "does not belong into a pack; remove it")
        for path in sorted((pack / MODELS).iterdir()) if (pack / MODELS).is_dir() else ():
            if path.name not in _readable(pack):
                yield Problem(f"{name}{MODELS}/{path.name}", "", "is of no run of this pack; remove it")


def _notes(out: Path) -> Iterator[Problem]:
    try:
        notes = records.prose(out) or ""
    except (OSError, ValueError):
        return  # which is said
    for place, what in overlong(notes):
        yield Problem(PROSE, place, what)


def _table(out: Path, found: Sequence[Record]) -> Iterator[Problem]:
    """Compare the table with the one that would be written now, of what can be read."""
    path = out / TABLE
    fix = f"'bench table --out {out} --write' writes it"
    try:
        written = reading.contents(path, reading.TEXT, links=False).decode()
    except FileNotFoundError:
        yield Problem(TABLE, "", f"is not there; {fix}")
        return
    except (OSError, ValueError) as error:
        yield Problem(TABLE, "", f"cannot be read ({reading.why(error)}); {fix}")
        return
    command = _COMMAND.search(written)
    if command is None:
        yield Problem(TABLE, "", f"does not say by which command it was written; {fix}")
        return
    try:
        placed, _ = records.stand(out, found)
        boards = leaderboards(placed, command[2] or "last")
        wanted = results_readme(boards, records.prose(out), command[1])
    except Exception as error:  # whatever made-up runs make of it
        yield Problem(TABLE, "", f"cannot be made of these folders ({type(error).__name__}: {error})")
        return
    if written != wanted:
        lines = zip([*written.splitlines(), ""], [*wanted.splitlines(), ""], strict=False)
        number = next((n for n, (one, other) in enumerate(lines, start=1) if one != other), 0)
        yield Problem(TABLE, f"line {number}", f"is not what the folders give: it is stale, or was edited; {fix}")


def _verifications(out: Path) -> Iterator[Problem]:
    if (out / standing.FILE).is_symlink() or (out / standing.FILE).is_fifo():
        return  # which is said
    try:
        entries = standing.read(out)
    except ValueError as error:
        yield Problem(standing.FILE, "", f"cannot be read: {error}")
        return
    for run, entry in entries.items():
        digest = records.digest(out, run) if _ID.fullmatch(run) else None
        if digest is None:
            yield Problem(standing.FILE, run, "is no run of this folder; remove the entry")
        elif digest != entry.document:
            what = "was looked at with another run.json than the one that is here; run it again, or remove the entry"
            yield Problem(standing.FILE, run, what)


def summary(report: Report, out: Path) -> str:
    """Say in a sentence or two what was looked at and found."""
    done = [record for record in report.runs if record.status == "done"]
    failed = len(report.runs) - len(done)
    protocols = len({record.protocol for record in report.runs})
    parts = f"{len(done)} finished run{'s' * (len(done) != 1)} of {protocols} protocol{'s' * (protocols != 1)}"
    parts += f" and {failed} failed" if failed else ""
    splits = f"the split of {report.splits} was made anew from the data"
    found = len(report.problems)
    return f"{out}: {parts}; {splits}; {found or 'no'} problem{'s' * (found != 1)}."
