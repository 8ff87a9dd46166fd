"""Kills at random moments, with finished runs between them: `python -m tests.attack.kills --kills 100`.

Sweeps of short runs on digits, on Ray. Whatever is at work is killed as the system kills it (SIGKILL): the driver,
workers, the raylet, the control store (GCS), the agents. Where the driver is dead the same command is typed again. In
the end all sweeps are finished by the same command, and compared with one that nobody disturbed: digest, metrics, and
the contents of all tables.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ALGORITHMS = "fedavg,fedrep(head_epochs=1),ditto"
SEEDS = 12
KINDS = ("driver", "worker", "raylet", "gcs", "agent")
_NAMES = {
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs_server",),
    "agent": ("dashboard/agent.py", "runtime_env/agent", "log_monitor.py", "DashboardAgent", "RuntimeEnvAgent"),
    "worker": ("ray::_", "ray::IDLE", "default_worker.py"),
}
"""What stands in the command line of Ray's processes."""


def words(out: Path, ray: str = "local", seeds: int = SEEDS, rounds: int = 3) -> list[str]:
    """Give the command."""
    asked = ("run", "--algos", ALGORITHMS, "--seeds", seeds, "--rounds", rounds, "--epochs", 1, "--json")
    return [*map(str, asked), "--ray", ray, "--tracking-uri", "off", "--out", str(out)]


def start(out: Path, ray: str = "local", seeds: int = SEEDS, rounds: int = 3) -> subprocess.Popen[bytes]:
    """Type the command, in a session of its own; what it says goes to a file beside the folder."""
    with out.with_suffix(".said").open("ab") as said:
        command = [sys.executable, "-m", "bench", *words(out, ray, seeds, rounds)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)


