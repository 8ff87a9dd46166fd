"""`bench data`: fetch and check the official files, look at how a dataset is split, and pack a subset of it."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command.embed import embed_command
from bench.command.prepare import check_command, prepare_command
from bench.command.typed import Verbs
from bench.face.asked import DEFAULT_SETTING
from bench.face.preparing import prepare_own

if TYPE_CHECKING:
    from bench.dataset import Dataset, Labels, Splits
    from bench.files.download import Report
    from bench.protocol.settings import Setting
    from bench.splits.split import Split

_FOLDER, _ROOT = (
    click.option(
        "--data-root",
        type=click.Path(path_type=Path),
        help=f"Folder of all datasets{or_pack}; else $BENCH_DATA, else the user's cache.",
    )
    for or_pack in ("", ", or a file of 'bench data pack'")
)
_LINE_SECONDS = 10.0
"""Least time between two lines about a download, where there is no bar."""


@click.group("data", cls=Verbs, short_help="Fetch, check, prepare, look at and pack datasets.")
def data_command() -> None:
    """Fetch, check, prepare, look at and pack datasets.

    \b
    bench data fetch cifar10
    bench data check cifar10 --data-root /data
    bench data prepare inat --size 64
    bench data stats cifar10 --imbalance 50 --alpha 0.5 --clients 40 --partition fedloge --seed 3407
    bench data pack cifar10 --imbalance 100 --out pack.npz
    """


for _command in (check_command, prepare_command, embed_command):
    data_command.add_command(_command)


# Fetch ------------------------------------------------------------------------------------------------------


@data_command.command("fetch")
@click.argument("name")
@_FOLDER
@click.option("--yes", is_flag=True, help="Do not ask before the download.")
def fetch_command(name: str, data_root: Path | None, yes: bool) -> int:
    """Download the official files of the dataset NAME, unless they are there.

    Interrupted, the same command goes on where it stopped.
    """
    from bench import files
    from bench.dataset import DataMissing, Dataset
    from bench.files.download import free, reporting
    from bench.files.photographs import Photographs
    from bench.sweep.config import parse_dataset

    dataset, root = parse_dataset(name), files.data_root(data_root)
    if root.is_file():
        raise click.BadParameter(f"{root} is a file; downloads go to a folder", param_hint="--data-root")
    try:
        click.echo(f"already there: {_summary(dataset, name, dataset.load(root), root)}")
        return 0
    except DataMissing:
        if type(dataset).fetch is Dataset.fetch:  # it cannot be downloaded; what to do instead was just said
            raise
    # Where nothing can be downloaded there is nothing to ask: `fetch` says what to do instead.
    if dataset.size != "nothing to download" and getattr(dataset, "remotes", True):
        size = dataset.size or "files of unknown size"
        question = f"{name}: download {size} from {dataset.source} to {root}, where {free(root) / 1e9:,.1f} GB are free"
        click.echo(question, err=True)
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("nobody is there to answer whether to download; use --yes")
            click.confirm("go on?", default=True, abort=True, err=True)
    try:
        with _progress() as report, reporting(report):
            dataset.fetch(root)
    except KeyboardInterrupt:
        again = shlex.join(["bench", *sys.argv[1:]])
        click.echo(f"bench: interrupted: what was downloaded is kept. The same command goes on: {again}", err=True)
        return 130
    if isinstance(dataset, Photographs):
        click.echo(f"{name}: the files are there; run next, once: {dataset.prepare_command(root)}")
    else:
        click.echo(_summary(dataset, name, dataset.load(root), root))
    return 0


@contextmanager
def _progress() -> Iterator[Report]:
    """Show transfers: a bar on a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), DownloadColumn(), Speed())
    bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)
    tasks: dict[str, TaskID] = {}
    said: dict[str, float] = {}

    def report(what: str, done: int, total: int | None) -> None:
        if console.is_terminal:
            if what not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)
        elif time.monotonic() - said.get(what, -_LINE_SECONDS) >= _LINE_SECONDS or done == total:
            said[what] = time.monotonic()
            of = "" if total is None else f" of {total / 1e6:,.1f}"
            console.print(f"{what}: {done / 1e6:,.1f}{of} MB", markup=False)

    with bars:
        yield report


