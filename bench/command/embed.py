"""`bench data embed`: the features of all images by a body that is not trained, once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from bench.command.typed import Choice

_MODEL = "Network whose body makes them; see 'bench list models', or one of timm's."
_WEIGHTS = (
    "File of its weights: torchvision's state_dict of a ResNet, or our own names; .pth or .safetensors. Those of "
    "timm's networks are found without."
)
_PIXELS = "Side that images are scaled to, for timm's networks; default: what the weights were trained with."
_NORMS = ("group", "layer", "batch")  # of `bench.models.layers`, which loads torch
_NORM = "Default: batch, as pre-trained networks have it; group with --random-weights."
_ROOT = "Folder of all datasets; else $BENCH_DATA, else the user's cache."


@click.command("embed")
@click.argument("name")
@click.option("--model", required=True, help=_MODEL)
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help=_WEIGHTS)
@click.option("--random-weights", is_flag=True, help="Take the weights that a run would start from: for tests.")
@click.option("--norm", type=Choice(_NORMS), help=_NORM)
@click.option("--pixels", type=click.IntRange(8, 1024), help=_PIXELS)
@click.option("--batch-size", type=click.IntRange(1, 256), default=64, show_default=True, help="Images at once.")
@click.option("--device", type=Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--data-root", type=click.Path(path_type=Path), help=_ROOT)
def embed_command(
    name: str,
    model: str,
    weights: Path | None,
    random_weights: bool,
    norm: str | None,
    pixels: int | None,
    batch_size: int,
    device: str,
    data_root: Path | None,
) -> None:
    """Make the features of all images of the dataset NAME, once, for runs that train heads only.

    Interrupted or killed, it goes on with the same command.

    \b
    bench data embed inat --model resnet50 --weights resnet50.pth
    bench data embed cifar100 --model tf_efficientnet_lite0 --pixels 128
    """
    from bench.plugins.registry import MODELS

    ours = model in MODELS
    if ours and weights is None and not random_weights:
        raise click.UsageError(
            "name a file with --weights; features of random weights are for tests only: --random-weights"
        )
    if weights is not None and random_weights:
        raise click.UsageError("--weights and --random-weights exclude each other; leave one out")
    if random_weights and not ours:
        raise click.UsageError(f"--random-weights is for networks of ours, and {model} is none")
    norm = norm or ("group" if weights is None else "batch")
    sys.exit(_embed(name, model, weights, norm, pixels, batch_size, device, data_root))


def _embed(
    name: str,
    model: str,
    weights: Path | None,
    norm: str,
    pixels: int | None,
    batch_size: int,
    device: str,
    data_root: Path | None,
) -> int:
    from bench.face.bar import Bar
    from bench.face.preparing import prepare_own
    from bench.files import data_root as choose
    from bench.preparing.embedding import Embedding
    from bench.sweep.config import parse_dataset, resolve_device

    dataset = parse_dataset(name)
    used = resolve_device(device)
    embedding = Embedding(dataset=dataset, model=model, norm=norm, weights=weights, device=used, pixels=pixels)
    prepare_own([dataset], choose(data_root))
    with Bar("images") as display:
        try:
            store = embedding.make(choose(data_root), display, batch_size)
        except KeyboardInterrupt:
            kept = f"the features of {display.done:,} of {display.total:,} images are kept"
            display.say(f"bench: interrupted: {kept}; the same command goes on")
            return 130
    plan = store.plan
    count = f"{plan.train:,} training and {plan.test:,} test images, {plan.shape[0]:,} each"
    click.echo(f"features of {count}, in {store.folder}")
    call = f"features(path={str(store.folder.absolute())!r})"
    protocol = (" --imbalance 50" if dataset.tail == "made" else "") + (
        " --partition users" if dataset.own_clients else ""
    )
    click.echo(f"use them with: bench run --algos fedloge,creff --dataset {_quote(call)}{protocol}")
    return 0


def _quote(call: str) -> str:
    """Quote for a shell; the call has single quotes, which double ones hold as they are."""
    return shlex.quote(call) if set(call) & set('"$`\\!') else f'"{call}"'
