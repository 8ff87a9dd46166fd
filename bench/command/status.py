"""`bench status`: how the sweeps of a folder stand, from another shell than theirs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bench.command.stored import require_folder, stored_in
from bench.system import reading
from bench.system.text import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bench.sweep.journal import Entry, Sweep

State = Literal["running", "waiting", "failed", "done"]

_WATCH_SECONDS, _WATCH_LINES_SECONDS = 1.0, 10.0
_MOST_WAITING = 5
_MOST_BYTES = 256 << 20
"""Of what a run says of its rounds: half a kilobyte each."""
"""Waiting runs that are named."""


@click.command("status")
@stored_in()
@click.option("--watch", is_flag=True, help="Again and again, until no driver is at work.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; with --watch one a line.")
def status_command(out: Path, watch: bool, as_json: bool) -> None:
    """Say how far a sweep is that runs elsewhere: who drives it, what is running, failed and waiting.

    Nothing is asked of the driver, files tell: it may have been killed, and then that is said.

    \b
    bench status
    bench status results --watch
    """
    require_folder(out)
    if watch and not as_json:
        _watch(out)
        return
    while True:
        found = look(out)
        click.echo(json.dumps(found.as_json(), indent=None if watch else 2)) if as_json else _print(found)
        if not watch or not found.at_work:
            return
        time.sleep(_WATCH_LINES_SECONDS)


# What there is ----------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """How a run stands."""

    id: str
    title: str
    state: State
    rounds: int | None = None
    starts: int = 0
    round: int | None = None
    """Completed; None where nothing is known."""
    left: float | None = None
    """Seconds, of one that is running."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    reason: str | None = None


@dataclass
class Found:
    """How the sweeps of a folder stand."""

    drivers: list[Sweep]
    runs: list[_Run]
    left: float | None
    """Seconds until all has ended; None where nobody knows, or nobody is at work."""
    sign_of_life: Mapping[int, float]
    """By a driver's number, when it was last heard of, in seconds since 1970."""

    @property
    def at_work(self) -> bool:
        """Whether a driver is at work, or may be."""
        return any(driver.fate in ("working", "unknown") for driver in self.drivers)

    def of(self, state: State) -> list[_Run]:
        """Give the runs that stand so."""
        return [run for run in self.runs if run.state == state]

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON's types."""
        drivers = [
            {
                "pid": driver.pid,
                "host": driver.host,
                "began": _iso(driver.began),
                "ended": None if driver.ended is None else _iso(driver.ended),
                "state": driver.fate,
                "heard": _iso(self.sign_of_life[driver.pid]),
                "command": driver.command,
                "runs": len(driver.runs),
            }
            for driver in self.drivers
        ]
        states: tuple[State, ...] = ("running", "waiting", "failed", "done")
        counts = {state: len(self.of(state)) for state in states}
        runs = [
            {
                "id": run.id,
                "title": run.title,
                "status": run.state,
                "round": run.round,
                "rounds": run.rounds,
                "starts": run.starts,
                "left_seconds": run.left,
                "metrics": dict(run.metrics),
                "reason": run.reason,
            }
            for run in self.runs
        ]
        return {"drivers": drivers, "counts": counts, "left_seconds": self.left, "runs": runs}