def _summary(dataset: Dataset, name: str, splits: Splits, root: Path) -> str:
    """Say what was read."""
    shape = " x ".join(map(str, dataset.image_shape))
    what = "images" if len(dataset.image_shape) == 3 else "examples"
    return (
        f"{name}: {len(splits.train_y):,} training and {len(splits.test_y):,} test {what} of {shape}, "
        f"{dataset.num_classes:,} classes (data root {root})"
    )


# Pack -------------------------------------------------------------------------------------------------------


@data_command.command("pack")
@click.argument("name")
@click.option("--imbalance", help="Largest class over smallest of the training subset; 1 packs everything.")
@click.option("--profile", help="Shape of the long tail: exponential, step or pareto.")
@_ROOT
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="PACK.npz", help="File to write.")
def pack_command(name: str, imbalance: str | None, profile: str | None, data_root: Path | None, out: Path) -> None:
    """Write a part of the dataset NAME to one file, for machines without a network.

    The file holds the images of the long-tailed training set and the test part, and all labels. With
    `--data-root PACK.npz`, runs at that imbalance or a larger one, at any seed and partition, give what they give from
    the official files. A naturally long-tailed dataset is packed whole.
    """
    import torch

    from bench import files
    from bench.files import pack, source
    from bench.splits.longtail import subsample
    from bench.sweep.config import parse_dataset, parse_imbalance
    from bench.sweep.resolving import resolve_setting

    dataset = parse_dataset(name)
    given: dict[str, object] = {} if profile is None else {"profile": profile}
    if imbalance is not None:
        given["imbalance"] = parse_imbalance(imbalance)
    elif dataset.tail == "made":
        raise click.UsageError(f"{name} is balanced: say with --imbalance which long-tailed part to pack, or 1 for all")
    setting = resolve_setting(DEFAULT_SETTING, dataset, given)
    if profile is not None and setting.imbalance is None:
        raise click.UsageError(f"--profile {profile}: {name} is packed as it is, and not cut")
    if out.suffix != ".npz" or out.exists():
        why = "is there already" if out.exists() else "must end in .npz"
        raise click.BadParameter(f"{out} {why}; choose another name", param_hint="--out")
    prepare_own([dataset], files.data_root(data_root))
    source.verify(dataset, files.data_root(data_root))
    splits = source.load(dataset, files.data_root(data_root))
    rows = subsample(splits.train_y, dataset.num_classes, setting.profile, setting.imbalance)
    try:
        packed = pack.write(out, dataset, splits, torch.from_numpy(rows), setting.profile, setting.imbalance)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not error.errno:  # ours, which is a sentence
            raise
        raise click.BadParameter(f"{out} cannot be written ({error})", param_hint="--out") from error
    click.echo(
        f"{out}: {packed} and {len(splits.test_y):,} test images, {out.stat().st_size / 1e6:,.1f} MB, fingerprint "
        f"{packed.fingerprint}; use it with --data-root {shlex.quote(str(out))}"
    )


# Stats ------------------------------------------------------------------------------------------------------


