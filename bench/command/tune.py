"""`bench tune`: the same number of trials for every algorithm, on data set aside from training."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.command.options import Options, defaults, some_run_options
from bench.command.typed import Choice
from bench.face.preparing import prepare_own
from bench.system.text import plain

if TYPE_CHECKING:
    from bench.tuning.book import Book
    from bench.tuning.study import Study, Trial

_OF_RUN = (
    "--algos", "--dataset", "--imbalance", "--alpha", "--seeds", "--plugin", "--setting", "--partition", "--clients",
    "--participation", "--rounds", "--match", "--epochs", "--batch-size", "--lr", "--model", "--eval-clients",
    "--auxiliary", "--weights", "--teacher", "--set", "--engine", "--precision", "--device", "--jobs",
    "--ray", "--out", "--data-root", "--from", "--suite", "--json",
)  # fmt: skip


@some_run_options(_OF_RUN)
@click.command("tune")
@click.option("--trials", type=click.IntRange(min=1), default=20, show_default=True, help="Of each algorithm.")
@click.option(
    "--for",
    "target",
    type=Choice(["balanced", "personal", "generic"]),
    default="balanced",
    show_default=True,
    help="What is maximised: personal.balanced, personal or generic; generic, or else balanced, where that is absent.",
)
@click.option("--fields", help="Tune only these, e.g. lr,head_epochs; by default the learning rate and all fields.")
@click.option(
    "--validation",
    type=float,
    default=0.2,
    show_default=True,
    help="Share of each client's training images to choose on.",
)
@click.option("--tracking-uri", type=Choice(["off"]), help="Trials are not tracked; a line for 'bench run' may say so.")
@click.option("--name", default="tuned", show_default=True, help="Of the preset, beside the algorithms in tables.")
def tune_command(trials: int, target: str, fields: str | None, validation: float, name: str, **values: Any) -> None:
    """Give every algorithm the same number of trials, and write what was best as a preset for `bench run`.

    With --match samples every trial has as many rounds as make its samples those of all others: then the budgets are
    equal in samples too.

    Trial 0 is the algorithm as it is written; the others are chosen by Optuna's sampler (TPE), told of those before.
    What is tuned: the learning rate (a tenth to ten times the setting's) and the algorithm's fields that are not given
    ('bench show' lists them): what it declares as its space, else floats likewise, whole numbers from half to twice,
    and all values of a choice. An algorithm with nothing to tune has one trial.

    Models train on a part of each client's training images and are scored on the rest after the last round, averaged
    over --seeds: personal over clients, generic over the classes present. The official test part is never looked at. A
    trial that fails counts as the worst. Trials of one algorithm follow each other, algorithms go side by side; all
    trials are stored, and an interrupted search goes on, or gets more trials, with the same command.

    \b
    bench tune --algos fedavg,fedrep --trials 20
    bench run --algos fedavg,fedrep --preset default,tuned
    bench tune --suite lt-small --imbalance 100 --algos ditto,fedloge --seeds 1
    bench tune --algos "fedrep(head_epochs=2),ditto" --fields lr,pull --for generic --seeds 2
    """
    sys.exit(_tune(Options(**{**defaults(), **values}), trials, target, fields, validation, name))


def _tune(options: Options, trials: int, target: str, fields: str | None, validation: float, name: str) -> int:
    from bench.protocol.settings import BadConfig

    if find_spec("optuna") is None:
        raise BadConfig("optuna is not installed, which chooses what is tried; pip install optuna")
    import torch

    from bench.plugins.registry import label
    from bench.protocol import presets
    from bench.protocol.words import split_list
    from bench.results.storage import place, prepare
    from bench.sweep.driver import verify_data
    from bench.tuning.book import check, opened
    from bench.tuning.choice import best, kept, preset

    torch.set_num_threads(1)
    chosen = None if fields is None else [item.replace("-", "_") for item in split_list(fields)]
    studies = _studies(options, target, chosen, validation)
    file = _file(name, options)
    earlier = presets.read(file) if file.exists() else None
    prepare_own((study.run.dataset for study in studies), studies[0].run.data_root)
    check(studies)
    verify_data(study.run for study in studies)
    prepare(options.out)
    with opened(studies, trials, options.out, _teller(trials)) as book:
        asked = preset(book, trials, name, chosen)
        stays = {} if earlier is None else kept(asked, earlier, file, [label(s.run.algorithm) for s in studies])
        _say(book, trials)
        try:
            _search(book, options)
        except KeyboardInterrupt:
            said = f"interrupted: {book.left()} trials are left, and those done are kept"
            click.echo(f"bench: {said}. The same command goes on: {_command()}", err=True)
            return 130
    found = preset(book, trials, name, chosen)
    found = replace(found, algorithms={**stays, **found.algorithms})
    if found.algorithms:
        use = f"bench run --algos {shlex.quote(','.join(found.algorithms))} --preset {shlex.quote(str(file))}"
        text = presets.spell(found, f"Written by: {_command()}\nUsed by:    {use}, and the options of the protocol")
        place(file.parent, {file.name: text.encode()})
    if options.json:
        click.echo(json.dumps(_as_json(book, file if found.algorithms else None), indent=2))
    else:
        _print(book)
        click.echo(f"preset: {file}" if found.algorithms else "preset: none")
    failed = [label(study.run.algorithm) for study in studies if best(book.within(study)) is None]
    if failed:
        click.echo(f"bench: every trial of {', '.join(failed)} failed, so there is nothing to choose", err=True)
    return 1 if failed else 0


def _file(name: str, options: Options) -> Path:
    from bench.protocol.presets import file_of
    from bench.protocol.settings import BadConfig

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in ("default", "paper"):
        raise BadConfig(f"--name {name}: letters, digits, '_', '-' and '.' are wanted, and neither default nor paper")
    return file_of(name, options.out)


def _studies(options: Options, target: str, chosen: Sequence[str] | None, share: float) -> list[Study]:
    """Make a study of each algorithm, in one cell."""
    from bench.face.asked import expand, sweep
    from bench.protocol.settings import BadConfig
    from bench.tuning.space import space
    from bench.tuning.study import Study

    asked = sweep(options)
    runs = expand(asked)
    if len({run.protocol for run in runs}) > 1:
        raise BadConfig(
            "bench tune: one dataset, one imbalance and one alpha are wanted; tune each with its own --name"
        )
    first = [run for run in runs if run.seed == asked.seeds[0]]
    spaces = [space(run.algorithm, run.setting.lr) for run in first]
    known = sorted({name for each in spaces for name in each})
    unknown = [name for name in chosen or () if name not in known]
    if unknown or chosen == []:
        raise BadConfig(f"--fields {', '.join(unknown) or 'is empty'}: these can be tuned: {', '.join(known)}")
    return [
        Study(
            run=run,
            seeds=tuple(asked.seeds),
            space={name: values for name, values in space.items() if chosen is None or name in chosen},
            share=share,
            target=target,
        )
        for run, space in zip(first, spaces, strict=True)
    ]


def _search(book: Book, options: Options) -> None:
    from bench.sweep.cluster import has_ray
    from bench.tuning.search import search, search_on_ray

    alone = options.ray is None and (len(book.studies) == 1 or options.jobs == 1 or not has_ray())
    if options.ray == "off" or alone or not book.left():
        search(book)
    else:
        with redirect_stdout(sys.stderr):
            search_on_ray(book, options.ray or "local", options.jobs)


def _command() -> str:
    """Give the command line as it can be typed again."""
    return shlex.join(["bench", *sys.argv[1:]])


# What is said -----------------------------------------------------------------------------------------------


def _say(book: Book, trials: int) -> None:
    """Say what is tuned, and how far it has come."""
    from bench.plugins.registry import label

    first = book.studies[0]
    share, seeds = f"{first.share:.0%}", ",".join(map(str, first.seeds))
    on = f"{label(first.run.dataset)}, {share} of each client's training images set aside, seed {seeds}"
    click.echo(f"{trials} trials of each algorithm on {on}", err=True)
    for study in book.studies:
        done = len(book.within(study))
        there = f"; {done} trials are there" if done else ""
        what = ", ".join(f"{name} {_spell_values(values)}" for name, values in study.space.items())
        nothing = "nothing to tune: one trial, as written"
        click.echo(f"  {label(study.run.algorithm)}: {what or nothing}{there}", err=True)


def _spell_values(values: Any) -> str:
    if hasattr(values, "choices"):
        return "|".join(map(str, values.choices))
    return f"{values.low:g}-{values.high:g}"


def _teller(trials: int) -> Callable[[Study, Trial], None]:
    from bench.plugins.registry import label

    def tell(study: Study, trial: Trial) -> None:
        values = ", ".join(f"{name} {_value(value)}" for name, value in trial.values.items()) or "as written"
        score = "failed" if trial.score is None else f"{100 * trial.score:.2f}"
        why = f" ({trial.reason})" if trial.reason else ""
        why += f" (as trial {trial.same_as})" if trial.same_as is not None else ""
        place = f"{trial.number + 1}/{trials if study.space else 1}"
        click.echo(plain(f"{label(study.run.algorithm):<24} {place:>7}  {score:>6}  {values}{why}"), err=True)

    return tell


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print(book: Book) -> None:
    """Print for each algorithm what was chosen."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from bench.plugins.registry import label
    from bench.tuning.choice import best, scored_by

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("algorithm", "model", "as written", "tuned", "chosen", "trials", "failed", "samples"):
        words = heading in ("algorithm", "model", "chosen")
        table.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for study in book.studies:
        trials = book.within(study)
        found = best(trials)
        chosen = "–" if found is None else "as written" if found.number == 0 else f"{found.call}, lr {found.lr:g}"
        table.add_row(
            Text(plain(label(study.run.algorithm))),
            Text(plain(scored_by(study, trials) or "–")),
            *("–" if t is None or t.score is None else f"{100 * t.score:.2f}" for t in (trials[0], found)),
            Text(plain(chosen)),
            str(len(trials)),
            str(sum(trial.score is None for trial in trials)),
            f"{sum(_processed(each) for trial in trials for each in trial.cost if trial.same_as is None):,.0f}",
        )
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no width, and 80 columns would cut
    console.print(Text("accuracy (%) on training images that were set aside", style="bold"))
    console.print(table)


def _processed(cost: Mapping[str, float | None]) -> float:
    return (cost["train_samples"] or 0.0) + (cost["adaptation_samples"] or 0.0)


def _as_json(book: Book, file: Path | None) -> dict[str, Any]:
    from bench.plugins.registry import label
    from bench.tuning.choice import best, scored_by

    studies = [
        {
            "id": study.id,
            "algorithm": label(study.run.algorithm),
            "model": scored_by(study, book.within(study)),
            "best": None if (found := best(book.within(study))) is None else found.number,
            "trials": [asdict(trial) for trial in book.within(study)],
        }
        for study in book.studies
    ]
    return {"preset": None if file is None else str(file), "studies": studies}
