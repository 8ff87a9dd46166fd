"""What commands on stored results share: how it is said where they are, and how they are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command.typed import Place
from bench.plugins.names import meant
from bench.protocol.words import split_list
from bench.system.text import plain

if TYPE_CHECKING:
    from bench.results.record import Record

_RUNS, _RESULTS = Path("runs"), Path("results")


def stored_in(*, published: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command `[DIR]` and `--out`, which mean the same; it gets the folder as `out`.

    Args:
        published: Whether `results` is the default, where there is such a folder, and not `runs`.
    """
    default = "results if it is there, else runs" if published else "runs"

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.argument("folder", metavar="[DIR]", required=False, type=Place())
        @out_option(default)
        @wraps(command)
        def with_folder(*, folder: Path | None, out: Path | None, **others: Any) -> Any:
            return command(out=chosen(folder, out, published), **others)

        return with_folder

    return decorate


def out_option(default: str = "runs") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command `--out`, None where it is not given."""
    return click.option("--out", type=Place(), show_default=default, help="Folder of results; DIR means the same.")


all_versions_option = click.option(
    "--all-versions", is_flag=True, help="Older versions of an algorithm or a dataset too, beside the newest."
)


def chosen(folder: Path | None, out: Path | None, published: bool = False) -> Path:
    """Decide between DIR and --out.

    Raises:
        UsageError: They are two folders.
    """
    if folder is not None and out is not None and folder.resolve() != out.resolve():
        raise click.UsageError(f"{folder} and --out {out} are two folders of results; name one")
    return folder or out or (_RESULTS if published and _RESULTS.is_dir() else _RUNS)


def require_folder(out: Path) -> None:
    """Make sure that the folder of results is there."""
    if not out.is_dir():
        raise click.UsageError(f"{out}: there is no such folder, 'bench run' makes one")


suite_option = click.option("--suite", help="Only runs of this suite; see 'bench list suites'.")


def read_stored(out: Path, datasets: str | None = None, suite: str | None = None) -> list[Record]:
    """Read the results of a folder; damaged ones are named on standard error and left out.

    Args:
        out: Where.
        datasets: Those that are kept, separated by commas, `features` or `features(path='mine')`; None: all.
        suite: Name of the suite whose runs are kept; None: all.

    Raises:
        BadParameter: There are results, and none on one of these; or there is no such suite.
    """
    from bench.results import records

    require_folder(out)
    found, damaged = records.read_all(out)
    for sentence in damaged:
        click.echo(f"bench: {plain(sentence)}", err=True)
    if suite is not None:
        found = _of_suite(found, suite)
    if datasets is None:
        return found
    kept = set()
    for asked in split_list(datasets):
        known = sorted({record.dataset if "(" in asked else _name(record) for record in found})
        called = meant(asked, known)
        if called is None and known:
            said = f"there are no results on {asked!r} in {out}; there are some on {', '.join(known)}"
            raise click.BadParameter(said, param_hint="--dataset")
        kept.add(called)
    return [record for record in found if not kept.isdisjoint((record.dataset, _name(record)))]


def _of_suite(found: list[Record], name: str) -> list[Record]:
    from bench.plugins.names import near
    from bench.protocol import suites
    from bench.results.membership import suites_of

    known = meant(name, suites.names())
    if known is None:
        raise click.BadParameter(f"no suite is called {name!r}; {near(name, suites.names())}", param_hint="--suite")
    return [record for record in found if known in suites_of(record)]


def _name(record: Record) -> str:
    return record.dataset.partition("(")[0]