@data_command.command("stats")
@click.argument("name")
@click.option("--imbalance", help="Largest class over smallest; a value in (0, 1) is its inverse.")
@click.option("--alpha", type=float, help="Concentration of the partition; small is more skewed.")
@click.option("--clients", type=int, help="Number of clients.")
@click.option("--partition", help="How images are dealt to clients; see 'bench list partitions'.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the run.")
@click.option("--profile", help="Shape of the long tail: exponential, step or pareto.")
@click.option("--setting", default=DEFAULT_SETTING, show_default=True, help="Named protocol that says the rest.")
@click.option(
    "--set", "fields", multiple=True, metavar="FIELD=VALUE", help="Any other field of the setting; repeatable."
)
@_ROOT
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--out", type=click.Path(path_type=Path), metavar="PICTURE.png", help="Draw the split to a file as well.")
def stats_command(
    name: str,
    imbalance: str | None,
    seed: int,
    setting: str,
    fields: tuple[str, ...],
    data_root: Path | None,
    as_json: bool,
    out: Path | None,
    **overrides: Any,
) -> None:
    """Show how the dataset NAME is split: its long tail, its clients, and how different they are.

    It is the split of `bench run` with the same options and seed. Only labels are read.
    """
    from bench import files
    from bench.files import source
    from bench.protocol.spelling import parse_assignments
    from bench.splits.split import class_table, describe, make_split
    from bench.sweep.config import parse_dataset, parse_imbalance
    from bench.sweep.resolving import resolve_setting

    dataset = parse_dataset(name)
    given = parse_assignments(fields) | {field: value for field, value in overrides.items() if value is not None}
    if imbalance is not None:
        given["imbalance"] = parse_imbalance(imbalance)
    resolved = resolve_setting(setting, dataset, given)
    labels = source.labels(dataset, files.data_root(data_root))
    split = make_split(labels, dataset.num_classes, resolved, seed)
    document = describe(labels, split, dataset.num_classes, resolved.groups)
    title = _title(name, resolved, split, seed)
    if out is not None:
        _save(out, title, document, class_table(labels, split, dataset.num_classes))
    if as_json:
        click.echo(json.dumps(document))
    else:
        _print(title, document, labels, split)
        if (said := dataset.test_part(files.data_root(data_root))) is not None:
            click.echo(f"{'test part':<20} {said}")


def _title(name: str, setting: Setting, split: Split, seed: int) -> str:
    tail = "natural tail" if setting.imbalance is None else f"{setting.profile} imbalance {setting.imbalance:g}"
    own = [] if setting.alpha is None else [f"alpha {setting.alpha:g}"]
    if setting.partition == "classes":
        own += [f"{setting.classes_per_client} a client", f"{setting.sizes} sizes"]
    how = f" ({', '.join(own)})" if own else ""
    return f"{name}, {tail}, {len(split.clients):,} clients by {setting.partition}{how}, seed {seed}"


def _save(out: Path, title: str, document: dict[str, Any], table: Any) -> None:
    from bench.command.picture import save

    try:
        save(out, title, document, table)
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{out} cannot be drawn ({error})", param_hint="--out") from error
    click.echo(f"picture: {out}", err=True)


def _print(title: str, document: dict[str, Any], labels: Labels, split: Split) -> None:
    import numpy as np
    from rich.console import Console

    from bench.command.picture import bars, client_table, spans
    from bench.splits.split import class_table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    counts = np.array(document["class_counts"])
    console.print(title, style="bold", markup=False)
    console.print()
    console.print(f"{counts.sum():,} training images, {counts.max():,} to {counts.min():,} of a class, by size")
    for line in bars(np.sort(counts)[::-1], console.width - 2):
        console.print(line, style="cyan", soft_wrap=True)
    for group, classes in document["groups"].items():
        console.print(f"{group:<6} {len(classes):>4} classes  {spans(classes)}")
    console.print(client_table(document, class_table(labels, split, len(counts)), console.width))
    for part, users in document["users"].items():
        if users is not None:
            console.print(f"{f'natural users, {part}':<20} {users:,}")
    if document["left_out"]:
        console.print(f"{'images in no client':<20} {document['left_out']:,}")
    for measure, value in document["heterogeneity"].items():
        console.print(f"{measure.replace('_', ' '):<20} {value:,.4g}")
    console.print(f"{'fingerprint':<20} {document['fingerprint']}")
