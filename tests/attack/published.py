"""Finished runs that are tampered with: six on digits with their table, as the tests of validation have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attack.frame import copied, looked_at, made
from tests.attack.verdict import Answer, bench, require
from tests.test_validation import SWEEP, Forger, document, folder, write_table

DATA = ("--data-root", "no data here")
"""Digits need none."""


@made
def published() -> None:
    """Six real runs and their table."""
    from bench.sweep import driver
    from bench.sweep.pool import InProcess

    results = driver.run(SWEEP.expand(), Path(), pool=InProcess())
    require({result.status for result in results} == {"done"}, "the runs failed")
    write_table(Path())


@looked_at("published")
def valid(out: Path) -> None:
    """Validate them once: what a method does on the toy problem is then known."""
    from bench.validation.report import validate

    require(validate(out, Path("no data here")).problems == (), "the runs are not valid")


def validated(out: Path, *more: object) -> Answer:
    """Validate a folder."""
    return bench("validate", out, *DATA, *more)


def forged(change: Callable[[Forger], object], label: str = "fedavg_ft", table: bool = True) -> tuple[Path, str]:
    """Copy the runs, and forge one: give the folder and the id that the run has now."""
    out = copied("published")
    forger = Forger(folder(out, label))
    change(forger)
    here = forger.save()
    if table:
        write_table(out)
    return out, here.name


def altered(change: Callable[[dict[str, Any]], object], label: str = "fedavg_ft") -> tuple[Path, str]:
    """Copy the runs and change a run.json, checksums of tables left as they are: give the folder and the run's id."""
    out = copied("published")
    here = folder(out, label)
    content = document(here)
    change(content)
    (here / "run.json").write_text(json.dumps(content))
    return out, here.name