def look(out: Path) -> Found:
    """Look at a folder of results: at what drivers have noted, at runs' progress, at what is finished."""
    from bench.sweep import journal
    from bench.sweep.schedule import Outlook

    drivers = journal.read(out)
    now = time.time()
    noted: dict[str, tuple[Entry, Sweep]] = {}
    for driver in drivers:
        for run_id, entry in driver.runs.items():
            if run_id not in noted or entry.state != "cached":  # whoever came later knows more, unless it did not do it
                noted[run_id] = entry, driver
    at_work = {run_id for run_id, (_, driver) in noted.items() if driver.fate in ("working", "unknown")}
    known = {run_id: entry.forecast for run_id, (entry, _) in noted.items() if entry.forecast is not None}
    outlook = Outlook({run_id: noted[run_id][0].cell for run_id in at_work}, known)
    runs: dict[str, _Run] = {}
    heard = {driver.pid: driver.ended or _time_of(out, driver) for driver in drivers}
    for run_id, (entry, driver) in noted.items():
        runs[run_id] = run = _as_noted(out, run_id, entry, driver.fate)
        if run_id in at_work:
            _tell(outlook, run_id, entry, now)
        if run.state == "running" and (report := _latest(out, run_id)) is not None:
            last, at = report
            run.round, run.metrics = last["round"], last["metrics"]
            outlook.progressed(run_id, last["round"], last["rounds"], last["seconds"], at)
            heard[driver.pid] = max(heard[driver.pid], at)
    for run in runs.values():
        if run.state == "running":
            run.left = outlook.left_of(run.id, now)
    for run in _stored(out):  # of sweeps that have left no notes, and of other drivers
        if run.id not in runs or (run.state == "done" and run.id not in at_work):
            runs[run.id] = run
    return Found(drivers, list(runs.values()), outlook.left(now) if at_work else None, heard)


def _as_noted(out: Path, run_id: str, entry: Entry, fate: str) -> _Run:
    """Give how a run stands after its driver's notes: of a driver that is dead, what was running waits."""
    from bench.results.claims import is_claimed

    run = _Run(run_id, entry.title, "waiting", rounds=entry.rounds, starts=entry.starts, reason=entry.reason)
    if entry.state in ("done", "cached"):
        run.state, run.round, run.reason = "done", entry.rounds, None
    elif entry.state == "failed":
        run.state = "failed"
    elif entry.state == "running" and (fate in ("working", "unknown") or is_claimed(out / run_id)):
        run.state = "running"
    elif entry.state == "running":
        checkpoint = (out / run_id / "checkpoint.pt").is_file()
        run.reason = "its driver ended; " + ("it goes on from a checkpoint" if checkpoint else "it begins anew")
    return run


def _tell(outlook: Any, run_id: str, entry: Entry, now: float) -> None:
    """Tell the outlook what has become of a run."""
    if entry.state == "running":
        outlook.started(run_id, entry.began or now)
    elif entry.state in ("done", "cached", "failed"):
        outlook.ended(run_id, entry.seconds if entry.state == "done" else None)


def _latest(out: Path, run_id: str) -> tuple[dict[str, Any], float] | None:
    """Give the last report of a run, the last metrics in it, and when it was written; see `bench.sweep.watch`."""
    file = out / run_id / "progress.jsonl"
    try:
        lines, at = reading.contents(file, _MOST_BYTES, links=False).split(b"\n")[:-1], file.stat().st_mtime
        last = json.loads(lines[-1])
        measured: dict[str, Any] = next(filter(None, (json.loads(line)["metrics"] for line in reversed(lines))), {})
        numbers = (*(last[key] for key in ("round", "rounds", "seconds")), *measured.values())
        if not all(isinstance(each, int | float | None) for each in numbers) or None in numbers[:3]:
            raise ValueError("another version's")
        return {**last, "metrics": measured}, at
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # none yet, or gone meanwhile
        return None


def _stored(out: Path) -> list[_Run]:
    """Give the finished and failed runs of a folder and its packs, without looking at their numbers."""
    from bench.results import packed, record

    texts: dict[str, bytes] = {}
    for pack in packed.packs(out):
        with suppress(record.DamagedResult):  # 'bench table' says so
            texts |= packed.documents(pack)
    for path in sorted(out.glob("*/run.json")):
        with suppress(OSError, reading.TooLarge):
            texts[path.parent.name] = record.stored(path.parent)
    found = []
    for run, text in texts.items():
        try:
            document: Any = record.parse(text)
            alpha = "" if document["alpha"] is None else f", alpha {document['alpha']:g}"
            factor = "natural" if document["imbalance"] is None else f"{document['imbalance']:g}"
            what = f"{document.get('label') or document['algorithm']} on {document['dataset']}"
            title = f"{what}, imbalance {factor}{alpha}, seed {document['seed']}"
            state: State = "done" if document["status"] == "done" else "failed"
            found.append(_Run(run, title, state, reason=document.get("reason")))
        except (ValueError, KeyError, TypeError, RecursionError):  # damaged
            continue
    return found


