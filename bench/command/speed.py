"""`bench speed`: how fast, beside the bare loop and beside others, and how large."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command.typed import Choice, Place
from bench.face.asked import DEFAULT_DATASET, DEFAULT_SETTING
from bench.system.text import plain

if TYPE_CHECKING:
    from bench.speed.measure import Asked

_FILE = Place()
_USUAL = "tiny,small,cnn"


@click.command("speed")
@click.option(
    "--workload", "names", default=_USUAL, show_default=True,
    help="Some of tiny, small, cnn, resnet8, fedloge, adapter, personal, sweep; or all.",
)  # fmt: skip
@click.option(
    "--precision", type=Choice(["fp32", "bf16", "both"]), default="both", show_default=True, help="Of training."
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of each side.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True,
    help="Processes of a run, and threads of the bare loop and of peers.",
)  # fmt: skip
@click.option(
    "--peers", is_flag=True, help="Have others do the same work: a plain loop, and Flower and pfl if installed."
)
@click.option(
    "--peers-python", type=_FILE, help="Interpreter that has them; theirs and our versions may exclude each other."
)
@click.option("--growth", "grows", is_flag=True, help="Measure growth with clients, classes, cohort and model instead.")
@click.option("--to", type=_FILE, default=Path("results/speed"), show_default=True, help="Folder for --growth.")
@click.option(
    "--scale", "at_scale", is_flag=True, help="Measure many clients and many images instead: minutes, 2.5 GB."
)
@click.option("--model", help="Measure both engines for this network instead; see 'bench list models'.")
@click.option("--dataset", default=DEFAULT_DATASET, show_default=True, help="Whose shape and classes --model is for.")
@click.option("--batch-size", type=click.IntRange(min=1), help="For --model; the default setting's by default.")
@click.option("--plugin", type=_FILE, help="File that the network or dataset is defined in.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurement as one JSON document.")
def speed_command(
    names: str,
    precision: str,
    repeats: int,
    workers: int,
    peers: bool,
    peers_python: Path | None,
    grows: bool,
    to: Path,
    at_scale: bool,
    model: str | None,
    dataset: str,
    batch_size: int | None,
    plugin: Path | None,
    as_json: bool,
) -> None:
    """Measure federated training beside the bare training loop and beside others, which take turns in one run.

    Ratios are medians of the ratios of a turn, so that a machine that slows down slows both sides. Besides: evaluation,
    the time from the command to the first finished round, and with --peers whole runs from start to end.

    \b
    bench speed --workload tiny,cnn --workers 2
    bench speed --workload cnn --peers --json
    bench speed --growth --to results/speed

    With --model: of clients stacked, and one by one, and which of them --engine auto takes.

    With --scale: the memory that ten thousand clients take, and a store of 200,000 generated images, and how fast
    training from it is against the same images in memory.
    """
    others = {"--growth": grows, "--scale": at_scale, "--model": model is not None}
    asked_for = [option for option, given in others.items() if given]
    if len(asked_for) > 1:
        raise click.UsageError(f"{asked_for[0]} and {asked_for[1]} exclude each other; leave one out")
    if model is not None:
        measured: Any = _both_engines(model, dataset, batch_size, plugin)
        click.echo(json.dumps(measured, indent=2) if as_json else _lines(measured))
    elif at_scale:
        from bench.speed import scale

        measured = scale.measure()
        click.echo(json.dumps(measured, indent=2) if as_json else _lines(measured))
    elif grows:
        from bench.command import growth as drawn
        from bench.speed import growth

        measured = growth.measure(repeats)
        drawn.write(to, measured)
        click.echo(json.dumps(measured, indent=2) if as_json else drawn.markdown(measured))
    else:
        from bench.speed.measure import Asked, measure

        precisions = ("fp32", "bf16") if precision == "both" else (precision,)
        python = sys.executable if peers_python is None else str(peers_python)
        asked = Asked(precisions=precisions, repeats=repeats, workers=workers, peers=peers, python=python)
        measured = measure(_workloads(names), asked, lambda sentence: click.echo(sentence, err=True))
        click.echo(json.dumps(measured, indent=2) if as_json else _tables(measured, asked))


def _workloads(names: str) -> list[str]:
    """Read names of workloads.

    Raises:
        UsageError: There is no such.
    """
    from bench.plugins.names import meant, near
    from bench.protocol.words import split_list
    from bench.speed.workloads import WORKLOADS

    typed = split_list(names)
    if typed == ["all"]:
        return list(WORKLOADS)
    known = {name: meant(name, WORKLOADS) for name in typed}
    for name, found in known.items():
        if found is None:
            raise click.UsageError(f"--workload: none is called {name!r}; {near(name, WORKLOADS)}")
    if not typed:
        raise click.UsageError(f"--workload is empty; there are {', '.join(WORKLOADS)}, and all")
    return [found for found in known.values() if found is not None]


def _both_engines(model: str, dataset: str, batch_size: int | None, plugin: Path | None) -> Any:
    from bench.plugins.registry import load_plugin
    from bench.protocol.bundles import named
    from bench.protocol.spelling import parse_dataset
    from bench.speed import engines

    if plugin is not None:
        load_plugin(plugin)
    images = parse_dataset(dataset)
    return engines.compare(images, model, batch_size or named(DEFAULT_SETTING, images).batch_size)


def _tables(measured: Mapping[str, Any], asked: Asked) -> str:
    """Lay out a document of `bench.speed.measure` as a table of sides and one of ratios for each workload."""
    from tabulate import tabulate

    from bench.speed.peers.driver import PEERS, TOLERANCE

    machine, versions, threads = measured["machine"], measured["versions"], measured["threads"]
    cores = f"{plain(machine['cpu'])}, {threads} of {machine['cores']} cores"
    others = [f"{name} {version}" for name, version in (measured["peers"] or {}).items() if version is not None]
    pieces = [", ".join([cores, f"torch {versions['torch']}", *others, f"{measured['repeats']} turns"])]
    for name, found in measured["workloads"].items():
        sides, notes = [], []
        for side, told in found["sides"].items():
            if told is None:
                sides.append([side, "–", "–", "–", ""])
                notes.append(f"{side} is not installed: {PEERS[side].install}")
            elif "failed" in told:
                sides.append([side, "–", "–", "–", ""])
                notes.append(f"{side} failed: {plain(told['failed'])}")
            else:
                sides.append([side, *(_number(told[key]) for key in ("median", "least", "most")), told["unit"]])
        ratios = []
        for ratio in found["ratios"]:
            of = f"{ratio['of']} / {ratio['to']}" + (", time" if ratio["by"] == "time" else "")
            if ratio.get("comparable") is False:
                notes.append(f"{of} is not comparable: accuracies are not within {100 * TOLERANCE:g} points")
            ratios.append([of, *(f"{ratio[key]:.2f}" for key in ("median", "least", "most"))])
        notes += [f"accuracy, {side}: {100 * share:.1f} %" for side, share in found.get("accuracy", {}).items()]
        look: dict[str, Any] = {"tablefmt": "simple", "disable_numparse": True}
        right = ("right",) * 3
        auto = f" (auto is {found['auto']})" if "auto" in found else ""
        pieces += [
            "",
            f"{name}: {found['what']}{auto}",
            "",
            tabulate(sides, ["side", "median", "least", "most", ""], colalign=("left", *right, "left"), **look),
        ]
        if ratios:
            pieces += ["", tabulate(ratios, ["ratio", "median", "least", "most"], colalign=("left", *right), **look)]
        pieces += ["", *notes] if notes else []
    return "\n".join(pieces)


def _lines(measured: Any, indent: str = "") -> str:
    """Write nested mappings as indented lines."""
    lines = []
    for key, value in measured.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", _lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<{34 - len(indent)}} {_number(value)}")
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
