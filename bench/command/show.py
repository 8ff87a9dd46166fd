"""`bench list` and `bench show`: what there is, and what each thing does."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bench.command.typed import Choice
from bench.face.asked import DEFAULT_DATASET
from bench.system import text

_WIDTH = 120  # of the documentation beside it
_KINDS = ("algorithms", "sets", "aliases", "parts", "datasets", "models", "settings", "partitions", "suites")
_CONTROLS = "controls"


@click.command("list")
@click.argument("kind", type=Choice((*_KINDS, _CONTROLS)), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document: names, or of one kind more.")
def list_command(kind: str | None, as_json: bool) -> None:
    """List what there is to choose from; of every kind, if none is given. Controls are the rows that a method says it
    must be compared with, and what each answers.

    \b
    bench list algorithms
    bench list datasets --json
    bench list controls
    """
    from bench.command import catalogue

    if kind == _CONTROLS:
        _list_controls(catalogue.controls(), as_json)
        return
    if as_json:
        names = {each: list(catalogue.summaries(each)) for each in catalogue.KINDS if kind is None}
        click.echo(json.dumps(catalogue.entries(kind) if kind else names, indent=2))
        return
    if kind == "models":
        _list_models(catalogue.entries(kind))
        return
    listed = {each: catalogue.summaries(each) for each in ((kind,) if kind else catalogue.KINDS)}
    for each, summaries in listed.items():
        click.echo("" if kind else f"{each}:")
        width = max(map(len, summaries), default=0)
        for name, summary in summaries.items():
            kept = f"{catalogue.family(name) or '–':10}  " if each == "algorithms" else ""
            click.echo(text.plain(f"  {name:{width}}  {kept}{summary}"))


def _list_models(known: Sequence[Mapping[str, Any]]) -> None:
    """List networks with their size, and the work of a forward pass of one image, so that a small one is found."""
    width = max(len(entry["name"]) for entry in known)
    click.echo(f"  {'':{width}}  {'parameters':>10}  {'MB':>6}  {'MFLOP':>8}  for 10 classes and images of 3×32×32")
    for entry in known:
        sizes = f"{entry['parameters']:>10,}  {entry['model_bytes'] / 1e6:>6.2f}  {entry['forward_flops'] / 1e6:>8,.2f}"
        click.echo(text.plain(f"  {entry['name']:{width}}  {sizes}  {entry['summary']}"))


def _list_controls(known: Mapping[str, Mapping[str, str]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(known))
        return
    for method, told in known.items():
        click.echo(f"{method}:")
        width = max(map(len, told))
        for row, answer in told.items():
            click.echo(text.plain(f"  {row:{width}}  {answer}"))


@click.command("show")
@click.argument("name")
@click.option("--plugin", type=click.Path(path_type=Path), help="File that the name is defined in.")
@click.option("--kind", type=Choice(_KINDS), help="Which is meant, where several have the name.")
@click.option("--dataset", default=DEFAULT_DATASET, show_default=True, help="Show a setting as it is for this.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def show_command(name: str, plugin: Path | None, kind: str | None, dataset: str, as_json: bool) -> None:
    """Say what an algorithm, set, alias, part, dataset, model, setting, partition or suite is, and which parameters it
    takes.

    \b
    bench show fedloge
    bench show "fedrep+topk(share=0.05)"
    bench show cifar10 --json
    bench show quick --dataset cifar10
    bench show fedloge --kind settings
    bench show mine --plugin mine.py
    """
    from bench.command import catalogue
    from bench.plugins.registry import UnknownPlugin, load_plugin

    if plugin is not None:
        load_plugin(plugin)
    kinds = catalogue.find(name)
    if kind is not None and kind not in kinds:
        raise UnknownPlugin(f"none of the {kind} is called {name!r}; it is one of the {' and the '.join(kinds)}")
    shown = kind or kinds[0]
    described = catalogue.describe(shown, name, dataset)
    click.echo(json.dumps(described, indent=2) if as_json else text.lines(_prose(described)))
    for other in kinds:
        if kind is None and other != shown:
            click.echo(f"{name} is also one of the {other}: bench show {name} --kind {other}", err=True)


def _prose(described: Mapping[str, Any]) -> str:
    """Write a description for a person."""
    from bench.plugins.ledger import LETTERS, TIERS

    known = ("name", "kind", "documentation", "ledger", "fields", "setting", "pieces", "controls", "options")
    lines = [f"{described['name']} ({described['kind'].removesuffix('s')})", "", described["documentation"]]
    if "Up" in described.get("ledger", ()):
        lines += ["", textwrap.fill(LETTERS, _WIDTH)]
    if described.get("fields"):
        lines += ["", "Fields"]
    for name, field in described.get("fields", {}).items():
        lines.append(f"  {name} = {field.get('value', field.get('default'))!r}  ({field['takes']})")
        if field["doc"]:
            lines.append(textwrap.fill(field["doc"], _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if described.get("controls"):
        lines += ["", "Controls", *(f"  {row}  ({answer})" for row, answer in described["controls"].items())]
    if described.get("setting"):
        values = ", ".join(f"{key} {_value(value)}" for key, value in described["setting"].items() if key != "name")
        title = f"Setting {described['setting']['name']}, the default (others: bench list settings)"
        lines += ["", title, textwrap.fill(values, _WIDTH, initial_indent="  ", subsequent_indent="  ")]
    if described.get("options"):
        lines += ["", "Options of bench run"]
        lines += [_hanging(f"  {key}", _typed(value)) for key, value in described["options"].items()]
    rest = {key: value for key, value in described.items() if key not in known}
    if "tier" in rest:
        rest["tier"] = f"{rest['tier']}, the server learns or needs {TIERS[rest['tier']]}"
    if "forward_flops" in rest:
        rest["takes"] = {"bytes": rest.pop("model_bytes"), "FLOP to look at an image": rest.pop("forward_flops")}
    if "Up" in described.get("ledger", ()) and "Reproduced" not in described["ledger"]:
        rest["reproduced"] = "not held against its authors' code yet"
    lines += ["", *(_hanging(key, _value(value)) for key, value in rest.items())]
    return "\n".join((*lines, *("\n\n" + _prose(piece) for piece in described.get("pieces", ()))))


def _hanging(key: str, value: str) -> str:
    """Write a fact; words that are long go on under themselves."""
    return f"{key:<14} " + f"\n{' ' * 15}".join(
        textwrap.wrap(value, _WIDTH - 15, break_on_hyphens=False, break_long_words=False) or [""]
    )


def _typed(value: Any) -> str:
    """Write the value of an option as a file of options has it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{field}={each}" for field, each in value.items())
    return " | ".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{each:,} {key}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "nothing"
    return str(value)