def _time_of(out: Path, driver: Sweep) -> float:
    from bench.sweep.journal import FOLDER

    files = (out / FOLDER).glob(f"{driver.pid}-*.json")
    return max((file.stat().st_mtime for file in files), default=driver.began)


# How it is said ---------------------------------------------------------------------------------------------


def _watch(out: Path) -> None:
    """Show how things stand until no driver is at work: in place on a terminal, else now and then below."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        while True:
            found = look(out)
            _print(found)
            if not found.at_work:
                return
            click.echo()
            time.sleep(_WATCH_LINES_SECONDS)
    with Live(_lines(look(out), console.height), console=console, auto_refresh=False) as live:
        while True:
            found = look(out)
            live.update(_lines(found, console.height), refresh=True)
            if not found.at_work:
                return
            time.sleep(_WATCH_SECONDS)


def _lines(found: Found, height: int) -> RenderableType:
    """Fit what is said to a terminal: the most important is at the top."""
    from rich.text import Text

    return Text("\n".join(say(found)[: max(height - 1, 1)]), no_wrap=True, overflow="ellipsis")


def _print(found: Found) -> None:
    click.echo("\n".join(say(found)))


def say(found: Found) -> list[str]:
    """Say in lines how things stand."""
    from bench.face.wording import accuracy, duration

    now = time.time()
    lines = [_driver(driver, found.sign_of_life[driver.pid], now) for driver in found.drivers]
    if not found.drivers:
        lines = ["driver   none"]
    counts = [f"{len(found.of(state))} {state}" for state in ("done", "failed", "running", "waiting")]
    left = "" if found.left is None else f"; about {duration(found.left)} left"
    lines += [f"{len(found.runs)} runs: {', '.join(counts)}{left}"]
    for run in found.of("running"):
        how = "begins" if run.round is None else f"round {run.round} of {run.rounds}, {accuracy(run.metrics)}"
        left = "" if run.left is None else f", {duration(run.left)} left"
        again = f", start {run.starts}" if run.starts > 1 else ""
        lines.append(f"  running  {run.id}  {run.title}: {how}{left}{again}")
    lines += [f"  failed   {run.id}  {run.title}: {run.reason}" for run in found.of("failed")]
    waiting = sorted(found.of("waiting"), key=lambda run: run.reason is None)  # those with a story first
    for run in waiting[:_MOST_WAITING]:
        lines.append(f"  waiting  {run.id}  {run.title}{'' if run.reason is None else ': ' + run.reason}")
    if len(waiting) > _MOST_WAITING:
        lines.append(f"  waiting  and {len(waiting) - _MOST_WAITING} more")
    return [*map(plain, lines)]


def _driver(driver: Sweep, heard: float, now: float) -> str:
    """Say in a line who drives, and whether it still does."""
    from bench.face.wording import duration

    who = f"process {driver.pid} on {driver.host}, since {_iso(driver.began)}"
    ago = f"last heard of {duration(max(now - heard, 0.0))} ago"
    if driver.fate == "working":
        return f"driver   {who} ({duration(now - driver.began)}): at work"
    if driver.fate == "ended":
        return f"driver   {who}: ended at {_iso(heard)}"
    if driver.fate == "unknown":
        return f"driver   {who}: on another machine, {ago}"
    return f"driver   {who}: died, {ago}; the same command goes on: {driver.command}"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")
