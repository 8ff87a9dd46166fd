"""What whoever keeps published results does about them: runs are run again, models tested, and both noted."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.protocol.refusal import BadConfig
from bench.results import standing
from bench.results.kept import NotKept
from bench.results.record import DamagedResult
from bench.results.standing import ORDER, Standing
from bench.sweep.apart import NotToItsEnd
from bench.sweep.driver import verify_data
from bench.sweep.run import Run
from bench.validation import rerun as reruns
from bench.validation.found import Inspected
from bench.validation.recount import recount
from bench.validation.report import Report
from bench.validation.rerun import Rerun


@dataclass(kw_only=True)
class Board:
    """Work on the runs of a validated folder, one after the other."""

    report: Report
    root: Path
    """Of all datasets."""
    plugins: tuple[Path, ...] = ()
    """Files, for the processes of reruns."""
    seconds: float | None = None
    """What one run may take, as for `rerun`."""
    say: Callable[[str], None] = lambda sentence: None
    """Told what is being done, and what came out."""
    outcomes: list[Rerun] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    """Of runs that were run again and did not come to their end, why."""
    recounted: dict[str, list[str]] = field(default_factory=dict)
    """Of runs whose models were tested, what differs."""

    def rerun(self, asked: str, seed: int | None = None) -> int | None:
        """Run some runs again.

        Args:
            asked: How many, drawn by chance, or which, by their ids with commas between them.
            seed: Of the draw; None: a new one.

        Returns:
            The seed, if there was a draw.

        Raises:
            BadConfig: No such run, or it cannot be run again here.
            DataDamaged: The images here are not what they should be.
        """
        possible = reruns.candidates(self.report.inspected, self.root, self.plugins)
        chosen, seed = self._choose(asked, seed, possible)
        verify_data([possible[run] for run in chosen])
        for run in chosen:
            record = next(record for record in self.report.runs if record.id == run)
            took = record.cost.get("wall_seconds")
            before = "" if took is None else f", which is said to have taken {took:.0f} s"
            self.say(f"running {run} again{before}: {possible[run]}")
            try:
                self.outcomes.append(reruns.rerun(record, possible[run], self.seconds))
                self.say(str(self.outcomes[-1]))
            except NotToItsEnd as error:
                self.stopped[run] = str(error)
                self.say(f"{run}: {error}.")
        return seed

    def recount(self) -> None:
        """Test the models of every run that has some, where its data are at hand."""
        for one in self.report.inspected:
            record, asked = one.record, one.asked
            if record is None or asked is None or one.dealt is None or not record.has_models:
                continue
            try:
                differs = recount(record, asked, self.root)
            except (NotKept, DamagedResult) as error:
                differs = [str(error)]
            self.recounted[record.id] = differs
            said = f"differ: {'; '.join(differs)}" if differs else "give its right answers"
            self.say(f"{record.id}: its models, tested again, {said}.")

    @property
    def differing(self) -> int:
        """How many runs came out otherwise."""
        return sum(not outcome.agrees for outcome in self.outcomes) + sum(map(bool, self.recounted.values()))

    def note(self, out: Path) -> list[str]:
        """Note in the board's file what was found of runs without problems; what is known of a run gets no worse.

        Returns:
            The runs of which something is new.

        Raises:
            OutputUnwritable: It cannot be written.
            ValueError: It is damaged.
        """
        known = standing.read(out)
        entries = {
            run: entry
            for run, entry in self._found().items()
            if run not in known
            or known[run].document != entry.document
            or ORDER.index(entry.kind) <= ORDER.index(known[run].kind)
        }
        if entries:
            standing.note(out, entries)
        return sorted(entries)

    def _found(self) -> dict[str, Standing]:
        """Give the entries of all runs that nothing speaks against."""
        sound = {
            each.record.id: each for each in self.report.inspected if each.record is not None and self._holds(each)
        }
        found = {}
        for run, one in sound.items():
            assert one.record is not None
            why = self.stopped.get(run) or reruns.obstacle(one, self.root)
            if self.recounted.get(run) == []:
                found[run] = reruns.recounted(one.record)
            elif why is not None:
                found[run] = reruns.unrepeatable(one.record, why)
        return found | {
            each.record.id: reruns.entry(each) for each in self.outcomes if each.agrees and each.record.id in sound
        }

    def _holds(self, one: Inspected) -> bool:
        """Tell whether a run has no problem, and nothing that was run or tested again speaks against it."""
        assert one.record is not None
        run = one.record.id
        otherwise = [each for each in self.outcomes if each.record.id == run and not each.agrees]
        return not (otherwise or self.recounted.get(run) or self._problems(run))

    def _problems(self, run: str) -> bool:
        return any(problem.file.split("/")[0] == run for problem in self.report.problems)

    def _choose(self, asked: str, seed: int | None, possible: dict[str, Run]) -> tuple[list[str], int | None]:
        named = [word.strip() for word in asked.split(",") if word.strip()]
        known: dict[str, Inspected] = {one.record.id: one for one in self.report.inspected if one.record is not None}
        if named and all(word in known for word in named):
            for word in named:
                if word not in possible:
                    why = reruns.obstacle(known[word], self.root)
                    raise BadConfig(f"--rerun: {word} cannot be run again here: {why}")
            return list(dict.fromkeys(named)), None
        if not re.fullmatch(r"[1-9][0-9]{0,5}", asked):
            raise BadConfig(f"--rerun {asked}: a number of runs is wanted, or ids of runs")
        seed = secrets.randbelow(2**32) if seed is None else seed
        chosen = reruns.draw(list(possible), int(asked), seed)
        told = f"{len(possible)} of {len(self.report.runs)} runs can be run again here"
        self.say(f"{told}; seed {seed} (--rerun-seed) draws {', '.join(chosen) or 'none'}")
        return chosen, seed
