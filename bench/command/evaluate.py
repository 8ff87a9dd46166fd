"""`bench eval`: the models that a run kept, tested on other images or on new clients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command.stored import chosen, out_option, require_folder
from bench.system.text import plain

if TYPE_CHECKING:
    from torch import Tensor

    from bench.data import Images
    from bench.dataset import Dataset, Splits
    from bench.results.kept import Network
    from bench.results.record import Record
    from bench.results.retest import Retested

_PATH = click.Path(path_type=Path)
_OF_THE_SPLIT = ("profile", "client_test", "split_seed")
"""Fields of the setting that new clients have from the run, besides what the options say."""
_OF_THE_CLIENTS = ("partition", "clients", "alpha")


@click.command("eval")
@click.argument("run", metavar="RUN")
@click.option("--dataset", metavar="NAME[:train|test]", help="Images to test on; by default the run's, the test part.")
@click.option("--partition", help="Deal the images to new clients; see 'bench list partitions'.")
@click.option("--clients", type=int, help="New clients: as many as the run's, the default.")
@click.option("--alpha", type=float, help="Concentration of the new clients' partition.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Of the new clients; by default the run's.")
@click.option("--plugin", "plugins", type=_PATH, multiple=True, help="File with an algorithm or dataset; repeatable.")
@click.option("--data-root", type=_PATH, help="Folder of datasets; else $BENCH_DATA, else the user's cache.")
@out_option()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with the counts of each class.")
def eval_command(
    run: str,
    dataset: str | None,
    seed: int | None,
    plugins: tuple[Path, ...],
    data_root: Path | None,
    out: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Test the models that RUN kept (bench run --keep-models); RUN is its id, or the beginning of it.

    Generic models are tested on all images. So is each personal model, unless the images are dealt to new clients
    (--partition, --clients, --alpha or --seed, as of 'bench run', and otherwise as in the run): then client k's model
    is tested on the images of the new client k. Images are normalised as the run's were.

    \b
    bench eval 3f0a9c21b7de --dataset svhn
    bench eval 3f0a --dataset cifar10:train --partition dirichlet --alpha 0.1 --seed 7
    """
    import torch

    from bench.files import data_root as root_of
    from bench.files import source
    from bench.plugins.registry import load_plugin
    from bench.results.kept import load
    from bench.results.retest import retest

    torch.set_num_threads(1)
    out = chosen(None, out)
    require_folder(out)
    for file in plugins:
        load_plugin(file)
    record = _find(out, run)
    kept = load(record)
    tested, part = _dataset(record.dataset if dataset is None else dataset)
    _require_fit(kept.network, tested)
    source.verify(tested, root_of(data_root))
    splits = source.load(tested, root_of(data_root))
    given = {key: value for key, value in given.items() if value is not None}
    rows = None
    if given or seed is not None:
        rows = _rows(record, tested, splits, part, given, record.seed if seed is None else seed)
    if part == "train" and tested == _dataset(record.dataset)[0]:
        click.echo("the run was trained on some of these images: what it gets right there says little", err=True)
    found = retest(kept, _images(kept.network, tested, splits, part), rows)
    if as_json:
        click.echo(json.dumps(_document(record, tested, part, rows is not None, found), indent=2))
    else:
        _print(record, tested, part, rows is not None, found)


def _find(out: Path, run: str) -> Record:
    """Read the one run whose id begins so."""
    from bench.results import record

    known = sorted(path.parent.name for path in out.glob(f"*/{record.DOCUMENT}"))
    found = [each for each in known if run and each.startswith(run)]
    if len(found) != 1:
        said = f"several runs of {out} begin so, {', '.join(found)}" if found else f"no run of {out} has an id like it"
        raise click.BadParameter(f"{run}: {said}; 'bench table --format json' lists them", param_hint="RUN")
    return record.read(out / found[0])


def _dataset(text: str) -> tuple[Dataset, str]:
    from bench.sweep.config import parse_dataset

    called, _, part = text.rpartition(":")
    return (parse_dataset(called), part) if part in ("train", "test") else (parse_dataset(text), "test")


