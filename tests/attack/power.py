"""A loss of power at any moment of whole runs: `python -m tests.attack.power`.

Nothing but what was fsynced is sure, see `tests.power`. Of each moment is made what a disk may then hold, and the same
command is typed again: finished runs, checkpoints, states in files, kept models, sweeps with their journals, packs of
results, a file of packed images. What was reported as safe must be there, and all numbers must be as ever.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import DataDamaged, DataMissing
from bench.results import packing, records
from bench.sweep import driver, execution
from bench.sweep.config import Sweep, parse_algorithms, parse_datasets
from bench.sweep.journal import Journal
from bench.sweep.pool import InProcess
from bench.sweep.run import Run
from bench.training import rounds, states
from tests.attack.verdict import bench, require
from tests.power import Disk, restore

Numbers = dict[str, object]
"""Digest, metrics and checksums of tables, by run."""


def runs(algorithms: str, count: int = 3, seeds: tuple[int, ...] = (0,)) -> tuple[Run, ...]:
    """Give short runs on digits."""
    asked = Sweep(
        algorithms=tuple(parse_algorithms(algorithms)),
        datasets=tuple(parse_datasets("digits")),
        seeds=seeds,
        overrides={"rounds": count, "epochs": 1, "clients": 8},
        data_root=Path("no data here"),
    )
    return tuple(asked.expand())


def numbers(out: Path) -> Numbers:
    """Read the finished runs of a folder.

    Raises:
        AssertionError: Some are damaged.
    """
    found, damaged = records.read_all(out)
    assert not damaged, damaged
    keys = ("digest", "metrics", "tables")
    return {record.id: [record.document[key] for key in keys] for record in found if record.status == "done"}


@dataclass
class Count:
    """What came of the moments of a scene."""

    moments: int = 0
    tried: int = 0
    equal: int = 0
    """As ever after the same command."""
    lost: int = 0
    """Safe, and yet not there."""
    changed: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Scene:
    """Something that is written, watched meanwhile, and repeated after a loss of power."""

    write: Callable[[Path, Disk | None], object]
    """To a folder; sets `Disk.safe` to how much is safe from then on."""
    safe: Callable[[Path], int]
    """How much of what was safe a folder still has."""
    numbers: Callable[[Path], object]


def _sweep(asked: tuple[Run, ...], keep_models: bool, out: Path, disk: Disk | None) -> None:
    journal = Journal(out, "bench run")
    with journal:
        for number, run in enumerate(asked, start=1):
            driver.run([run], out, pool=InProcess(), watchers=[journal], keep_models=keep_models)
            if disk is not None:
                disk.safe = number
                disk.note()


def _finished(asked: tuple[Run, ...], keep_models: bool, out: Path) -> int:
    return sum(execution.finished(run, out, models=keep_models) for run in asked)


def _packed(known: list[records.Record], to: Path, disk: Disk | None) -> None:
    for number in (2, 4, len(known)):
        packing.pack(known[:number], to)
        if disk is not None:
            disk.safe = number
            disk.note()


def _images(out: Path, disk: Disk | None) -> None:
    """A file that is there is left: it must then be whole, or nobody ever gets another of that name."""
    require(bench("data", "pack", "digits", "--imbalance", 10, "--out", out / "pack.npz").status in (0, 2), "no file")


def _images_safe(out: Path) -> int:
    """Require that what is left of a file of images is whole or refused."""
    with suppress(DataDamaged, DataMissing):
        _images_read(out)
    return 0


def _images_read(out: Path) -> object:
    from bench.files import source

    digits = parse_datasets("digits")[0]
    splits = source.load(digits, out / "pack.npz")
    return [splits.train_y.tolist(), splits.test_y.tolist(), int(torch.as_tensor(splits.train_x).sum())]


def scenes(place: Path) -> dict[str, Scene]:
    """Give what is tried; runs to be packed are made in a folder."""
    plain, models, several = runs("fedper"), runs("fedrep(head_epochs=1)", 1), runs("fedavg,ditto", 2)
    driver.run(runs("fedavg,fedper,ditto", 1, (0, 1)), place / "made", pool=InProcess())
    known = records.read_all(place / "made")[0]
    return {
        "a run and its checkpoints": Scene(partial(_sweep, plain, False), partial(_finished, plain, False), numbers),
        "a run and its states in a file": Scene(
            partial(_sweep, plain, False), partial(_finished, plain, False), numbers
        ),
        "a run that keeps its models": Scene(partial(_sweep, models, True), partial(_finished, models, True), numbers),
        "a sweep and its journal": Scene(partial(_sweep, several, False), partial(_finished, several, False), numbers),
        "a pack of results": Scene(partial(_packed, known), lambda out: len(numbers(out)), numbers),
        "a file of images": Scene(_images, _images_safe, _images_read),
    }


def cut(scene: Scene, place: Path, chosen: random.Random, most: int) -> Count:
    """Cut the power at moments of a scene.

    Args:
        scene: What is written.
        place: A new folder for all that is written.
        chosen: Of moments, where there are too many.
        most: So many moments are tried.
    """
    count = Count()
    place.mkdir()
    scene.write(place / "whole", None)
    wanted = scene.numbers(place / "whole")
    (place / "powered").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(place / "powered", patch)
        scene.write(place / "powered", disk)
        disk.note()
    disk.close()
    count.moments = len(disk.moments)
    picked = disk.moments if len(disk.moments) <= most else chosen.sample(disk.moments, most)
    for number, moment in enumerate(picked):
        after = place / f"after-{number}"
        restore(moment.files, after)
        count.tried += 1
        try:
            count.lost += scene.safe(after) < moment.safe
            scene.write(after, None)
            equal = scene.numbers(after) == wanted
            count.equal += equal
            count.changed += not equal
        except Exception as error:  # whatever it is, it is to be told and counted
            count.wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
        shutil.rmtree(after)
    return count


def prepared(name: str, patch: pytest.MonkeyPatch) -> None:
    """Save after every round; keep states in a file where the scene is called so."""
    patch.setattr(rounds.Run, "_is_due", lambda run: True)
    if "states" in name:
        patch.setattr(states, "IN_MEMORY_BYTES", 0)


def main() -> None:
    """Cut the power, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=150, help="tried of each scene, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments that are tried")
    given = parser.parse_args()
    began, chosen, held = time.monotonic(), random.Random(given.seed), True
    print("| what is written | moments | tried | equal | safe and lost | changed | errors |")
    print("|---|--:|--:|--:|--:|--:|---|")
    with tempfile.TemporaryDirectory(prefix="power-") as folder:
        for number, (name, scene) in enumerate(scenes(Path(folder)).items()):
            with pytest.MonkeyPatch.context() as patch:
                prepared(name, patch)
                one = cut(scene, Path(folder) / str(number), chosen, given.moments)
            errors = f"{len(one.wrong)}: {one.wrong[0]}" if one.wrong else "none"
            cells: list[Any] = [name, one.moments, one.tried, one.equal, one.lost, one.changed, errors]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            held &= one.equal == one.tried and not one.lost
    print(f"\n{time.monotonic() - began:.0f} s, seed {given.seed}")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
