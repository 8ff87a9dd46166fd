"""Finished folders that were damaged, then read by any command: named, left out, and no number is another."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.attack.checkpoints import cut, flipped, hole
from tests.attack.frame import TRIES, Try, copied
from tests.attack.published import DATA
from tests.attack.verdict import bench, calm, require
from tests.test_validation import folder

AREA = "damaged finished folders, then reading commands"
READING: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "table": lambda out: ("table", "--out", out),
    "csv": lambda out: ("table", "--out", out, "--format", "long"),
    "compare": lambda out: ("compare", "--out", out),
    "status": lambda out: ("status", "--out", out),
    "site": lambda out: ("site", "--out", out, "--to", "site"),
    "validate": lambda out: ("validate", out, *DATA),
    "submit": lambda out: ("submit", out, "--to", "mine.zip", *DATA),
    "pack": lambda out: ("pack", out, "--to", "packed"),
    "clean": lambda out: ("clean", out, "--failed", "--dry-run"),
    "f1": lambda out: ("table", "--out", out, "--metrics", "generic,f1"),
}


def emptied(content: bytes, place: int) -> bytes:
    """Lose everything."""
    return b""


def appended(content: bytes, place: int) -> bytes:
    """Have more than was written."""
    return content + content[:place]


def nested(content: bytes, place: int) -> bytes:
    """Have brackets without an end, as the report's."""
    return content.rstrip()[:-1] + b', "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


def _read(name: str, change: Callable[[bytes, int], bytes], share: float, verb: str) -> None:
    out = copied("published")
    whole = calm(bench("table", "--out", out, "--format", "csv"))
    here = folder(out)
    file = here / name
    content = file.read_bytes()
    damaged = change(content, min(int(share * len(content)), len(content) - 1))
    file.write_bytes(damaged)
    answer = calm(bench(*READING[verb](out)))
    if damaged == content:
        return
    if verb in ("validate", "submit"):
        require(answer.status != 0, "it is taken")
    # of the others nothing is another
    rest = calm(bench("table", "--out", out, "--format", "csv"))
    others = [line for line in whole.out.splitlines() if "ditto" in line or "fedrep" in line]
    require(bool(others) and set(others) <= set(rest.out.splitlines()), "the rows of other runs are others")


def draw(seed: int) -> None:
    """Enter the damage at random places."""
    chosen = random.Random(f"{seed} folders")
    verbs = list(READING)
    number = 0
    for name in ("run.json", "counts.parquet", "predictions.parquet", "rounds.parquet"):
        for change in (cut, flipped, flipped, hole, hole, emptied, appended, cut, flipped, appended):
            act = partial(_read, name, change, chosen.random(), verbs[number % len(verbs)])
            what = f"{name} {change.__name__}, then {verbs[number % len(verbs)]}, {number}"
            TRIES.append(Try(area=AREA, name=what, act=act, needs=("published",)))
            number += 3
            number += number % 10 == 0
    for verb in verbs:
        act = partial(_read, "run.json", nested, 0, verb)
        TRIES.append(Try(area=AREA, name=f"run.json nested, then {verb}", act=act, needs=("published",)))
