"""Kills at random moments, then the same command: nothing finished is lost, and all numbers are as ever."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

from tests.attack.frame import TRIES, Try, made, material
from tests.attack.kills import KINDS, Tally, disturb, finished, undisturbed, words
from tests.attack.verdict import bench, calm, equal, require

AREA = "kill -9 of driver, workers or all, then the same command"
ROUNDS, SEEDS = 3, 4


@made
def whole() -> None:
    """Twelve runs that nobody disturbs."""
    undisturbed(Path("whole").absolute(), SEEDS, ROUNDS)


def _one_process(moments: tuple[float, ...]) -> None:
    """Kill a driver that does its runs itself, some seconds after it has begun to; then the same command."""
    wanted = finished(material("whole") / "whole")
    out = Path("killed").absolute()
    before = dict[str, object]()
    for moment in moments:
        child = os.fork()
        if not child:
            bench(*words(out, "off", SEEDS, ROUNDS))
            os._exit(0)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = finished(out) if out.exists() else {}
        require(set(before) <= set(now), "a finished run is lost")
        before = now
    answer = calm(bench(*words(out, "off", SEEDS, ROUNDS)))
    require(answer.status == 0, f"exit status {answer.status}: {answer.err[-300:]}")
    equal(finished(out), wanted)
    left = [
        path.name
        for path in out.glob("*/*")
        if path.name.startswith(".") or ".tmp" in path.name or "checkpoint" in path.name
    ]
    require(not left, f"left behind: {left}")


def _on_ray(kinds: tuple[str, ...], seed: str) -> None:
    tally = Tally()
    wanted = finished(material("whole") / "whole")
    disturb(tally, Path("killed").absolute(), len(kinds), wanted, random.Random(seed), kinds=kinds, rounds=ROUNDS)
    require(tally.held, str(tally).replace("\n", "; "))
    require(tally.kills["driver"] > 0 or not tally.gave_up, f"the driver gave up: {tally}".replace("\n", "; "))


def draw(seed: int) -> None:
    """Enter the moments: thirty-two in one process, a few for each of Ray's processes."""
    chosen = random.Random(f"{seed} kills")
    for number in range(32):
        moments = tuple(chosen.uniform(0.02, 2.5) for _ in range(1 + number % 3))
        name = f"in one process, {number}: after {', '.join(f'{moment:.2f}' for moment in moments)} s"
        TRIES.append(Try(area=AREA, name=name, act=partial(_one_process, moments), needs=("whole",), seconds=120))
    for kind in KINDS:
        for number in range(2):
            act = partial(_on_ray, (kind, kind, kind), f"{seed} {kind} {number}")
            name = f"on Ray, {kind} three times, {number}"
            TRIES.append(Try(area=AREA, name=name, act=act, needs=("whole",), seconds=420, memory=None, alone=True))
    act = partial(_on_ray, KINDS, f"{seed} all")
    TRIES.append(
        Try(area=AREA, name="on Ray, each once", act=act, needs=("whole",), seconds=600, memory=None, alone=True)
    )
