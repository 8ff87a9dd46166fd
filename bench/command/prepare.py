"""`bench data prepare` and `bench data check`: photographs into a store, and what is wrong with files."""

from __future__ import annotations

from pathlib import Path

import click

from bench.face.bar import Bar
from bench.system.text import plain

_SHOWN = 20
"""Broken photographs that are named; a file has them all."""

_ROOT = click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder of all datasets; else $BENCH_DATA, else the user's cache.",
)
_JOBS = click.option(
    "--jobs", type=click.IntRange(min=1), help="Processes at once, on Ray; 1: this one. Default: what the machine has."
)


@click.command("prepare")
@click.argument("name")
@click.option("--size", type=int, help="Height and width in pixels; the middle square is kept.")
@_JOBS
@_ROOT
def prepare_command(name: str, size: int | None, jobs: int | None, data_root: Path | None) -> int:
    """Decode the photographs of the dataset NAME once, so that runs read pixels.

    Interrupted or killed, it goes on with the same command. A photograph that cannot be decoded does not keep the
    others; exit status 3 says that there are such.

    \b
    bench data prepare inat --size 64
    bench data prepare "inat(version=2019)" --size 224 --jobs 16
    """
    from dataclasses import replace

    from bench.dataset import DataDamaged
    from bench.files import data_root as choose
    from bench.files.photographs import Photographs
    from bench.preparing import preparation
    from bench.protocol.settings import BadConfig
    from bench.sweep.config import parse_dataset

    dataset, root = parse_dataset(name), choose(data_root)
    if not isinstance(dataset, Photographs):
        click.echo(f"{name} needs no preparation: its files are read as they are")
        return 0
    if root.is_file():
        click.echo(f"{root} is a pack: its images are decoded already")
        return 0
    if size is not None:
        try:
            dataset = replace(dataset, pixels=size)
        except ValueError as error:
            raise BadConfig(f"--size {size}: {error}") from error
    with Bar("images") as display:
        try:
            done = preparation.prepare(dataset, root, jobs, display)
        except KeyboardInterrupt:
            kept = f"; {display.done:,} of {display.total:,} photographs are decoded and kept" if display.total else ""
            display.say(f"bench: interrupted{kept}; the same command goes on")
            return 130
    if done.store is None:
        for path, why in done.broken[:_SHOWN]:
            click.echo(plain(f"{path}: {why}"), err=True)
        raise DataDamaged(done.complaint(name))
    plan, what = done.store.plan, "prepared" if done.decoded else "already prepared"
    shape = " x ".join(map(str, plan.shape))
    click.echo(f"{what}: {plan.train:,} training and {plan.test:,} test images of {shape} in {done.folder}")
    return 0


@click.command("check")
@click.argument("name")
@_JOBS
@_ROOT
def check_command(name: str, jobs: int | None, data_root: Path | None) -> int:
    """Read all files of the dataset NAME and list all that is wrong with them; exit status 3 if anything is.

    Photographs are decoded, each of them, and a prepared store is compared with its checksums.
    """
    from bench.dataset import DataDamaged
    from bench.files import data_root as choose
    from bench.plugins import registry
    from bench.preparing import preparation
    from bench.sweep.config import parse_dataset

    dataset, root = parse_dataset(name), choose(data_root)
    with Bar("images") as display:
        try:
            checked = preparation.check(dataset, root, jobs, display)
        except KeyboardInterrupt:
            display.say("bench: interrupted; the check is not complete")
            return 130
    if not checked.problems:
        click.echo(f"{name}: {checked.contents}, as they should be")
        return 0
    for problem in checked.problems:
        click.echo(plain(problem))
    first, *others = checked.problems
    for said in (registry.label(dataset), registry.name(dataset)):  # many a sentence begins with whose it is
        first = first.removeprefix(f"{said}: ")
    if not others:
        raise DataDamaged(f"{name}: {first}")
    many = f"{len(checked.problems):,} problems, listed on standard output; the first: {first}"
    raise DataDamaged(f"{name}: {checked.contents}; {many}")