def _require_fit(network: Network, dataset: Dataset) -> None:
    """Require images that the models take, of classes that they know."""
    from bench.plugins.registry import label

    if dataset.num_classes != network.classes:
        said = f"has {dataset.num_classes} classes, and the models tell {network.classes} apart"
    elif dataset.image_shape != network.shape:
        there, wanted = ("×".join(map(str, shape)) for shape in (dataset.image_shape, network.shape))
        said = f"has images of {there} (channels, height, width), and the models take {wanted}"
    else:
        return
    raise click.BadParameter(f"{label(dataset)} {said}; choose another one", param_hint="--dataset")


def _images(network: Network, dataset: Dataset, splits: Splits, part: str) -> Images:
    """Give the images of a part, each as a share of its own white, and normalised as the run's were."""
    from bench.data import Images

    x, y = (splits.train_x, splits.train_y) if part == "train" else (splits.test_x, splits.test_y)
    held = splits.held if part == "train" else None
    return Images(x, y if held is None else y[held], network.mean, network.std, scale=dataset.scale)


def _rows(
    record: Record, dataset: Dataset, splits: Splits, part: str, given: Mapping[str, Any], seed: int
) -> Sequence[Tensor]:
    """Deal the images of a part to as many new clients as the run has."""
    import torch

    from bench.splits.split import make_split
    from bench.sweep.resolving import resolve_setting

    of_run = {key: record.setting[key] for key in _OF_THE_SPLIT}
    if dataset.tail == "either" or (record.setting["imbalance"] is None) == (dataset.tail == "natural"):
        of_run["imbalance"] = record.setting["imbalance"]
    if "partition" not in given:
        of_run |= {key: record.setting[key] for key in _OF_THE_CLIENTS}
    elif given["partition"] != "users":
        of_run["clients"] = record.clients
    setting = resolve_setting(str(record.setting["name"]), dataset, {**of_run, **given})
    split = make_split(splits.labels, dataset.num_classes, setting, seed)
    if len(split.clients) != record.clients:
        raise click.BadParameter(
            f"there are {len(split.clients)} new clients, and the run has {record.clients}, each with a model of its "
            f"own; give it --clients {record.clients}",
            param_hint="--clients",
        )
    rows = split.clients if part == "train" else split.tests
    held = splits.held if part == "train" else None
    return rows if held is None else [torch.searchsorted(held, own) for own in rows]


# What is said -----------------------------------------------------------------------------------------------


def _measures(name: str, found: Retested) -> dict[str, float | None]:
    """Give shares of right answers: over images, over classes, and of the worst tenth of the clients."""
    from bench.training.metrics import summarise

    measured = summarise({f"personal:{name}": (found.correct, found.total)}, {})
    right, balanced, worst = (measured[f"personal:{name}{key}"] for key in ("", ".balanced", ".worst_decile"))
    return {"right": right, "balanced": balanced, "worst_decile": None if found.clients == (-1,) else worst}


def _document(
    record: Record, dataset: Dataset, part: str, dealt: bool, found: Mapping[str, Retested]
) -> dict[str, object]:
    from bench.plugins.registry import label

    models = {}
    for name, each in found.items():
        models[name] = {
            **_measures(name, each),
            "clients": list(each.clients),
            "correct": each.correct.tolist(),
            "total": each.total.tolist(),
        }
    return {"run": record.id, "dataset": label(dataset), "part": part, "new_clients": dealt, "models": models}


def _print(record: Record, dataset: Dataset, part: str, dealt: bool, found: Mapping[str, Retested]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from bench.plugins.registry import label
    from bench.results.columns import ABSENT

    where = "new clients have their own images" if dealt else "every model has all images"
    title = plain(f"{record.label or record.call} ({record.id}) on {label(dataset)}, {part} part: {where}")
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("model", overflow="fold")
    for heading in ("clients", "images", "right", "balanced", "worst decile"):
        table.add_column(heading, justify="right")
    for name, each in found.items():
        clients = ABSENT if each.clients == (-1,) else str(len(each.clients))
        shares = [ABSENT if share is None else f"{100 * share:.1f}" for share in _measures(name, each).values()]
        table.add_row(Text(plain(name)), clients, f"{int(each.total.sum()):,}", *shares)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has no width, and 80 columns would cut
    console.print(Text(title, style="bold"))
    console.print(table)
    legend = (
        "Percent. right: of a model's images; balanced: a mean over the classes among them; both, where clients have "
        "models of their own, a mean over clients, and worst decile that over the worst tenth of them."
    )
    console.print(Text(legend, style="dim"))
