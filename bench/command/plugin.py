"""`bench new` and `bench check`: for who writes a plug-in."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.command.typed import Choice, Place
from bench.system.text import plain

if TYPE_CHECKING:
    from bench.contract.promises import Finding

_FILE = Place()
_RUN = {"algorithm": "--algos {}", "part": "--algos fedavg+{}", "dataset": "--dataset {}", "model": "--model {}"}


@click.command("new")
@click.argument("kind", type=Choice(list(_RUN)))
@click.argument("name")
@click.option("--out", type=_FILE, default=Path("."), show_default=True, help="Folder of the new file.")
def new_command(kind: str, name: str, out: Path) -> None:
    """Write a file that passes `bench check` and does the default thing, to start from.

    \b
    bench new algorithm mine
    bench new part mine
    bench new model mine
    bench new dataset leaves --out plugins
    """
    from bench.command import scaffold

    file = scaffold.write(kind, name, out)
    plugin = shlex.quote(str(file))
    click.echo(f"wrote {file}; next:")
    click.echo(f"  bench check {file.stem} --plugin {plugin}")
    click.echo(f"  bench run {_RUN[kind].format(file.stem)} --plugin {plugin}")


@click.command("check")
@click.argument("name")
@click.option("--plugin", type=_FILE, help="File that the name is defined in.")
@click.option("--kind", type=Choice([f"{kind}s" for kind in _RUN]), help="Which is meant, if several have the name.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check_command(name: str, plugin: Path | None, kind: str | None, as_json: bool) -> None:
    """Check that the algorithm, part, dataset or model NAME keeps the contract; exit status 1 if a promise is broken.

    \b
    bench check fedrep
    bench check focal
    bench check mine --plugin mine.py
    """
    import torch

    from bench.command.catalogue import PLUGINS
    from bench.contract import checks, networks, parts
    from bench.plugins.names import near
    from bench.plugins.registry import UnknownPlugin, load_plugin

    if plugin is not None:
        load_plugin(plugin)
    torch.set_num_threads(1)  # the toy problem is too small for more; they would wait for each other
    kinds = [each for each, registry in PLUGINS.items() if name in registry and kind in (None, each)]
    if not kinds:
        raise UnknownPlugin(
            f"no {kind or 'plug-in'} is called {name!r}; {near(name, [n for r in PLUGINS.values() for n in r])}"
        )
    for other in kinds[1:]:
        click.echo(f"{name} is also one of the {other}: bench check {name} --kind {other}", err=True)
    check = {"parts": parts.check, "models": networks.check}.get(kinds[0], checks.check)
    findings: list[Finding] = []
    for finding in check(PLUGINS[kinds[0]][name]):
        again = not finding.looked_at and finding.problem in [each.problem for each in findings]
        findings.append(finding)
        if not as_json and not again:
            broken = "" if finding.problem is None else f": {finding.problem}"
            click.echo(plain(f"{'✓' if finding.problem is None else '✗'} {finding.promise}{broken}"))
    if as_json:
        rows = [{"promise": finding.promise, "problem": finding.problem} for finding in findings]
        click.echo(json.dumps({"name": name, "findings": rows}, indent=2))
    else:
        _say_unseen(findings)
    sys.exit(1 if any(finding.problem is not None for finding in findings) else 0)


def _say_unseen(findings: Sequence[Finding]) -> None:
    """Say of each error that kept several promises from being looked at how many more they were."""
    errors = Counter(finding.problem for finding in findings if not finding.looked_at)
    for error, times in errors.items():
        if times > 1:
            more = f"{times - 1} more promise{'s' * (times > 2)}"
            click.echo(plain(f"✗ {more} could not be looked at, for the same error: {error}"))