def descendants(of: int) -> dict[int, str]:
    """Give the processes below one, with their command lines: nobody else's."""
    above, lines = dict[int, int](), dict[int, str]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                above[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    found, edge = dict[int, str](), {of}
    while edge:
        edge = {pid for pid, parent in above.items() if parent in edge and pid not in found}
        found |= {pid: lines[pid] for pid in edge}
    return found


def target(driver: int, kind: str, chosen: random.Random) -> int | None:
    """Choose a process of a kind; None: there is none now."""
    if kind == "driver":
        return driver
    those = [pid for pid, line in descendants(driver).items() if any(name in line for name in _NAMES[kind])]
    return chosen.choice(sorted(those)) if those else None


def finished(out: Path) -> dict[str, object]:
    """Give what each finished run has, by id: digest, metrics, and checksums of the tables' contents."""
    known = dict[str, object]()
    for file in out.glob("*/run.json"):
        document = json.loads(file.read_text())
        if document["status"] == "done":
            known[file.parent.name] = [document[key] for key in ("digest", "metrics", "tables")]
    return known


def failures(out: Path) -> dict[str, str]:
    """Give why runs failed, by id."""
    said = {}
    for file in out.glob("*/run.json"):
        document = json.loads(file.read_text())
        if document["status"] == "failed":
            said[file.parent.name] = str(document["reason"])
    return said


@dataclass
class Tally:
    """What came of the kills."""

    kills: Counter[str] = field(default_factory=Counter)
    seen: int = 0
    """Finished runs that were there when something was killed, summed up over kills."""
    between: int = 0
    """Kills since the one before which runs have finished."""
    lost: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    """Runs that were recorded as failed, though nothing was wrong with them."""
    gave_up: Counter[int] = field(default_factory=Counter)
    """Exit statuses of drivers that ended by themselves and not well."""
    tracebacks: int = 0

    @property
    def held(self) -> bool:
        """Whether nothing was lost, changed or blamed on a run."""
        return not (self.lost or self.changed or self.failed or self.tracebacks)

    def __str__(self) -> str:
        """Say it in lines."""
        by_kind = ", ".join(f"{kind} {self.kills[kind]}" for kind in KINDS if self.kills[kind])
        lines = [
            f"kills: {self.kills.total()} ({by_kind}), {self.between} of them with new finished runs since the last",
            f"finished runs seen before kills: {self.seen}; lost: {len(self.lost)}; changed: {len(self.changed)}",
            f"recorded as failed though nothing was wrong with them: {len(self.failed)}"
            + "".join(f"\n    {run}: {reason[:200]}" for run, reason in [*self.failed.items()][:5]),
            f"drivers that gave up: {dict(self.gave_up) or 'none'}; tracebacks: {self.tracebacks}",
        ]
        return "\n".join(lines)


def watch(tally: Tally, out: Path, before: Mapping[str, object], wanted: Mapping[str, object]) -> dict[str, object]:
    """Compare what is finished now with what was, and with what it should be."""
    now = finished(out)
    tally.lost |= {f"{out.name}/{run}" for run in set(before) - set(now)}
    tally.changed |= {f"{out.name}/{run}" for run, found in now.items() if wanted.get(run) != found}
    return now


def disturb(
    tally: Tally,
    out: Path,
    kills: int,
    wanted: Mapping[str, object],
    chosen: random.Random,
    ray: str = "local",
    kinds: tuple[str, ...] = KINDS,
    rounds: int = 3,
) -> None:
    """Kill during one sweep, each time after a while in which runs finish; end it by the same command.

    Args:
        tally: What is counted in.
        out: Folder of the sweep, new.
        kills: How often.
        wanted: What runs must have, by id.
        chosen: Of moments and kinds.
        ray: Where runs go.
        kinds: What is killed.
        rounds: Of a run.
    """
    before = dict[str, object]()
    seeds = len(wanted) // 3
    process = None
    for kill in range(kills):
        if process is None or process.poll() is not None:
            process = start(out, ray, seeds, rounds)
        kind = kinds[kill % len(kinds)] if kill < len(kinds) else chosen.choice(kinds)
        more = chosen.choice((0, 1, 1, 2, 3)) if len(before) < len(wanted) - 4 else 0
        limit = time.monotonic() + (60 if more else chosen.uniform(0.5, 15))
        while (
            time.monotonic() < limit
            and process.poll() is None
            and (not more or len(finished(out)) < len(before) + more)
        ):
            time.sleep(0.05)
        time.sleep(chosen.uniform(0, 0.5))
        if process.poll() is not None:
            if process.returncode:
                tally.gave_up[process.returncode] += 1
                tally.failed |= {f"{out.name}/{run}": reason for run, reason in failures(out).items()}
            if len(finished(out)) == len(wanted):
                break
            continue
        now = watch(tally, out, before, wanted)
        limit = time.monotonic() + 20
        while (
            (pid := target(process.pid, kind, chosen)) is None and process.poll() is None and time.monotonic() < limit
        ):
            time.sleep(0.1)
        if pid is None:
            kind, pid = "driver", process.pid
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself meanwhile
            continue
        tally.kills[kind] += 1
        tally.seen += len(now)
        tally.between += len(now) > len(before)
        before = now
        if kind == "driver":
            process.wait()
            _end_rest(process.pid)
    if process is not None and process.poll() is None:
        try:
            process.wait(240)
        except subprocess.TimeoutExpired:
            tally.gave_up[-1] += 1
            _end_rest(process.pid)
            process.kill()
            process.wait()
        if process.returncode > 0:
            tally.gave_up[process.returncode] += 1
    tally.failed |= {f"{out.name}/{run}": reason for run, reason in failures(out).items()}
    process = start(out, "off", seeds, rounds)
    process.wait(600)
    now = watch(tally, out, before, wanted)
    tally.lost |= {f"{out.name}/{run}" for run in set(wanted) - set(now)}
    tally.tracebacks += out.with_suffix(".said").read_text(errors="replace").count("Traceback (most recent call last)")


def _end_rest(session: int) -> None:
    """Kill what a killed driver has left in its session."""
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def undisturbed(out: Path, seeds: int = SEEDS, rounds: int = 3) -> dict[str, object]:
    """Give what the runs of a sweep have that nobody disturbs."""
    process = start(out, "off", seeds, rounds)
    if process.wait(900):
        raise RuntimeError(out.with_suffix(".said").read_text()[-500:])
    return finished(out)


def main() -> None:
    """Kill as often as was asked for, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of moments and kinds")
    parser.add_argument("--rounds", type=int, default=3, help="of each run")
    parser.add_argument("--runs", type=int, default=36, help="of a sweep, a multiple of three")
    given = parser.parse_args()
    chosen, tally = random.Random(given.seed), Tally()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        here = Path(place)
        wanted = undisturbed(here / "whole", given.runs // 3, given.rounds)
        sweep = 0
        while tally.kills.total() < given.kills:
            sweep += 1
            rest = given.kills - tally.kills.total()
            disturb(tally, here / f"killed-{sweep}", min(rest, 25), wanted, chosen, rounds=given.rounds)
            print(f"sweep {sweep}, {time.monotonic() - began:.0f} s\n{tally}", flush=True)
    sys.exit(0 if tally.held else 1)


if __name__ == "__main__":
    main()
