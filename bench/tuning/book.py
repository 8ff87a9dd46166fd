"""The trials of several studies: what has been tried, on disk, and what is tried next."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter

from bench.files import source
from bench.plugins.registry import label
from bench.protocol.settings import BadConfig
from bench.results.claims import Claimed, claim
from bench.results.storage import place, prepare
from bench.splits import selection
from bench.sweep.run import Run
from bench.system import reading
from bench.tuning.study import Study, Trial

FOLDER = "tuning"
"""Within the folder of results."""
TRIALS, STUDY = "trials.jsonl", "study.json"


class DamagedStudy(BadConfig):
    """A study's file is not what was written."""


@contextmanager
def opened(studies: Sequence[Study], trials: int, out: Path, told: Callable[[Study, Trial], None]) -> Iterator[Book]:
    """Open a `Book`, and keep other processes from its studies.

    Raises:
        BadConfig: Another process has one of them. Besides, what `Book` raises.
    """
    with ExitStack() as claims:
        for study in studies:
            folder = prepare(out / FOLDER / study.id)
            try:
                claims.enter_context(claim(folder))
            except Claimed as error:
                what = f"another process is tuning {label(study.run.algorithm)} ({folder})"
                raise BadConfig(f"{what}; the same command goes on when that has ended") from error
        yield Book(studies, trials, out, told)


class Book:
    """What is tried next, and what has been: in memory, and in the studies' folders.

    Args:
        studies: What is searched.
        trials: Of each; a study with nothing to tune has the one of the algorithm as asked for.
        out: The folder of results.
        told: Learns each trial as it ends, with its study; of those that are there already nothing.

    Raises:
        DamagedStudy: A file cannot be read.
        OutputUnwritable: A folder cannot be written.
    """

    def __init__(self, studies: Sequence[Study], trials: int, out: Path, told: Callable[[Study, Trial], None]) -> None:
        self.studies, self.told = studies, told
        self.budget = {study.id: trials if study.space else 1 for study in studies}
        self.folders = {study.id: out / FOLDER / study.id for study in studies}
        self.trials = {study.id: trials_of(self.folders[study.id] / TRIALS) for study in studies}
        self._busy: set[str] = set()
        for study in studies:
            text = json.dumps(study.described(), indent=2) + "\n"
            place(self.folders[study.id], {STUDY: text.encode()})

    def left(self) -> int:
        """Count the trials that are not there yet."""
        return sum(max(self.budget[study.id] - len(self.trials[study.id]), 0) for study in self.studies)

    def next(self) -> tuple[Study, Trial] | None:
        """Begin a trial, of a study that has most left; None: all that are left wait for one that runs."""
        while waiting := [study for study in self.studies if study.id not in self._busy and self._lacks(study) > 0]:
            study = max(waiting, key=self._lacks)
            done = self.trials[study.id]
            trial = study.begun(study.propose(done), len(done))
            same = next((old for old in done if (old.call, old.lr) == (trial.call, trial.lr)), None)
            self._busy.add(study.id)
            if same is not None:
                same_as = same.number if same.same_as is None else same.same_as
                self.note(study, replace(same, number=trial.number, values=trial.values, same_as=same_as))
            else:
                return study, trial
        return None

    def give_back(self) -> None:
        """Have the trials that were begun and not ended begin again."""
        self._busy.clear()

    def note(self, study: Study, trial: Trial) -> None:
        """End a trial.

        Raises:
            OutputUnwritable: It cannot be stored.
        """
        self._busy.discard(study.id)
        self.trials[study.id].append(trial)
        lines = [json.dumps(asdict(each), allow_nan=False) + "\n" for each in self.trials[study.id]]
        place(self.folders[study.id], {TRIALS: "".join(lines).encode()})
        self.told(study, trial)

    def within(self, study: Study) -> list[Trial]:
        """Give the trials of a study that its budget allows: more may be there, of an earlier search."""
        return self.trials[study.id][: self.budget[study.id]]

    def _lacks(self, study: Study) -> int:
        return self.budget[study.id] - len(self.trials[study.id])


def trials_of(file: Path) -> list[Trial]:
    """Read a study's trials; none if there is no file.

    Raises:
        DamagedStudy: It cannot be read.
    """
    if not file.exists():
        return []
    try:
        lines = reading.contents(file, reading.TEXT, links=False).decode().splitlines()
        trials = [TypeAdapter(Trial).validate_json(line, strict=True) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedStudy(f"{file} cannot be read as trials; delete the folder {file.parent} ({error})") from error
    if [trial.number for trial in trials] != list(range(len(trials))):
        raise DamagedStudy(f"{file} lacks trials; delete the folder {file.parent}")
    return trials


def check(studies: Sequence[Study]) -> None:
    """Make the splits that studies need, from labels alone: what is wrong shows before any work is done. Standard error
    says which classes nothing can be chosen by.

    Raises:
        BadConfig, DataMissing, DataDamaged, PartitionFailed: As of `selection.set_aside` and `Dataset.labels`.
    """
    for study in {_reads(study.run): study for study in studies}.values():
        run = study.run
        labels = source.labels(run.dataset, run.data_root)
        for seed in study.seeds:
            split = selection.set_aside(labels, run.dataset.num_classes, run.setting, seed, study.share)
            source.require(run.dataset, run.data_root, [*split.clients, *split.tests, *run.reserved(labels)])
            _tell_of_the_unseen(selection.without_validation(labels, split), run, seed)
        run.read_weights()
        run.read_teacher(len(labels.train))


def _reads(run: Run) -> tuple[object, ...]:
    return run.protocol, run.setting.auxiliary, run.algorithm.needs, run.teacher


def _tell_of_the_unseen(classes: Sequence[int], run: Run, seed: int) -> None:
    if classes:
        first = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
        which = f"{len(classes)} of {run.dataset.num_classes} classes ({first})"
        print(
            f"{label(run.dataset)}, seed {seed}: {which} have no validation image, as no client has two of one; "
            "nothing is chosen by these",
            file=sys.stderr,
        )
