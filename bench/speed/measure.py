"""`bench speed`: the sides of each workload take turns, and a document says what came out."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.models import build
from bench.speed import commands, sides
from bench.speed.federation import elsewhere, job
from bench.speed.peers import driver, work
from bench.speed.turns import Ratio, Side, described, take_turns
from bench.speed.workloads import WORKLOADS, Workload
from bench.sweep.actors import hire
from bench.sweep.cluster import MODELS_BYTES, session
from bench.training.engine import choose
from bench.training.rounds import Run

_STARTS = 3
"""Turns of sides that are whole commands, at most: they take seconds and do not differ much."""
_RUNS = 12
"""Of the workload that is a sweep."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be measured, and how."""

    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Of training."""
    repeats: int = 5
    """Turns of each side."""
    workers: int = 1
    """Processes of a run of one thread each, and threads of the bare loop and of peers."""
    peers: bool = False
    """Whether peers take turns too."""
    python: str = sys.executable
    """The interpreter that has them."""

    @property
    def starts(self) -> int:
        """Turns of sides that are whole commands."""
        return min(self.repeats, _STARTS)


def measure(names: Sequence[str], asked: Asked, say: Callable[[str], None] = lambda sentence: None) -> dict[str, Any]:
    """Measure workloads, one after the other.

    Args:
        names: In `WORKLOADS`.
        asked: How.
        say: Told in sentences what is being measured.

    Returns:
        In JSON's types: "machine", "versions", "commit", "threads", "repeats", "peers" (version by name, None where one
        is not installed; None where none were asked for), and "workloads", by name: "what", "auto" (the engine that
        would be taken), "sides" and "ratios" as of `bench.speed.turns.described`, "accuracy" by side of a whole run.
        A ratio to a peer whose accuracy is another says "comparable": false.
    """
    threads = torch.get_num_threads()
    there = driver.installed(asked.python) if asked.peers else None
    try:
        measured = {}
        for name in names:
            say(f"measuring {name}: {WORKLOADS[name].what}")
            with tempfile.TemporaryDirectory(prefix="bench-speed-") as folder:
                measured[name] = of_workload(WORKLOADS[name], Path(folder), asked, there or {})
    finally:
        torch.set_num_threads(threads)
    return {
        **sides.here(),
        "threads": asked.workers,
        "repeats": asked.repeats,
        "peers": there,
        "workloads": measured,
    }


def of_workload(workload: Workload, folder: Path, asked: Asked, there: dict[str, str | None]) -> dict[str, Any]:
    """Measure one workload.

    Args:
        workload: Which.
        folder: Empty, on a disk, for its examples and results.
        asked: How.
        there: Version of each peer that is to take part; None: it is not installed.
    """
    workload.dataset(folder)  # writes what is drawn
    peers = [name for name, version in there.items() if version is not None]
    if workload.measures == "heads":
        return {"what": workload.what, **_of_heads(workload, folder, asked)}
    if workload.measures == "sweep":
        return {"what": workload.what, **_of_sweep(workload, folder, asked, peers)}
    if peers:
        work.write(folder, job(workload, folder))
    found = [_of_training(workload, folder, asked, peers), _of_starts(workload, folder, asked)]
    accuracy: dict[str, float] = {}
    if peers:
        found.append(_of_whole_runs(workload, folder, asked, peers, accuracy))
    together: dict[str, Any] = {
        "sides": {name: side for part in found for name, side in part["sides"].items()},
        "ratios": [ratio for part in found for ratio in part["ratios"]],
    }
    for name, version in there.items():
        if version is None:
            together["sides"][name] = None
    own = accuracy.get(_whole("fp32")) if accuracy else None
    for ratio in together["ratios"]:
        peer = ratio["to"].removeprefix(_WHOLE)
        if peer in peers:
            its = accuracy.get(_whole(peer))
            ratio["comparable"] = own is not None and its is not None and abs(own - its) <= driver.TOLERANCE
    return {"what": workload.what, "auto": _auto(workload, folder), **together, "accuracy": accuracy}


_WHOLE = "whole run, "


def _whole(what: str) -> str:
    return _WHOLE + what


def _auto(workload: Workload, folder: Path) -> str:
    """Name the engine that `--engine auto` takes."""
    dataset = workload.dataset(folder)
    model = build(workload.model, dataset.num_classes, dataset.image_shape, workload.norm)
    return choose("auto", model, workload.batch, "cpu")


def _of_training(workload: Workload, folder: Path, asked: Asked, peers: Sequence[str]) -> dict[str, Any]:
    """Train, test, run the bare loop, and have peers train."""
    first = f"{workload.engines[0]} {asked.precisions[0]}"
    ratios = [Ratio("evaluation", first, "time")]
    with ExitStack() as stack:
        taking: list[Side] = []
        hired = stack.enter_context(_crews(asked.workers, len(workload.engines) * len(asked.precisions)))
        for precision in asked.precisions:
            floor = f"bare {precision}"
            for engine in workload.engines:
                crew = stack.enter_context(hired(partial(elsewhere, workload, folder, engine, precision)))
                run = Run(job(workload, folder, engine, precision), crew=crew)
                name = f"{engine} {precision}"
                taking.append(sides.federated(name, run))
                if name == first:
                    taking.append(sides.evaluation("evaluation", run))
                ratios += [Ratio(name, other) for other in (floor, *peers)]
            taking.append(sides.bare(floor, job(workload, folder), precision, asked.workers))
            ratios += [Ratio(f"{engine} {precision}", first) for engine in workload.engines[1:]]
        for peer in peers:
            taking.append(stack.enter_context(driver.at_work(peer, folder, asked.workers, asked.python)))
        return described(take_turns(taking, asked.repeats, workload.warm), ratios)


@contextmanager
def _crews(workers: int, runs: int) -> Iterator[Callable[..., Any]]:
    """Give what hires a crew for each of some runs, which take turns: actors that wait need no core."""
    with ExitStack() as stack:
        if workers > 1:
            stack.enter_context(session(1 + runs * workers, shared_bytes=MODELS_BYTES))
        yield lambda make: hire(workers, "cpu", (), make)


def _of_starts(workload: Workload, folder: Path, asked: Asked) -> dict[str, Any]:
    """Run the command until its first round has ended."""
    taking = [commands.first_round("first round", workload, folder, 1)]
    if asked.workers > 1:
        taking.append(commands.first_round(f"first round, {asked.workers} workers", workload, folder, asked.workers))
    return described(take_turns(taking, asked.starts, warm=0), [])


def _of_whole_runs(
    workload: Workload, folder: Path, asked: Asked, peers: Sequence[str], accuracy: dict[str, float]
) -> dict[str, Any]:
    """Do whole runs by one command each, from start to end."""
    taking, ratios = [], []
    for precision in asked.precisions:
        name = _whole(precision)
        taking.append(commands.whole_run(name, workload, folder, precision, asked.workers, accuracy))
        ratios += [Ratio(name, _whole(peer)) for peer in peers]
    for peer in peers:
        name = _whole(peer)
        taking.append(driver.whole_run(name, peer, folder, asked.workers, workload.rounds, asked.python, accuracy))
    return described(take_turns(taking, asked.starts, warm=0), ratios)


def _of_heads(workload: Workload, folder: Path, asked: Asked) -> dict[str, Any]:
    generic, personal = sides.heads(workload, folder)
    return described(take_turns([generic, personal], asked.repeats), [Ratio(personal.name, generic.name, "time")])


def _of_sweep(workload: Workload, folder: Path, asked: Asked, peers: Sequence[str]) -> dict[str, Any]:
    """Do some runs on two cores and on one, and have two copies of the plain loop do as many side by side."""
    both, one = f"{_RUNS} runs, 2 at once", f"{_RUNS} runs, one process"
    taking = [
        commands.sweep(both, workload, folder, _RUNS, 2),
        commands.sweep(one, workload, folder, _RUNS, None),
    ]
    ratios = [Ratio(both, one, "time")]
    if peers:
        work.write(folder, job(workload, folder))
        peer = f"two plain loops, {_RUNS // 2} runs each"
        taking.append(driver.side_by_side(peer, "plain loop", folder, workload.rounds, _RUNS // 2, asked.python))
        ratios.append(Ratio(both, peer, "time"))
    return described(take_turns(taking, asked.starts, warm=0), ratios)
