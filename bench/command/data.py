"""`bench data`: fetch and check the official files, and look at how a dataset is split."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bench.dataset import Dataset, Labels
    from bench.settings import Setting
    from bench.split import Split

_ROOT = click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    help="Folder of all datasets; else $BENCH_DATA, else the user's cache.",
)


@click.group("data", short_help="Fetch, check and look at datasets and how they are split.")
def data_command() -> None:
    """Fetch, check and look at datasets and how they are split.

    \b
    bench data fetch cifar10
    bench data check cifar10 --data-root /data
    bench data stats cifar10 --imbalance 50 --alpha 0.5 --clients 40 --partition fedloge --seed 3407
    """


@data_command.command("fetch")
@click.argument("name")
@_ROOT
@click.option("--yes", is_flag=True, help="Do not ask before the download.")
def fetch_command(name: str, data_root: Path | None, yes: bool) -> None:
    """Download the official files of the dataset NAME, unless they are there."""
    from bench import files
    from bench.config import parse_dataset
    from bench.dataset import DataMissing

    dataset, root = parse_dataset(name), files.data_root(data_root)
    try:
        click.echo(f"already there: {_checked(dataset, name, root)}")
        return
    except DataMissing:
        pass
    question = f"{name}: download {dataset.size or 'files of unknown size'} from {dataset.source} to {root}"
    click.echo(question, err=True)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("nobody is there to answer whether to download; use --yes")
        click.confirm("go on?", default=True, abort=True, err=True)
    dataset.fetch(root)
    click.echo(_checked(dataset, name, root))


@data_command.command("check")
@click.argument("name")
@_ROOT
def check_command(name: str, data_root: Path | None) -> None:
    """Read all files of the dataset NAME and compare them with their checksums and shapes."""
    from bench import files
    from bench.config import parse_dataset

    click.echo(_checked(parse_dataset(name), name, files.data_root(data_root)))


@data_command.command("stats")
@click.argument("name")
@click.option("--imbalance", help="Largest class over smallest; a value in (0, 1) is its inverse.")
@click.option("--alpha", type=float, help="Concentration of the partition; small is more skewed.")
@click.option("--clients", type=int, help="Number of clients.")
@click.option("--partition", help="How images are dealt to clients; see 'bench list partitions'.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the run.")
@click.option("--profile", help="Shape of the long tail: exponential, step or pareto.")
@click.option("--setting", default="quick", show_default=True, help="Named protocol that says the rest.")
@_ROOT
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
@click.option("--out", type=click.Path(path_type=Path), metavar="PICTURE.png", help="Draw the split to a file as well.")
def stats_command(
    name: str,
    imbalance: str | None,
    seed: int,
    setting: str,
    data_root: Path | None,
    as_json: bool,
    out: Path | None,
    **overrides: Any,
) -> None:
    """Show how the dataset NAME is split: its long tail, its clients, and how different they are.

    It is the split of `bench run` with the same options and seed. Only labels are read.
    """
    from bench import files
    from bench.config import parse_dataset, parse_imbalance, resolve_setting
    from bench.split import describe, histograms, make_split

    dataset = parse_dataset(name)
    given = {field: value for field, value in overrides.items() if value is not None}
    if imbalance is not None:
        given["imbalance"] = parse_imbalance(imbalance)
    resolved = resolve_setting(setting, dataset, given)
    labels = dataset.labels(files.data_root(data_root))
    split = make_split(labels, dataset.num_classes, resolved, seed)
    document = describe(labels, split, dataset.num_classes, resolved.groups)
    title = _title(name, resolved, seed)
    if out is not None:
        _save(out, title, document, histograms(labels, split, dataset.num_classes).numpy())
    if as_json:
        click.echo(json.dumps(document))
    else:
        _print(title, document, labels, split)


def _checked(dataset: Dataset, name: str, root: Path) -> str:
    """Read everything and say what there is, or raise what is wrong."""
    from bench.dataset import DataDamaged

    splits = dataset.load(root)
    for part, x, y in (
        ("training", splits.train_x, splits.train_y),
        ("test", splits.test_x, splits.test_y),
    ):
        if tuple(x.shape[1:]) != dataset.image_shape or len(x) != len(y):
            found = f"{len(y)} labels and images of {tuple(x.shape)}"
            raise DataDamaged(f"{name}, {part} part: {found}; each must be {dataset.image_shape}")
        if set(y.tolist()) != set(range(dataset.num_classes)):
            found = f"{len(set(y.tolist()))} classes, {int(y.min())} to {int(y.max())}"
            raise DataDamaged(f"{name}, {part} part: {found}; there must be {dataset.num_classes} from 0")
    shape = " x ".join(map(str, dataset.image_shape))
    return (
        f"{name}: {len(splits.train_y):,} training and {len(splits.test_y):,} test images of {shape}, "
        f"{dataset.num_classes} classes, as they should be (data root {root})"
    )


def _title(name: str, setting: Setting, seed: int) -> str:
    return (
        f"{name}, {setting.profile} imbalance {setting.imbalance:g}, {setting.clients:,} clients by "
        f"{setting.partition} (alpha {setting.alpha:g}), seed {seed}"
    )


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
    from bench.split import histograms

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    counts = np.array(document["class_counts"])
    console.print(f"[bold]{title}[/bold]\n")
    console.print(f"{counts.sum():,} training images, {counts.max():,} to {counts.min():,} of a class")
    for line in bars(counts, console.width - 2):
        console.print(line, style="cyan", soft_wrap=True)
    for group, classes in document["groups"].items():
        console.print(f"{group:<6} {len(classes):>4} classes  {spans(classes)}")
    table = histograms(labels, split, len(counts)).numpy()
    console.print(client_table(document, table, console.width))
    for measure, value in document["heterogeneity"].items():
        console.print(f"{measure.replace('_', ' '):<20} {value:,.4g}")
    console.print(f"{'fingerprint':<20} {document['fingerprint']}")
